//! The records under the prefix in Consul, and nothing else: JSON in, JSON out, no I/O.
//!
//! These records are an interface: an operator may write one by hand with `consul kv put`, and a
//! newer agent may add fields. Readers ignore unknown fields and skip what they cannot read
//! (invariant 8).

use std::{collections::BTreeMap, net::Ipv4Addr};

use ipnet::Ipv4Net;
use serde::{Deserialize, Serialize};

/// Version of the records this agent writes, their field `v`.
pub const VERSION: u32 = 1;
/// The first VNI handed out.
pub const FIRST_VNI: u32 = 4096;
/// The last VNI there is (24 bits).
pub const LAST_VNI: u32 = 0x00ff_ffff;

/// `hosts/<node>`: a machine that runs the agent, written by itself under a session's lock.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostRecord {
    /// Version of the record, [`VERSION`].
    pub v: u32,
    /// The host's name, also the end of its key.
    pub node: String,
    /// The address of `--advertise`: the outer address of its VXLAN packets.
    pub vtep: Ipv4Addr,
    /// UDP port it receives VXLAN on, host byte order.
    #[serde(default = "default_port")]
    pub port: u16,
    /// MTU of its uplink in bytes.
    #[serde(default = "default_mtu")]
    pub mtu: u32,
    /// Version of its agent; empty for a host announced by hand.
    #[serde(default)]
    pub agent: String,
}

/// `networks/<name>`: a named virtual network, claimed with its VNI and subnet in one transaction.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetworkRecord {
    /// Version of the record, [`VERSION`].
    pub v: u32,
    /// UUID of the network.
    pub id: String,
    /// Its name, also the end of its key.
    pub name: String,
    /// VXLAN network identifier.
    pub vni: u32,
    /// The network's subnet.
    pub subnet: Ipv4Net,
    /// Address of the gateway, inside the subnet; never an endpoint's.
    pub gateway: Ipv4Addr,
    /// Part of the subnet that addresses are chosen from.
    #[serde(default)]
    pub ip_range: Option<Ipv4Net>,
    /// Named addresses that belong to the network, never to an endpoint.
    #[serde(default)]
    pub aux: BTreeMap<String, Ipv4Addr>,
    /// MTU of the endpoints; the uplink's minus 50 where absent.
    #[serde(default)]
    pub mtu: Option<u32>,
    /// No egress and no published ports.
    #[serde(default)]
    pub internal: bool,
    /// Driver options, as Docker's `-o`.
    #[serde(default)]
    pub options: BTreeMap<String, String>,
    /// Labels, as Docker's `--label`.
    #[serde(default)]
    pub labels: BTreeMap<String, String>,
    /// Name of the host that created it.
    #[serde(default)]
    pub created_by: String,
}

/// Whether an endpoint exists or only its address is claimed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum EndpointState {
    /// The address is claimed; there is no endpoint yet.
    Reserved,
    /// The endpoint exists.
    #[default]
    Up,
}

/// `endpoints/<network id>/<address>`: creating this key with `cas=0` is the address allocation.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct EndpointRecord {
    /// Version of the record, [`VERSION`].
    pub v: u32,
    /// Id of the endpoint: 64 hexadecimal digits as Docker's, or a UUID.
    pub id: String,
    /// Its address, also the end of its key.
    pub address: Ipv4Addr,
    /// Its MAC address as `02:42:0a:00:00:02`.
    pub mac: String,
    /// Name of the host it is on.
    pub host: String,
    /// Name and aliases.
    #[serde(default)]
    pub names: Vec<String>,
    /// See [`EndpointState`].
    #[serde(default)]
    pub state: EndpointState,
}

/// The MAC of an address: `02:42` and the four bytes of it, as libnetwork makes them.
pub fn mac_of(address: Ipv4Addr) -> [u8; 6] {
    let [a, b, c, d] = address.octets();
    [0x02, 0x42, a, b, c, d]
}

/// A MAC as text.
pub fn format_mac(mac: [u8; 6]) -> String {
    let [a, b, c, d, e, f] = mac;
    format!("{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{f:02x}")
}

fn default_port() -> u16 {
    ovnet_common::headers::vxlan::PORT
}

fn default_mtu() -> u32 {
    1500
}
