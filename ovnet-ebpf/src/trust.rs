//! Decapsulation is a trust boundary (invariant 4): these checks stand between the wire and every
//! container, and each program that brings packets in from the wire calls them.

use ovnet_common::{
    abi::{EndpointValue, HostConfig, mapped, unmapped},
    checksum,
    headers::{ethernet, ipv4, udp, vxlan as vxlan_header},
    verdict::DropReason,
    vxlan,
};

use crate::{
    maps,
    parse::{Ethernet, Frame, Ipv4},
};

/// What a frame of the wire turned out to be.
pub(crate) enum Accepted {
    /// Not ours, or one only the kernel's path takes.
    Nothing,
    /// In the network of probes, from a known VTEP.
    Probe,
    /// For a container.
    Packet(Packet),
}

/// A VXLAN packet of the wire that passed every check.
pub(crate) struct Packet {
    /// The inner Ethernet header.
    pub(crate) eth: Ethernet,
    /// The inner IPv4 header.
    pub(crate) ip: Ipv4,
    /// The local endpoint it is for.
    pub(crate) endpoint: EndpointValue,
    /// Its VNI.
    pub(crate) vni: u32,
    /// The outer TOS byte.
    pub(crate) outer_tos: u8,
}

/// Makes all checks on a frame of the wire, of which the headers are readable.
#[inline(always)]
pub(crate) fn accept(frame: &Frame, config: &HostConfig) -> Result<Accepted, DropReason> {
    if frame.read(ethernet::TYPE) != Some(ethernet::IPV4.to_be_bytes()) {
        return Ok(Accepted::Nothing);
    }
    let Received { source, tos, vni } = match outer(frame, config)? {
        Outer::NotOurs | Outer::Kernel => return Ok(Accepted::Nothing),
        Outer::Vxlan(received) => received,
    };
    if vni == vxlan::PROBE_VNI {
        // No endpoint vouches for it, so the host itself is looked for.
        return if maps::is_host(source) {
            Ok(Accepted::Probe)
        } else {
            Err(DropReason::UnknownVtep)
        };
    }
    let (eth, ip) = match inner(frame, vxlan::INNER_ETHERNET)? {
        Inner::Ipv4(eth, ip) => (eth, ip),
        // The reply must be encapsulated, which a decapsulated packet cannot be here: the kernel's
        // device takes it both ways, and `from_overlay` answers.
        Inner::Arp => return Ok(Accepted::Nothing),
    };
    let endpoint = local_endpoint(vni, source, ip.source, ip.destination)?;
    Ok(Accepted::Packet(Packet { eth, ip, endpoint, vni, outer_tos: tos }))
}

/// What a frame from the wire is to us.
enum Outer {
    /// Not VXLAN to our VTEP address and port.
    NotOurs,
    /// Ours, but in a form only the kernel's path takes: fragments, IP options, a UDP checksum.
    Kernel,
    /// VXLAN to us.
    Vxlan(Received),
}

/// The outer headers of a VXLAN packet to us.
struct Received {
    source: [u8; 4],
    tos: u8,
    vni: u32,
}

/// Reads the outer headers.
#[inline(always)]
fn outer(frame: &Frame, config: &HostConfig) -> Result<Outer, DropReason> {
    let Some(ip) = Ipv4::read_fields(frame, vxlan::OUTER_IP) else {
        return Ok(Outer::NotOurs);
    };
    if ip.protocol != ipv4::UDP || mapped(ip.destination) != config.vtep {
        return Ok(Outer::NotOurs);
    }
    if ip.version_ihl != ipv4::NO_OPTIONS || ip.is_fragment() {
        // Whether it is VXLAN cannot be seen in a later fragment. The kernel reassembles, and
        // `from_overlay` makes the same checks on what comes out of `ovnet-vx`.
        return Ok(Outer::Kernel);
    }
    let Some(ports) = frame.read::<{ udp::LEN }>(vxlan::OUTER_UDP) else {
        return Ok(Outer::NotOurs);
    };
    let [_, _, d0, d1, _, _, c0, c1] = ports;
    if u16::from_ne_bytes([d0, d1]) != config.vxlan_port_be {
        return Ok(Outer::NotOurs);
    }
    // The kernel's IP layer, which would check it, never sees the packet.
    if !frame.read(vxlan::OUTER_IP).is_some_and(|header| checksum::ipv4_valid(&header)) {
        return Err(DropReason::OuterChecksum);
    }
    // A program cannot verify a checksum over the whole packet; the kernel can. VXLAN senders set
    // zero (RFC 7348 §4.1).
    if [c0, c1] != [0, 0] {
        return Ok(Outer::Kernel);
    }
    let Some(header) = frame.read::<{ vxlan_header::LEN }>(vxlan::VXLAN) else {
        return Err(DropReason::Truncated);
    };
    let vni = vxlan::parse_vni(header)?;
    Ok(Outer::Vxlan(Received { source: ip.source, tos: ip.tos, vni }))
}

/// What is inside a VXLAN packet.
pub(crate) enum Inner {
    /// IPv4, with its Ethernet header.
    Ipv4(Ethernet, Ipv4),
    /// ARP, from a peer that is a plain kernel vxlan device.
    Arp,
}

/// Reads the inner headers.
#[inline(always)]
pub(crate) fn inner(frame: &Frame, offset: usize) -> Result<Inner, DropReason> {
    let eth = Ethernet::read(frame, offset).ok_or(DropReason::Truncated)?;
    match eth.ethertype {
        ethernet::IPV4 => {}
        ethernet::ARP => return Ok(Inner::Arp),
        _ => return Err(DropReason::EtherType),
    }
    let ip = Ipv4::read_fields(frame, offset + ethernet::LEN).ok_or(DropReason::Truncated)?;
    if !ip.is_valid() {
        return Err(DropReason::BadIpHeader);
    }
    Ok(Inner::Ipv4(eth, ip))
}

/// The local endpoint a packet may be delivered to, or why it may not.
///
/// The proof that the outer source is a known VTEP is the inner source's own entry: the agent
/// enters an endpoint only with the VTEP address of a known host, so an entry that names the outer
/// source says both that the host is known and that the endpoint is on it. One lookup is two
/// checks, and a host can only speak for its own endpoints.
#[inline(always)]
pub(crate) fn local_endpoint(
    vni: u32,
    vtep: [u8; 4],
    source: [u8; 4],
    destination: [u8; 4],
) -> Result<EndpointValue, DropReason> {
    if !is_sent_by(vni, vtep, source) {
        return Err(why_not_trusted(vni, vtep));
    }
    match maps::endpoint(vni, destination) {
        Some(endpoint) if endpoint.ifindex != 0 => Ok(endpoint),
        _ if destination[0] >= 224 => Err(DropReason::Multicast),
        _ => Err(DropReason::NotLocal),
    }
}

/// Whether the endpoint with this address is on the host with this VTEP address.
#[inline(always)]
pub(crate) fn is_sent_by(vni: u32, vtep: [u8; 4], source: [u8; 4]) -> bool {
    match maps::endpoint(vni, source) {
        Some(endpoint) => unmapped(&endpoint.vtep) == vtep && endpoint.ifindex == 0,
        None => false,
    }
}

/// The reason to count for a packet whose inner source its VTEP may not speak for.
#[inline(always)]
pub(crate) fn why_not_trusted(vni: u32, vtep: [u8; 4]) -> DropReason {
    if !maps::is_host(vtep) {
        return DropReason::UnknownVtep;
    }
    if maps::network(vni).is_none() {
        return DropReason::UnknownVni;
    }
    DropReason::ForgedSource
}
