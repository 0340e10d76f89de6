//! What the kernel should hold, computed from what Consul said and what is on this host. Pure.

mod held;
mod ports;
mod seniority;

use std::{
    collections::{BTreeMap, BTreeSet},
    net::Ipv4Addr,
};

use ovnet_common::{
    abi::{
        Address, EndpointKey, EndpointValue, HostConfig, HostValue, NetworkValue, PortValue,
        Program, mapped, network_flags,
    },
    vxlan,
};

pub use self::{
    held::Held,
    ports::{GatewayLink, PortInputs},
    seniority::Seniority,
};
use crate::{
    consul::schema::{
        EndpointRecord, EndpointState, HostRecord, NetworkRecord, is_host_of, mac_of, parse_mac,
    },
    datapath::{Attachment, Tables, XdpMode},
    state::LocalEndpoint,
};

/// Everything [`desired`] looks at.
#[derive(Clone, Debug)]
pub struct Inputs {
    /// Name of this host.
    pub node: String,
    /// The uplink as last known.
    pub uplink: UplinkView,
    /// ifindex of `ovnet-vx`; `None` while it could not be made.
    pub external: Option<u32>,
    /// UDP port VXLAN is received on, host byte order.
    pub vxlan_port: u16,
    /// Outer UDP source ports: the first, and the one never reached.
    pub source_ports: (u16, u16),
    /// XDP on the uplink.
    pub xdp: Option<XdpMode>,
    /// Hosts that count as there; `None` until Consul said so once.
    pub hosts: Option<BTreeMap<String, HostRecord>>,
    /// Those hosts in the order in which they came to have their VTEP addresses; see [`Seniority`].
    pub seniority: Vec<String>,
    /// All networks by name, as far as they were read.
    pub networks: BTreeMap<String, NetworkRecord>,
    /// See [`Authority::settled`].
    pub settled: bool,
    /// Endpoints by network id, of the networks that were read.
    pub endpoints: BTreeMap<String, BTreeMap<Ipv4Addr, EndpointRecord>>,
    /// The endpoints of this host whose veth exists, each with the host-side ifindex.
    pub local: Vec<(LocalEndpoint, u32)>,
    /// What published ports need besides.
    pub ports: PortInputs,
    /// What the kernel has of endpoints here whose state is lost.
    pub held: Held,
}

/// The uplink, as far as the datapath needs it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UplinkView {
    /// ifindex.
    pub ifindex: u32,
    /// Name.
    pub name: String,
    /// VTEP address.
    pub address: Ipv4Addr,
    /// Its MAC.
    pub mac: [u8; 6],
}

/// What the kernel should hold.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Desired {
    /// The tables.
    pub tables: Tables,
    /// The attached programs.
    pub attachments: BTreeSet<Attachment>,
    /// Of what this may be taken as the whole truth, so that the rest may be removed.
    pub authority: Authority,
    /// Records left out because they contradict others, one line each.
    pub contradictions: Vec<String>,
}

/// What was read whole. Entries outside it are kept (invariant 7).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Authority {
    /// The hosts were read.
    pub hosts: bool,
    /// The agent has been at it, with Consul answering, for the grace period: a host that was not
    /// there in that time is gone, also if it was there before the agent.
    pub settled: bool,
    /// The VNIs whose endpoints were read.
    pub endpoints: BTreeSet<u32>,
}

