//! The traits of the service on Consul and this host's kernel.

use std::{
    collections::BTreeMap,
    net::Ipv4Addr,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result};
use ipnet::Ipv4Net;
use ovnet_common::abi::{DropEvent, PortCounters};
use tokio::sync::broadcast;

use super::{AddressClaim, Records, VethRequest, Wiring, gateways::Gateways};
use crate::{
    api::types::{CounterView, CreateNetwork, Status},
    consul::{
        Consul, Publish,
        claims::{Claim, Pool},
        schema::{EndpointRecord, HostRecord, NetworkRecord, PendingRecord},
    },
    net::{self, GatewaySpec, LooseVeth, Net, VethSpec},
    peers::Known,
    publish::{
        PublishedPort,
        reserve::{Owner, Reservations},
        spec::PortRequest,
    },
    reconcile::{Description, Reconciler},
    repairs::Repairs,
    state::{GatewayPort, LocalEndpoint},
};

/// [`Records`] of a real Consul.
#[derive(Clone)]
pub struct ConsulRecords {
    /// The client.
    pub consul: Consul,
    /// Where subnets nobody named come from.
    pub pool: Pool,
}

impl Records for ConsulRecords {
    async fn create_network(
        &self,
        wanted: &CreateNetwork,
        local_routes: &[Ipv4Net],
    ) -> Result<NetworkRecord> {
        self.consul.create_network(wanted, &self.pool, local_routes).await
    }

    async fn claim_pending(
        &self,
        subnet: Option<Ipv4Net>,
        ip_range: Option<Ipv4Net>,
        local_routes: &[Ipv4Net],
    ) -> Result<PendingRecord> {
        self.consul.claim_pending(subnet, ip_range, &self.pool, local_routes).await
    }

    async fn pending(&self) -> Result<Vec<PendingRecord>> {
        self.consul.pending().await
    }

    async fn publish_network(&self, record: &NetworkRecord) -> Result<Publish> {
        self.consul.publish_network(record).await
    }

    async fn release_pending(&self, id: &str) -> Result<()> {
        self.consul.release_pending(id).await
    }

    async fn restore_network(&self, record: &NetworkRecord) -> Result<()> {
        self.consul.restore_network(record).await
    }

    async fn remove_network(&self, name_or_id: &str) -> Result<NetworkRecord> {
        self.consul.remove_network(name_or_id).await
    }

    async fn networks(&self) -> Result<Vec<NetworkRecord>> {
        self.consul.networks().await
    }

    async fn network(&self, name_or_id: &str) -> Result<NetworkRecord> {
        self.consul.network(name_or_id).await
    }

    async fn endpoints(&self, network_id: &str) -> Result<Vec<EndpointRecord>> {
        self.consul.endpoints(network_id).await
    }

    async fn hosts(&self) -> Result<Vec<(HostRecord, bool)>> {
        let hosts = self.consul.hosts().await?;
        Ok(hosts.into_values().map(|entry| (entry.record, entry.locked)).collect())
    }

    async fn claim_address(
        &self,
        network: &NetworkRecord,
        claim: &AddressClaim,
    ) -> Result<EndpointRecord> {
        let AddressClaim { id, names, address } = claim.clone();
        self.consul.claim_address(network, &Claim { id, names, address, mac: None }).await
    }

    async fn publish_endpoint(
        &self,
        network: &NetworkRecord,
        record: &EndpointRecord,
        claimed_as: Option<&str>,
    ) -> Result<()> {
        self.consul.publish_claimed(network, record, claimed_as).await
    }

    async fn release_endpoint(&self, network_id: &str, record: &EndpointRecord) -> Result<()> {
        self.consul.release_endpoint(network_id, record).await
    }
}

/// [`Wiring`] of this host.
#[derive(Clone)]
pub struct HostWiring {
    /// Owns the endpoints and what the kernel has of them.
    pub reconciler: Reconciler,
    /// Links, routes, namespaces.
    pub net: Net,
    /// The ports of this host that are published.
    pub reservations: Reservations,
    egress: Option<Option<Ipv4Net>>,
    gateways: Gateways,
}

impl HostWiring {
    /// This host's wiring. `egress` is absent where sandboxes are given no way out, and else the
    /// subnet asked for `ovnet_gwbridge`, if one was.
    pub fn new(
        reconciler: Reconciler,
        net: Net,
        reservations: Reservations,
        egress: Option<Option<Ipv4Net>>,
    ) -> Self {
        Self { reconciler, net, reservations, egress, gateways: Gateways::default() }
    }
}

impl Wiring for HostWiring {
    fn resolve_netns(&self, path_or_name: &str) -> Result<PathBuf> {
        net::resolve_netns(path_or_name)
    }

    fn uplink_mtu(&self) -> u32 {
        self.reconciler.uplink().link.mtu
    }

    async fn routes(&self) -> Result<Vec<Ipv4Net>> {
        self.net.routes().await
    }

