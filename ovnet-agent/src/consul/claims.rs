//! Addresses: creating an endpoint's record with check-and-set is the allocation of its address.

use std::{
    collections::BTreeSet,
    net::Ipv4Addr,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, anyhow, bail, ensure};

pub use super::networks::Pool;
use super::{
    client::{Consul, Entry},
    networks::{
        CONTENTION_LIMIT, encode, endpoint_key, endpoints_folder, ensure_time_left, network_key,
        vni_key,
    },
    schema::{EndpointRecord, EndpointState, NetworkRecord, VERSION, format_mac, mac_of},
    sentinel::{self, Identity},
    snapshot::Snapshot,
    transaction::Operation,
};
use crate::ipam;

/// How long a claim waits for those of this host before it.
const TURN_LIMIT: Duration = Duration::from_secs(15);

/// Between looks whether others have put back what Consul lost.
const LOOK: Duration = Duration::from_millis(250);

/// What an endpoint-to-be asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Claim {
    /// Id of the endpoint.
    pub id: String,
    /// Its name and aliases.
    pub names: Vec<String>,
    /// Its address; a free one where absent.
    pub address: Option<Ipv4Addr>,
    /// Its MAC; the one that follows from the address where absent.
    pub mac: Option<[u8; 6]>,
}

impl Consul {
    /// Claims an address, in state `reserved`. Fails where the subnet is full, where the address
    /// asked for cannot be had (naming who has it), and where the network is gone.
    pub async fn claim_address(
        &self,
        network: &NetworkRecord,
        claim: &Claim,
    ) -> Result<EndpointRecord> {
        if let Some(address) = claim.address {
            ipam::check_address(network, address)?;
        }
        let _turn = tokio::time::timeout(TURN_LIMIT, self.claiming()).await.with_context(|| {
            format!(
                "claim an address of {}: other claims of this host have not ended within {} s",
                network.name,
                TURN_LIMIT.as_secs()
            )
        })?;
        let deadline = Instant::now() + CONTENTION_LIMIT;
        let mut window = 1;
        loop {
            let mut current = self.current(network).await?;
            let known = self.known();
            current.add_known(&network.id, &known);
            // A claim of ours whose answer was lost.
            if let Some(record) = current.records.iter().find(|record| {
                record.id == claim.id
                    && record.host == self.node()
                    && claim.address.is_none_or(|address| address == record.address)
            }) {
                return Ok(record.clone());
            }
            if known.may_lack_endpoints(&network.id, current.networks.as_ref()) {
                let lost = anyhow!(
                    "Consul has lost its data, and the hosts of network {} put their endpoints back \
                     first",
                    network.name
                );
                ensure_time_left(deadline, lost, &format!("claim an address of {}", network.name))
                    .await?;
                tokio::time::sleep(LOOK).await;
                continue;
            }
            let address = match claim.address {
                Some(address) => {
                    current.refuse_taken(network, address)?;
                    address
                }
                None => ipam::choose_address(network, &current.taken, window, |candidates| {
                    rand::random_range(0..candidates)
                })?,
            };
            let record = EndpointRecord {
                v: VERSION,
                id: claim.id.clone(),
                address,
                mac: format_mac(claim.mac.unwrap_or_else(|| mac_of(address))),
                host: self.node().to_owned(),
                names: claim.names.clone(),
                state: EndpointState::Reserved,
            };
            let lost = match self.create_endpoint(network, &current, &record).await {
                Ok(true) => return Ok(record),
                Ok(false) => anyhow!("other hosts were faster each time"),
                Err(error) => error,
            };
            // Whoever is beaten chooses among more candidates: hosts then stop meeting at the same
            // one after a round or two.
            window = (window * 4).min(1024);
            ensure_time_left(deadline, lost, &format!("claim an address of {}", network.name))
                .await?;
        }
    }

