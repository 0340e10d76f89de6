//! Real agents, a real Consul, real traffic: what an agent does when things around it change.
//!
//! Each test makes one lab and goes through a story in it, because a lab costs more than a step.
//! What a test prints tells the step that failed. Needs root; a lab ends with its process, however
//! that ends.

#![allow(
    clippy::panic,
    clippy::unwrap_used,
    reason = "a test panics with what it found; the lint knows #[test] functions, not helpers"
)]

#[path = "net_agent/hosts.rs"]
mod hosts;
#[path = "net_agent/names.rs"]
mod names;
#[path = "net_agent/ports.rs"]
mod ports;
#[path = "net_agent/requests.rs"]
mod requests;
#[path = "net_agent/survives.rs"]
mod survives;
#[path = "net_agent/syn_flood.rs"]
mod syn_flood;
#[path = "net_agent/wrong_input.rs"]
mod wrong_input;
