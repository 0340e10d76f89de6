//! What a request does: the verbs of the API, each whole or not at all.
//!
//! The service decides the order of steps and undoes them when one fails. The steps themselves are
//! calls of two narrow traits, [`Records`] for what is in Consul and [`Wiring`] for what is in the
//! kernel, so tests run it on fakes in memory. [`attach`](self::Service::attach) is the one to read.

mod attach;
mod detach;
mod error;
#[cfg(test)]
pub(crate) mod fake;
mod gateways;
mod networks;
mod publish;
pub mod real;
mod release;
mod sandbox;
mod validate;
pub(crate) mod views;

use std::{
    collections::BTreeMap,
    net::Ipv4Addr,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError},
    time::Duration,
};

use anyhow::{Context as _, Result, anyhow};
use ipnet::Ipv4Net;
use ovnet_common::abi::{DropEvent, PortCounters};
use tokio::sync::broadcast;

pub use self::error::{Kind, Refusal, kind_of, one_line, with_advice};
use crate::{
    api::types::{CounterView, CreateNetwork, Status},
    consul::{
        Announced, Publish,
        schema::{EndpointRecord, HostRecord, NetworkRecord, PendingRecord},
    },
    net::LooseVeth,
    peers::Known,
    publish::{PublishedPort, reserve::Owner, spec::PortRequest},
    reconcile::Description,
    state::{GatewayPort, LocalEndpoint},
};

/// How long one call to Consul may take in the middle of an attach or detach. Longer than a claim
/// that goes on being beaten by other hosts: its own error says more.
const CONSUL_DEADLINE: Duration = Duration::from_secs(30);

/// An address to be claimed for an endpoint.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AddressClaim {
    /// Id of the endpoint.
    pub id: String,
    /// Name and aliases.
    pub names: Vec<String>,
    /// The address asked for; the next free one where absent.
    pub address: Option<Ipv4Addr>,
}

/// A veth pair to be made. Offloads are the implementation's business: it knows the datapath.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VethRequest {
    /// Name of the end that stays on the host.
    pub host_ifname: String,
    /// The sandbox.
    pub netns: PathBuf,
    /// Name of the end inside; the first free `eth<n>` where absent.
    pub ifname: Option<String>,
    /// MAC of the end inside.
    pub mac: [u8; 6],
    /// Address of the end inside, with the subnet's prefix length.
    pub address: Ipv4Net,
    /// MTU of both ends in bytes.
    pub mtu: u32,
}

/// The records in Consul, as far as requests need them. Every error names its object.
pub trait Records: Send + Sync + 'static {
    /// Claims name, VNI and subnet of a network in one transaction.
    fn create_network(
        &self,
        wanted: &CreateNetwork,
        local_routes: &[Ipv4Net],
    ) -> impl Future<Output = Result<NetworkRecord>> + Send;
    /// Claims a subnet, a free one of the pool where none is given, and a VNI for a network whose
    /// name follows.
    fn claim_pending(
        &self,
        subnet: Option<Ipv4Net>,
        ip_range: Option<Ipv4Net>,
        local_routes: &[Ipv4Net],
    ) -> impl Future<Output = Result<PendingRecord>> + Send;
    /// This host's claims whose networks have no name yet.
    fn pending(&self) -> impl Future<Output = Result<Vec<PendingRecord>>> + Send;
    /// Publishes a claimed network under its name.
    fn publish_network(
        &self,
        record: &NetworkRecord,
    ) -> impl Future<Output = Result<Publish>> + Send;
    /// Gives a claim up; one that is gone is no error.
    fn release_pending(&self, id: &str) -> impl Future<Output = Result<()>> + Send;
    /// Puts back a network that Consul lost.
    fn restore_network(&self, record: &NetworkRecord) -> impl Future<Output = Result<()>> + Send;
    /// Removes a network; refuses while any host has an endpoint in it.
    fn remove_network(
        &self,
        name_or_id: &str,
    ) -> impl Future<Output = Result<NetworkRecord>> + Send;
    /// All networks.
    fn networks(&self) -> impl Future<Output = Result<Vec<NetworkRecord>>> + Send;
    /// One network; an unknown one is an error.
    fn network(&self, name_or_id: &str) -> impl Future<Output = Result<NetworkRecord>> + Send;
    /// A network's endpoints on all hosts.
    fn endpoints(
        &self,
        network_id: &str,
    ) -> impl Future<Output = Result<Vec<EndpointRecord>>> + Send;
    /// All hosts, each with whether its lease stands.
    fn hosts(&self) -> impl Future<Output = Result<Vec<(HostRecord, bool)>>> + Send;
    /// Claims an address; the record it returns is `reserved`.
    fn claim_address(
        &self,
        network: &NetworkRecord,
        claim: &AddressClaim,
    ) -> impl Future<Output = Result<EndpointRecord>> + Send;
    /// Writes an endpoint's record as `up`. `claimed_as` is the id its address was claimed under
    /// where that was not the endpoint's own.
    fn publish_endpoint(
        &self,
        network: &NetworkRecord,
        record: &EndpointRecord,
        claimed_as: Option<&str>,
    ) -> impl Future<Output = Result<()>> + Send;
    /// Deletes an endpoint's record while it is still ours; one that is gone is no error.
    fn release_endpoint(
        &self,
        network_id: &str,
        record: &EndpointRecord,
    ) -> impl Future<Output = Result<()>> + Send;
}