    /// Announces an endpoint as `up`; also puts its record back where it was lost. Refuses where
    /// another endpoint has the address, and where the network is gone.
    pub async fn publish_endpoint(
        &self,
        network: &NetworkRecord,
        record: &EndpointRecord,
    ) -> Result<()> {
        self.publish_claimed(network, record, None).await
    }

    /// [`Self::publish_endpoint`] for an address that may have been claimed under another id,
    /// because the endpoint's own was not known yet.
    pub async fn publish_claimed(
        &self,
        network: &NetworkRecord,
        record: &EndpointRecord,
        claimed_as: Option<&str>,
    ) -> Result<()> {
        let record = EndpointRecord { state: EndpointState::Up, ..record.clone() };
        let key = endpoint_key(&network.id, record.address);
        let deadline = Instant::now() + CONTENTION_LIMIT;
        loop {
            let lost = match self.get(&key).await? {
                Some(entry) => {
                    match EndpointRecord::parse(&record.address.to_string(), &entry.value) {
                        Ok(there) if there == record => return Ok(()),
                        Ok(there) => ensure!(
                            (there.id == record.id || Some(there.id.as_str()) == claimed_as)
                                && there.host == record.host,
                            "address {} of network {} belongs to endpoint {} on host {} now",
                            record.address,
                            network.name,
                            there.id,
                            there.host
                        ),
                        // Claimed by us in our version, so whoever wrote this is no owner of it,
                        // but it is not ours to overwrite either.
                        Err(why) => bail!("the record {key} cannot be read: {why:#}"),
                    }
                    let update = Operation::cas(key.clone(), encode(&record)?, entry.modify_index);
                    match self.transact(vec![update]).await {
                        Ok(Ok(())) => return Ok(()),
                        Ok(Err(conflict)) => anyhow!("it keeps changing: {conflict}"),
                        Err(error) => error,
                    }
                }
                None => {
                    let current = self.current(network).await?;
                    match self.create_endpoint(network, &current, &record).await {
                        Ok(true) => return Ok(()),
                        Ok(false) => anyhow!("it keeps changing"),
                        Err(error) => error,
                    }
                }
            };
            ensure_time_left(deadline, lost, &format!("announce endpoint {}", record.id)).await?;
        }
    }

    /// Writes an endpoint's record again that somebody else has written to. For its owner, and where
    /// the key was there all the time: it was never free to be claimed.
    pub async fn reclaim_endpoint(
        &self,
        network: &NetworkRecord,
        record: &EndpointRecord,
    ) -> Result<()> {
        let key = endpoint_key(&network.id, record.address);
        let Some(entry) = self.get(&key).await? else {
            return self.publish_endpoint(network, record).await;
        };
        let write = Operation::cas(key.clone(), encode(record)?, entry.modify_index);
        let written = self.transact(vec![write]).await?;
        written.map_err(|conflict| anyhow!("write the record {key} again: {conflict}"))
    }

    /// Gives an address back: deletes the record if it is still this endpoint's. One that is gone
    /// or belongs to another endpoint by now is no error.
    pub async fn release_endpoint(&self, network_id: &str, record: &EndpointRecord) -> Result<()> {
        let key = endpoint_key(network_id, record.address);
        let deadline = Instant::now() + CONTENTION_LIMIT;
        loop {
            let Some(entry) = self.get(&key).await? else { return Ok(()) };
            let there = EndpointRecord::parse(&record.address.to_string(), &entry.value);
            if !there.is_ok_and(|there| there.id == record.id && there.host == record.host) {
                return Ok(());
            }
            let lost = match self
                .transact(vec![Operation::delete_cas(key.clone(), entry.modify_index)])
                .await
            {
                Ok(Ok(())) => return Ok(()),
                Ok(Err(conflict)) => anyhow!("it keeps changing: {conflict}"),
                Err(error) => error,
            };
            ensure_time_left(deadline, lost, &format!("release address {}", record.address))
                .await?;
        }
    }

