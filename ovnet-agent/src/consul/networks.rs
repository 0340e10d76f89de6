//! Networks: creating one is one transaction over its name, its VNI and its subnet.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::Ipv4Addr,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use ipnet::Ipv4Net;
use uuid::Uuid;

use super::{
    client::{Consul, Entry},
    failure::Refused,
    schema::{
        EndpointRecord, EndpointState, HostRecord, NetworkRecord, VERSION, check_name,
        check_network,
    },
    sentinel::{self, Identity},
    snapshot::HostEntry,
    transaction::Operation,
};
use crate::{api::types::CreateNetwork, ipam};

/// How long hosts may go on beating each other to a name, subnet or address before one gives up.
pub(super) const CONTENTION_LIMIT: Duration = Duration::from_secs(10);

/// Where subnets are taken from that the user did not choose.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pool {
    /// `--default-pool`.
    pub subnet: Ipv4Net,
    /// `--default-pool-size`, a prefix length.
    pub size: u8,
}

impl Consul {
    /// Creates a network and returns its record. Chooses what was not asked for, and again when
    /// another host was faster; fails where the name exists, saying who created it, and where what
    /// was asked for cannot be had.
    pub async fn create_network(
        &self,
        wanted: &CreateNetwork,
        pool: &Pool,
        local_routes: &[Ipv4Net],
    ) -> Result<NetworkRecord> {
        check_name("network name", &wanted.name)?;
        let id = Uuid::new_v4().to_string();
        let deadline = Instant::now() + CONTENTION_LIMIT;
        let gave_up = format!("create network {}", wanted.name);
        // Whether a transaction was sent whose outcome is not known.
        let mut open = false;
        loop {
            let taken = match self.taken_or_known().await {
                Ok(taken) => taken,
                Err(error) if open => {
                    if let Err(error) = ensure_time_left(deadline, error, &gave_up).await {
                        self.unmake_later(id);
                        return Err(error);
                    }
                    continue;
                }
                Err(error) => return Err(error),
            };
            if taken.doubtful.contains(&wanted.name) {
                let lost = anyhow!(
                    "network {} is known here, but Consul has lost it: the hosts that use it, and \
                     the one that created it, put it back",
                    wanted.name
                );
                ensure_time_left(deadline, lost, &gave_up).await?;
                continue;
            }
            match taken.networks.get(&wanted.name) {
                // Our transaction went through although its answer was lost.
                Some(Ok(existing)) if existing.id == id => return Ok(existing.clone()),
                Some(Ok(existing)) => bail!(
                    "network {} exists already: created by {} with subnet {}",
                    existing.name,
                    if existing.created_by.is_empty() { "hand" } else { &existing.created_by },
                    existing.subnet
                ),
                Some(Err(why)) => bail!(
                    "network {} exists already, but its record cannot be read: {why}",
                    wanted.name
                ),
                None => {}
            }
            let record = plan(wanted, &id, self.node(), &taken, pool, local_routes)?;
            let guard = taken.subnets_sentinel.as_ref();
            let operations = vec![
                Operation::cas(network_key(&record.name), encode(&record)?, 0),
                Operation::cas(vni_key(record.vni), id.clone().into_bytes(), 0),
                Operation::cas(subnet_key(record.subnet), id.clone().into_bytes(), 0),
                Operation::cas(
                    sentinel::key("subnets/"),
                    sentinel::touched(guard),
                    guard.map_or(0, |guard| guard.modify_index),
                ),
                Operation::set(sentinel::key(&endpoints_folder(&id)), sentinel::touched(None)),
            ];
            let lost = match self.transact(operations).await {
                Ok(Ok(())) => return Ok(record),
                Ok(Err(conflict)) => anyhow!("other hosts were faster: {conflict}"),
                Err(error) => {
                    open |= !error.is::<Refused>();
                    error
                }
            };
            if let Err(error) = ensure_time_left(deadline, lost, &gave_up).await {
                if open {
                    self.unmake_later(id);
                }
                return Err(error);
            }
        }
    }

