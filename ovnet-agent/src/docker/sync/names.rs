//! What containers are called, and which ports Docker published for them. The plugin's calls do not
//! tell, or not what Docker chose; Docker's API does, but it does not describe a container while
//! that container starts. So each container is asked about in a task of its own.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use anyhow::Result;
use tokio::{
    sync::{Semaphore, mpsc},
    task::JoinSet,
};

use super::{
    api::Api,
    notes::{Notes, Part},
    over::Over,
    side::Side,
};
use crate::{
    consul::schema::check_name,
    docker::daemon::{ContainerNames, EndpointNames},
    reconcile::Description,
    state::LocalEndpoint,
};

/// How many questions may be open at once.
const AT_ONCE: usize = 8;
/// Of the looks at endpoints whose container is not known, every which is one at all of them.
const ALL_EVERY: u32 = 6;
/// How many times in a row something must fail to be worth a note.
const FAILED: u32 = 2;
/// The length of a short id.
const SHORT: usize = 12;

/// Looks up each container sent, and every `every` those of endpoints whose container is not known,
/// until the session is over. What is being said then is said to the end.
pub(super) async fn run<A: Api, S: Side>(
    api: A,
    side: S,
    notes: &Notes<S>,
    every: Duration,
    mut containers: mpsc::UnboundedReceiver<String>,
    mut over: Over,
) {
    let mut lookups = Lookups {
        api,
        side,
        over: over.clone(),
        tasks: JoinSet::new(),
        open: BTreeMap::new(),
        looking: false,
        turns: Arc::new(Semaphore::new(AT_ONCE)),
        ours: BTreeSet::new(),
        failed: BTreeMap::new(),
    };
    let mut ticks = tokio::time::interval(every);
    let mut looks = 0;
    loop {
        tokio::select! {
            () = over.wait() => break,
            Some(container) = containers.recv() => lookups.start(container),
            Some(done) = lookups.tasks.join_next() => {
                if let Ok(done) = done {
                    lookups.finished(done);
                    notes.set(Part::Names, lookups.notes());
                }
            }
            _ = ticks.tick() => {
                if !lookups.looking {
                    lookups.look_around(looks % ALL_EVERY == 0);
                    looks += 1;
                }
            }
        }
    }
    while lookups.tasks.join_next().await.is_some() {}
}

struct Lookups<A, S> {
    api: A,
    side: S,
    over: Over,
    tasks: JoinSet<Done>,
    /// The containers that are being looked up, each with whether it is to be done once more:
    /// what is on its way may have been asked for before the change.
    open: BTreeMap<String, bool>,
    /// Whether a look around is on its way.
    looking: bool,
    turns: Arc<Semaphore>,
    /// The containers that have endpoints of ours, and the Docker networks that were asked for
    /// them, as of the last look around. Others are none of our business.
    ours: BTreeSet<String>,
    /// How many times in a row asking about these failed, and the last error.
    failed: BTreeMap<String, (u32, String)>,
}

/// What a task has done.
enum Done {
    LookedUp { container: String, result: Result<()> },
    LookedAround { all: bool, found: Around },
}

/// The containers of endpoints.
#[derive(Default)]
struct Around {
    /// Those that were known.
    known: BTreeSet<String>,
    /// Those that Docker told of now.
    new: BTreeSet<String>,
    /// The Docker networks that were asked for these, by Docker's id, and whether it answered.
    asked: BTreeMap<String, Result<()>>,
}

impl<A: Api, S: Side> Lookups<A, S> {
    fn start(&mut self, container: String) {
        if let Some(once_more) = self.open.get_mut(&container) {
            *once_more = true;
            return;
        }
        self.open.insert(container.clone(), false);
        let (api, side, turns) = (self.api.clone(), self.side.clone(), Arc::clone(&self.turns));
        let mut over = self.over.clone();
        self.tasks.spawn(async move {
            // The semaphore is never closed; without a turn it is tried at the next look.
            let result = match over.or(turns.acquire()).await {
                Some(Ok(_turn)) => look_up(&api, &side, &container, &mut over).await,
                _ => Ok(()),
            };
            Done::LookedUp { container, result }
        });
    }

