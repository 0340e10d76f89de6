//! How long things have been as they are: what one look at Docker and Consul cannot tell.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::{Duration, Instant},
};

use super::{
    plan::{Action, View},
    side::Networks,
};
use crate::{consul::schema::NetworkRecord, docker::daemon::DockerNetwork};

/// How long a Docker network that we were told of may be missing from Docker's list, and how long
/// one may be missing from Consul that was never seen there: it may be in the middle of being made.
pub(super) const FRESH: Duration = Duration::from_secs(15);
/// How long a network is not made again after its Docker network went.
pub(super) const RESTING: Duration = Duration::from_secs(2);
/// How long a Docker network may be known to nobody before that is worth a note.
pub(super) const STRAY: Duration = Duration::from_secs(30);
/// How long a step that failed is not tried again, whatever happens meanwhile.
pub(super) const RETRY: Duration = Duration::from_secs(2);

/// What was seen when. Lives as long as the task.
#[derive(Debug, Default)]
pub(super) struct Memory {
    /// By Docker's id.
    bound: BTreeMap<String, Bound>,
    /// Docker networks of our driver that nobody knows, by Docker's id, and since when.
    strays: BTreeMap<String, Instant>,
    /// Docker networks, by Docker's id, whose removal Docker told of.
    destroyed: BTreeSet<String>,
    /// Ids of networks that were seen in Consul.
    seen: BTreeSet<String>,
    /// Ids of networks whose Docker network went, and when.
    gone: BTreeMap<String, Instant>,
    /// Since when Consul has answered.
    answering: Option<Instant>,
    /// Steps that failed, when, and the error.
    failed: Vec<(Action, Instant, String)>,
}

#[derive(Debug)]
struct Bound {
    since: Instant,
    network: String,
}

impl Memory {
    /// Docker told that it removed this network.
    pub(super) fn destroyed(&mut self, docker_id: String) {
        self.destroyed.insert(docker_id);
    }

    /// A step failed.
    pub(super) fn failed(&mut self, action: Action, error: String, now: Instant) {
        self.failed.retain(|(other, ..)| *other != action);
        self.failed.push((action, now, error));
    }

    /// The error of a step that failed too short a time ago to be tried again.
    pub(super) fn failed_lately(&self, action: &Action, now: Instant) -> Option<&str> {
        let lately = |at: Instant| now < at + RETRY;
        let failed = self.failed.iter().find(|(other, at, _)| other == action && lately(*at));
        failed.map(|(.., error)| error.as_str())
    }

    /// Takes in what is, at the time `now`.
    pub(super) fn view(
        &mut self,
        consul: Networks,
        bound: BTreeMap<String, NetworkRecord>,
        docker: Vec<DockerNetwork>,
        now: Instant,
    ) -> View {
        self.look_at_bound(&bound, now);
        let is_stray =
            |network: &&DockerNetwork| network.is_ours() && !bound.contains_key(&network.id);
        let strays: BTreeSet<_> = docker.iter().filter(is_stray).map(|n| n.id.clone()).collect();
        self.strays.retain(|id, _| strays.contains(id));
        for id in strays {
            self.strays.entry(id).or_insert(now);
        }
        if !consul.connected || consul.read.is_none() {
            self.answering = None;
        } else {
            self.answering.get_or_insert(now);
        }
        let in_consul = consul.read.iter().flat_map(BTreeMap::values);
        self.seen.extend(in_consul.map(|network| network.id.clone()));
        let is_known = |id: &str| {
            consul.by_id(id).is_some() || self.bound.values().any(|bound| bound.network == id)
        };
        self.seen.retain(|id| is_known(id));
        self.destroyed.retain(|id| bound.contains_key(id));
        self.gone.retain(|_, since| now < *since + RESTING);
        self.failed.retain(|(_, at, _)| now < *at + RETRY);

        let fresh = self
            .bound
            .iter()
            .filter(|(id, bound)| now < bound.since + FRESH && !self.destroyed.contains(*id));
        let settled = self.bound.values().filter(|bound| {
            self.seen.contains(&bound.network)
                || self.unseen_until(bound).is_some_and(|at| at <= now)
        });
        let strays = self.strays.iter().filter(|(_, since)| **since + STRAY <= now);
        View {
            fresh: fresh.map(|(id, _)| id.clone()).collect(),
            settled: settled.map(|bound| bound.network.clone()).collect(),
            resting: self.gone.keys().cloned().collect(),
            strays: strays.map(|(id, _)| id.clone()).collect(),
            consul,
            bound,
            docker,
        }
    }

    /// When the next look is worth it although nothing happened by then.
    pub(super) fn due(&self, now: Instant) -> Option<Instant> {
        let bound = self.bound.values().map(|bound| bound.since + FRESH);
        let unseen = self.bound.values().filter_map(|bound| self.unseen_until(bound));
        let strays = self.strays.values().map(|since| *since + STRAY);
        let gone = self.gone.values().map(|since| *since + RESTING);
        let failed = self.failed.iter().map(|(_, at, _)| *at + RETRY);
        let all = bound.chain(unseen).chain(strays).chain(gone).chain(failed);
        all.filter(|at| *at > now).min()
    }