    /// Removes a network. Refuses while any host has an endpoint, or any record that may be one,
    /// in it, and names both.
    pub async fn remove_network(&self, name_or_id: &str) -> Result<NetworkRecord> {
        let deadline = Instant::now() + CONTENTION_LIMIT;
        let mut tried = None;
        loop {
            let (record, entry) = match (self.find_network(name_or_id).await?, tried.take()) {
                (Some(found), _) => found,
                // Our transaction went through although its answer was lost.
                (None, Some(record)) => return Ok(record),
                (None, None) => bail!(unknown(name_or_id)),
            };
            let folder = endpoints_folder(&record.id);
            let entries = self.list(&folder).await?.map_or(Vec::new(), |listing| listing.entries);
            let (sentinels, endpoints): (Vec<_>, Vec<_>) =
                entries.into_iter().partition(|entry| entry.key == sentinel::key(&folder));
            if let Some(endpoint) = endpoints.first() {
                bail!("{}", in_use(&record, endpoint, endpoints.len()));
            }
            let mut operations = vec![match sentinels.first() {
                Some(sentinel) => {
                    Operation::check_index(sentinel.key.clone(), sentinel.modify_index)
                }
                // A claim would have made it, so creating it here fails if there is one by now.
                None => sentinel::create(&folder),
            }];
            operations.push(Operation::delete_cas(entry.key, entry.modify_index));
            for key in [vni_key(record.vni), subnet_key(record.subnet)] {
                // A record by hand may lack these keys, or name another network's.
                let claim = self.get(&key).await?;
                if let Some(claim) = claim.filter(|claim| claim.value == record.id.as_bytes()) {
                    operations.push(Operation::delete_cas(key, claim.modify_index));
                }
            }
            operations.push(Operation::delete_tree(folder));
            let lost = match self.transact(operations).await {
                Ok(Ok(())) => return Ok(record),
                Ok(Err(conflict)) => anyhow!("other hosts were faster: {conflict}"),
                Err(error) => {
                    tried = Some(record);
                    error
                }
            };
            ensure_time_left(deadline, lost, &format!("remove network {name_or_id}")).await?;
        }
    }

    /// Every network that can be read, by name.
    pub async fn networks(&self) -> Result<Vec<NetworkRecord>> {
        let entries = self.records("networks/").await?;
        Ok(readable(&entries, "networks/", NetworkRecord::parse))
    }

    /// One network by name or id.
    pub async fn network(&self, name_or_id: &str) -> Result<NetworkRecord> {
        let found = self.find_network(name_or_id).await?;
        Ok(found.with_context(|| unknown(name_or_id))?.0)
    }

    /// Every endpoint of a network that can be read, by address.
    pub async fn endpoints(&self, network_id: &str) -> Result<Vec<EndpointRecord>> {
        let folder = endpoints_folder(network_id);
        let entries = self.records(&folder).await?;
        let mut endpoints = readable(&entries, &folder, EndpointRecord::parse);
        endpoints.sort_by_key(|endpoint| endpoint.address);
        Ok(endpoints)
    }

    /// Every host that can be read, by name.
    pub async fn hosts(&self) -> Result<BTreeMap<String, HostEntry>> {
        let mut hosts = BTreeMap::new();
        for entry in self.records("hosts/").await? {
            let node = entry.key.trim_start_matches("hosts/");
            if let Ok(record) = HostRecord::parse(node, &entry.value) {
                let locked = entry.session.is_some();
                hosts.insert(record.node.clone(), HostEntry { record, locked });
            }
        }
        Ok(hosts)
    }

    /// The keys of a folder without its sentinel.
    async fn records(&self, folder: &str) -> Result<Vec<Entry>> {
        let mut entries = self.list(folder).await?.map_or(Vec::new(), |listing| listing.entries);
        entries.retain(|entry| entry.key != sentinel::key(folder));
        Ok(entries)
    }

