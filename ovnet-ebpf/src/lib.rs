//! Empty: it lets the agent's build script depend on this crate, so that cargo rebuilds the
//! programs when they change. The programs are in `main.rs`.
#![no_std]
