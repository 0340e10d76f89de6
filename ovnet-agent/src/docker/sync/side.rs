//! Our side of the two that are kept the same: Consul's networks, and what the plugin knows.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use anyhow::Result;
use tokio::sync::{Notify, watch};

pub use crate::consul::Publish;
use crate::{consul::schema::NetworkRecord, reconcile::Description, state::LocalEndpoint};

/// Consul's networks as last read.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Networks {
    /// By name; `None` until they were read once.
    pub read: Option<BTreeMap<String, NetworkRecord>>,
    /// Names of those whose record vanished with Consul's data rather than by a deletion.
    pub lost: BTreeSet<String>,
    /// Names of those whose record is there, but cannot be read: it may be of a newer version.
    /// `read` has what it said before, where this agent saw that.
    pub unreadable: BTreeSet<String>,
    /// Whether Consul answers.
    pub connected: bool,
}

impl Networks {
    /// The network with an id.
    pub fn by_id(&self, id: &str) -> Option<&NetworkRecord> {
        self.read.as_ref()?.values().find(|network| network.id == id)
    }

    /// The network with a name.
    pub fn by_name(&self, name: &str) -> Option<&NetworkRecord> {
        self.read.as_ref()?.get(name)
    }
}

/// What the task needs of the plugin and of Consul. Clones share everything; every call is bounded
/// in time and every error names its object.
pub trait Side: Clone + Send + Sync + 'static {
    /// Consul's networks as last read.
    fn networks(&self) -> Networks;
    /// Wakes up when any of them may have changed.
    fn changed(&self) -> watch::Receiver<u64>;
    /// Wakes up when a CreateNetwork was answered and its network waits for its name.
    fn created(&self) -> Arc<Notify>;
    /// The Docker networks of this host that we remember, by Docker's id. The name is empty where
    /// a user made it here and it is not published yet.
    fn bound(&self) -> BTreeMap<String, NetworkRecord>;
    /// Publishes a network made here by a user under the name Docker gave it. What [`Self::bound`]
    /// says has that name once this returns.
    fn publish(
        &self,
        docker_id: &str,
        name: &str,
        labels: BTreeMap<String, String>,
    ) -> impl Future<Output = Result<Publish>> + Send;
    /// Remembers that this Docker network stands for this network; idempotent.
    fn bind(&self, docker_id: &str, network: &NetworkRecord) -> Result<()>;
    /// Forgets a Docker network that is gone, giving back what was claimed for it where it was
    /// never published; idempotent.
    fn unbind(&self, docker_id: &str) -> impl Future<Output = Result<()>> + Send;
    /// Marks networks, by their own id, for which we are making a Docker network: where Docker
    /// gives up in the middle, it has the plugin delete what the plugin made, which is no user's
    /// order either.
    fn creating(&self, network_id: &str, yes: bool);
    /// Marks Docker networks whose removal we asked for ourselves, so that the plugin does not take
    /// it for a user's order.
    fn removing(&self, docker_id: &str, yes: bool);
    /// Puts a network back that Consul lost.
    fn restore(&self, network: &NetworkRecord) -> impl Future<Output = Result<()>> + Send;
    /// The endpoints of this host that Docker made.
    fn endpoints(&self) -> Vec<LocalEndpoint>;
    /// Removes an endpoint that Docker has no more; idempotent.
    fn remove_endpoint(&self, id: &str) -> impl Future<Output = Result<()>> + Send;
    /// Says which container an endpoint belongs to, what it is called and which ports lead to it.
    fn describe_endpoint(
        &self,
        description: Description,
    ) -> impl Future<Output = Result<()>> + Send;
    /// Takes what stands in the way, one line each, for `ovnet status`: all there is now, none where
    /// all is well.
    fn note(&self, notes: BTreeSet<String>);
}