    pub(super) async fn find_network(
        &self,
        name_or_id: &str,
    ) -> Result<Option<(NetworkRecord, Entry)>> {
        for entry in self.records("networks/").await? {
            let name = entry.key.trim_start_matches("networks/");
            match NetworkRecord::parse(name, &entry.value) {
                Ok(record) if record.name == name_or_id || record.id == name_or_id => {
                    return Ok(Some((record, entry)));
                }
                Err(why) if name == name_or_id => {
                    bail!("the record of network {name} cannot be read: {why:#}")
                }
                _ => {}
            }
        }
        Ok(None)
    }

    /// What is taken by what Consul has and by what it has lost, as far as this host knows it: for
    /// whoever is about to take something.
    pub(super) async fn taken_or_known(&self) -> Result<Taken> {
        let mut taken = self.taken().await?;
        let there = |name: &str| taken.networks.contains_key(name);
        let doubtful = self.known().doubtful_networks(taken.identity.as_ref(), there);
        for network in doubtful {
            taken.vnis.insert(network.vni);
            taken.subnets.insert(network.name.clone(), network.subnet);
            taken.doubtful.insert(network.name);
        }
        Ok(taken)
    }

    /// What is taken by what Consul has.
    pub(super) async fn taken(&self) -> Result<Taken> {
        // In this order a subnet that is seen has its network seen, so that it can be named. What
        // is claimed between the readings is caught by the sentinel of subnets/, read first.
        let subnets = self.list("subnets/").await?;
        let (networks, vnis) = tokio::try_join!(self.list("networks/"), self.records("vnis/"))?;
        let mut taken = Taken::default();
        for entry in networks.map_or(Vec::new(), |listing| listing.entries) {
            let name = entry.key.trim_start_matches("networks/").to_owned();
            if name == sentinel::NAME {
                taken.identity = Some(Identity::of(&entry));
                continue;
            }
            let parsed =
                NetworkRecord::parse(&name, &entry.value).map_err(|why| format!("{why:#}"));
            if let Ok(network) = &parsed {
                // Also those of a record by hand, which may have claimed neither.
                taken.vnis.insert(network.vni);
                taken.subnets.insert(name.clone(), network.subnet);
            }
            taken.networks.insert(name, parsed);
        }
        for entry in vnis {
            taken.vnis.extend(entry.key.trim_start_matches("vnis/").parse::<u32>());
        }
        for entry in subnets.map_or(Vec::new(), |listing| listing.entries) {
            let name = entry.key.trim_start_matches("subnets/");
            if name == sentinel::NAME {
                taken.subnets_sentinel = Some(entry);
            } else if let Ok(subnet) = name.replace('-', "/").parse()
                && !taken.subnets.values().any(|other| *other == subnet)
            {
                // Of a network whose own record cannot be read: its id is all there is to say.
                taken.subnets.insert(String::from_utf8_lossy(&entry.value).into_owned(), subnet);
            }
        }
        Ok(taken)
    }
}

/// What networks have taken.
#[derive(Default)]
pub(super) struct Taken {
    /// By name; `Err` says why the record cannot be read.
    pub(super) networks: BTreeMap<String, Result<NetworkRecord, String>>,
    pub(super) vnis: BTreeSet<u32>,
    /// By name of the network, or its id where the name is not known.
    pub(super) subnets: BTreeMap<String, Ipv4Net>,
    pub(super) subnets_sentinel: Option<Entry>,
    /// Which Consul this is.
    identity: Option<Identity>,
    /// Names of networks that are only known here.
    doubtful: BTreeSet<String>,
}

