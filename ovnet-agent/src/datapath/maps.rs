//! Typed handles of the pinned maps: read whole, changed one entry at a time.

use std::collections::BTreeMap;

use anyhow::{Context as _, Result, anyhow, bail};
use aya::{
    Ebpf,
    maps::{
        Array, HashMap, Map, MapData, MapError, PerCpuArray, PerCpuHashMap, PerCpuValues, RingBuf,
    },
    util::nr_cpus,
};
use ovnet_common::{
    abi::{
        Address, Counter, EndpointKey, EndpointValue, HostConfig, HostValue, MAX_ENDPOINTS,
        MAX_HOSTS, MAX_NETWORKS, MAX_PORTS, NetworkValue, PortCounters, PortValue, Program,
        counter_index, map,
    },
    published::{MAX_PUBLISHED, PublishedKey, PublishedValue},
};

/// What is entered into `PORTS`.
const ENDS: &str = "interfaces of local endpoints, up to two each";

/// The content of every table the agent writes: as it is, or as it should be.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Tables {
    /// What the programs know about their own host.
    pub config: HostConfig,
    /// Known VTEPs.
    pub hosts: BTreeMap<Address, HostValue>,
    /// Networks in use here, by VNI.
    pub networks: BTreeMap<u32, NetworkValue>,
    /// Endpoints of those networks.
    pub endpoints: BTreeMap<EndpointKey, EndpointValue>,
    /// Local endpoints by host-side ifindex.
    pub ports: BTreeMap<u32, PortValue>,
    /// What ports of this host lead to.
    pub published: BTreeMap<PublishedKey, PublishedValue>,
}

impl Tables {
    /// Entries of each table, with its name and how many fit.
    pub fn fill(&self) -> [(&'static str, u64, u64); 5] {
        let Self { config: _, hosts, networks, endpoints, ports, published } = self;
        [
            (map::HOSTS, hosts.len(), MAX_HOSTS),
            (map::NETWORKS, networks.len(), MAX_NETWORKS),
            (map::ENDPOINTS, endpoints.len(), MAX_ENDPOINTS),
            (map::PORTS, ports.len(), MAX_PORTS),
            (map::PUBLISHED, published.len(), MAX_PUBLISHED),
        ]
        .map(|(name, entries, fit)| (name, u64::try_from(entries).unwrap_or(u64::MAX), fit.into()))
    }
}

/// The open maps.
pub struct Maps {
    config: Array<MapData, HostConfig>,
    hosts: HashMap<MapData, Address, HostValue>,
    networks: HashMap<MapData, u32, NetworkValue>,
    endpoints: HashMap<MapData, EndpointKey, EndpointValue>,
    ports: HashMap<MapData, u32, PortValue>,
    port_counters: PerCpuHashMap<MapData, u32, PortCounters>,
    counters: PerCpuArray<MapData, Counter>,
    events: Option<RingBuf<MapData>>,
    published: HashMap<MapData, PublishedKey, PublishedValue>,
}

impl Maps {
    /// Takes the maps out of a loaded object.
    pub(super) fn take(ebpf: &mut Ebpf) -> Result<Self> {
        let mut take = |name: &'static str| -> Result<Map> {
            ebpf.take_map(name).ok_or_else(|| anyhow!("the object has no map {name}"))
        };
        Ok(Self {
            config: take(map::CONFIG)?.try_into()?,
            hosts: take(map::HOSTS)?.try_into()?,
            networks: take(map::NETWORKS)?.try_into()?,
            endpoints: take(map::ENDPOINTS)?.try_into()?,
            ports: take(map::PORTS)?.try_into()?,
            port_counters: take(map::PORT_COUNTERS)?.try_into()?,
            counters: take(map::COUNTERS)?.try_into()?,
            events: Some(take(map::EVENTS)?.try_into()?),
            published: take(map::PUBLISHED)?.try_into()?,
        })
    }

    /// Everything that is in the tables now.
    pub fn read(&self) -> Result<Tables> {
        Ok(Tables {
            config: self.config.get(&0, 0).context("read CONFIG")?,
            hosts: collect(&self.hosts).context("read HOSTS")?,
            networks: collect(&self.networks).context("read NETWORKS")?,
            endpoints: collect(&self.endpoints).context("read ENDPOINTS")?,
            ports: collect(&self.ports).context("read PORTS")?,
            published: collect(&self.published).context("read PUBLISHED")?,
        })
    }

    /// Replaces what the programs know about their own host.
    pub fn set_config(&mut self, value: HostConfig) -> Result<()> {
        self.config.set(0, value, 0).context("write CONFIG")
    }

    /// Enters a known VTEP.
    pub fn set_host(&mut self, key: Address, value: HostValue) -> Result<()> {
        entered(self.hosts.insert(key, value, 0), map::HOSTS, MAX_HOSTS, "hosts")
    }

    /// Enters a network.
    pub fn set_network(&mut self, vni: u32, value: NetworkValue) -> Result<()> {
        entered(self.networks.insert(vni, value, 0), map::NETWORKS, MAX_NETWORKS, "networks")
    }

