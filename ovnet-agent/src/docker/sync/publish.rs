//! Publishing a network that a user made here: Docker says its name only when it is done making it,
//! and other hosts are to have it within a moment.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Result, ensure};
use tokio::sync::{Mutex, Notify};

use super::{
    api::Api,
    over::Over,
    side::{Publish, Side},
};
use crate::{consul::schema::NetworkRecord, docker::daemon::DockerNetwork};

/// Between two questions whether Docker is done.
const ASK_AGAIN: Duration = Duration::from_millis(10);
/// How long Docker is asked that often.
const ASK_FOR: Duration = Duration::from_secs(10);

/// Publishes. Clones share everything.
#[derive(Clone, Debug)]
pub(super) struct Publisher<A, S> {
    pub(super) api: A,
    pub(super) side: S,
    /// Woken when a network's Docker side has to be made or unmade because of this.
    pub(super) again: Arc<Notify>,
    pub(super) over: Over,
    /// One at a time: the pass over everything and this task may see the same network.
    turn: Arc<Mutex<()>>,
}

impl<A: Api, S: Side> Publisher<A, S> {
    pub(super) fn new(api: A, side: S, again: Arc<Notify>, over: Over) -> Self {
        Self { api, side, again, over, turn: Arc::default() }
    }

    /// Publishes each new network as soon as Docker knows its name, until the session is over. What
    /// fails here is left to the next pass.
    pub(super) async fn run(&self) {
        let mut over = self.over.clone();
        let created = self.side.created();
        let mut until = BTreeMap::new();
        loop {
            let woken = created.notified();
            tokio::pin!(woken);
            // From here on no wake-up is missed, whichever way it is given.
            woken.as_mut().enable();
            while self.publish_new(&mut until).await && !over.now() {
                tokio::time::sleep(ASK_AGAIN).await;
            }
            tokio::select! {
                () = woken => {}
                () = over.wait() => return,
            }
        }
    }

    /// Publishes a network under the name Docker gave it, unless that happened meanwhile. Where
    /// another host has the name, the network made here goes, to be made again as theirs.
    pub(super) async fn publish(&self, network: &DockerNetwork) -> Result<()> {
        let _turn = self.turn.lock().await;
        if self.over.now() {
            return Ok(());
        }
        let bound = self.side.bound();
        if bound.get(&network.id).is_none_or(|record| !record.name.is_empty()) {
            return Ok(());
        }
        let DockerNetwork { id, name, labels, .. } = network;
        match self.side.publish(id, name, labels.clone()).await? {
            Publish::Done(record) => {
                tracing::info!(network = name, vni = record.vni, "published a network made here");
            }
            Publish::Taken(theirs) => {
                let used = self.api.endpoints_of(id).await?.is_some_and(|used| !used.is_empty());
                ensure!(
                    !used,
                    "network {name} made here is not the cluster's, which {} made first: remove \
                     the containers that use it here",
                    theirs.created_by
                );
                self.remove(id).await?;
                tracing::info!(
                    network = name,
                    host = theirs.created_by,
                    "removed a network made here: another host made one of that name first"
                );
            }
        }
        self.again.notify_one();
        Ok(())
    }

    /// Removes a Docker network by our own decision, which the plugin must not take for a user's.
    pub(super) async fn remove(&self, docker_id: &str) -> Result<()> {
        let marked = Marked::new(&self.side, docker_id, S::removing);
        self.api.remove_network(docker_id).await?;
        drop(marked);
        self.side.unbind(docker_id).await
    }

    /// Makes this host's Docker network of a network; returns Docker's id of it.
    pub(super) async fn create(&self, network: &NetworkRecord) -> Result<String> {
        let marked = Marked::new(&self.side, &network.id, S::creating);
        let docker_id = self.api.create_network(network).await?;
        drop(marked);
        self.side.bind(&docker_id, network)?;
        Ok(docker_id)
    }

    /// Publishes what Docker knows the name of. `until` says how long each is asked for. Returns
    /// whether there is more to ask for.
    async fn publish_new(&self, until: &mut BTreeMap<String, Instant>) -> bool {
        let mut waiting = false;
        let unpublished = self.unpublished();
        until.retain(|id, _| unpublished.contains(id));
        for id in unpublished {
            let now = Instant::now();
            let until = until.entry(id.clone()).or_insert(now + ASK_FOR);
            if *until <= now {
                continue;
            }
            let Some(asked) = self.over.clone().or(self.api.network(&id)).await else {
                return false;
            };
            let published = match asked {
                Ok(None) => {
                    waiting = true;
                    continue;
                }
                Ok(Some(network)) => self.publish(&network).await,
                Err(error) => Err(error),
            };
            if let Err(error) = published {
                tracing::debug!(error = format!("{error:#}"), "the next pass publishes it");
                *until = now;
                self.again.notify_one();
            }
        }
        waiting
    }

    fn unpublished(&self) -> BTreeSet<String> {
        let bound = self.side.bound().into_iter();
        bound.filter(|(_, record)| record.name.is_empty()).map(|(id, _)| id).collect()
    }
}

/// The mark on what we make or remove; taken off also where that fails.
struct Marked<'a, S> {
    side: &'a S,
    id: &'a str,
    mark: fn(&S, &str, bool),
}

impl<'a, S> Marked<'a, S> {
    fn new(side: &'a S, id: &'a str, mark: fn(&S, &str, bool)) -> Self {
        mark(side, id, true);
        Self { side, id, mark }
    }
}

impl<S> Drop for Marked<'_, S> {
    fn drop(&mut self) {
        (self.mark)(self.side, self.id, false);
    }
}
