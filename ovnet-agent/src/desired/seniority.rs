//! Which of several hosts that claim one VTEP address had it first. Pure.

use std::{collections::BTreeMap, net::Ipv4Addr};

use crate::consul::{HostEntry, schema::HostRecord};

/// The order in which hosts came to have their VTEP addresses, as this agent saw it. Who has an
/// address keeps it for as long as it counts as there: a record that turns up later and claims the
/// same takes nothing from it, whatever its name.
#[derive(Clone, Debug, Default)]
pub struct Seniority {
    since: BTreeMap<String, (Ipv4Addr, u64)>,
    next: u64,
}

impl Seniority {
    /// Takes in the hosts that count as there, and what Consul says of them now. Of those that are
    /// seen for the first time together the ones that hold a lease come first: a record without one
    /// is written by anybody.
    pub fn update(
        &mut self,
        hosts: &BTreeMap<String, HostRecord>,
        read: &BTreeMap<String, HostEntry>,
    ) {
        self.since.retain(|node, (vtep, _)| hosts.get(node).is_some_and(|it| it.vtep == *vtep));
        let mut new: Vec<_> =
            hosts.iter().filter(|(node, _)| !self.since.contains_key(*node)).collect();
        new.sort_by_key(|(node, _)| (read.get(*node).is_none_or(|it| !it.locked), *node));
        for (node, record) in new {
            self.since.insert(node.clone(), (record.vtep, self.next));
            self.next += 1;
        }
    }

    /// The hosts in that order.
    pub fn order(&self) -> Vec<String> {
        let mut nodes: Vec<_> = self.since.iter().collect();
        nodes.sort_by_key(|(_, (_, since))| *since);
        nodes.into_iter().map(|(node, _)| node.clone()).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::consul::schema::VERSION;

    fn entries(hosts: &[(&str, u8, bool)]) -> BTreeMap<String, HostEntry> {
        let entry = |node: &str, vtep: u8, locked: bool| HostEntry {
            record: HostRecord {
                v: VERSION,
                node: node.into(),
                vtep: [192, 168, 1, vtep].into(),
                port: 4789,
                mtu: 1500,
                agent: "0.1.0".into(),
            },
            locked,
        };
        let named = |(node, vtep, locked): &(&str, u8, bool)| {
            ((*node).to_owned(), entry(node, *vtep, *locked))
        };
        hosts.iter().map(named).collect()
    }

    fn update(seniority: &mut Seniority, hosts: &[(&str, u8, bool)]) -> Vec<String> {
        let read = entries(hosts);
        let records = read.iter().map(|(node, it)| (node.clone(), it.record.clone())).collect();
        seniority.update(&records, &read);
        seniority.order()
    }

    #[test]
    fn who_comes_later_is_later_whatever_its_name() {
        let mut seniority = Seniority::default();
        let honest = [("docker02", 12, true), ("docker03", 13, true)];
        assert_eq!(update(&mut seniority, &honest), ["docker02", "docker03"]);
        let all = [honest[0], honest[1], ("aaa", 12, true)];
        assert_eq!(update(&mut seniority, &all), ["docker02", "docker03", "aaa"]);
        // A lease that is lost for the moment changes nothing.
        let lost = [("docker02", 12, false), honest[1], ("aaa", 12, true)];
        assert_eq!(update(&mut seniority, &lost), ["docker02", "docker03", "aaa"]);
        // Gone for good, and back at last.
        assert_eq!(update(&mut seniority, &[honest[1], ("aaa", 12, true)]), ["docker03", "aaa"]);
        assert_eq!(update(&mut seniority, &all), ["docker03", "aaa", "docker02"]);
    }

    #[test]
    fn a_host_that_moves_to_an_address_is_the_last_to_have_it() {
        let mut seniority = Seniority::default();
        update(&mut seniority, &[("a", 11, true), ("b", 12, true)]);
        assert_eq!(update(&mut seniority, &[("a", 12, true), ("b", 12, true)]), ["b", "a"]);
    }

    #[test]
    fn of_those_seen_together_the_ones_with_a_lease_come_first() {
        let mut seniority = Seniority::default();
        let hosts = [("aaa", 12, false), ("docker02", 12, true), ("docker03", 13, true)];
        assert_eq!(update(&mut seniority, &hosts), ["docker02", "docker03", "aaa"]);
    }
}
