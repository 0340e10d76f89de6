//! What containers are called. The plugin's calls do not tell; Docker's API does, but it does not
//! describe a container while that container starts. So each container is asked about in a task
//! of its own.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use anyhow::Result;
use tokio::{
    sync::{Semaphore, mpsc, watch},
    task::JoinSet,
};

use super::{api::Api, side::Side, true_in};
use crate::{
    consul::schema::check_name,
    docker::daemon::{ContainerNames, EndpointNames},
};

/// How many questions may be open at once.
const AT_ONCE: usize = 8;
/// Of the looks at endpoints whose container is not known, every which is one at all of them.
const ALL_EVERY: u32 = 6;
/// The length of a short id.
const SHORT: usize = 12;

/// Looks up each container sent, and every `every` those of endpoints whose container is not known,
/// until Docker went away.
pub(super) async fn run<A: Api, S: Side>(
    api: A,
    side: S,
    every: Duration,
    mut containers: mpsc::UnboundedReceiver<String>,
    mut over: watch::Receiver<bool>,
) {
    let mut lookups = Lookups {
        api,
        side,
        tasks: JoinSet::new(),
        open: BTreeMap::new(),
        turns: Arc::new(Semaphore::new(AT_ONCE)),
    };
    let mut ticks = tokio::time::interval(every);
    let mut looks = 0;
    loop {
        tokio::select! {
            () = true_in(&mut over) => return,
            Some(container) = containers.recv() => lookups.start(container),
            Some(done) = lookups.tasks.join_next() => {
                if let Ok(container) = done {
                    lookups.finished(&container);
                }
            }
            _ = ticks.tick() => {
                lookups.look_around(looks % ALL_EVERY == 0).await;
                looks += 1;
            }
        }
    }
}

struct Lookups<A, S> {
    api: A,
    side: S,
    tasks: JoinSet<String>,
    /// The containers that are being looked up, each with whether it is to be done once more:
    /// what is on its way may have been asked for before the change.
    open: BTreeMap<String, bool>,
    turns: Arc<Semaphore>,
}

impl<A: Api, S: Side> Lookups<A, S> {
    fn start(&mut self, container: String) {
        if let Some(once_more) = self.open.get_mut(&container) {
            *once_more = true;
            return;
        }
        self.open.insert(container.clone(), false);
        let (api, side, turns) = (self.api.clone(), self.side.clone(), Arc::clone(&self.turns));
        self.tasks.spawn(async move {
            // The semaphore is never closed; without a turn it is tried at the next look.
            if let Ok(_turn) = turns.acquire().await
                && let Err(error) = look_up(&api, &side, &container).await
            {
                tracing::debug!(container, error = format!("{error:#}"), "names are asked again");
            }
            container
        });
    }

    fn finished(&mut self, container: &str) {
        if self.open.remove(container) == Some(true) {
            self.start(container.to_owned());
        }
    }

    /// Finds the containers of endpoints, those whose container is not known or all.
    async fn look_around(&mut self, all: bool) {
        let mut unknown = BTreeMap::<String, BTreeSet<String>>::new();
        for endpoint in self.side.endpoints() {
            match endpoint.docker {
                Some(docker) if docker.container.is_none() => {
                    unknown.entry(docker.network).or_default().insert(endpoint.record.id);
                }
                Some(docker) if all => docker.container.into_iter().for_each(|id| self.start(id)),
                _ => {}
            }
        }
        for (network, ids) in unknown {
            match self.api.endpoints_of(&network).await {
                Ok(listed) => {
                    let listed = listed.into_iter().flatten();
                    let containers = listed.filter(|(id, _)| ids.contains(id));
                    containers.filter_map(|(_, owner)| owner.container).for_each(|c| self.start(c));
                }
                Err(error) => {
                    tracing::debug!(error = format!("{error:#}"), "containers are asked again");
                }
            }
        }
    }
}

/// Asks what a container is called, and says so where it is news.
async fn look_up<A: Api, S: Side>(api: &A, side: &S, container: &str) -> Result<()> {
    // A container without endpoints of ours is none of our business.
    let Some(found) = api.names_of(container).await? else { return Ok(()) };
    for endpoint in side.endpoints() {
        let (record, Some(docker)) = (endpoint.record, endpoint.docker) else { continue };
        let Some(theirs) = found.endpoints.iter().find(|theirs| theirs.endpoint == record.id)
        else {
            continue;
        };
        let names = names(&found, theirs);
        if docker.container.as_deref() != Some(&found.id) || record.names != names {
            tracing::debug!(endpoint = record.id, ?names, "an endpoint is called");
            side.name_endpoint(&record.id, &found.id, names).await?;
        }
    }
    Ok(())
}

/// The names of a container in a network: its own, its aliases, its short id. A name that no record
/// may hold is left out.
fn names(container: &ContainerNames, endpoint: &EndpointNames) -> Vec<String> {
    let short = container.id.get(..SHORT).map(str::to_owned);
    let all = [&container.name].into_iter().chain(&endpoint.aliases).chain(&short);
    let mut names = Vec::new();
    for name in all {
        if check_name("name", name).is_ok() && !names.contains(name) {
            names.push(name.clone());
        }
    }
    names
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_the_containers_own_its_aliases_and_its_short_id() {
        let container =
            ContainerNames { id: "0123456789abcdef".into(), name: "t1".into(), endpoints: vec![] };
        let aliases = ["web", "t1", "", "-x", "a b", "0123456789ab", "db"];
        let aliases = aliases.map(str::to_owned).to_vec();
        let endpoint = EndpointNames { aliases, ..EndpointNames::default() };
        assert_eq!(names(&container, &endpoint), ["t1", "web", "0123456789ab", "db"]);
        let young = ContainerNames { id: "01".into(), ..container };
        assert_eq!(names(&young, &EndpointNames::default()), ["t1"]);
    }
}
