//! Who asks: the networks of the container that has a source address.
//!
//! A query comes from any address inside a container, of an overlay or of docker_gwbridge, whose
//! addresses only Docker and the kernel know. So the addresses inside the sandboxes of this host's
//! endpoints are listed, which works for every runtime, and what was found is remembered. An
//! address is given to another container as soon as its own has stopped, and docker_gwbridge's
//! appears a moment after the overlay's; so what is remembered counts only while the very endpoint
//! it was found with exists, and is looked at again after [`FRESH`]. What is not remembered is
//! looked for, in scans that all who wait share and of which there are at most four a second where
//! they find nothing.

use std::{
    collections::{HashMap, HashSet},
    net::Ipv4Addr,
    path::{Path, PathBuf},
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use anyhow::Result;

use super::server::Networks;
use crate::consul::schema::NetworkRecord;

/// How long an address that was found is believed to be where it was.
pub const FRESH: Duration = Duration::from_secs(3);
/// How long an address that was not found is believed to be nobody's, unless endpoints come or go.
pub const UNKNOWN: Duration = Duration::from_secs(1);
/// Least time between the starts of two scans, whatever is asked.
pub const SCANS: Duration = Duration::from_millis(250);
/// Most addresses remembered as nobody's. Sources can be forged; forgetting costs a scan.
const MOST_UNKNOWN: usize = 1024;

/// An endpoint of this host, as far as it tells who asks.
#[derive(Clone, Debug)]
pub struct Sandbox {
    /// Id of the endpoint.
    pub endpoint: String,
    /// The network it is on.
    pub network: NetworkRecord,
    /// Path of its network namespace.
    pub netns: PathBuf,
}

/// Where endpoints and addresses are looked up.
pub trait Places: Send + Sync + 'static {
    /// Ids of this host's endpoints, in a fixed order. Asked for with every query.
    fn endpoints(&self) -> Vec<String>;
    /// This host's endpoints.
    fn sandboxes(&self) -> Vec<Sandbox>;
    /// What tells one namespace from another (device and inode), however its path is spelled;
    /// `None` where it is gone.
    fn identity(&self, netns: &Path) -> Option<(u64, u64)>;
    /// The IPv4 addresses inside a namespace.
    fn addresses(&self, netns: &Path) -> impl Future<Output = Result<Vec<Ipv4Addr>>> + Send;
}

/// The memory of who has which address.
#[derive(Debug)]
pub struct Askers<P> {
    places: P,
    memory: Mutex<Memory>,
    /// Held by the one scan that is under way; when the last that looked everywhere began.
    scan: tokio::sync::Mutex<Option<Instant>>,
}

#[derive(Debug, Default)]
struct Memory {
    /// The endpoints as of the last query.
    endpoints: Vec<String>,
    /// Their sandboxes.
    groups: Vec<Group>,
    /// Addresses, each with an endpoint in whose sandbox it was seen, and when.
    found: HashMap<Ipv4Addr, (String, Instant)>,
    /// Endpoints whose sandboxes were looked into.
    looked: HashSet<String>,
    /// Addresses that are in no sandbox, and since when that is known.
    unknown: HashMap<Ipv4Addr, Instant>,
}

/// A network namespace with all endpoints that are in it.
#[derive(Clone, Debug)]
struct Group {
    identity: (u64, u64),
    netns: PathBuf,
    endpoints: Vec<String>,
    networks: Networks,
}

impl<P: Places> Askers<P> {
    /// Nothing is known yet.
    pub fn new(places: P) -> Self {
        Self { places, memory: Mutex::default(), scan: tokio::sync::Mutex::default() }
    }

    /// The networks of who has the address, none for a stranger; `None` where that takes looking.
    pub fn known(&self, source: Ipv4Addr) -> Option<Networks> {
        let memory = self.memory();
        if let Some((endpoint, at)) = memory.found.get(&source) {
            let fresh = at.elapsed() < FRESH;
            return memory.group_of(endpoint).filter(|_| fresh).map(|it| it.networks.clone());
        }
        let since = memory.unknown.get(&source)?;
        (since.elapsed() < UNKNOWN).then(Networks::default)
    }

    /// As [`Askers::known`], looking where needed. Takes at most a scan that is under way, the
    /// pause after it, and another one.
    pub async fn find(&self, source: Ipv4Addr) -> Networks {
        let asked = Instant::now();
        let mut everywhere = self.scan.lock().await;
        // Another may have found it while we waited, or found that it is nobody's. A scan that
        // began before we asked may have passed our sandbox before our address was in it.
        if let Some(networks) = self.known(source) {
            return networks;
        }
        if let Some(began) = *everywhere {
            if began >= asked {
                return Networks::default();
            }
            if !self.may_be_cheap(source) {
                tokio::time::sleep_until((began + SCANS).into()).await;
            }
        }
        let began = Instant::now();
        match self.scan(source).await {
            Some(networks) => networks,
            None => {
                *everywhere = Some(began);
                Networks::default()
            }
        }
    }