    /// Finds the containers of endpoints, to look up the new ones or all.
    fn look_around(&mut self, all: bool) {
        self.looking = true;
        let (api, side, mut over) = (self.api.clone(), self.side.clone(), self.over.clone());
        self.tasks.spawn(async move {
            Done::LookedAround { all, found: look_around(&api, &side, &mut over).await }
        });
    }

    fn finished(&mut self, done: Done) {
        match done {
            Done::LookedUp { container, result } => {
                let once_more = self.open.remove(&container) == Some(true);
                self.count(&container, result);
                if once_more {
                    self.start(container);
                }
            }
            Done::LookedAround { all, found: Around { known, new, asked } } => {
                self.looking = false;
                self.ours = known.iter().chain(&new).chain(asked.keys()).cloned().collect();
                asked.into_iter().for_each(|(network, result)| self.count(&network, result));
                self.failed.retain(|what, _| self.ours.contains(what));
                let again = known.into_iter().filter(|id| all || self.failed.contains_key(id));
                let again: Vec<_> = again.chain(new).collect();
                again.into_iter().for_each(|container| self.start(container));
            }
        }
    }

    fn count(&mut self, what: &str, result: Result<()>) {
        let Err(error) = result else {
            self.failed.remove(what);
            return;
        };
        let error = format!("{error:#}");
        tracing::debug!(error, "names are asked again");
        let failed = self.failed.entry(what.to_owned()).or_default();
        *failed = (failed.0 + 1, error);
    }

    fn notes(&self) -> BTreeSet<String> {
        let failed = self.failed.iter().filter(|(what, _)| self.ours.contains(*what));
        let failed = failed.filter(|(_, (times, _))| *times >= FAILED);
        failed
            .map(|(_, (_, error))| format!("names of containers may be missing: {error}"))
            .collect()
    }
}

async fn look_around<A: Api, S: Side>(api: &A, side: &S, over: &mut Over) -> Around {
    let mut around = Around::default();
    let mut unknown = BTreeMap::<String, BTreeSet<String>>::new();
    for endpoint in side.endpoints() {
        let Some(docker) = endpoint.docker else { continue };
        match docker.container {
            Some(container) => {
                around.known.insert(container);
            }
            None => {
                unknown.entry(docker.network).or_default().insert(endpoint.record.id);
            }
        }
    }
    for (network, ids) in unknown {
        let Some(listed) = over.or(api.endpoints_of(&network)).await else { break };
        let result = listed.map(|listed| {
            let listed = listed.into_iter().flatten().filter(|(id, _)| ids.contains(id));
            around.new.extend(listed.filter_map(|(_, container)| container));
        });
        around.asked.insert(network, result);
    }
    around
}

/// Asks what a container is called and what its ports are, and says so where it is news.
async fn look_up<A: Api, S: Side>(
    api: &A,
    side: &S,
    container: &str,
    over: &mut Over,
) -> Result<()> {
    let Some(found) = over.or(api.names_of(container)).await else { return Ok(()) };
    // A container without endpoints of ours is none of our business.
    let Some(found) = found? else { return Ok(()) };
    for endpoint in side.endpoints() {
        let LocalEndpoint { record, docker: Some(docker), ports, .. } = endpoint else { continue };
        let Some(theirs) = found.endpoints.iter().find(|theirs| theirs.endpoint == record.id)
        else {
            continue;
        };
        let names = names(&found, theirs);
        let container = &found.id;
        let is_named = docker.container.as_ref() == Some(container) && record.names == names;
        if is_named && ports == found.ports {
            continue;
        }
        if over.now() {
            break;
        }
        let (id, container, ports) = (record.id, container.clone(), found.ports.clone());
        tracing::debug!(endpoint = id, ?names, ?ports, "an endpoint is called");
        side.describe_endpoint(Description { id, names, container, ports }).await?;
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
            ContainerNames { id: "0123456789abcdef".into(), name: "t1".into(), ..<_>::default() };
        let aliases = ["web", "t1", "", "-x", "a b", "0123456789ab", "db"];
        let aliases = aliases.map(str::to_owned).to_vec();
        let endpoint = EndpointNames { aliases, ..EndpointNames::default() };
        assert_eq!(names(&container, &endpoint), ["t1", "web", "0123456789ab", "db"]);
        let young = ContainerNames { id: "01".into(), ..container };
        assert_eq!(names(&young, &EndpointNames::default()), ["t1"]);
    }
}
