//! Consul's records and a host's wiring in memory, with faults on demand, for tests.

mod records;
mod samples;

use std::{
    collections::{BTreeMap, BTreeSet},
    net::Ipv4Addr,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard},
    time::Duration,
};

use anyhow::{Result, bail};
use ipnet::Ipv4Net;
use ovnet_common::abi::{DropEvent, PortCounters};
use tokio::sync::{Semaphore, broadcast};

use super::{Refusal, Service, VethRequest, Wiring, netns_of_name};
use crate::{
    api::types::{CounterView, Status},
    consul::schema::{EndpointRecord, NetworkRecord, PendingRecord},
    net::LooseVeth,
    peers::{self, Known},
    publish::{PublishedPort, reserve::Owner, spec::PortRequest},
    reconcile::Description,
    state::{GatewayPort, LocalEndpoint},
};

/// The host all fakes are.
pub(crate) const NODE: &str = "docker01";

pub(crate) use samples::{attach, local_endpoint, network, record};

pub(crate) type FakeService = Service<Fake, Fake>;

/// Clones share everything.
#[derive(Clone, Debug)]
pub(crate) struct Fake {
    state: Arc<Mutex<State>>,
    events: broadcast::Sender<DropEvent>,
}

#[derive(Debug, Default)]
struct State {
    networks: BTreeMap<String, NetworkRecord>,
    pending: BTreeMap<String, PendingRecord>,
    endpoints: BTreeMap<(String, Ipv4Addr), EndpointRecord>,
    links: BTreeSet<String>,
    gateways: BTreeMap<String, GatewayPort>,
    /// With the id of the endpoint each is reserved for.
    ports: BTreeMap<PublishedPort, String>,
    without_egress: bool,
    routed_netns: BTreeSet<String>,
    local: BTreeMap<String, LocalEndpoint>,
    lost_netns: BTreeSet<String>,
    calls: Vec<&'static str>,
    failing: BTreeSet<String>,
    held: Option<(String, Arc<Semaphore>)>,
}

/// Lets the held step go on when dropped.
pub(crate) struct Gate(Arc<Semaphore>);

impl Drop for Gate {
    fn drop(&mut self) {
        self.0.close();
    }
}

/// A service on a host where the networks given exist, and the fake behind it.
pub(crate) fn service(networks: &[&str]) -> (FakeService, Fake) {
    let fake = Fake { state: Arc::default(), events: broadcast::channel(4).0 };
    for (name, vni) in networks.iter().zip(4096..) {
        fake.state().networks.insert((*name).to_owned(), network(name, vni));
    }
    (Service::new(fake.clone(), fake.clone(), NODE, 4789), fake)
}

/// Waits until something is so, and fails when it never is.
pub(crate) async fn eventually(so: impl Fn() -> bool) {
    let wait = async {
        while !so() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(60), wait).await.expect("what was waited for");
}

impl Fake {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    /// Makes a call fail from now on; `""` ends all faults. With ` after`, it fails when its work
    /// is done; with ` once`, only the next time.
    pub(crate) fn fail(&self, call: &str) {
        let mut state = self.state();
        if call.is_empty() {
            state.failing.clear();
        } else {
            state.failing.insert(call.to_owned());
        }
    }

    /// Holds a call where it begins until the gate is dropped.
    pub(crate) fn hold(&self, call: &str) -> Gate {
        let gate = Arc::new(Semaphore::new(0));
        self.state().held = Some((call.to_owned(), Arc::clone(&gate)));
        Gate(gate)
    }

    /// Calls that come from now on are not held.
    pub(crate) fn let_others_pass(&self) {
        self.state().held = None;
    }

    pub(crate) fn lose_netns(&self, name: &str) {
        self.state().lost_netns.insert(name.to_owned());
    }

    /// The agent runs with `--egress off`.
    pub(crate) fn without_egress(&self) {
        self.state().without_egress = true;
    }

    /// The sandbox has a default route of its own.
    pub(crate) fn give_default_route(&self, name: &str) {
        self.state().routed_netns.insert(name.to_owned());
    }

    pub(crate) fn make_internal(&self, network_name: &str) {
        if let Some(network) = self.state().networks.get_mut(network_name) {
            network.internal = true;
        }
    }

