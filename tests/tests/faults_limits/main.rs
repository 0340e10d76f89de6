//! What runs out, and what is lost: disks, maps, memory, descriptors, state files. Each under running
//! traffic, of which nothing may be lost, and each over by itself when there is enough again.
//!
//! Each test makes one lab and goes through a story in it, because a lab costs more than a step.

#![allow(
    clippy::panic,
    clippy::unwrap_used,
    reason = "a test panics with what it found; the lint knows #[test] functions, not helpers"
)]

mod exhausted;
mod sockets;
mod state;