/// Computes it.
pub fn desired(inputs: &Inputs) -> Desired {
    let mut desired = Desired::default();
    desired.tables.config = HostConfig {
        vtep: mapped(inputs.uplink.address.octets()),
        external_ifindex: inputs.external.unwrap_or(0),
        vxlan_port_be: inputs.vxlan_port.to_be(),
        source_port_min: inputs.source_ports.0,
        source_port_max: inputs.source_ports.1,
        published: 0,
        gwbridge_ifindex: inputs.ports.gwbridge.map_or(0, |(ifindex, _)| ifindex),
        gwbridge_mac: inputs.ports.gwbridge.map_or([0; 6], |(_, mac)| mac),
        uplink_mac: inputs.uplink.mac,
        uplink_ifindex: inputs.uplink.ifindex,
    };
    let hosts = inputs.hosts.clone().unwrap_or_default();
    desired.authority.hosts = inputs.hosts.is_some();
    desired.authority.settled = inputs.settled;
    let vteps = vteps(inputs, &hosts, &mut desired.contradictions);
    for record in vteps.values() {
        desired.tables.hosts.insert(
            mapped(record.vtep.octets()),
            HostValue { vxlan_port_be: record.port.to_be(), reserved: 0 },
        );
    }
    networks_at_odds(&inputs.networks, &mut desired.contradictions);
    // The one that was here first, which the lowest ifindex is of.
    let mut owners: BTreeMap<u32, &NetworkRecord> = BTreeMap::new();
    let mut in_order: Vec<_> = inputs.local.iter().collect();
    in_order.sort_by_key(|(_, ifindex)| *ifindex);
    for (endpoint, ifindex) in in_order {
        let network = &endpoint.network;
        let owner = *owners.entry(network.vni).or_insert(network);
        if owner.id == network.id {
            local(&mut desired, endpoint, *ifindex);
        } else {
            // Its program drops all it sends: it is of no network.
            desired.attachments.insert(from_container(endpoint, *ifindex));
            desired.contradictions.push(format!(
                "endpoint {} of network {} is cut off: VNI {} is network {}'s here",
                endpoint.record.address, network.name, network.vni, owner.name
            ));
        }
    }
    let networks: BTreeMap<&str, &NetworkRecord> = inputs
        .local
        .iter()
        .map(|(endpoint, _)| (endpoint.network.id.as_str(), &endpoint.network))
        .filter(|(id, network)| owners.get(&network.vni).is_some_and(|owner| owner.id == **id))
        .collect();
    for (id, network) in networks {
        let Some(endpoints) = inputs.endpoints.get(id) else { continue };
        desired.authority.endpoints.insert(network.vni);
        for record in endpoints.values() {
            remote(&mut desired, inputs, &vteps, network, record);
        }
    }
    attachments(&mut desired, inputs);
    ports::enter(&mut desired, &inputs.ports, &inputs.local);
    held::enter(&mut desired, &inputs.held);
    desired
}

/// Networks that say the same VNI, or overlapping subnets. Each is a network of its own all the same
/// until it is used: addresses are claimed of the one only that has claimed the VNI.
fn networks_at_odds(networks: &BTreeMap<String, NetworkRecord>, contradictions: &mut Vec<String>) {
    let mut by_vni: BTreeMap<u32, &str> = BTreeMap::new();
    let mut by_subnet: Vec<&NetworkRecord> = networks.values().collect();
    for (name, network) in networks {
        let first = *by_vni.entry(network.vni).or_insert(name);
        if first != name {
            let vni = network.vni;
            contradictions.push(format!("networks {first} and {name} both say VNI {vni}"));
        }
    }
    by_subnet.sort_by_key(|network| (network.subnet.network(), network.subnet.prefix_len()));
    // Two subnets overlap only where one is in the other, which then is the widest so far.
    let mut widest: Option<&NetworkRecord> = None;
    for network in by_subnet {
        match widest {
            Some(wide) if wide.subnet.contains(&network.subnet) => contradictions.push(format!(
                "networks {} and {} overlap: {} and {}",
                wide.name, network.name, wide.subnet, network.subnet
            )),
            _ => widest = Some(network),
        }
    }
}

/// The other hosts by name, each VTEP address once. A record that claims ours, or one another host
/// has, is left out: who had it first keeps it.
fn vteps<'a>(
    inputs: &Inputs,
    hosts: &'a BTreeMap<String, HostRecord>,
    contradictions: &mut Vec<String>,
) -> BTreeMap<&'a str, &'a HostRecord> {
    let mut taken: BTreeMap<Address, &str> = BTreeMap::new();
    let mut vteps = BTreeMap::new();
    let rank = |node: &str| inputs.seniority.iter().position(|it| it == node);
    let mut in_order: Vec<_> = hosts.iter().collect();
    in_order.sort_by_key(|(node, _)| (rank(node).unwrap_or(usize::MAX), *node));
    for (node, record) in in_order {
        if *node == inputs.node {
            continue;
        }
        // The kernel's path cannot be told a port per packet, so there is one for all.
        if record.port != inputs.vxlan_port {
            let (port, ours) = (record.port, inputs.vxlan_port);
            contradictions.push(format!("host {node} has VXLAN port {port}, the others {ours}"));
            continue;
        }
        let unusable = record.vtep.is_unspecified()
            || record.vtep.is_multicast()
            || record.vtep.is_broadcast()
            || record.vtep.is_loopback();
        if unusable || record.vtep == inputs.uplink.address {
            contradictions.push(format!("host {node} claims the VTEP address {}", record.vtep));
            continue;
        }
        if let Some(other) = taken.get(&mapped(record.vtep.octets())) {
            contradictions.push(format!(
                "hosts {other} and {node} both claim the VTEP address {}; {other} keeps it",
                record.vtep
            ));
            continue;
        }
        taken.insert(mapped(record.vtep.octets()), node);
        vteps.insert(node.as_str(), record);
    }
    vteps
}

