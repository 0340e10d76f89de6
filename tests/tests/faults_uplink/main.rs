//! The uplink changing under running traffic, and everything that somebody else breaks on a host.
//!
//! Each test makes one lab and goes through many faults in it, and prints a table of what each cost:
//! README has it. Needs root; a lab ends with its process, however that ends.

#![allow(
    clippy::panic,
    clippy::unwrap_used,
    reason = "a test panics with what it found; the lint knows #[test] functions, not helpers"
)]

mod download;
mod edit;
mod host;
mod probe;
mod repairs;
mod uplink;
