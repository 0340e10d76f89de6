//! What the eBPF programs and the agent must agree on.
//!
//! - [`abi`]: map names, pin layout, keys and values, the ABI number.
//! - [`verdict`]: what can happen to a packet, and the number each outcome is counted under.
//! - [`published`]: layouts and rules of published ports and their connection tracking.
//! - [`headers`]: Ethernet, ARP, IPv4, UDP and VXLAN layouts as named offsets.
//! - [`vxlan`]: builds the outer 50 bytes and validates received ones (RFC 7348).
//! - [`ecn`]: RFC 6040 in both directions.
//! - [`flow`]: the kernel's flow hash to UDP source port formula.
//! - [`checksum`]: RFC 1071 and RFC 1624 for the IPv4 header.
//!
//! Invariant: no dependency, no allocation, no I/O, and no `unsafe` besides `aya::Pod`. All of it
//! is tested on the host with `cargo test -p ovnet-common`.
#![no_std]

pub mod abi;
pub mod checksum;
pub mod ecn;
pub mod flow;
pub mod headers;
pub mod published;
pub mod verdict;
pub mod vxlan;
