//! The only module that talks to Consul.
//!
//! [`client`] speaks HTTP and knows keys; [`watch`] turns blocking queries into snapshots;
//! [`lease`] keeps this host's own record; [`networks`], [`pending`] and [`claims`] are what hosts
//! compete for, each one transaction; [`schema`] is the records, without I/O.
//!
//! Every watched folder holds a key `.keep`, the sentinel. It is there because a folder without
//! keys cannot be blocked on, and it does two more things. Its identity (when it was created, and
//! a random word in it) tells an emptied folder from a wiped Consul: records missing next to the
//! sentinel we know were deleted, records missing next to another one were lost and are kept
//! (invariant 7). And what must not happen at once meets there: every claim of an address writes
//! the network's sentinel and removing the network checks it; every creation of a network checks
//! and writes the sentinel of `subnets/`, because two overlapping subnets need not be equal keys.

pub mod claims;
pub mod client;
mod connect;
mod failure;
mod folder;
#[cfg(test)]
mod fuzz;
mod health;
pub mod lease;
mod memory;
pub mod networks;
mod orphans;
pub mod pending;
mod restore;
pub mod schema;
mod sentinel;
mod snapshot;
mod token;
mod transaction;
pub mod watch;

pub use claims::Claim;
pub use client::Consul;
pub use health::Health;
pub use lease::{Announced, Lease};
pub use networks::Pool;
pub use pending::Publish;
pub use snapshot::{HostEntry, Snapshot};
pub use watch::Watcher;
