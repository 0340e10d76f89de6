//! What is to be done so that this host's Docker and Consul's networks are the same. Pure.
//!
//! Absence is not an order (invariant 7): a Docker network is removed only where Consul answers
//! and the deletion of its network was read. A record that cannot be read is no deletion either.

#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};

use super::side::Networks;
use crate::{
    consul::schema::NetworkRecord,
    docker::daemon::{DRIVER, DockerNetwork},
};

/// Everything [`plan`] looks at. [`super::memory::Memory`] fills in what depends on time.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct View {
    /// Consul's networks.
    pub(super) consul: Networks,
    /// What the plugin knows of this host's Docker networks, by Docker's id.
    pub(super) bound: BTreeMap<String, NetworkRecord>,
    /// This host's Docker networks, those of other drivers too.
    pub(super) docker: Vec<DockerNetwork>,
    /// Of the bound ones, by Docker's id, those that may just be being made: Docker does not list
    /// them before they are whole.
    pub(super) fresh: BTreeSet<String>,
    /// The networks, by id, whose absence from Consul is a deletion.
    pub(super) settled: BTreeSet<String>,
    /// The networks, by id, whose Docker network went a moment ago: Consul may hear in a moment
    /// that a user removed it.
    pub(super) resting: BTreeSet<String>,
    /// Our driver's Docker networks, by Docker's id, that nobody knows although they had time.
    pub(super) strays: BTreeSet<String>,
}

/// One step.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Action {
    /// Forget a Docker network that is gone.
    Unbind { docker_id: String, network: NetworkRecord },
    /// Put a record back that Consul lost.
    Restore { network: NetworkRecord },
    /// Remember which network a Docker network stands for.
    Bind { docker_id: String, network: NetworkRecord },
    /// Remove a Docker network.
    Remove { docker_id: String, name: String, why: Removal },
    /// Publish what a user made here.
    Publish { network: DockerNetwork },
    /// Make this host's Docker network.
    Create { network: NetworkRecord },
}

/// Why a Docker network is to go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Removal {
    /// Its network was deleted.
    Deleted,
    /// An older Docker network stands for the same network.
    Duplicate,
}

/// The steps, in the order they are to be taken, and what stands in the way, one line each. What
/// one step makes possible comes in the plan after it.
pub(super) fn plan(view: &View) -> (Vec<Action>, BTreeSet<String>) {
    let mut plan = Plan::new(view);
    for (id, network) in &view.bound {
        plan.bound(id, network);
    }
    for network in ours(view) {
        if !view.bound.contains_key(&network.id) {
            plan.unbound(network);
        }
    }
    plan.duplicates();
    if view.consul.connected {
        for network in view.consul.read.iter().flat_map(BTreeMap::values) {
            plan.wanted(network);
        }
    }
    (plan.actions, plan.notes)
}

fn ours(view: &View) -> impl Iterator<Item = &DockerNetwork> {
    view.docker.iter().filter(|network| network.is_ours())
}

struct Plan<'a> {
    view: &'a View,
    /// Our driver's Docker networks by Docker's id.
    docker: BTreeMap<&'a str, &'a DockerNetwork>,
    /// Docker networks that stand for a network, by its id.
    standing: BTreeMap<&'a str, Vec<&'a DockerNetwork>>,
    /// Docker networks, by id, whose name will be free or given away by another step.
    leaving: BTreeSet<&'a str>,
    actions: Vec<Action>,
    notes: BTreeSet<String>,
}

impl<'a> Plan<'a> {
    fn new(view: &'a View) -> Self {
        Self {
            view,
            docker: ours(view).map(|network| (network.id.as_str(), network)).collect(),
            standing: BTreeMap::new(),
            leaving: BTreeSet::new(),
            actions: Vec::new(),
            notes: BTreeSet::new(),
        }
    }

