//! What this host remembers of its Docker's networks, and of the claims between two calls.
//!
//! Docker's calls come one by one and name things by ids of its own: a pool, then addresses of the
//! pool, then a network, then endpoints. The book knows which network of ovnet each is about. What
//! must outlive the agent (Docker calls again with the same ids) is a file per Docker network; the
//! rest is between two calls, and lost calls are made good by Consul's records and by time.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::Ipv4Addr,
    path::Path,
    sync::{Mutex, MutexGuard, PoisonError},
    time::Instant,
};

use anyhow::{Context as _, Result};
use serde::{Deserialize, Serialize};

use crate::{
    consul::schema::{EndpointRecord, NetworkRecord, PendingRecord},
    durable::Folder,
};

/// A Docker network of this host that stands for a network of ovnet.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Bound {
    /// Docker's id of the network.
    pub docker: String,
    /// The network; its name is empty until Docker has told it.
    pub network: NetworkRecord,
    /// The Consul it was last seen in; see [`crate::consul::Snapshot::identity`].
    #[serde(default)]
    pub consul: Option<String>,
}

/// A subnet claimed for a network that Docker is making.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Making {
    pub(super) claim: PendingRecord,
    pub(super) gateway: Option<Ipv4Addr>,
    pub(super) since: Instant,
}

/// An address that Docker asked for and no endpoint has, yet or any more.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Reservation {
    pub(super) network: NetworkRecord,
    pub(super) record: EndpointRecord,
    pub(super) since: Instant,
}

/// An endpoint between its creation and its join.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Created {
    /// The record as it will be announced.
    pub(super) record: EndpointRecord,
    pub(super) bound: Bound,
    /// The id its address was claimed under.
    pub(super) claimed_as: String,
    pub(super) since: Instant,
}

/// The book.
#[derive(Debug)]
pub struct Book {
    folder: Folder,
    pages: Mutex<Pages>,
}

#[derive(Debug, Default)]
pub(super) struct Pages {
    /// By Docker's id of the network.
    pub(super) bound: BTreeMap<String, Bound>,
    /// By the network's id, which is the pool's, too.
    pub(super) making: BTreeMap<String, Making>,
    /// By the network's id and the address.
    pub(super) reserved: BTreeMap<(String, Ipv4Addr), Reservation>,
    /// By the endpoint's id.
    pub(super) created: BTreeMap<String, Created>,
    /// Docker networks whose removal the agent asked for.
    pub(super) removing: BTreeSet<String>,
    /// Networks, by their own id, that the agent is having Docker make.
    pub(super) creating: BTreeSet<String>,
}

impl Book {
    /// Opens the folder `docker` of the state folder. A file that cannot be read is set aside: its
    /// network is found again by its name.
    pub fn open(state_dir: &Path) -> Result<Self> {
        let folder = Folder::open(&state_dir.join("docker"))?;
        let bound = folder.load(|bound: &Bound| &bound.docker)?.objects;
        let bound = bound.into_iter().map(|bound| (bound.docker.clone(), bound)).collect();
        let pages = Pages { bound, ..Pages::default() };
        Ok(Self { folder, pages: Mutex::new(pages) })
    }

    /// Remembers what a Docker network stands for, on disk before this returns.
    pub fn bind(&self, bound: Bound) -> Result<()> {
        self.folder.store(&bound.docker, &bound).context("keep the network's state")?;
        self.pages().bound.insert(bound.docker.clone(), bound);
        Ok(())
    }

    /// Forgets a Docker network.
    pub fn unbind(&self, docker: &str) -> Result<()> {
        self.pages().bound.remove(docker);
        self.folder.remove(docker).context("forget the network's state")
    }

    /// What a Docker network stands for.
    pub fn bound(&self, docker: &str) -> Option<Bound> {
        self.pages().bound.get(docker).cloned()
    }

    /// Everything bound, by Docker's id.
    pub fn all(&self) -> BTreeMap<String, Bound> {
        self.pages().bound.clone()
    }

    /// The bound network of this id of ovnet.
    pub fn of_network(&self, network: &str) -> Option<Bound> {
        self.pages().bound.values().find(|bound| bound.network.id == network).cloned()
    }

    pub(super) fn pages(&self) -> MutexGuard<'_, Pages> {
        // Every change of a page is one insertion or removal.
        self.pages.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::service::fake;

    #[test]
    fn what_is_bound_outlives_the_agent_and_what_is_unbound_does_not() {
        let folder = tempfile::tempdir().unwrap();
        let bound = |docker: &str| Bound {
            docker: docker.into(),
            consul: None,
            network: fake::network("ov_net1", 4096),
        };
        let book = Book::open(folder.path()).unwrap();
        book.bind(bound("aa")).unwrap();
        book.bind(bound("bb")).unwrap();
        book.unbind("bb").unwrap();
        book.unbind("bb").unwrap();
        std::fs::write(folder.path().join("docker/cc.json"), "{").unwrap();
        let book = Book::open(folder.path()).unwrap();
        assert_eq!(book.bound("aa"), Some(bound("aa")));
        assert_eq!(book.all().len(), 1);
        assert_eq!(book.of_network(&bound("aa").network.id), Some(bound("aa")));
    }
}
