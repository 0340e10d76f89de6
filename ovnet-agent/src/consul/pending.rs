//! Networks whose name is not known yet: subnet and VNI are claimed, and the name follows.
//!
//! Docker asks its IPAM driver for a subnet before anybody says what the network is called. The
//! subnet must be nobody else's from then on, so it is claimed at once, together with a VNI and a
//! record of this host that says so. Publishing the network under its name, or giving the claim
//! up, ends the record.

use std::{net::Ipv4Addr, time::Instant};

use anyhow::{Result, anyhow, ensure};
use ipnet::Ipv4Net;
use uuid::Uuid;

use super::{
    client::Consul,
    networks::{
        CONTENTION_LIMIT, Pool, encode, endpoints_folder, ensure_time_left, network_key,
        subnet_key, vni_key,
    },
    schema::{NetworkRecord, PendingRecord, VERSION, check_name, check_network, check_subnet},
    sentinel,
    transaction::Operation,
};
use crate::ipam;

/// How publishing a network ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Publish {
    /// It has its name.
    Done(NetworkRecord),
    /// Another network has the name; this is its record.
    Taken(NetworkRecord),
}

impl Consul {
    /// Claims a subnet, the one asked for or a free one of the pool, and a VNI for a network of
    /// this host that has no name yet. Fails where the subnet overlaps a network or a route of this
    /// host.
    pub async fn claim_pending(
        &self,
        subnet: Option<Ipv4Net>,
        ip_range: Option<Ipv4Net>,
        pool: &Pool,
        local_routes: &[Ipv4Net],
    ) -> Result<PendingRecord> {
        let id = Uuid::new_v4().to_string();
        let deadline = Instant::now() + CONTENTION_LIMIT;
        loop {
            // A claim of ours whose answer was lost.
            if let Some(record) = self.pending().await?.into_iter().find(|it| it.id == id) {
                return Ok(record);
            }
            let taken = self.taken_or_known().await?;
            let subnet = match subnet {
                Some(subnet) => {
                    check_subnet(subnet)?;
                    ipam::check_subnet(subnet, &taken.subnets, local_routes)?;
                    subnet
                }
                None => {
                    let subnets = taken.subnets.values().chain(local_routes).copied();
                    ipam::choose_subnet(pool.subnet, pool.size, &subnets.collect::<Vec<_>>())?
                }
            };
            if let Some(range) = ip_range {
                ensure!(subnet.contains(&range), "ip range {range} is not inside subnet {subnet}");
            }
            let (host, vni) = (self.node().to_owned(), ipam::choose_vni(&taken.vnis)?);
            let record = PendingRecord { v: VERSION, id: id.clone(), host, vni, subnet, ip_range };
            let guard = taken.subnets_sentinel.as_ref();
            let operations = vec![
                Operation::cas(self.pending_key(&id), encode(&record)?, 0),
                Operation::cas(vni_key(vni), id.clone().into_bytes(), 0),
                Operation::cas(subnet_key(subnet), id.clone().into_bytes(), 0),
                Operation::cas(
                    sentinel::key("subnets/"),
                    sentinel::touched(guard),
                    guard.map_or(0, |guard| guard.modify_index),
                ),
            ];
            let lost = match self.transact(operations).await {
                Ok(Ok(())) => return Ok(record),
                Ok(Err(conflict)) => anyhow!("other hosts were faster: {conflict}"),
                Err(error) => error,
            };
            ensure_time_left(deadline, lost, "claim a subnet").await?;
        }
    }

    /// The claims of this host whose networks have no name yet.
    pub async fn pending(&self) -> Result<Vec<PendingRecord>> {
        let folder = self.pending_key("");
        let entries = self.list(&folder).await?.map_or(Vec::new(), |listing| listing.entries);
        let id = |key: &str| key.strip_prefix(&folder).unwrap_or_default().to_owned();
        let read =
            entries.iter().filter_map(|it| PendingRecord::parse(&id(&it.key), &it.value).ok());
        Ok(read.filter(|record| record.host == self.node()).collect())
    }