    /// A Docker network the plugin knows.
    fn bound(&mut self, id: &'a str, network: &'a NetworkRecord) {
        let consul = &self.view.consul;
        let Some(&found) = self.docker.get(id) else {
            if !self.view.fresh.contains(id) {
                self.actions
                    .push(Action::Unbind { docker_id: id.into(), network: network.clone() });
            }
            return;
        };
        if network.name.is_empty() {
            self.leaving.insert(id);
            if consul.connected {
                self.actions.push(Action::Publish { network: found.clone() });
            } else {
                self.notes.insert(format!(
                    "network {} is on this host only: other hosts get it when Consul answers",
                    found.name
                ));
            }
            return;
        }
        if consul.unreadable.contains(&network.name) {
            self.unreadable(&network.name);
            return;
        }
        let gone = consul.read.is_some() && consul.by_id(&network.id).is_none();
        if consul.connected && consul.lost.contains(&network.name) {
            self.actions.push(Action::Restore { network: network.clone() });
        } else if consul.connected && gone && self.view.settled.contains(&network.id) {
            self.leaving.insert(id);
            self.actions.push(remove(found, Removal::Deleted));
            return;
        }
        self.standing.entry(&network.id).or_default().push(found);
    }

    /// A Docker network of our driver that the plugin does not know.
    fn unbound(&mut self, found: &'a DockerNetwork) {
        let consul = &self.view.consul;
        let network = match found.stands_for() {
            Some(id) => consul.by_id(id),
            None => {
                consul.by_name(&found.name).filter(|network| Some(network.subnet) == found.subnet)
            }
        };
        if let Some(network) = network {
            self.standing.entry(&network.id).or_default().push(found);
            self.actions
                .push(Action::Bind { docker_id: found.id.clone(), network: network.clone() });
        } else if consul.unreadable.contains(&found.name) {
            self.unreadable(&found.name);
        } else if consul.read.is_some() && self.view.strays.contains(&found.id) {
            self.notes.insert(format!(
                "Docker network {name} is no network of the cluster: remove it with `docker \
                 network rm {name}` and create it again",
                name = found.name
            ));
        }
    }

    /// A network whose record is there, whatever it says: it was not deleted.
    fn unreadable(&mut self, name: &str) {
        self.notes.insert(format!(
            "network {name} stays on this host as it is: its record in Consul cannot be read; \
             see the agent's log, and update ovnet where the record is newer"
        ));
    }

    /// What an interrupted create left: the older Docker network stays.
    fn duplicates(&mut self) {
        for found in self.standing.values_mut() {
            found.sort_by_key(|network| (age(network), network.id.as_str()));
            for later in &found[1..] {
                self.leaving.insert(&later.id);
                self.actions.push(remove(later, Removal::Duplicate));
            }
        }
    }

    /// A network of Consul, which answers.
    fn wanted(&mut self, network: &NetworkRecord) {
        let view = self.view;
        let here = self.standing.contains_key(network.id.as_str())
            || view.bound.values().any(|bound| bound.id == network.id);
        // A network that Consul lost is there again when a host that has it put it back.
        if here || view.resting.contains(&network.id) || view.consul.lost.contains(&network.name) {
            return;
        }
        match view.docker.iter().find(|other| other.name == network.name) {
            None => self.actions.push(Action::Create { network: network.clone() }),
            Some(other) if self.leaving.contains(other.id.as_str()) => {}
            // Ours gets a note of its own when it stays.
            Some(other) if other.driver == DRIVER => {}
            Some(other) => {
                self.notes.insert(format!(
                    "network {name} is not on this host: Docker has a network of driver {driver} \
                     by that name; remove it with `docker network rm {name}`",
                    name = network.name,
                    driver = other.driver
                ));
            }
        }
    }
}

fn remove(network: &DockerNetwork, why: Removal) -> Action {
    Action::Remove { docker_id: network.id.clone(), name: network.name.clone(), why }
}

/// When it was made, to be compared as text: Docker leaves zeros off the end of the fraction, and
/// the zone after it would be compared with the other's digits.
fn age(network: &DockerNetwork) -> &str {
    network.created.trim_end_matches('Z')
}
