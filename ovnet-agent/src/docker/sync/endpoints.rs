//! Endpoints of containers that are gone: Docker always says so, except where it, or the agent,
//! was killed in the middle.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::{Duration, Instant},
};

use super::{api::Api, over::Over, side::Side};
use crate::docker::daemon::DockerNetwork;

/// Docker lists an endpoint only some time after it asked for it.
pub(super) const OLD_ENOUGH: Duration = Duration::from_secs(30);
/// How long an endpoint must be missing from what Docker answers: two passes, which are a little
/// more or less than ten seconds apart.
pub(super) const MISSING_FOR: Duration = Duration::from_secs(9);

/// What Docker has: by Docker's id of the network, the ids of the endpoints in it, none where the
/// network is gone. A network about which Docker did not answer, or which this Docker may never have
/// had, has no entry.
type Listed = BTreeMap<String, BTreeSet<String>>;

/// Which endpoints Docker had when, by id.
#[derive(Debug, Default)]
pub(super) struct Endpoints {
    seen: BTreeMap<String, Seen>,
    /// The Docker networks, by Docker's id, that Docker has or had while this agent looked.
    networks: BTreeSet<String>,
}

#[derive(Debug)]
struct Seen {
    first: Instant,
    missing: Option<Instant>,
}

impl Endpoints {
    /// Asks Docker about every endpoint of this host and removes those it has no more. Returns
    /// what went wrong, one line each. `docker` is what Docker lists now.
    ///
    /// Where Docker lists a network no more, its endpoints are gone; where it never did, this is
    /// another Docker than the one that made them, and says nothing about them.
    pub(super) async fn check<A: Api, S: Side>(
        &mut self,
        api: &A,
        side: &S,
        docker: &[DockerNetwork],
        over: &mut Over,
        now: Instant,
    ) -> BTreeSet<String> {
        let mut notes = BTreeSet::new();
        // Listed before Docker is asked: one made in the meantime must not look like one missing.
        let local = side.endpoints();
        let names: BTreeMap<_, _> = local
            .iter()
            .filter_map(|local| Some((local.docker.clone()?.network, local.network.name.clone())))
            .collect();
        let local: BTreeMap<_, _> = local
            .into_iter()
            .filter_map(|endpoint| Some((endpoint.record.id, endpoint.docker?.network)))
            .collect();
        let is_listed = |id: &String| docker.iter().any(|network| network.id == *id);
        self.networks.retain(|id| is_listed(id) || names.contains_key(id));
        let mut listed = Listed::new();
        let mut foreign = BTreeMap::new();
        for (network, name) in names {
            if !is_listed(&network) {
                if self.networks.contains(&network) {
                    listed.insert(network, BTreeSet::new());
                } else {
                    foreign.insert(network, name);
                }
                continue;
            }
            let Some(endpoints) = over.or(api.endpoints_of(&network)).await else { return notes };
            match endpoints {
                Ok(ids) => {
                    listed.insert(network, ids.into_iter().flatten().map(|(id, _)| id).collect());
                }
                Err(error) => {
                    notes.insert(format!("{error:#}"));
                }
            }
        }
        for id in self.gone(&local, &listed, now) {
            if over.now() {
                return notes;
            }
            match side.remove_endpoint(&id).await {
                Ok(()) => tracing::info!(
                    endpoint = id,
                    "removed an endpoint whose container Docker has no more"
                ),
                Err(error) => {
                    notes.insert(format!("{error:#}"));
                }
            }
        }
        notes.extend(foreign.into_iter().filter_map(|(id, name)| {
            let in_it = local.iter().filter(|(_, network)| **network == id);
            // A younger one may have been made after Docker's list.
            let is_old =
                |id: &String| self.seen.get(id).is_some_and(|seen| now >= seen.first + OLD_ENOUGH);
            let count = in_it.filter(|(endpoint, _)| is_old(endpoint)).count();
            (count > 0).then(|| {
                format!(
                    "Docker network {id} ({name}) has {count} endpoints on this host, but this \
                     Docker does not have it: they stay; if it is not the Docker that made them, \
                     correct --docker"
                )
            })
        }));
        notes
    }

    /// Docker has, or had until now, this network, by Docker's id.
    pub(super) fn has_network(&mut self, id: &str) {
        if !self.networks.contains(id) {
            self.networks.insert(id.to_owned());
        }
    }