/// The kernel's side of this host, as far as requests need it.
pub trait Wiring: Send + Sync + 'static {
    /// The path of a sandbox given by path or by name; an error where it is no network namespace.
    fn resolve_netns(&self, path_or_name: &str) -> Result<PathBuf>;
    /// MTU of the uplink in bytes, as last seen.
    fn uplink_mtu(&self) -> u32;
    /// The destinations this host has routes to, the default route left out.
    fn routes(&self) -> impl Future<Output = Result<Vec<Ipv4Net>>> + Send;
    /// Makes a veth pair and returns the name of its end inside; leaves nothing where it fails.
    fn create_veth(&self, request: &VethRequest) -> impl Future<Output = Result<String>> + Send;
    /// Makes a veth pair whose inner end somebody else moves into a sandbox, names and addresses;
    /// leaves nothing where it fails.
    fn create_loose_veth(&self, request: &LooseVeth) -> impl Future<Output = Result<()>> + Send;
    /// Deletes a link; one that is gone is no error.
    fn delete_link(&self, name: &str) -> impl Future<Output = Result<()>> + Send;
    /// Whether sandboxes are given a way out (`--egress`).
    fn egress(&self) -> bool;
    /// Whether a sandbox has a default route of its own.
    fn has_default_route(&self, netns: &Path) -> impl Future<Output = Result<bool>> + Send;
    /// This host's own IPv4 addresses, those of loopback left out.
    fn local_addresses(&self) -> impl Future<Output = Result<Vec<Ipv4Addr>>> + Send;
    /// Reserves host ports for an endpoint, all or none, in the order asked. `local_addresses` are
    /// those they may be published on.
    fn reserve_ports(
        &self,
        owner: Owner,
        requests: Vec<PortRequest>,
        local_addresses: Vec<Ipv4Addr>,
    ) -> impl Future<Output = Result<Vec<PublishedPort>>> + Send;
    /// Frees the host ports of an endpoint; none is no error.
    fn release_ports(&self, id: &str);
    /// Gives a sandbox a way out: a port of the gwbridge with the default route. Leaves nothing
    /// where it fails. Its address stays taken until an endpoint that has it was added, or until
    /// it is deleted.
    fn create_gateway(
        &self,
        netns: &Path,
        host_ifname: &str,
    ) -> impl Future<Output = Result<GatewayPort>> + Send;
    /// Takes a sandbox's way out away; one that is gone is no error.
    fn delete_gateway(&self, gateway: &GatewayPort) -> impl Future<Output = Result<()>> + Send;
    /// The endpoints of this host.
    fn local(&self) -> Vec<LocalEndpoint>;
    /// Whether the endpoint is one of this host whose state is lost: it is none of [`Self::local`],
    /// and may be used all the same.
    fn holds(&self, id: &str) -> bool;
    /// Remembers an endpoint and wires it.
    fn add_local(&self, endpoint: LocalEndpoint) -> impl Future<Output = Result<()>> + Send;
    /// Adds to an endpoint what was learned of it; `None` where it is not there any more.
    fn describe_local(
        &self,
        description: Description,
    ) -> impl Future<Output = Result<Option<LocalEndpoint>>> + Send;
    /// Forgets an endpoint, unwires it and deletes its veth; idempotent.
    fn remove_local(&self, id: &str) -> impl Future<Output = Result<()>> + Send;
    /// What `ovnet status` shows.
    fn status(&self) -> Status;
    /// The hosts that are asked whether VXLAN gets through to them, by name.
    fn peers(&self) -> BTreeMap<String, Known>;
    /// What `ovnet counters` shows, zeroes included.
    fn counters(&self) -> Result<Vec<CounterView>>;
    /// Packets and bytes of an endpoint.
    fn port_counters(&self, host_ifname: &str) -> Result<PortCounters>;
    /// Sampled drops from now on.
    fn events(&self) -> broadcast::Receiver<DropEvent>;
}

