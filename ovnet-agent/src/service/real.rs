//! The traits of the service on Consul and this host's kernel.

use std::path::PathBuf;

use anyhow::Result;
use ipnet::Ipv4Net;
use ovnet_common::abi::{DropEvent, PortCounters};
use tokio::sync::broadcast;

use super::{AddressClaim, Records, VethRequest, Wiring};
use crate::{
    api::types::{CounterView, CreateNetwork, Status},
    consul::{
        Consul, Publish,
        claims::{Claim, Pool},
        schema::{EndpointRecord, HostRecord, NetworkRecord, PendingRecord},
    },
    net::{self, LooseVeth, Net, VethSpec},
    reconcile::{Description, Reconciler},
    state::LocalEndpoint,
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

    fn local(&self) -> Vec<LocalEndpoint> {
        self.reconciler.local()
    }

    async fn add_local(&self, endpoint: LocalEndpoint) -> Result<()> {
        self.reconciler.add_local(endpoint).await
    }

    async fn describe_local(&self, description: Description) -> Result<Option<LocalEndpoint>> {
        self.reconciler.describe_local(description).await
    }

    async fn remove_local(&self, id: &str) -> Result<()> {
        self.reconciler.remove_local(id).await
    }

    fn status(&self) -> Status {
        self.reconciler.status()
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