    /// Creates the record if its address is free and the network as it was read; `false` where
    /// one of the two changed meanwhile.
    async fn create_endpoint(
        &self,
        network: &NetworkRecord,
        current: &Current,
        record: &EndpointRecord,
    ) -> Result<bool> {
        let folder = endpoints_folder(&network.id);
        let operations = vec![
            Operation::check_index(network_key(&network.name), current.network_index),
            Operation::cas(endpoint_key(&network.id, record.address), encode(record)?, 0),
            // Removing the network checks this key's index, so one of the two loses.
            Operation::set(sentinel::key(&folder), sentinel::touched(current.sentinel.as_ref())),
        ];
        Ok(self.transact(operations).await?.is_ok())
    }

    async fn current(&self, network: &NetworkRecord) -> Result<Current> {
        let folder = endpoints_folder(&network.id);
        let (key, of_vni) = (network_key(&network.name), vni_key(network.vni));
        let networks = sentinel::key("networks/");
        let (entry, listing, claim, networks) = tokio::try_join!(
            self.get(&key),
            self.list(&folder),
            self.get(&of_vni),
            self.get(&networks)
        )?;
        // A record by hand may have claimed nothing; what another has claimed it cannot have.
        if let Some(claim) = claim.filter(|claim| claim.value != network.id.as_bytes()) {
            bail!(
                "network {} says VNI {}, which network {} has claimed: one of the two records lies",
                network.name,
                network.vni,
                String::from_utf8_lossy(&claim.value).chars().take(64).collect::<String>()
            );
        }
        let entry = entry.filter(|entry| {
            NetworkRecord::parse(&network.name, &entry.value)
                .is_ok_and(|there| there.id == network.id)
        });
        let entry = entry.with_context(|| {
            format!("network {} ({}) does not exist any more", network.name, network.id)
        })?;
        let mut current = Current {
            network_index: entry.modify_index,
            networks: networks.as_ref().map(Identity::of),
            ..Current::default()
        };
        for entry in listing.map_or(Vec::new(), |listing| listing.entries) {
            let name = entry.key.strip_prefix(&folder).unwrap_or_default();
            if name == sentinel::NAME {
                current.sentinel = Some(entry);
                continue;
            }
            // The key is what is taken, whether or not its record can be read.
            if let Ok(address) = name.parse() {
                current.taken.insert(address);
            }
            if let Ok(record) = EndpointRecord::parse(name, &entry.value) {
                current.records.push(record);
            }
        }
        Ok(current)
    }
}

/// A network's addresses as last read.
#[derive(Default)]
struct Current {
    network_index: u64,
    /// What tells the networks from those of another Consul, or of this one wiped.
    networks: Option<Identity>,
    sentinel: Option<Entry>,
    taken: BTreeSet<Ipv4Addr>,
    records: Vec<EndpointRecord>,
    /// Endpoints that only this host knows: Consul has lost them, and their hosts put them back.
    doubtful: Vec<EndpointRecord>,
}

impl Current {
    /// Takes for taken, too, what Consul has lost.
    fn add_known(&mut self, network_id: &str, known: &Snapshot) {
        let identity = self.sentinel.as_ref().map(Identity::of);
        let there = |address| self.taken.contains(&address);
        self.doubtful = known.doubtful_endpoints(network_id, identity.as_ref(), there);
        self.taken.extend(self.doubtful.iter().map(|endpoint| endpoint.address));
    }

    fn refuse_taken(&self, network: &NetworkRecord, address: Ipv4Addr) -> Result<()> {
        if !self.taken.contains(&address) {
            return Ok(());
        }
        let name = &network.name;
        let mut known = self.records.iter().chain(&self.doubtful);
        match known.find(|record| record.address == address) {
            Some(holder) => {
                let label = holder.names.first().unwrap_or(&holder.id);
                bail!(
                    "address {address} of network {name} is taken by endpoint {label} on host {}",
                    holder.host
                )
            }
            None => bail!(
                "address {address} of network {name} is taken by a record that cannot be read"
            ),
        }
    }
}