    /// Host ends of the gateway ports there are.
    pub(crate) fn gateways(&self) -> Vec<String> {
        self.state().gateways.keys().cloned().collect()
    }

    /// Host ports that are reserved.
    pub(crate) fn reserved(&self) -> Vec<u16> {
        self.state().ports.keys().map(|it| it.host_port).collect()
    }

    pub(crate) fn put(&self, network_name: &str, record: EndpointRecord) {
        let mut state = self.state();
        let id = state.networks[network_name].id.clone();
        state.endpoints.insert((id, record.address), record);
    }

    pub(crate) fn pending_claims(&self) -> usize {
        self.state().pending.len()
    }

    pub(crate) fn records(&self) -> Vec<EndpointRecord> {
        self.state().endpoints.values().cloned().collect()
    }

    pub(crate) fn links(&self) -> Vec<String> {
        self.state().links.iter().cloned().collect()
    }

    pub(crate) fn calls(&self) -> Vec<&'static str> {
        self.state().calls.clone()
    }

    pub(crate) fn local(&self) -> Vec<LocalEndpoint> {
        Wiring::local(self)
    }

    pub(crate) fn emit(&self, event: DropEvent) {
        self.events.send(event).unwrap();
    }

    pub(crate) fn listeners(&self) -> usize {
        self.events.receiver_count()
    }

    async fn begin(&self, call: &'static str) -> Result<()> {
        let gate = {
            let mut state = self.state();
            state.calls.push(call);
            state.held.as_ref().filter(|(held, _)| held == call).map(|it| Arc::clone(&it.1))
        };
        if let Some(gate) = gate {
            // Closed, not acquired: that is how the gate opens.
            drop(gate.acquire().await);
        } else {
            tokio::task::yield_now().await;
        }
        let mut state = self.state();
        let once = state.failing.remove(&format!("{call} once"));
        if once || state.failing.contains(call) {
            bail!("{call} was told to fail");
        }
        Ok(())
    }
}

impl Wiring for Fake {
    fn resolve_netns(&self, path_or_name: &str) -> Result<PathBuf> {
        if path_or_name == "missing" || self.state().lost_netns.contains(path_or_name) {
            bail!("there is no network namespace {path_or_name}");
        }
        Ok(netns_of_name(path_or_name))
    }

    fn uplink_mtu(&self) -> u32 {
        1500
    }

    async fn routes(&self) -> Result<Vec<Ipv4Net>> {
        self.begin("routes").await?;
        Ok(vec![])
    }

    async fn create_veth(&self, request: &VethRequest) -> Result<String> {
        self.begin("create_veth").await?;
        self.state().links.insert(request.host_ifname.clone());
        Ok(request.ifname.clone().unwrap_or("eth0".into()))
    }

    async fn create_loose_veth(&self, request: &LooseVeth) -> Result<()> {
        self.begin("create_loose_veth").await?;
        self.state().links.insert(request.host_ifname.clone());
        Ok(())
    }

    async fn delete_link(&self, name: &str) -> Result<()> {
        self.begin("delete_link").await?;
        self.state().links.remove(name);
        Ok(())
    }

    fn egress(&self) -> bool {
        !self.state().without_egress
    }

    async fn has_default_route(&self, netns: &Path) -> Result<bool> {
        self.begin("has_default_route").await?;
        let name = netns.file_name().unwrap().to_str().unwrap();
        Ok(self.state().routed_netns.contains(name))
    }

    async fn local_addresses(&self) -> Result<Vec<Ipv4Addr>> {
        self.begin("local_addresses").await?;
        Ok(vec![[192, 168, 1, 11].into()])
    }

    async fn reserve_ports(
        &self,
        owner: Owner,
        requests: Vec<PortRequest>,
        _: Vec<Ipv4Addr>,
    ) -> Result<Vec<PublishedPort>> {
        self.begin("reserve_ports").await?;
        let mut state = self.state();
        let mut ports = Vec::new();
        for it in requests {
            let taken: BTreeSet<u16> =
                state.ports.keys().chain(&ports).map(|it| it.host_port).collect();
            let free = it.host_ports.unwrap_or(32768..=60999).find(|port| !taken.contains(port));
            let Some(host_port) = free else { return Err(Refusal::conflict("port in use")) };
            ports.push(PublishedPort {
                protocol: it.protocol,
                host_address: it.host_address.unwrap_or(Ipv4Addr::UNSPECIFIED),
                host_port,
                container_port: it.container_port,
            });
        }
        state.ports.extend(ports.iter().map(|it| (*it, owner.id.clone())));
        Ok(ports)
    }

