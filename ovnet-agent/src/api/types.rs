//! Bodies of the HTTP API on the agent's socket. The client prints them with `--json` as they are.

use std::{collections::BTreeMap, net::Ipv4Addr};

use ipnet::Ipv4Net;
use serde::{Deserialize, Serialize};

use crate::{
    consul::schema::{EndpointRecord, NetworkRecord},
    publish::PublishedPort,
    repairs::Repairs,
};

/// `POST /v1/networks`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CreateNetwork {
    /// Name of the network.
    pub name: String,
    /// Subnet; the next free one of the default pool where absent.
    #[serde(default)]
    pub subnet: Option<Ipv4Net>,
    /// Gateway; the first address of the subnet where absent.
    #[serde(default)]
    pub gateway: Option<Ipv4Addr>,
    /// Part of the subnet that addresses are chosen from.
    #[serde(default)]
    pub ip_range: Option<Ipv4Net>,
    /// Named addresses kept from endpoints.
    #[serde(default)]
    pub aux: BTreeMap<String, Ipv4Addr>,
    /// MTU of the endpoints.
    #[serde(default)]
    pub mtu: Option<u32>,
    /// No egress and no published ports.
    #[serde(default)]
    pub internal: bool,
    /// Driver options.
    #[serde(default)]
    pub options: BTreeMap<String, String>,
    /// Labels.
    #[serde(default)]
    pub labels: BTreeMap<String, String>,
}

/// `GET /v1/networks/{name}`: a network and everyone in it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetworkView {
    /// The network's record.
    #[serde(flatten)]
    pub network: NetworkRecord,
    /// Its endpoints on all hosts.
    pub endpoints: Vec<EndpointRecord>,
}

/// `POST /v1/endpoints`: attach a sandbox to a network.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Attach {
    /// Name or id of the network.
    pub network: String,
    /// Path of the sandbox's network namespace, or its name under `/run/netns`.
    pub netns: String,
    /// Address; the next free one where absent.
    #[serde(default)]
    pub ip: Option<Ipv4Addr>,
    /// Name of the endpoint.
    #[serde(default)]
    pub name: Option<String>,
    /// Further names.
    #[serde(default)]
    pub aliases: Vec<String>,
    /// Name of the interface; the first free `eth<n>` where absent.
    #[serde(default)]
    pub ifname: Option<String>,
    /// Ports to publish, as Docker's `-p` has them: `192.168.1.12:90:80/udp`.
    #[serde(default)]
    pub publish: Vec<String>,
    /// Whether every exposed port is published on a free port of the host.
    #[serde(default)]
    pub publish_all: bool,
    /// Ports of the sandbox that `publish_all` publishes, as `80/tcp` or `8000-8010/udp`.
    #[serde(default)]
    pub expose: Vec<String>,
}

/// `POST /v1/endpoints/detach`: which endpoints to detach; all that match every field given.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Detach {
    /// Name or id of the network.
    #[serde(default)]
    pub network: Option<String>,
    /// The sandbox's network namespace, as in [`Attach::netns`].
    #[serde(default)]
    pub netns: Option<String>,
    /// Name or id of the endpoint.
    #[serde(default)]
    pub endpoint: Option<String>,
}

/// What a detach did.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Detached {
    /// The endpoints that were detached, as they were.
    pub endpoints: Vec<EndpointView>,
    /// What is still to be done, one line each: a record Consul could not be asked to delete.
    #[serde(default)]
    pub warnings: Vec<String>,
}

/// An endpoint as `ovnet endpoint ls` shows it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct EndpointView {
    /// The endpoint's record.
    #[serde(flatten)]
    pub record: EndpointRecord,
    /// Name of its network.
    pub network: String,
    /// What only its own host knows; absent for an endpoint elsewhere.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub local: Option<LocalView>,
}

/// The part of an endpoint that only its host knows.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LocalView {
    /// Path of the sandbox's network namespace.
    pub netns: String,
    /// Interface inside the sandbox.
    pub ifname: String,
    /// Host-side veth.
    pub host_ifname: String,
    /// MTU in bytes.
    pub mtu: u32,
    /// Packets the container sent.
    pub tx_packets: u64,
    /// Bytes the container sent.
    pub tx_bytes: u64,
    /// Packets delivered to the container.
    pub rx_packets: u64,
    /// Bytes delivered to the container.
    pub rx_bytes: u64,
    /// The sandbox's way out, where ovnet or Docker gave it one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gateway: Option<GatewayView>,
    /// The ports of this host that lead to it, by the port inside.
    #[serde(default)]
    pub ports: Vec<PublishedPort>,
}

