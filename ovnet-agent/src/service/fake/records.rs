//! Consul's records in memory.

use std::net::Ipv4Addr;

use anyhow::{Result, anyhow, bail};
use ipnet::Ipv4Net;

use super::{Fake, NODE, network};
use crate::{
    api::types::CreateNetwork,
    consul::{
        Publish,
        schema::{
            EndpointRecord, EndpointState, HostRecord, NetworkRecord, PendingRecord, VERSION,
            format_mac, mac_of,
        },
    },
    service::{AddressClaim, Records},
};

impl Records for Fake {
    async fn create_network(&self, wanted: &CreateNetwork, _: &[Ipv4Net]) -> Result<NetworkRecord> {
        self.begin("create_network").await?;
        let mut state = self.state();
        if let Some(other) = state.networks.get(&wanted.name) {
            bail!("network {} exists: {} created it", wanted.name, other.created_by);
        }
        let vni = 4096 + u32::try_from(state.networks.len()).unwrap();
        let record = network(&wanted.name, vni);
        state.networks.insert(wanted.name.clone(), record.clone());
        Ok(record)
    }

    async fn claim_pending(
        &self,
        subnet: Option<Ipv4Net>,
        ip_range: Option<Ipv4Net>,
        _: &[Ipv4Net],
    ) -> Result<PendingRecord> {
        self.begin("claim_pending").await?;
        let mut state = self.state();
        let vni = 4096 + u32::try_from(state.networks.len() + state.pending.len()).unwrap();
        let free = network("", vni);
        let taken = |it: &Ipv4Net| {
            state.networks.values().any(|other| other.subnet == *it)
                || state.pending.values().any(|other| other.subnet == *it)
        };
        if let Some(subnet) = subnet.filter(taken) {
            bail!("subnet {subnet} overlaps another network");
        }
        let record = PendingRecord {
            v: VERSION,
            id: free.id,
            host: NODE.into(),
            vni,
            subnet: subnet.unwrap_or(free.subnet),
            ip_range,
        };
        state.pending.insert(record.id.clone(), record.clone());
        Ok(record)
    }

    async fn pending(&self) -> Result<Vec<PendingRecord>> {
        self.begin("pending").await?;
        Ok(self.state().pending.values().cloned().collect())
    }

    async fn publish_network(&self, record: &NetworkRecord) -> Result<Publish> {
        self.begin("publish_network").await?;
        let mut state = self.state();
        if let Some(other) = state.networks.get(&record.name).filter(|it| it.id != record.id) {
            return Ok(Publish::Taken(other.clone()));
        }
        state.pending.remove(&record.id);
        state.networks.insert(record.name.clone(), record.clone());
        Ok(Publish::Done(record.clone()))
    }

    async fn release_pending(&self, id: &str) -> Result<()> {
        self.begin("release_pending").await?;
        self.state().pending.remove(id);
        Ok(())
    }

    async fn restore_network(&self, record: &NetworkRecord) -> Result<()> {
        self.begin("restore_network").await?;
        self.state().networks.insert(record.name.clone(), record.clone());
        Ok(())
    }

    async fn remove_network(&self, name_or_id: &str) -> Result<NetworkRecord> {
        self.begin("remove_network").await?;
        let mut state = self.state();
        let mut all = state.networks.values();
        let record = all.find(|it| it.name == name_or_id || it.id == name_or_id).cloned();
        let record = record.ok_or_else(|| anyhow!("there is no network {name_or_id}"))?;
        if let Some((_, used)) = state.endpoints.iter().find(|((id, _), _)| *id == record.id) {
            bail!("network {name_or_id} has endpoint {} on host {}", used.address, used.host);
        }
        state.networks.remove(&record.name);
        Ok(record)
    }

    async fn networks(&self) -> Result<Vec<NetworkRecord>> {
        self.begin("networks").await?;
        Ok(self.state().networks.values().cloned().collect())
    }

    async fn network(&self, name_or_id: &str) -> Result<NetworkRecord> {
        self.begin("network").await?;
        let state = self.state();
        let found = state.networks.values().find(|it| it.name == name_or_id || it.id == name_or_id);
        found.cloned().ok_or_else(|| anyhow!("there is no network {name_or_id}"))
    }

    async fn endpoints(&self, network_id: &str) -> Result<Vec<EndpointRecord>> {
        self.begin("endpoints").await?;
        let state = self.state();
        let of_network = state.endpoints.iter().filter(|((id, _), _)| id == network_id);
        Ok(of_network.map(|(_, record)| record.clone()).collect())
    }

    async fn hosts(&self) -> Result<Vec<(HostRecord, bool)>> {
        self.begin("hosts").await?;
        let host = |node: &str, last| HostRecord {
            v: VERSION,
            node: node.into(),
            vtep: [192, 168, 1, last].into(),
            port: 4789,
            mtu: 1500,
            agent: "0.1.0".into(),
        };
        Ok(vec![(host("docker02", 12), false), (host(NODE, 11), true)])
    }

    async fn claim_address(
        &self,
        network: &NetworkRecord,
        claim: &AddressClaim,
    ) -> Result<EndpointRecord> {
        self.begin("claim_address").await?;
        let mut state = self.state();
        let taken =
            |address: Ipv4Addr| state.endpoints.contains_key(&(network.id.clone(), address));
        let address = match claim.address {
            Some(address) if taken(address) => {
                bail!("address {address} of network {} is taken", network.name)
            }
            Some(address) => address,
            None => {
                let free = network.subnet.hosts().find(|it| *it != network.gateway && !taken(*it));
                free.ok_or_else(|| anyhow!("network {} is full", network.name))?
            }
        };
        let record = EndpointRecord {
            v: VERSION,
            id: claim.id.clone(),
            address,
            mac: format_mac(mac_of(address)),
            host: NODE.into(),
            names: claim.names.clone(),
            state: EndpointState::Reserved,
        };
        state.endpoints.insert((network.id.clone(), address), record.clone());
        if state.failing.contains("claim_address after") {
            bail!("the connection was lost");
        }
        Ok(record)
    }

    async fn publish_endpoint(
        &self,
        network: &NetworkRecord,
        record: &EndpointRecord,
        claimed_as: Option<&str>,
    ) -> Result<()> {
        self.begin("publish_endpoint").await?;
        let record = EndpointRecord { state: EndpointState::Up, ..record.clone() };
        let mut state = self.state();
        let key = (network.id.clone(), record.address);
        if let Some(there) = state.endpoints.get(&key)
            && there.id != record.id
            && Some(there.id.as_str()) != claimed_as
        {
            bail!("address {} belongs to endpoint {} now", record.address, there.id);
        }
        state.endpoints.insert(key, record);
        Ok(())
    }

    async fn release_endpoint(&self, network_id: &str, record: &EndpointRecord) -> Result<()> {
        self.begin("release_endpoint").await?;
        let mut state = self.state();
        let key = (network_id.to_owned(), record.address);
        if state.endpoints.get(&key).is_some_and(|it| it.id == record.id && it.host == NODE) {
            state.endpoints.remove(&key);
        }
        Ok(())
    }
}