    fn release_ports(&self, id: &str) {
        self.state().ports.retain(|_, owner| owner != id);
    }

    async fn create_gateway(&self, _: &Path, host_ifname: &str) -> Result<GatewayPort> {
        self.begin("create_gateway").await?;
        let mut state = self.state();
        let last = 2 + u8::try_from(state.gateways.len() % 200).unwrap();
        let gateway = GatewayPort {
            bridge: "ovnet_gwbridge".into(),
            host_ifname: host_ifname.into(),
            ifname: "eth1".into(),
            address: [172, 18, 0, last].into(),
            mac: format!("02:42:ac:12:00:{last:02x}"),
        };
        state.gateways.insert(host_ifname.to_owned(), gateway.clone());
        Ok(gateway)
    }

    async fn delete_gateway(&self, gateway: &GatewayPort) -> Result<()> {
        self.begin("delete_gateway").await?;
        self.state().gateways.remove(&gateway.host_ifname);
        Ok(())
    }

    fn local(&self) -> Vec<LocalEndpoint> {
        self.state().local.values().cloned().collect()
    }

    fn holds(&self, _id: &str) -> bool {
        false
    }

    async fn add_local(&self, endpoint: LocalEndpoint) -> Result<()> {
        // Remembered first: a failed add may leave the endpoint half there.
        self.state().local.insert(endpoint.record.id.clone(), endpoint);
        self.begin("add_local").await
    }

    async fn describe_local(&self, description: Description) -> Result<Option<LocalEndpoint>> {
        self.begin("describe_local").await?;
        let mut state = self.state();
        let Some(endpoint) = state.local.get_mut(&description.id) else { return Ok(None) };
        endpoint.record.names = description.names;
        if let Some(docker) = &mut endpoint.docker {
            docker.container = Some(description.container);
            endpoint.ports = description.ports;
        }
        Ok(Some(endpoint.clone()))
    }

    async fn remove_local(&self, id: &str) -> Result<()> {
        self.begin("remove_local").await?;
        let mut state = self.state();
        if let Some(endpoint) = state.local.remove(id) {
            state.links.remove(&endpoint.host_ifname);
        }
        Ok(())
    }

    fn status(&self) -> Status {
        Status {
            node: NODE.into(),
            agent: "0.1.0".into(),
            uplink: "ens33".into(),
            vtep: Some([192, 168, 1, 11].into()),
            uplink_mtu: 1500,
            consul: "192.168.1.11:8500".into(),
            consul_state: "connected".into(),
            xdp: "off".into(),
            tc: "tcx".into(),
            hosts: 3,
            networks: 1,
            local_endpoints: self.state().local.len(),
            published_ports: 0,
            flow_entries: 0,
            flow_capacity: 0,
            repairs: crate::repairs::Repairs::default(),
            unreadable_records: 0,
            state_files_set_aside: 0,
            peers: vec![],
            warnings: vec![],
            errors: vec![],
        }
    }

    fn peers(&self) -> BTreeMap<String, Known> {
        let known = Known {
            vtep: [192, 168, 1, 12].into(),
            mtu: 1500,
            state: peers::State::Unreachable,
            lasting: Duration::from_secs(37),
            round_trip: None,
        };
        BTreeMap::from([("docker02".to_owned(), known)])
    }

    fn counters(&self) -> Result<Vec<CounterView>> {
        Ok(vec![CounterView {
            program: "from_uplink".into(),
            verdict: "pass".into(),
            packets: 1,
            bytes: 60,
        }])
    }

    fn port_counters(&self, _: &str) -> Result<PortCounters> {
        Ok(PortCounters { tx_packets: 1, tx_bytes: 98, rx_packets: 2, rx_bytes: 196 })
    }

    fn events(&self) -> broadcast::Receiver<DropEvent> {
        self.events.subscribe()
    }
}