    fn look_at_bound(&mut self, bound: &BTreeMap<String, NetworkRecord>, now: Instant) {
        for (_, went) in self.bound.extract_if(.., |id, _| !bound.contains_key(id)) {
            self.gone.insert(went.network, now);
        }
        for (id, record) in bound {
            let bound = self.bound.entry(id.clone());
            bound.or_insert_with(|| Bound { since: now, network: record.id.clone() });
        }
    }

    /// Until when a network that was never seen in Consul may still be on its way there.
    fn unseen_until(&self, bound: &Bound) -> Option<Instant> {
        Some(bound.since.max(self.answering?) + FRESH)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::docker::sync::{
        fake::{docker_network, networks},
        plan::{Action, plan},
    };

    fn seconds(n: u64) -> Duration {
        Duration::from_secs(n)
    }

    /// The record of `ov_net1` and its Docker network.
    fn one() -> (NetworkRecord, DockerNetwork) {
        let (record, docker) = (crate::service::fake::network("ov_net1", 4096), "d1");
        (record.clone(), docker_network(docker, &record))
    }

    fn bound(record: &NetworkRecord) -> BTreeMap<String, NetworkRecord> {
        BTreeMap::from([("d1".into(), record.clone())])
    }

    #[test]
    fn a_network_just_made_here_is_neither_forgotten_nor_removed() {
        let (record, docker) = one();
        let (mut memory, start) = (Memory::default(), Instant::now());
        // Docker does not list it yet, and then Consul does not.
        let view = memory.view(networks(&[]), bound(&record), vec![], start);
        assert_eq!(plan(&view).0, []);
        let view = memory.view(networks(&[]), bound(&record), vec![docker], start + seconds(1));
        assert_eq!(plan(&view).0, []);
        assert_eq!(memory.due(start + seconds(1)), Some(start + FRESH));
        let view = memory.view(networks(&[]), bound(&record), vec![], start + FRESH);
        assert_eq!(plan(&view).0, [Action::Unbind { docker_id: "d1".into(), network: record }]);
    }

    #[test]
    fn one_that_was_in_consul_is_removed_at_once_and_one_that_was_not_after_a_while() {
        let (record, docker) = one();
        let start = Instant::now();
        let removes = |view: &View| matches!(plan(view).0[..], [Action::Remove { .. }]);
        let look = |memory: &mut Memory, consul: Networks, now| {
            memory.view(consul, bound(&record), vec![docker.clone()], now)
        };

        let mut memory = Memory::default();
        look(&mut memory, networks(&[&record]), start);
        assert!(removes(&look(&mut memory, networks(&[]), start + seconds(1))));

        let mut memory = Memory::default();
        assert!(!removes(&look(&mut memory, networks(&[]), start)));
        assert!(removes(&look(&mut memory, networks(&[]), start + FRESH)));

        // The time in which Consul did not answer does not count.
        let mut memory = Memory::default();
        let away = Networks { connected: false, ..networks(&[]) };
        look(&mut memory, away, start);
        assert!(!removes(&look(&mut memory, networks(&[]), start + seconds(60))));
        assert!(removes(&look(&mut memory, networks(&[]), start + seconds(60) + FRESH)));
    }

    #[test]
    fn one_whose_docker_side_went_is_made_again_after_a_moment() {
        let (record, docker) = one();
        let (mut memory, start) = (Memory::default(), Instant::now());
        memory.view(networks(&[&record]), bound(&record), vec![docker], start);
        memory.destroyed("d1".into());
        let view = memory.view(networks(&[&record]), bound(&record), vec![], start);
        assert!(matches!(plan(&view).0[..], [Action::Unbind { .. }]));
        let none = BTreeMap::new;
        let view = memory.view(networks(&[&record]), none(), vec![], start);
        assert_eq!(plan(&view).0, []);
        assert_eq!(memory.due(start), Some(start + RESTING));
        let view = memory.view(networks(&[&record]), none(), vec![], start + RESTING);
        assert_eq!(plan(&view).0, [Action::Create { network: record }]);
    }

    #[test]
    fn a_step_that_failed_is_tried_again_after_a_while() {
        let (mut memory, start) = (Memory::default(), Instant::now());
        let action = Action::Create { network: one().0 };
        memory.failed(action.clone(), "no".into(), start);
        assert_eq!(memory.failed_lately(&action, start + seconds(1)), Some("no"));
        assert_eq!(memory.due(start + seconds(1)), Some(start + RETRY));
        assert_eq!(memory.failed_lately(&action, start + RETRY), None);
    }

    #[test]
    fn a_docker_network_nobody_knows_is_noted_when_it_stays() {
        let (_, mut docker) = one();
        docker.options.clear();
        let (mut memory, start) = (Memory::default(), Instant::now());
        let mut look = |now| {
            let view = memory.view(networks(&[]), BTreeMap::new(), vec![docker.clone()], now);
            plan(&view)
        };
        assert_eq!(look(start), Default::default());
        let (actions, notes) = look(start + STRAY);
        assert_eq!((actions.len(), notes.len()), (0, 1));
    }
}