/// A sandbox's way out.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GatewayView {
    /// Its address on the bridge: where published ports are delivered.
    pub address: Ipv4Addr,
    /// The interface inside the sandbox.
    pub ifname: String,
}

/// A host as `ovnet host ls` shows it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostView {
    /// Name of the host.
    pub node: String,
    /// Its VTEP address.
    pub vtep: Ipv4Addr,
    /// Its VXLAN port.
    pub port: u16,
    /// MTU of its uplink.
    pub mtu: u32,
    /// Version of its agent.
    pub agent: String,
    /// Whether its lease stands: `up`, or `lost` while it has none.
    pub state: String,
    /// Whether it is the host that answers.
    pub this: bool,
    /// The way to it; absent for the host that answers, and for one that is not asked.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub path: Option<PathView>,
}

/// Whether VXLAN gets through to a host and back.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PathView {
    /// `reachable`; `narrow` where only short packets come back; `unreachable`; `unknown` before the
    /// first answer.
    pub path: String,
    /// How long that has been so, in seconds.
    pub seconds: u64,
    /// How long the last answer took, in microseconds; absent where there is none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub round_trip_us: Option<u64>,
}

/// A peer as `ovnet status` knows it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PeerView {
    /// Name of the host.
    pub node: String,
    /// Its VTEP address.
    pub vtep: Ipv4Addr,
    /// The way to it.
    #[serde(flatten)]
    pub path: PathView,
}

/// `GET /v1/status`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// Name of this host.
    pub node: String,
    /// Version of the agent.
    pub agent: String,
    /// The uplink's name.
    pub uplink: String,
    /// The VTEP address; absent while the uplink has none.
    pub vtep: Option<Ipv4Addr>,
    /// MTU of the uplink in bytes.
    pub uplink_mtu: u32,
    /// Address of Consul.
    pub consul: String,
    /// `connected`, or what is wrong.
    pub consul_state: String,
    /// XDP mode in force: `native`, `generic`, or `off` with the reason.
    pub xdp: String,
    /// `tcx` or `clsact`.
    pub tc: String,
    /// Hosts known, this one included.
    pub hosts: usize,
    /// Networks known.
    pub networks: usize,
    /// Endpoints on this host.
    pub local_endpoints: usize,
    /// Ports of this host that lead to its endpoints.
    #[serde(default)]
    pub published_ports: usize,
    /// Entries of published ports' flows, two per flow, at the last look.
    #[serde(default)]
    pub flow_entries: u64,
    /// How many entries fit.
    #[serde(default)]
    pub flow_capacity: u64,
    /// What somebody else broke and the agent put right since it started, by kind.
    #[serde(default)]
    pub repairs: Repairs,
    /// Records that could not be read, now.
    pub unreadable_records: usize,
    /// Files of endpoints that could not be read when the agent started, and were set aside.
    #[serde(default)]
    pub state_files_set_aside: usize,
    /// The hosts that are asked whether VXLAN gets through to them, by name.
    #[serde(default)]
    pub peers: Vec<PeerView>,
    /// What somebody should look at and what the agent cannot mend; empty when there is nothing.
    #[serde(default)]
    pub warnings: Vec<String>,
    /// The last reconciliation's errors; empty when all is as it should be.
    pub errors: Vec<String>,
}

/// One line of `ovnet counters`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CounterView {
    /// Name of the program.
    pub program: String,
    /// Label of the verdict or drop reason.
    pub verdict: String,
    /// Packets; a GSO packet is one.
    pub packets: u64,
    /// Bytes of frame.
    pub bytes: u64,
}

/// One line of `GET /v1/monitor`, which streams them as newline-delimited JSON.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum MonitorLine {
    /// A sampled drop.
    Drop(MonitorView),
    /// Events came faster than they were read.
    Missed {
        /// How many were left out.
        missed: u64,
    },
}

/// A sampled drop.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MonitorView {
    /// Nanoseconds since boot.
    pub timestamp_ns: u64,
    /// Name of the program.
    pub program: String,
    /// Label of the drop reason.
    pub reason: String,
    /// ifindex the packet came in by.
    pub ifindex: u32,
    /// Name of that interface, where it still has one.
    pub interface: String,
    /// Length of the frame.
    pub length: u32,
    /// A one-line reading of the headers, as `10.0.0.2 > 10.0.0.9 icmp`.
    pub summary: String,
    /// The captured bytes in hexadecimal.
    pub data: String,
}

/// Any error: one line that says what failed, why, and what to do.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ErrorBody {
    /// The line.
    pub error: String,
}
