//! Docker's own daemon on three hosts, with ovnet behind it: what people type, and what happens
//! when a part of it is stopped, killed or asked for nonsense.
//!
//! Each test makes one lab and goes through a story in it. After each part of it ovnet must hold
//! what Docker's running containers have, and nothing else. Needs root and a Docker daemon's
//! program; a lab ends with its process, however that ends.

#![allow(
    clippy::panic,
    clippy::unwrap_used,
    reason = "a test panics with what it found; the lint knows #[test] functions, not helpers"
)]

mod calls;
mod containers;
mod crowd;
mod dns;
mod names;
mod networks;
mod outages;
mod ports;
mod restarts;

use std::thread;

/// The hosts of the labs.
const HOSTS: [&str; 3] = ["docker01", "docker02", "docker03"];

/// Does something with each at the same time.
fn together<T: Send, R: Send>(
    items: impl IntoIterator<Item = T>,
    work: impl Fn(T) -> R + Sync,
) -> Vec<R> {
    let work = &work;
    thread::scope(|scope| {
        let threads: Vec<_> =
            items.into_iter().map(|item| scope.spawn(move || work(item))).collect();
        threads.into_iter().map(|it| it.join().unwrap()).collect()
    })
}
