//! Docker on this host.

pub mod setup;