    async fn create_veth(&self, request: &VethRequest) -> Result<String> {
        let VethRequest { host_ifname, netns, ifname, mac, address, mtu } = request.clone();
        let offloads = self.reconciler.sandbox_offloads();
        let spec = VethSpec { host_ifname, netns, ifname, mac, address, mtu, offloads };
        Ok(self.net.create_veth(&spec).await?.ifname)
    }

    async fn create_loose_veth(&self, request: &LooseVeth) -> Result<()> {
        self.net.create_loose_veth(request, self.reconciler.sandbox_offloads()).await
    }

    async fn delete_link(&self, name: &str) -> Result<()> {
        self.net.delete_link(name).await
    }

    fn egress(&self) -> bool {
        self.egress.is_some()
    }

    async fn has_default_route(&self, netns: &Path) -> Result<bool> {
        self.net.has_default_route(netns).await
    }

    async fn local_addresses(&self) -> Result<Vec<Ipv4Addr>> {
        self.net.local_addresses().await
    }

    async fn reserve_ports(
        &self,
        owner: Owner,
        requests: Vec<PortRequest>,
        local_addresses: Vec<Ipv4Addr>,
    ) -> Result<Vec<PublishedPort>> {
        let reservations = self.reservations.clone();
        // Whoever has a port is looked for in `/proc`, process by process.
        tokio::task::spawn_blocking(move || {
            reservations.reserve(&owner, &requests, &local_addresses)
        })
        .await
        .context("reserve the published ports")?
    }

    fn release_ports(&self, id: &str) {
        self.reservations.release(id);
    }

    async fn create_gateway(&self, netns: &Path, host_ifname: &str) -> Result<GatewayPort> {
        // Made with the first sandbox that needs it: a host with Docker alone has no use for one.
        let subnet = self.net.free_gwbridge_subnet(self.egress.flatten()).await?;
        // What is made here was not broken.
        let new = &mut Repairs::default();
        let bridge = self.net.ensure_gwbridge(subnet, self.uplink_mtu(), new).await?;
        self.net.forward_ipv4(&self.reconciler.uplink().link.name).await?;
        let (address, mac) = self.gateways.take(bridge.address, || self.local())?;
        let spec = GatewaySpec {
            bridge: bridge.name,
            host_ifname: host_ifname.to_owned(),
            netns: netns.to_owned(),
            ifname: None,
            mac,
            address,
            gateway: bridge.address.addr(),
            mtu: self.uplink_mtu(),
            offloads: self.reconciler.sandbox_offloads(),
        };
        let made = self.net.create_gateway_port(&spec).await;
        if made.is_err() {
            self.gateways.give_back(address.addr());
        }
        made
    }

    async fn delete_gateway(&self, gateway: &GatewayPort) -> Result<()> {
        self.net.delete_gateway_port(gateway).await?;
        self.gateways.give_back(gateway.address);
        Ok(())
    }

    fn local(&self) -> Vec<LocalEndpoint> {
        self.reconciler.local()
    }

    fn holds(&self, id: &str) -> bool {
        self.reconciler.holds(id)
    }

    async fn add_local(&self, endpoint: LocalEndpoint) -> Result<()> {
        let address = endpoint.gateway.as_ref().map(|it| it.address);
        self.reconciler.add_local(endpoint).await?;
        if let Some(address) = address {
            // From here on the endpoint has it.
            self.gateways.give_back(address);
        }
        Ok(())
    }

    async fn describe_local(&self, description: Description) -> Result<Option<LocalEndpoint>> {
        self.reconciler.describe_local(description).await
    }

    async fn remove_local(&self, id: &str) -> Result<()> {
        let local = self.local();
        let gateway = local.iter().find(|it| it.record.id == id && it.docker.is_none());
        let gateway = gateway.and_then(|it| it.gateway.as_ref());
        let shares = |it: &&LocalEndpoint| it.gateway.as_ref() == gateway;
        // The last of its sandbox: `delete_gateway` is next, and gives the address back.
        let last = gateway.filter(|_| local.iter().filter(shares).count() == 1);
        if let Some(gateway) = last {
            self.gateways.hold(gateway.address);
        }
        let removed = self.reconciler.remove_local(id).await;
        if let (Some(gateway), Err(_)) = (last, &removed) {
            self.gateways.give_back(gateway.address);
        }
        removed
    }

    fn status(&self) -> Status {
        self.reconciler.status()
    }

    fn peers(&self) -> BTreeMap<String, Known> {
        self.reconciler.peers().known()
    }

    fn counters(&self) -> Result<Vec<CounterView>> {
        self.reconciler.counters()
    }

    fn port_counters(&self, host_ifname: &str) -> Result<PortCounters> {
        self.reconciler.port_counters(host_ifname)
    }

    fn events(&self) -> broadcast::Receiver<DropEvent> {
        self.reconciler.events()
    }
}
