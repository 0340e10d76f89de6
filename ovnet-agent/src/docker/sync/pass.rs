//! One pass: look at both sides, plan, and take the steps, until there is nothing left to do.

use std::{collections::BTreeSet, time::Instant};

use anyhow::{Context as _, Result, ensure};

use super::{
    api::Api,
    memory::Memory,
    plan::{Action, Removal, plan},
    publish::Publisher,
    side::Side,
};
use crate::docker::daemon::DockerNetwork;

/// Steps make other steps possible; more rounds than this means that somebody works against us.
const ROUNDS: usize = 4;

/// Makes Docker's networks and Consul's the same. Returns Docker's networks and what stands in the
/// way, one line each; an error where Docker did not say what it has, and `None` where the session
/// is over: no step is taken from then on.
pub(super) async fn networks<A: Api, S: Side>(
    publisher: &Publisher<A, S>,
    memory: &mut Memory,
) -> Result<Option<(Vec<DockerNetwork>, BTreeSet<String>)>> {
    let mut over = publisher.over.clone();
    let mut rounds = 0;
    loop {
        let Some(docker) = over.or(publisher.api.networks()).await else { return Ok(None) };
        let docker = docker?;
        // Both after Docker's list: what is made here in between is then known to the plugin.
        let (consul, bound) = (publisher.side.networks(), publisher.side.bound());
        let now = Instant::now();
        let view = memory.view(consul, bound, docker, now);
        let (actions, mut notes) = plan(&view);
        let mut did = false;
        for action in actions {
            if let Some(note) = memory.failed_lately(&action, now) {
                notes.insert(note.to_owned());
                continue;
            }
            if over.now() {
                return Ok(None);
            }
            match take(publisher, &action).await {
                Ok(()) => did = true,
                Err(error) => {
                    let note = format!("{error:#}");
                    notes.insert(note.clone());
                    memory.failed(action, note, Instant::now());
                }
            }
        }
        rounds += 1;
        if !did || rounds == ROUNDS {
            return Ok(Some((view.docker, notes)));
        }
    }
}

async fn take<A: Api, S: Side>(publisher: &Publisher<A, S>, action: &Action) -> Result<()> {
    let Publisher { api, side, .. } = publisher;
    match action {
        Action::Unbind { docker_id, network } => {
            side.unbind(docker_id).await?;
            tracing::info!(network = network.name, docker_id, "Docker has this network no more");
        }
        Action::Restore { network } => {
            side.restore(network).await?;
            tracing::info!(network = network.name, "put a network back that Consul lost");
        }
        Action::Bind { docker_id, network } => {
            side.bind(docker_id, network)?;
            tracing::info!(network = network.name, docker_id, "found this network in Docker");
        }
        Action::Remove { docker_id, name, why } => {
            if *why == Removal::Duplicate {
                let used = api.endpoints_of(docker_id).await?;
                ensure!(
                    used.is_none_or(|used| used.is_empty()),
                    "Docker network {docker_id} is a second one for network {name}, and \
                     containers use it: remove them"
                );
            }
            publisher.remove(docker_id).await.with_context(|| match why {
                Removal::Deleted => format!("network {name} was deleted, but is on this host"),
                Removal::Duplicate => format!("network {name} is on this host twice"),
            })?;
            tracing::info!(network = name, docker_id, ?why, "removed a network from Docker");
        }
        Action::Publish { network } => publisher.publish(network).await?,
        Action::Create { network } => {
            let docker_id = publisher.create(network).await?;
            tracing::info!(network = network.name, docker_id, "made a network in Docker");
        }
    }
    Ok(())
}