    /// Enters an endpoint, local or remote.
    pub fn set_endpoint(&mut self, key: EndpointKey, value: EndpointValue) -> Result<()> {
        entered(self.endpoints.insert(key, value, 0), map::ENDPOINTS, MAX_ENDPOINTS, "endpoints")
    }

    /// Enters a local endpoint's veth, with its counters at zero.
    pub fn set_port(&mut self, ifindex: u32, value: PortValue) -> Result<()> {
        if self.port_counters.get(&ifindex, 0).is_err() {
            let cpus = nr_cpus().map_err(|(what, error)| anyhow!("{what}: {error}"))?;
            let zero = PerCpuValues::try_from(vec![PortCounters::default(); cpus])?;
            let counters = self.port_counters.insert(ifindex, zero, 0);
            entered(counters, map::PORT_COUNTERS, MAX_PORTS, ENDS)?;
        }
        entered(self.ports.insert(ifindex, value, 0), map::PORTS, MAX_PORTS, ENDS)
    }

    /// Enters a published port.
    pub fn set_published(&mut self, key: PublishedKey, value: PublishedValue) -> Result<()> {
        entered(
            self.published.insert(key, value, 0),
            map::PUBLISHED,
            MAX_PUBLISHED,
            "published ports",
        )
    }

    /// Removes a published port; one that is not there is no error, here and below.
    pub fn remove_published(&mut self, key: &PublishedKey) -> Result<()> {
        gone(self.published.remove(key)).context("remove from PUBLISHED")
    }

    /// Removes a VTEP.
    pub fn remove_host(&mut self, key: &Address) -> Result<()> {
        gone(self.hosts.remove(key)).context("remove from HOSTS")
    }

    /// Removes a network.
    pub fn remove_network(&mut self, vni: u32) -> Result<()> {
        gone(self.networks.remove(&vni)).context("remove from NETWORKS")
    }

    /// Removes an endpoint.
    pub fn remove_endpoint(&mut self, key: &EndpointKey) -> Result<()> {
        gone(self.endpoints.remove(key)).context("remove from ENDPOINTS")
    }

    /// Removes a local endpoint's veth and its counters.
    pub fn remove_port(&mut self, ifindex: u32) -> Result<()> {
        gone(self.ports.remove(&ifindex)).context("remove from PORTS")?;
        gone(self.port_counters.remove(&ifindex)).context("remove from PORT_COUNTERS")
    }

    /// The counter of one verdict of one program, summed over the CPUs.
    pub fn counter(&self, program: Program, code: u8) -> Result<Counter> {
        let values =
            self.counters.get(&counter_index(program, code), 0).context("read COUNTERS")?;
        Ok(values.iter().fold(Counter::default(), |sum, it| Counter {
            packets: sum.packets + it.packets,
            bytes: sum.bytes + it.bytes,
        }))
    }

    /// The traffic of a local endpoint, summed over the CPUs; zero for one that is not there.
    pub fn port_counters(&self, ifindex: u32) -> Result<PortCounters> {
        let values = match self.port_counters.get(&ifindex, 0) {
            Err(MapError::KeyNotFound) => return Ok(PortCounters::default()),
            other => other.context("read PORT_COUNTERS")?,
        };
        Ok(values.iter().fold(PortCounters::default(), |sum, it| PortCounters {
            tx_packets: sum.tx_packets + it.tx_packets,
            tx_bytes: sum.tx_bytes + it.tx_bytes,
            rx_packets: sum.rx_packets + it.rx_packets,
            rx_bytes: sum.rx_bytes + it.rx_bytes,
        }))
    }

    /// The ring buffer of drop events, once.
    pub fn take_events(&mut self) -> Option<RingBuf<MapData>> {
        self.events.take()
    }
}

impl std::fmt::Debug for Maps {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Maps").finish_non_exhaustive()
    }
}

/// Every entry of a table. The agent is its only writer, so nothing changes under the walk.
fn collect<K: aya::Pod + Ord, V: aya::Pod>(
    map: &HashMap<MapData, K, V>,
) -> Result<BTreeMap<K, V>, MapError> {
    map.iter().collect()
}

fn gone(result: Result<(), MapError>) -> Result<()> {
    match result {
        Err(MapError::KeyNotFound) => Ok(()),
        // aya 0.14 reports a missing key of bpf_map_delete_elem as the system call's error.
        Err(MapError::SyscallError(error))
            if error.io_error.raw_os_error() == Some(libc::ENOENT) =>
        {
            Ok(())
        }
        other => Ok(other?),
    }
}

/// The result of entering something, with what to do where the map has no more room.
fn entered(result: Result<(), MapError>, map: &str, room: u32, what: &str) -> Result<()> {
    match result {
        Err(MapError::SyscallError(error))
            if error.io_error.raw_os_error() == Some(libc::E2BIG) =>
        {
            bail!("the map {map} is full: it has room for {room} {what}; there must be fewer")
        }
        other => other.with_context(|| format!("write {map}")),
    }
}
