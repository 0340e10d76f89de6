//! Programs of ovnet; see main.rs.
#![no_std]
