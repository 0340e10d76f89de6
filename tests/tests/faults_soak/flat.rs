//! Whether anything grows: memory and file descriptors of agents, and what is on the hosts.

use std::{collections::BTreeMap, fs};

use ovnet_tests::cluster::{Cluster, Footprint, until};

use super::plan::HOSTS;

/// What memory may grow by between the first look and the last, in KiB: an allocator keeps what it
/// needed at the busiest moment, and a short soak has few of those before its first look.
const GROWTH_KIB: u64 = 4096;
/// What open descriptors may differ by: requests under way.
const DESCRIPTORS: usize = 4;

/// What each host had at the first look, and an agent that was never killed since.
pub(crate) struct Flatness {
    at_first: BTreeMap<&'static str, Footprint>,
    looks: Vec<Look>,
}

/// The agent that is never killed, at a moment at which there is little to do.
struct Look {
    memory_kib: u64,
    descriptors: usize,
}

impl Flatness {
    /// Looks for the first time.
    pub(crate) fn begin(cluster: &Cluster) -> Self {
        let at_first = HOSTS.into_iter().map(|host| (host, cluster.footprint(host))).collect();
        Self { at_first, looks: Vec::new() }
    }

    /// Looks again: interfaces, pins, files and map entries must be the very same.
    pub(crate) fn look(&mut self, cluster: &Cluster) {
        for (host, before) in &self.at_first {
            until(&format!("{host} to have what it had at first, {before:?}"), || {
                (cluster.footprint(host) == *before).then_some(())
            });
        }
        let agent = cluster.lab.agent(HOSTS[HOSTS.len() - 1]).unwrap();
        let look = Look {
            memory_kib: anonymous_kib(agent.pid),
            descriptors: fs::read_dir(format!("/proc/{}/fd", agent.pid)).unwrap().count(),
        };
        println!("         {} KiB, {} descriptors", look.memory_kib, look.descriptors);
        self.looks.push(look);
    }

    /// The last look has no more than the first.
    pub(crate) fn must_be_flat(&self) {
        let (first, last) = (self.looks.first().unwrap(), self.looks.last().unwrap());
        let (before, after) = (first.memory_kib, last.memory_kib);
        println!("memory {before} KiB, then {after} KiB, in {} looks", self.looks.len());
        assert!(after <= before + GROWTH_KIB, "memory grew from {before} to {after} KiB");
        let (before, after) = (first.descriptors, last.descriptors);
        assert!(after <= before + DESCRIPTORS, "descriptors grew from {before} to {after}");
    }
}

/// Memory that is the process's own, in KiB.
fn anonymous_kib(pid: i32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:")).unwrap();
    line.split_whitespace().next().unwrap().parse().unwrap()
}
