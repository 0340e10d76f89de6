//! Which hosts count as there: the records, and for a while those whose lease is lost.
//!
//! Absence is not an order (invariant 7). A host that lost its lease, or whose record is gone,
//! stays until a grace period has passed in which Consul itself answered: its containers usually
//! run on, and so does the traffic to them.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use crate::consul::{schema::HostRecord, watch::HostEntry};

/// The hosts known, each with how long it has been lost.
#[derive(Clone, Debug)]
pub struct HostTable {
    known: BTreeMap<String, Known>,
    grace: Duration,
    /// When the last reading was, where Consul had answered then.
    updated: Option<Instant>,
    /// How long Consul has answered, in all.
    read_for: Duration,
}

#[derive(Clone, Debug)]
struct Known {
    record: HostRecord,
    /// How long Consul has answered without this host's lease.
    lost_for: Duration,
    lost: bool,
}

impl HostTable {
    /// An empty table; `grace` is how long a lost host stays.
    pub fn new(grace: Duration) -> Self {
        Self { known: BTreeMap::new(), grace, updated: None, read_for: Duration::ZERO }
    }

    /// Takes in what was read, at the time `now`. Time in which Consul did not answer
    /// (`connected` false) is no part of anybody's grace.
    pub fn update(&mut self, read: &BTreeMap<String, HostEntry>, connected: bool, now: Instant) {
        let since = self.updated.map_or(Duration::ZERO, |then| now - then);
        self.updated = connected.then_some(now);
        self.read_for += since;
        for (node, entry) in read {
            let known = self.known.entry(node.clone()).or_insert_with(|| Known {
                record: entry.record.clone(),
                lost_for: Duration::ZERO,
                lost: false,
            });
            known.record = entry.record.clone();
            if !is_lost(entry) {
                known.lost = false;
                known.lost_for = Duration::ZERO;
            }
        }
        for (node, known) in &mut self.known {
            if read.get(node).is_some_and(|entry| !is_lost(entry)) {
                continue;
            }
            if known.lost && connected {
                known.lost_for += since;
            }
            known.lost = true;
        }
        let grace = self.grace;
        self.known.retain(|_, known| known.lost_for < grace);
    }

    /// Whether Consul has answered for the grace period since the first reading.
    pub fn settled(&self) -> bool {
        self.read_for >= self.grace
    }

    /// The hosts that count as there.
    pub fn usable(&self) -> BTreeMap<String, HostRecord> {
        self.known.iter().map(|(node, known)| (node.clone(), known.record.clone())).collect()
    }
}

/// Whether the host had a lease and lost it. A host announced by hand, by a record that names no
/// agent, never had one.
fn is_lost(entry: &HostEntry) -> bool {
    !entry.locked && !entry.record.agent.is_empty()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::consul::schema::VERSION;

    const GRACE: Duration = Duration::from_secs(60);

    fn entry(locked: bool, agent: &str) -> HostEntry {
        HostEntry {
            record: HostRecord {
                v: VERSION,
                node: "docker02".into(),
                vtep: [192, 168, 1, 12].into(),
                port: 4789,
                mtu: 1500,
                agent: agent.into(),
            },
            locked,
        }
    }

    /// Feeds the table one reading a second and returns after how many the host was gone.
    fn gone_after(read: Option<HostEntry>, connected: impl Fn(u64) -> bool) -> Option<u64> {
        let mut table = HostTable::new(GRACE);
        let start = Instant::now();
        let here = BTreeMap::from([("docker02".to_string(), entry(true, "0.1.0"))]);
        table.update(&here, true, start);
        let read: BTreeMap<_, _> =
            read.map(|it| ("docker02".to_string(), it)).into_iter().collect();
        (1..600).find(|second| {
            table.update(&read, connected(*second), start + Duration::from_secs(*second));
            table.usable().is_empty()
        })
    }

    #[test]
    fn a_lost_lease_removes_a_host_after_the_grace_and_not_before() {
        assert_eq!(gone_after(Some(entry(false, "0.1.0")), |_| true), Some(61));
    }

    #[test]
    fn a_deleted_record_does_too() {
        assert_eq!(gone_after(None, |_| true), Some(61));
    }

    #[test]
    fn time_without_consul_does_not_count() {
        assert_eq!(gone_after(None, |_| false), None);
        assert_eq!(gone_after(None, |second| second > 100), Some(161), "from the first answer on");
    }

    #[test]
    fn a_host_announced_by_hand_needs_no_lease() {
        assert_eq!(gone_after(Some(entry(false, "")), |_| true), None);
    }

    #[test]
    fn a_host_that_comes_back_starts_afresh() {
        let mut table = HostTable::new(GRACE);
        let start = Instant::now();
        let at = |second| start + Duration::from_secs(second);
        let here = BTreeMap::from([("docker02".to_string(), entry(true, "0.1.0"))]);
        table.update(&here, true, at(0));
        table.update(&BTreeMap::new(), true, at(1));
        table.update(&BTreeMap::new(), true, at(50));
        table.update(&here, true, at(51));
        table.update(&BTreeMap::new(), true, at(52));
        table.update(&BTreeMap::new(), true, at(100));
        assert_eq!(table.usable().len(), 1);
    }
}
