//! Endpoints of containers that are gone: Docker always says so, except where it, or the agent,
//! was killed in the middle.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::{Duration, Instant},
};

use anyhow::Result;

use super::{api::Api, side::Side};
use crate::docker::daemon::DockerNetwork;

/// Docker lists an endpoint only some time after it asked for it.
pub(super) const OLD_ENOUGH: Duration = Duration::from_secs(30);
/// How long an endpoint must be missing from what Docker answers: two passes, which are a little
/// more or less than ten seconds apart.
pub(super) const MISSING_FOR: Duration = Duration::from_secs(9);

/// What Docker has: by Docker's id of the network, the ids of the endpoints in it, none where the
/// network is gone. A network about which Docker did not answer has no entry.
type Listed = BTreeMap<String, BTreeSet<String>>;

/// Which endpoints Docker had when, by id.
#[derive(Debug, Default)]
pub(super) struct Endpoints {
    seen: BTreeMap<String, Seen>,
}

#[derive(Debug)]
struct Seen {
    first: Instant,
    missing: Option<Instant>,
}

impl Endpoints {
    /// Asks Docker about every endpoint of this host and removes those it has no more. Returns
    /// what went wrong, one line each.
    pub(super) async fn check<A: Api, S: Side>(
        &mut self,
        api: &A,
        side: &S,
        docker: &[DockerNetwork],
        now: Instant,
    ) -> BTreeSet<String> {
        let mut notes = BTreeSet::new();
        // Listed before Docker is asked: one made in the meantime must not look like one missing.
        let local: BTreeMap<_, _> = side
            .endpoints()
            .into_iter()
            .filter_map(|endpoint| Some((endpoint.record.id, endpoint.docker?.network)))
            .collect();
        let mut listed = Listed::new();
        for network in local.values().collect::<BTreeSet<_>>() {
            match list(api, network, docker).await {
                Ok(ids) => {
                    listed.insert(network.clone(), ids);
                }
                Err(error) => {
                    notes.insert(format!("{error:#}"));
                }
            }
        }
        for id in self.gone(&local, &listed, now) {
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
        notes
    }

    /// Starts counting anew: Docker was away, and has to say again what is missing.
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

async fn list<A: Api>(
    api: &A,
    network: &str,
    docker: &[DockerNetwork],
) -> Result<BTreeSet<String>> {
    if !docker.iter().any(|found| found.id == network) {
        return Ok(BTreeSet::new());
    }
    let endpoints = api.endpoints_of(network).await?;
    Ok(endpoints.into_iter().flatten().map(|(id, _)| id).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

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
}