    /// Whether there is a sandbox that is most likely the asker's, so that no scan of all will be
    /// needed: the one it was in before, or one never looked into.
    fn may_be_cheap(&self, source: Ipv4Addr) -> bool {
        let memory = self.memory();
        memory.found.contains_key(&source) || memory.groups.iter().any(|it| memory.is_new(it))
    }

    /// Looks into the sandboxes: first where the address was before, then into all that were
    /// never looked into, as most who are unknown have just been started; into the others only
    /// while it is not found. `None` where it is nowhere.
    async fn scan(&self, source: Ipv4Addr) -> Option<Networks> {
        let (endpoints, mut groups) = {
            let mut memory = self.memory();
            let before = memory.found.remove(&source).map(|(endpoint, _)| endpoint);
            let rank = |group: &Group| match &before {
                Some(endpoint) if group.endpoints.contains(endpoint) => 0,
                _ if memory.is_new(group) => 1,
                _ => 2,
            };
            let groups: Vec<_> = memory.groups.iter().map(|it| (rank(it), it.clone())).collect();
            (memory.endpoints.clone(), groups)
        };
        groups.sort_by_key(|(rank, _)| *rank);
        let mut networks = None;
        for (rank, group) in groups {
            if networks.is_some() && rank != 1 {
                break;
            }
            // It may be gone: its container may be about to stop.
            let inside = self.places.addresses(&group.netns).await.unwrap_or_else(|error| {
                tracing::debug!("look for who asks: {error:#}");
                Vec::new()
            });
            if inside.contains(&source) {
                networks = Some(group.networks.clone());
            }
            self.memory().remember(&group, inside);
        }
        let mut memory = self.memory();
        // Where an endpoint came meanwhile it was not looked into.
        if networks.is_none() && memory.endpoints == endpoints {
            if memory.unknown.len() >= MOST_UNKNOWN {
                memory.unknown.clear();
            }
            memory.unknown.insert(source, Instant::now());
        }
        networks
    }

    /// The memory, without what it remembers of endpoints that are gone.
    fn memory(&self) -> MutexGuard<'_, Memory> {
        let endpoints = self.places.endpoints();
        // Every change leaves it whole.
        let mut memory = self.memory.lock().unwrap_or_else(PoisonError::into_inner);
        if memory.endpoints != endpoints {
            memory.endpoints = endpoints;
            memory.unknown.clear();
            memory.groups = self.group();
            let Memory { groups, found, looked, .. } = &mut *memory;
            let exists = |of: &String| groups.iter().any(|group| group.endpoints.contains(of));
            found.retain(|_, (of, _)| exists(of));
            looked.retain(exists);
        }
        memory
    }

    /// The sandboxes, each once, with all endpoints in it.
    fn group(&self) -> Vec<Group> {
        let mut groups: Vec<Group> = Vec::new();
        for Sandbox { endpoint, network, netns } in self.places.sandboxes() {
            let Some(identity) = self.places.identity(&netns) else { continue };
            match groups.iter_mut().find(|group| group.identity == identity) {
                Some(group) => {
                    group.endpoints.push(endpoint);
                    group.networks = group.networks.iter().cloned().chain([network]).collect();
                }
                None => groups.push(Group {
                    identity,
                    netns,
                    endpoints: vec![endpoint],
                    networks: [network].into(),
                }),
            }
        }
        groups
    }
}

impl Memory {
    fn group_of(&self, endpoint: &String) -> Option<&Group> {
        self.groups.iter().find(|group| group.endpoints.contains(endpoint))
    }

    /// Whether it was not looked into since one of its endpoints came.
    fn is_new(&self, group: &Group) -> bool {
        group.endpoints.iter().any(|endpoint| !self.looked.contains(endpoint))
    }

    /// Takes in the addresses inside a sandbox. The endpoint that vouches for them is its first:
    /// where that goes, the addresses are looked for again.
    fn remember(&mut self, group: &Group, inside: Vec<Ipv4Addr>) {
        self.found.retain(|_, (endpoint, _)| !group.endpoints.contains(endpoint));
        let still = |endpoint: &&String| self.group_of(endpoint).is_some();
        // It may have gone while its sandbox was looked into.
        let Some(endpoint) = group.endpoints.first().filter(still) else { return };
        self.looked.extend(group.endpoints.iter().cloned());
        for address in inside {
            self.unknown.remove(&address);
            self.found.insert(address, (endpoint.clone(), Instant::now()));
        }
    }
}

#[cfg(test)]
mod tests;
