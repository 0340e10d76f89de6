//! Forgets the flows of published ports that are over, in a task of its own: a full table takes a
//! while to walk, and nothing waits for it.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use tokio::sync::watch;

use crate::datapath::Conntrack;

/// Between sweeps. A flow so stays up to this much longer than it must.
const EVERY: Duration = Duration::from_secs(10);

/// How many flows there are.
#[derive(Debug, Default)]
pub(super) struct Flows {
    entries: AtomicU64,
    capacity: AtomicU64,
}

impl Flows {
    /// Entries of the table at the last sweep, two per flow, and how many fit.
    pub(super) fn usage(&self) -> (u64, u64) {
        (self.entries.load(Ordering::Relaxed), self.capacity.load(Ordering::Relaxed))
    }
}

/// Spawns the task. It sweeps at once when told that a port changed what it leads to, for the first
/// time when told that the table of ports is filled, and ends with whoever tells.
pub(super) fn spawn(conntrack: Conntrack, mut published: watch::Receiver<()>) -> Arc<Flows> {
    let flows = Arc::new(Flows::default());
    flows.capacity.store(conntrack.capacity().into(), Ordering::Relaxed);
    let usage = Arc::clone(&flows);
    let conntrack = Arc::new(conntrack);
    tokio::spawn(async move {
        if published.changed().await.is_err() {
            return;
        }
        let mut ticks = tokio::time::interval(EVERY);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                changed = published.changed() => if changed.is_err() { return },
                _ = ticks.tick() => {}
            }
            let table = Arc::clone(&conntrack);
            let swept = tokio::task::spawn_blocking(move || table.sweep(now_ns())).await;
            match swept {
                Ok(Ok(swept)) => {
                    usage.entries.store(swept.entries - swept.removed, Ordering::Relaxed);
                    tracing::debug!(?swept, "flows of published ports");
                }
                Ok(Err(error)) => tracing::warn!("{error:#}"),
                Err(error) => tracing::warn!(%error, "flows of published ports are not swept"),
            }
        }
    });
    flows
}

/// CLOCK_MONOTONIC, by which the programs note when they saw a flow.
fn now_ns() -> u64 {
    let now = nix::time::clock_gettime(nix::time::ClockId::CLOCK_MONOTONIC);
    // The clock is always there; a zero makes every flow young.
    let now = now.map_or(Duration::ZERO, Duration::from);
    u64::try_from(now.as_nanos()).unwrap_or(u64::MAX)
}
