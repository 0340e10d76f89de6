//! Which hosts count as there: the records, and for a while those whose lease is lost.
//!
//! Absence is not an order (invariant 7). A host that lost its lease, or whose record is gone,
//! stays until a grace period has passed in which Consul itself answered: its containers usually
//! run on, and so does the traffic to them. While a host that lost its lease still answers probes
//! ([`crate::peers`]), it is only cut off from Consul, and the period does not begin.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::Ipv4Addr,
    time::{Duration, Instant},
};

use crate::consul::{HostEntry, schema::HostRecord};

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
    /// (`connected` false) is no part of anybody's grace. `reaches` says which hosts answer probes.
    pub fn update(
        &mut self,
        read: &BTreeMap<String, HostEntry>,
        connected: bool,
        now: Instant,
        reaches: impl Fn(&HostRecord) -> bool,
    ) {
        let since = self.updated.map_or(Duration::ZERO, |then| now - then);
        self.updated = connected.then_some(now);
        self.read_for += since;
        // Who answers at an address is the host that has its lease, whoever had the address before.
        let held: BTreeSet<Ipv4Addr> =
            read.values().filter(|it| it.locked).map(|it| it.record.vtep).collect();
        for (node, entry) in read {
            let known = self.known.entry(node.clone()).or_insert_with(|| Known {
                record: entry.record.clone(),
                lost_for: Duration::ZERO,
                lost: false,
            });
            known.record = entry.record.clone();
            let only_cut_off = || !held.contains(&entry.record.vtep) && reaches(&entry.record);
            if !is_lost(entry) || only_cut_off() {
                known.lost = false;
                known.lost_for = Duration::ZERO;
            } else {
                known.lose(connected, since);
            }
        }
        for (node, known) in &mut self.known {
            if !read.contains_key(node) {
                known.lose(connected, since);
            }
        }
        let grace = self.grace;
        // One that has a record is remembered as gone: forgotten, it would be met as a new one.
        self.known.retain(|node, known| known.lost_for < grace || read.contains_key(node));
    }

    /// Whether Consul has answered for the grace period since the first reading.
    pub fn settled(&self) -> bool {
        self.read_for >= self.grace
    }

    /// The hosts that count as there.
    pub fn usable(&self) -> BTreeMap<String, HostRecord> {
        let there = self.known.iter().filter(|(_, known)| known.lost_for < self.grace);
        there.map(|(node, known)| (node.clone(), known.record.clone())).collect()
    }
}

impl Known {
    /// Counts the time since the last reading, if the host was lost then already.
    fn lose(&mut self, connected: bool, since: Duration) {
        if self.lost && connected {
            self.lost_for += since;
        }
        self.lost = true;
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
        table.update(&here, true, start, |_| false);
        let read: BTreeMap<_, _> =
            read.map(|it| ("docker02".to_string(), it)).into_iter().collect();
        (1..600).find(|second| {
            table
                .update(&read, connected(*second), start + Duration::from_secs(*second), |_| false);
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
        table.update(&here, true, at(0), |_| false);
        table.update(&BTreeMap::new(), true, at(1), |_| false);
        table.update(&BTreeMap::new(), true, at(50), |_| false);
        table.update(&here, true, at(51), |_| false);
        table.update(&BTreeMap::new(), true, at(52), |_| false);
        table.update(&BTreeMap::new(), true, at(100), |_| false);
        assert_eq!(table.usable().len(), 1);
    }

    /// Feeds the table one reading a second of a host without its lease; whether it was there at
    /// each second.
    fn there(
        others: &[(&str, HostEntry)],
        seconds: u64,
        reached: impl Fn(u64) -> bool,
    ) -> Vec<bool> {
        let mut table = HostTable::new(GRACE);
        let start = Instant::now();
        let mut read: BTreeMap<String, HostEntry> =
            others.iter().map(|(node, entry)| ((*node).to_owned(), entry.clone())).collect();
        read.insert("docker02".into(), entry(false, "0.1.0"));
        let at = |second| {
            let now = start + Duration::from_secs(second);
            table.update(&read, true, now, |record| record.node == "docker02" && reached(second));
            table.usable().contains_key("docker02")
        };
        (0..seconds).map(at).collect()
    }

    #[test]
    fn a_host_that_is_gone_stays_gone_while_its_record_does_not() {
        let there = there(&[], 600, |_| false);
        assert_eq!(there.iter().position(|it| !it), Some(60));
        assert!(there[60..].iter().all(|it| !it), "it comes back by itself");
    }

    #[test]
    fn a_host_without_a_lease_stays_while_it_answers_and_for_the_grace_after() {
        let there = there(&[], 600, |second| second < 300);
        assert_eq!(there.iter().position(|it| !it), Some(360));
    }

    #[test]
    fn a_host_that_is_gone_is_back_when_it_answers() {
        let there = there(&[], 600, |second| second == 300);
        assert!(!there[299] && there[300] && there[359] && !there[361]);
    }

    #[test]
    fn what_answers_at_the_address_of_another_host_is_that_host() {
        let mut heir = entry(true, "0.1.0");
        heir.record.node = "docker07".into();
        let gone = there(&[("docker07", heir.clone())], 100, |_| true);
        assert_eq!(gone.iter().position(|it| !it), Some(60));
        heir.locked = false;
        let both = there(&[("docker07", heir.clone())], 100, |_| true);
        assert!(both.iter().all(|it| *it), "of two without a lease nobody knows");
        heir.record.vtep = [192, 168, 1, 17].into();
        heir.locked = true;
        assert!(there(&[("docker07", heir)], 100, |_| true).iter().all(|it| *it), "elsewhere");
    }

    #[test]
    fn a_deleted_record_is_an_order_whoever_answers() {
        let mut table = HostTable::new(GRACE);
        let start = Instant::now();
        let here = BTreeMap::from([("docker02".to_string(), entry(true, "0.1.0"))]);
        table.update(&here, true, start, |_| true);
        for second in 1..=61 {
            let now = start + Duration::from_secs(second);
            table.update(&BTreeMap::new(), true, now, |_| true);
        }
        assert!(table.usable().is_empty());
    }
}
