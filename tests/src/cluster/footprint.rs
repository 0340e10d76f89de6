//! What ovnet has on a host, to compare before and after.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs, io,
    net::Ipv4Addr,
    path::Path,
};

use aya::maps::{HashMap, Map, MapData};
use ovnet_common::{
    abi::{Address, EndpointKey, EndpointValue, HostValue, NetworkValue, PortValue, mapped},
    published::{PublishedKey, PublishedValue},
};

use super::Cluster;

/// Everything of ovnet on one host.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Footprint {
    /// Links named `ovnet*`.
    pub links: BTreeSet<String>,
    /// Pins below `/sys/fs/bpf`, folders with a slash at their end.
    pub pins: BTreeSet<String>,
    /// Files of the state folder.
    pub state: BTreeSet<String>,
    /// What is in the folder of the socket.
    pub sockets: BTreeSet<String>,
    /// Entries of the pinned maps.
    pub entries: BTreeSet<String>,
}

impl Cluster {
    /// What ovnet has on a host now.
    pub fn footprint(&self, host: &str) -> Footprint {
        let root = self.lab.host(host).unwrap().root();
        let links = self.sh(host, "ip -o link");
        let links = links.lines().filter_map(|line| line.split(": ").nth(1));
        let links = links.map(|name| name.split('@').next().unwrap_or(name).to_owned());
        Footprint {
            links: links.filter(|name| name.starts_with("ovnet")).collect(),
            // The kernel's own are there too: maps.debug, progs.debug.
            pins: tree(&root.join("sys/fs/bpf"))
                .into_iter()
                .filter(|pin| pin.starts_with("ovnet"))
                .collect(),
            state: tree(&root.join("var/lib/ovnet")),
            sockets: tree(&root.join("run/ovnet")),
            entries: self.entries(host),
        }
    }

    /// Footprints of all hosts and, under an empty name, the records in Consul.
    pub fn footprints(&self) -> (BTreeMap<String, Footprint>, BTreeMap<String, String>) {
        let nodes = self.lab.nodes();
        let of = nodes.into_iter().map(|node| (node.clone(), self.footprint(&node))).collect();
        (of, self.records())
    }

    /// Addresses that the maps of a host lead to, as the programs see them: of all networks, the
    /// endpoints and the VTEP of each, unspecified for a local one.
    pub fn endpoints_of(&self, host: &str) -> BTreeMap<Ipv4Addr, Ipv4Addr> {
        let Some(map) = self.map(host, "ENDPOINTS") else { return BTreeMap::new() };
        let map: HashMap<MapData, EndpointKey, EndpointValue> = map.try_into().unwrap();
        map.iter()
            .filter_map(Result::ok)
            .map(|(key, value)| (ipv4(key.address), ipv4(value.vtep)))
            .collect()
    }

    /// The VTEPs that a host takes packets from.
    pub fn vteps_of(&self, host: &str) -> BTreeSet<Ipv4Addr> {
        let Some(map) = self.map(host, "HOSTS") else { return BTreeSet::new() };
        let map: HashMap<MapData, Address, HostValue> = map.try_into().unwrap();
        map.keys().filter_map(Result::ok).map(ipv4).collect()
    }

    /// The VNIs of the networks that a host is in, as its programs see them.
    pub fn vnis_of(&self, host: &str) -> BTreeSet<u32> {
        let Some(map) = self.map(host, "NETWORKS") else { return BTreeSet::new() };
        let map: HashMap<MapData, u32, NetworkValue> = map.try_into().unwrap();
        map.keys().filter_map(Result::ok).collect()
    }

    /// The TCP and UDP ports of a host's uplink that its programs lead to sandboxes.
    pub fn published_by(&self, host: &str) -> BTreeSet<u16> {
        let Some(map) = self.map(host, "PUBLISHED") else { return BTreeSet::new() };
        let map: HashMap<MapData, PublishedKey, PublishedValue> = map.try_into().unwrap();
        let uplink = self.lab.address(host).unwrap();
        let keys = map.keys().filter_map(Result::ok).filter(|key| ipv4(key.address) == uplink);
        keys.map(|key| u16::from_be(key.port_be)).collect()
    }

    fn entries(&self, host: &str) -> BTreeSet<String> {
        let mut entries: BTreeSet<String> = self
            .endpoints_of(host)
            .into_iter()
            .map(|(address, vtep)| format!("endpoint {address} at {vtep}"))
            .collect();
        entries.extend(self.vteps_of(host).into_iter().map(|vtep| format!("host {vtep}")));
        if let Some(map) = self.map(host, "PORTS") {
            let map: HashMap<MapData, u32, PortValue> = map.try_into().unwrap();
            entries.extend(map.keys().filter_map(Result::ok).map(|key| format!("port {key}")));
        }
        entries
    }

    /// A pinned map of a host, of whatever version there is.
    fn map(&self, host: &str, name: &str) -> Option<Map> {
        let bpffs = self.lab.host(host).unwrap().root().join("sys/fs/bpf/ovnet");
        let folders = fs::read_dir(bpffs).into_iter().flatten().filter_map(Result::ok);
        let mut pins = folders.map(|folder| folder.path().join("maps").join(name));
        let data = pins.find_map(|pin| MapData::from_pin(pin).ok())?;
        Some(Map::HashMap(data))
    }
}

/// The IPv4 address in a map's key; unspecified where there is none.
fn ipv4(address: Address) -> Ipv4Addr {
    let octets = [address[12], address[13], address[14], address[15]];
    if address == mapped(octets) { octets.into() } else { Ipv4Addr::UNSPECIFIED }
}

/// Everything below a folder, relative to it; nothing where it is missing.
fn tree(folder: &Path) -> BTreeSet<String> {
    fn walk(folder: &Path, below: &str, found: &mut BTreeSet<String>) -> io::Result<()> {
        for entry in fs::read_dir(folder)? {
            let entry = entry?;
            let name = format!("{below}{}", entry.file_name().to_string_lossy());
            if entry.file_type()?.is_dir() {
                found.insert(format!("{name}/"));
                // It may be gone again.
                let _ = walk(&entry.path(), &format!("{name}/"), found);
            } else {
                found.insert(name);
            }
        }
        Ok(())
    }
    let mut found = BTreeSet::new();
    let _ = walk(folder, "", &mut found);
    found
}