fn plan(
    wanted: &CreateNetwork,
    id: &str,
    node: &str,
    taken: &Taken,
    pool: &Pool,
    local_routes: &[Ipv4Net],
) -> Result<NetworkRecord> {
    let CreateNetwork { name, subnet, gateway, ip_range, aux, mtu, internal, options, labels } =
        wanted;
    let subnet = match subnet {
        Some(subnet) => *subnet,
        None => {
            ensure!(
                gateway.is_none() && ip_range.is_none() && aux.is_empty(),
                "network {name}: a gateway, ip range or aux address needs a --subnet to lie in"
            );
            let subnets = taken.subnets.values().chain(local_routes).copied();
            ipam::choose_subnet(pool.subnet, pool.size, &subnets.collect::<Vec<_>>())?
        }
    };
    let record = NetworkRecord {
        v: VERSION,
        id: id.to_owned(),
        name: name.clone(),
        vni: ipam::choose_vni(&taken.vnis)?,
        subnet,
        gateway: match gateway {
            Some(gateway) => *gateway,
            None => ipam::choose_gateway(subnet, aux)?,
        },
        ip_range: *ip_range,
        aux: aux.clone(),
        mtu: *mtu,
        internal: *internal,
        options: options.clone(),
        labels: labels.clone(),
        created_by: node.to_owned(),
    };
    check_network(&record)?;
    if wanted.subnet.is_some() {
        ipam::check_subnet(subnet, &taken.subnets, local_routes)?;
    }
    Ok(record)
}

fn unknown(name_or_id: &str) -> String {
    format!("no network {name_or_id}: see `ovnet network ls`, or create it")
}

fn in_use(network: &NetworkRecord, first: &Entry, count: usize) -> String {
    let (name, address) = (&network.name, first.key.rsplit('/').next().unwrap_or_default());
    let others = match count - 1 {
        0 => String::new(),
        others => format!(", and {others} more"),
    };
    match EndpointRecord::parse(address, &first.value) {
        Ok(endpoint) => {
            let label = endpoint.names.first().unwrap_or(&endpoint.id);
            let reserved = match endpoint.state {
                EndpointState::Up => "",
                EndpointState::Reserved => ", being attached",
            };
            format!(
                "network {name} is in use: host {} has endpoint {label} ({address}{reserved}) in \
                 it{others}; detach it first",
                endpoint.host
            )
        }
        Err(why) => format!(
            "network {name} may be in use: the record {} cannot be read ({why:#}){others}; delete \
             that key if no host has an endpoint there",
            first.key
        ),
    }
}

/// Waits a little, longer for some than for others, or gives up with `lost` as the reason.
pub(super) async fn ensure_time_left(
    deadline: Instant,
    lost: anyhow::Error,
    what: &str,
) -> Result<()> {
    if lost.is::<Refused>() {
        return Err(lost.context(what.to_owned()));
    }
    if Instant::now() >= deadline {
        return Err(lost.context(format!("{what}: gave up")));
    }
    tokio::time::sleep(Duration::from_millis(rand::random_range(1..40))).await;
    Ok(())
}

fn readable<T>(
    entries: &[Entry],
    folder: &str,
    parse: impl Fn(&str, &[u8]) -> Result<T>,
) -> Vec<T> {
    // Counting and logging what cannot be read is the watch's business.
    let name = |entry: &Entry| entry.key.strip_prefix(folder).unwrap_or_default().to_owned();
    entries.iter().filter_map(|entry| parse(&name(entry), &entry.value).ok()).collect()
}

pub(super) fn encode<T: serde::Serialize>(record: &T) -> Result<Vec<u8>> {
    Ok(serde_json::to_vec(record)?)
}

pub(super) fn network_key(name: &str) -> String {
    format!("networks/{name}")
}

pub(super) fn endpoints_folder(network_id: &str) -> String {
    format!("endpoints/{network_id}/")
}

pub(super) fn endpoint_key(network_id: &str, address: Ipv4Addr) -> String {
    format!("{}{address}", endpoints_folder(network_id))
}

pub(super) fn vni_key(vni: u32) -> String {
    format!("vnis/{vni}")
}

pub(super) fn subnet_key(subnet: Ipv4Net) -> String {
    format!("subnets/{}-{}", subnet.network(), subnet.prefix_len())
}