    /// Docker was away, and has to say again what is missing. It is still the one whose networks
    /// were seen, if perhaps without its memory.
    pub(super) fn docker_came_back(&mut self) {
        for seen in self.seen.values_mut() {
            seen.missing = None;
        }
    }

    /// The endpoints that are gone. `local` has Docker's id of the network of each.
    fn gone(
        &mut self,
        local: &BTreeMap<String, String>,
        listed: &Listed,
        now: Instant,
    ) -> Vec<String> {
        self.seen.retain(|id, _| local.contains_key(id));
        let mut gone = Vec::new();
        for (id, network) in local {
            let seen = self.seen.entry(id.clone()).or_insert(Seen { first: now, missing: None });
            let Some(ids) = listed.get(network) else { continue };
            if ids.contains(id) {
                seen.missing = None;
                continue;
            }
            let since = *seen.missing.get_or_insert(now);
            if now >= since + MISSING_FOR && now >= seen.first + OLD_ENOUGH {
                gone.push(id.clone());
            }
        }
        gone
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        docker::sync::fake::{Fake, docker_network},
        service::fake::network,
    };

    fn seconds(n: u64) -> Duration {
        Duration::from_secs(n)
    }

    fn listed(ids: &[&str]) -> Listed {
        BTreeMap::from([("d1".into(), ids.iter().map(|id| (*id).to_owned()).collect())])
    }

    #[test]
    fn only_an_old_endpoint_that_stays_missing_is_gone() {
        let local = BTreeMap::from([("e1".into(), "d1".into()), ("e2".into(), "d1".into())]);
        let (mut endpoints, start) = (Endpoints::default(), Instant::now());
        let mut look = |listed: &Listed, at| endpoints.gone(&local, listed, start + seconds(at));
        assert!(look(&listed(&["e2"]), 0).is_empty());
        assert!(look(&listed(&["e2"]), 20).is_empty(), "it is not old enough");
        assert_eq!(look(&listed(&["e2"]), 30), ["e1"]);
        assert!(look(&listed(&["e1", "e2"]), 40).is_empty(), "it is there");
        assert!(look(&listed(&["e2"]), 50).is_empty(), "missing anew");
        assert!(look(&Listed::new(), 70).is_empty(), "Docker did not answer");
        assert_eq!(look(&listed(&[]), 71), ["e1"], "e2 is missing for the first time");
    }

    #[test]
    fn a_docker_that_was_away_has_to_say_it_again() {
        let local = BTreeMap::from([("e1".into(), "d1".into())]);
        let (mut endpoints, start) = (Endpoints::default(), Instant::now());
        endpoints.gone(&local, &listed(&[]), start);
        endpoints.docker_came_back();
        assert!(endpoints.gone(&local, &listed(&[]), start + seconds(60)).is_empty());
        assert_eq!(endpoints.gone(&local, &listed(&[]), start + seconds(70)), ["e1"]);
    }

    #[tokio::test]
    async fn only_a_docker_that_had_the_network_says_that_its_endpoints_are_gone() {
        let record = network("ov_net1", 4096);
        let fake = Fake::new(&[&record]);
        let docker_id = fake.user_creates("ov_net1", &record);
        fake.state().bound.insert(docker_id.clone(), record.clone());
        fake.start_container(&docker_id, "c1", &[]);
        let docker = [docker_network(&docker_id, &record)];
        let (_end, going) = tokio::sync::watch::channel(false);
        let mut over = Over::new(going.clone(), going);
        let (mut endpoints, start) = (Endpoints::default(), Instant::now());
        let looks = async |endpoints: &mut Endpoints, over: &mut Over| {
            let mut notes = BTreeSet::new();
            for at in [0, 40, 60] {
                let at = start + seconds(at);
                notes = endpoints.check(&fake, &fake, &[], over, at).await;
            }
            notes
        };
        // Another Docker than the one that made it.
        let notes = looks(&mut endpoints, &mut over).await;
        assert!(notes.first().unwrap().contains("(ov_net1) has 1 endpoints"), "{notes:?}");
        assert_eq!(fake.state().endpoints.len(), 1);
        // The one that had it, and lost all it knew.
        docker.iter().for_each(|network| endpoints.has_network(&network.id));
        assert!(endpoints.check(&fake, &fake, &docker, &mut over, start).await.is_empty());
        endpoints.docker_came_back();
        assert!(looks(&mut endpoints, &mut over).await.is_empty());
        assert!(fake.state().endpoints.is_empty());
    }
}