/// Carries requests out. Clones share everything.
#[derive(Debug)]
pub struct Service<R, W> {
    shared: Arc<Shared<R, W>>,
}

#[derive(Debug)]
struct Shared<R, W> {
    records: R,
    wiring: W,
    node: String,
    vxlan_port: u16,
    sandboxes: sandbox::Locks,
    /// Endpoints between their claim and their place among the local ones: theirs are no orphans.
    /// By the endpoint's id, each with its network.
    attaching: Mutex<BTreeMap<String, NetworkRecord>>,
    /// Networks, by id, in which something ended since they were last found without orphans.
    touched: Mutex<BTreeMap<String, NetworkRecord>>,
    announced: OnceLock<Announced>,
}

impl<R, W> Clone for Service<R, W> {
    fn clone(&self) -> Self {
        Self { shared: Arc::clone(&self.shared) }
    }
}

impl<R: Records, W: Wiring> Service<R, W> {
    /// A service for the host `node`, which receives VXLAN on `vxlan_port` (host byte order).
    pub fn new(records: R, wiring: W, node: impl Into<String>, vxlan_port: u16) -> Self {
        Self {
            shared: Arc::new(Shared {
                records,
                wiring,
                node: node.into(),
                vxlan_port,
                sandboxes: sandbox::Locks::default(),
                attaching: Mutex::default(),
                touched: Mutex::default(),
                announced: OnceLock::new(),
            }),
        }
    }

    /// The name of this host.
    pub fn node(&self) -> &str {
        &self.shared.node
    }

    /// The UDP port VXLAN is received on, host byte order: what drop summaries look for.
    pub fn vxlan_port(&self) -> u16 {
        self.shared.vxlan_port
    }

    /// The kernel's side: status, counters and events need nothing of the service itself.
    pub fn wiring(&self) -> &W {
        &self.shared.wiring
    }

    /// What is in Consul.
    pub(crate) fn records(&self) -> &R {
        &self.shared.records
    }

    /// Says that an address is about to be claimed, or released, under this id: until
    /// [`Self::end`] nobody takes its record for an orphan, and afterwards the sweep has a look.
    pub(crate) fn begin(&self, network: &NetworkRecord, id: &str) {
        self.attaching().insert(id.to_owned(), network.clone());
    }

    /// Says that what was begun is over, whatever came of it.
    pub(crate) fn end(&self, id: &str) {
        let network = self.attaching().remove(id);
        if let Some(network) = network {
            self.touched().insert(network.id.clone(), network);
        }
    }

    /// Makes this host's lease a condition of releasing records of this host on its own account.
    pub fn set_announced(&self, announced: Announced) {
        // A second one would be the same lease's.
        let _ = self.shared.announced.set(announced);
    }

    /// Whether the records of this host's name are this machine's to release.
    pub(crate) fn is_announced(&self) -> bool {
        self.shared.announced.get().is_none_or(Announced::now)
    }

    fn touched(&self) -> MutexGuard<'_, BTreeMap<String, NetworkRecord>> {
        self.shared.touched.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn attaching(&self) -> MutexGuard<'_, BTreeMap<String, NetworkRecord>> {
        // The map is never left half changed, so a panic elsewhere does not make it wrong.
        self.shared.attaching.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Carries work out to its end even when whoever waits for it goes away: a client that disconnects
/// drops its handler's future in the middle, and half an attach must not be what remains.
async fn carried_out<T: Send + 'static>(
    work: impl Future<Output = Result<T>> + Send + 'static,
) -> Result<T> {
    match tokio::spawn(work).await {
        Ok(result) => result,
        Err(error) => Err(anyhow!("the agent gave the request up: {error}")),
    }
}

/// Bounds one call to Consul.
async fn in_time<T>(what: &str, call: impl Future<Output = Result<T>>) -> Result<T> {
    tokio::time::timeout(CONSUL_DEADLINE, call)
        .await
        .with_context(|| format!("{what}: Consul took longer than {CONSUL_DEADLINE:?}"))?
}

/// Whether `text` is the start of `id` that `ovnet … ls` prints, or more of it. Fewer than four
/// characters are more likely a mistyped name.
fn is_prefix(text: &str, id: &str) -> bool {
    text.len() >= 4 && id.starts_with(text)
}

fn netns_of_name(path_or_name: &str) -> PathBuf {
    if path_or_name.contains('/') {
        PathBuf::from(path_or_name)
    } else {
        Path::new("/run/netns").join(path_or_name)
    }
}