/// Enters an endpoint of this host, and with it its network.
fn local(desired: &mut Desired, endpoint: &LocalEndpoint, ifindex: u32) {
    let LocalEndpoint { record, network, mtu, .. } = endpoint;
    let Ok(mac) = parse_mac(&record.mac) else {
        desired.contradictions.push(format!("endpoint {} has no MAC address", record.id));
        return;
    };
    let address = mapped(record.address.octets());
    let flags = if network.internal { network_flags::INTERNAL } else { 0 };
    desired.tables.networks.insert(
        network.vni,
        NetworkValue {
            gateway: mapped(network.gateway.octets()),
            gateway_mac: mac_of(network.gateway),
            mtu: u16::try_from(*mtu).unwrap_or(u16::MAX),
            flags,
        },
    );
    desired.tables.endpoints.insert(
        EndpointKey { vni: network.vni, address },
        EndpointValue { vtep: [0; 16], ifindex, mac, vxlan_port_be: 0 },
    );
    desired.tables.ports.insert(ifindex, PortValue { vni: network.vni, address, mac, reserved: 0 });
    desired.attachments.insert(from_container(endpoint, ifindex));
}

fn from_container(endpoint: &LocalEndpoint, ifindex: u32) -> Attachment {
    let interface = endpoint.host_ifname.clone();
    Attachment { program: Program::FromContainer, ifindex, interface, xdp: None }
}

/// Enters an endpoint of another host, where its record makes sense.
fn remote(
    desired: &mut Desired,
    inputs: &Inputs,
    vteps: &BTreeMap<&str, &HostRecord>,
    network: &NetworkRecord,
    record: &EndpointRecord,
) {
    if record.host == inputs.node || record.state == EndpointState::Reserved {
        return;
    }
    let key = EndpointKey { vni: network.vni, address: mapped(record.address.octets()) };
    // What is on this host is known better here than in Consul.
    if desired.tables.endpoints.contains_key(&key) {
        desired.contradictions.push(format!(
            "host {} claims {} of network {}, which an endpoint here has",
            record.host, record.address, network.name
        ));
        return;
    }
    let of_network = record.address == network.gateway
        || network.aux.values().any(|address| *address == record.address);
    if of_network || !is_host_of(network.subnet, record.address) {
        desired.contradictions.push(format!(
            "host {} claims {}, which no endpoint of network {} can have",
            record.host, record.address, network.name
        ));
        return;
    }
    let (Ok(mac), Some(host)) = (parse_mac(&record.mac), vteps.get(record.host.as_str())) else {
        // Its host is not there, or no longer; that is said of the host already.
        return;
    };
    desired.tables.endpoints.insert(
        key,
        EndpointValue {
            vtep: mapped(host.vtep.octets()),
            ifindex: 0,
            mac,
            vxlan_port_be: host.port.to_be(),
        },
    );
}

fn attachments(desired: &mut Desired, inputs: &Inputs) {
    let UplinkView { ifindex, name, .. } = &inputs.uplink;
    let on = |program, ifindex, interface: &str, xdp| Attachment {
        program,
        ifindex,
        interface: interface.into(),
        xdp,
    };
    desired.attachments.insert(on(Program::FromUplink, *ifindex, name, None));
    if let Some(external) = inputs.external {
        let name = crate::net::EXTERNAL;
        desired.attachments.insert(on(Program::FromOverlay, external, name, None));
    }
    if let Some(mode) = inputs.xdp {
        desired.attachments.insert(on(Program::UplinkXdp, *ifindex, name, Some(mode)));
    }
}

/// MTU of an endpoint: the network's where it has one, but never more than the uplink carries.
pub fn endpoint_mtu(network: &NetworkRecord, uplink_mtu: u32) -> u32 {
    let overhead = u32::try_from(vxlan::OVERHEAD).unwrap_or(u32::MAX);
    let room = uplink_mtu.saturating_sub(overhead);
    network.mtu.map_or(room, |mtu| mtu.min(room))
}

#[cfg(test)]
mod tests;
