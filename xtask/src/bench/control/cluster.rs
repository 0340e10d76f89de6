//! The simulated cluster: which hosts, networks and endpoints there are, and their records. Pure.
//!
//! The records are those README describes. They are written out here once more, because nothing of
//! this crate may depend on the agent.

use std::net::Ipv4Addr;

use clap::ValueEnum;
use serde_json::{Value, json};

/// What comes before every key, the agents' default.
const PREFIX: &str = "ovnet/v1";
/// VNI of the first network.
const FIRST_VNI: u32 = 5000;
/// Networks of a cluster whose endpoints are spread, and those of them that a measured host is on.
const SPREAD: (u32, u32) = (100, 3);
/// Addresses at a network's beginning that no simulated endpoint has: the measured hosts attach there.
const MEASURED: u32 = 256;
/// Addresses that the measurement attaches, in turns.
const TURNS: u32 = 200;

/// How endpoints lie in networks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum Shape {
    /// All in one network, which the measured hosts are on.
    One,
    /// In 100 networks, three of which the measured hosts are on.
    Spread,
}

/// A simulated cluster.
#[derive(Clone, Copy, Debug)]
pub(super) struct Cluster {
    /// How endpoints lie in networks.
    pub(super) shape: Shape,
    /// Simulated hosts; the real ones come on top.
    pub(super) hosts: u32,
    /// Simulated endpoints of the whole cluster.
    pub(super) endpoints: u32,
}

/// A key with its record.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Record {
    /// The whole key.
    pub(super) key: String,
    /// What is written there.
    pub(super) value: String,
}

/// Where an endpoint is: what the map's key is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Place {
    /// VNI of its network.
    pub(super) vni: u32,
    /// Its address.
    pub(super) address: Ipv4Addr,
}

impl Cluster {
    /// How many networks there are, and how many of them, the first, the measured hosts are on.
    pub(super) fn networks(&self) -> (u32, u32) {
        match self.shape {
            Shape::One => (1, 1),
            Shape::Spread => SPREAD,
        }
    }

    /// Name of a network.
    pub(super) fn name(network: u32) -> String {
        format!("bench{network}")
    }

    /// The folder of a network's endpoints, with a slash at its end.
    pub(super) fn folder(network: u32) -> String {
        format!("{PREFIX}/endpoints/{}/", id(network))
    }

    /// The records of the simulated hosts, to be written under a session's lock.
    pub(super) fn host_records(&self) -> impl Iterator<Item = Record> {
        (0..self.hosts).map(|host| {
            let node = node(host);
            let vtep = Ipv4Addr::from(0xac1f_0001 + host);
            let value = json!({
                "v": 1, "node": node, "vtep": vtep, "port": 4789, "mtu": 1500, "agent": "0.1.0",
            });
            Record { key: format!("{PREFIX}/hosts/{node}"), value: value.to_string() }
        })
    }

    /// The records of the networks: name, VNI, subnet, and the sentinel of the endpoints.
    pub(super) fn network_records(&self) -> Vec<Record> {
        let record = |key: String, value: String| Record { key: format!("{PREFIX}/{key}"), value };
        let all = (0..self.networks().0).flat_map(|network| {
            let (base, length) = (self.base(network), self.length());
            let (address, id) = (Ipv4Addr::from(base), id(network));
            let (name, vni) = (Self::name(network), FIRST_VNI + network);
            let value = json!({
                "v": 1, "id": id, "name": name, "vni": vni,
                "subnet": format!("{address}/{length}"), "gateway": Ipv4Addr::from(base + 1),
                "ip_range": Value::Null, "aux": {}, "mtu": Value::Null, "internal": false,
                "options": {}, "labels": {}, "created_by": node(0),
            });
            [
                record(format!("vnis/{vni}"), id.clone()),
                record(format!("subnets/{address}-{length}"), id.clone()),
                record(format!("endpoints/{id}/.keep"), format!("sentinel-of-{network}")),
                record(format!("networks/{name}"), value.to_string()),
            ]
        });
        all.collect()
    }