    /// Publishes a claimed network under its name, which ends its pending record. Claims again
    /// what Consul lost in between, unless it is another network's by now.
    pub async fn publish_network(&self, record: &NetworkRecord) -> Result<Publish> {
        check_name("network name", &record.name)?;
        check_network(record)?;
        let deadline = Instant::now() + CONTENTION_LIMIT;
        loop {
            let taken = self.taken().await?;
            match taken.networks.get(&record.name) {
                // Also a publication of ours whose answer was lost.
                Some(Ok(existing)) if existing.id == record.id => {
                    return Ok(Publish::Done(existing.clone()));
                }
                Some(Ok(existing)) => return Ok(Publish::Taken(existing.clone())),
                Some(Err(why)) => anyhow::bail!(
                    "network {} exists already, but its record cannot be read: {why}",
                    record.name
                ),
                None => {}
            }
            let guard = taken.subnets_sentinel.as_ref();
            let mut operations = vec![
                Operation::cas(network_key(&record.name), encode(record)?, 0),
                Operation::set(
                    sentinel::key(&endpoints_folder(&record.id)),
                    sentinel::touched(None),
                ),
                Operation::cas(
                    sentinel::key("subnets/"),
                    sentinel::touched(guard),
                    guard.map_or(0, |guard| guard.modify_index),
                ),
            ];
            for key in [vni_key(record.vni), subnet_key(record.subnet)] {
                let claim = self.get(&key).await?;
                ensure!(
                    claim.as_ref().is_none_or(|claim| claim.value == record.id.as_bytes()),
                    "{key} belongs to another network now: remove {} and create it anew",
                    record.name
                );
                let index = claim.map_or(0, |claim| claim.modify_index);
                operations.push(Operation::cas(key, record.id.clone().into_bytes(), index));
            }
            if let Some(entry) = self.get(&self.pending_key(&record.id)).await? {
                operations.push(Operation::delete_cas(entry.key, entry.modify_index));
            }
            let lost = match self.transact(operations).await {
                Ok(Ok(())) => return Ok(Publish::Done(record.clone())),
                Ok(Err(conflict)) => anyhow!("other hosts were faster: {conflict}"),
                Err(error) => error,
            };
            ensure_time_left(deadline, lost, &format!("publish network {}", record.name)).await?;
        }
    }

    /// Gives up what was claimed for a network that will have no name. Nothing to do where it was
    /// given up, or published, before.
    pub async fn release_pending(&self, id: &str) -> Result<()> {
        let deadline = Instant::now() + CONTENTION_LIMIT;
        loop {
            let Some(entry) = self.get(&self.pending_key(id)).await? else { return Ok(()) };
            let mut operations = vec![Operation::delete_cas(entry.key, entry.modify_index)];
            if let Ok(record) = PendingRecord::parse(id, &entry.value) {
                for key in [vni_key(record.vni), subnet_key(record.subnet)] {
                    let claim = self.get(&key).await?;
                    if let Some(claim) = claim.filter(|claim| claim.value == id.as_bytes()) {
                        operations.push(Operation::delete_cas(key, claim.modify_index));
                    }
                }
            }
            let lost = match self.transact(operations).await {
                Ok(Ok(())) => return Ok(()),
                Ok(Err(conflict)) => anyhow!("it keeps changing: {conflict}"),
                Err(error) => error,
            };
            ensure_time_left(deadline, lost, "give a subnet back").await?;
        }
    }

    /// `pending/<node>/<id>`, or the folder of this host's where the id is empty.
    fn pending_key(&self, id: &str) -> String {
        format!("pending/{}/{id}", self.node())
    }
}

/// The gateway of a network that is being made: the one asked for, else the subnet's first address.
pub fn gateway_of(pending: &PendingRecord, wanted: Option<Ipv4Addr>) -> Result<Ipv4Addr> {
    let gateway = match wanted {
        Some(gateway) => gateway,
        None => ipam::choose_gateway(pending.subnet, &Default::default())?,
    };
    ensure!(
        super::schema::is_host_of(pending.subnet, gateway),
        "gateway {gateway} is not a host address of subnet {}",
        pending.subnet
    );
    Ok(gateway)
}