    /// The simulated endpoints that are there all the time.
    pub(super) fn endpoint_records(&self) -> impl Iterator<Item = Record> {
        (0..self.endpoints).map(|number| self.record(number, MEASURED))
    }

    /// Those of them that the measured hosts must know.
    pub(super) fn known(&self) -> impl Iterator<Item = Place> {
        let (networks, mine) = self.networks();
        let ours = (0..self.endpoints).filter(move |number| number % networks < mine);
        ours.map(|number| self.place(number, MEASURED))
    }

    /// The record of an endpoint that comes and goes, and where it is.
    pub(super) fn passing(&self, number: u32) -> (Record, Place) {
        // Behind all others: half a subnet.
        let first = 1 << (31 - self.length());
        (self.record(number, first), self.place(number, first))
    }

    /// As [`Self::passing`], in the first network, which the measured hosts are on.
    pub(super) fn passing_here(&self, number: u32) -> (Record, Place) {
        // Far from those that come and go meanwhile.
        self.passing((20_000 + number) * self.networks().0)
    }

    /// The address that the measurement attaches the nth time, in the first network.
    pub(super) fn attached(&self, turn: u32) -> Place {
        Place { vni: FIRST_VNI, address: Ipv4Addr::from(self.base(0) + 10 + turn % TURNS) }
    }

    fn record(&self, number: u32, first: u32) -> Record {
        let network = number % self.networks().0;
        let Place { address, .. } = self.place(number, first);
        let [a, b, c, d] = address.octets();
        let value = json!({
            "v": 1, "id": format!("{number:064x}"), "address": address,
            "mac": format!("02:42:{a:02x}:{b:02x}:{c:02x}:{d:02x}"),
            "host": node(number % self.hosts), "names": [format!("web-{number}")], "state": "up",
        });
        Record { key: format!("{}{address}", Self::folder(network)), value: value.to_string() }
    }

    fn place(&self, number: u32, first: u32) -> Place {
        let networks = self.networks().0;
        let network = number % networks;
        let address = Ipv4Addr::from(self.base(network) + first + number / networks);
        Place { vni: FIRST_VNI + network, address }
    }

    fn base(&self, network: u32) -> u32 {
        0x0a00_0000 + (network << 16)
    }

    fn length(&self) -> u32 {
        match self.shape {
            Shape::One => 12,
            Shape::Spread => 16,
        }
    }
}

fn node(host: u32) -> String {
    format!("sim{host:04}")
}

fn id(network: u32) -> String {
    format!("00000000-0000-4000-8000-{network:012}")
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn no_two_endpoints_have_one_address_and_all_lie_in_their_subnet() {
        for (shape, endpoints) in [(Shape::One, 100_000), (Shape::Spread, 20_000)] {
            let cluster = Cluster { shape, hosts: 7, endpoints };
            let there = cluster.endpoint_records().map(|it| it.key);
            let passing = (0..5000).map(|number| cluster.passing(number).0.key);
            let here = (0..2000).map(|number| cluster.passing_here(number).0.key);
            let all: Vec<String> = there.chain(passing).chain(here).collect();
            assert_eq!(all.iter().collect::<BTreeSet<_>>().len(), all.len(), "{shape:?}");
            let size = 1 << (32 - cluster.length());
            let last = cluster.passing_here(2000).1.address;
            assert!(u32::from(last) - cluster.base(0) < size - 1, "{last}");
            assert_eq!(cluster.passing_here(3).1.vni, cluster.attached(0).vni);
        }
    }

    #[test]
    fn a_measured_host_knows_the_endpoints_of_its_networks() {
        let cluster = Cluster { shape: Shape::Spread, hosts: 10, endpoints: 1000 };
        assert_eq!(cluster.known().count(), 30);
        assert_eq!(Cluster { shape: Shape::One, ..cluster }.known().count(), 1000);
    }
}
