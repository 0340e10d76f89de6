//! The rules the programs follow, written a second time as plainly as they can be said, over byte
//! slices and without helpers. Fixtures and random packets are checked against it.
//!
//! Here is what is decided by a packet and the tables alone; `published.rs` has the rules of
//! published ports, `flows.rs` their memory, `header.rs` how a header is read and changed.

mod flows;
mod header;
mod published;

use ovnet_agent::datapath::Tables;
use ovnet_common::{
    abi::{EndpointKey, EndpointValue, NetworkValue, Program, mapped},
    verdict::{Answer, DropReason as Drop, SlowReason as Slow, Verdict},
    vxlan::PROBE_VNI,
};

pub use self::flows::{Chosen, Flows};
use self::header::{Header, Request, adjust, bytes, set_tos, word};
use crate::{
    bpf::{Input, PORT_A1, PORT_A2, PORT_A4, PORT_UNKNOWN, UPLINK},
    packet::{
        Address, HOST_A, HOST_B, HOST_C, HOST_E, Ipv4, Mac, OUTER, ROUTED_MTU, ROUTER, UDP,
        UPLINK_MTU, Vxlan, checksum,
    },
};

/// The verdict of programs that remember nothing yet, and the frame afterwards, outer identification
/// and source port being arbitrary.
pub fn predict(tables: &Tables, input: &Input) -> (Verdict, Vec<u8>) {
    let mut frame = input.packet.clone();
    let verdict = next(tables, &mut Flows::default(), input, &mut frame, &|_| None);
    (verdict, frame)
}

/// The verdict, with what was remembered of the packets before. `frame` is the packet, and
/// afterwards what it becomes; `chosen` says which port the program took for a flow whose client's
/// own is taken inside.
pub fn next(
    tables: &Tables,
    flows: &mut Flows,
    input: &Input,
    frame: &mut Vec<u8>,
    chosen: Chosen<'_>,
) -> Verdict {
    let for_us = bytes::<6>(frame, 0) == Some(HOST_A.mac) && input.vlan == 0;
    let result = match input.program {
        Program::FromContainer => from_container(tables, input, frame),
        Program::FromOverlay => from_overlay(tables, input, frame),
        Program::FromUplink | Program::UplinkXdp if !for_us => Ok(Verdict::Pass),
        Program::FromUplink => {
            let hook = Hook::Tc { gso: input.gso_size != 0 };
            match from_wire(tables, frame, hook) {
                Ok(Verdict::Pass) => published::from_uplink(tables, flows, input, frame, chosen),
                decided => decided,
            }
        }
        Program::UplinkXdp => match from_wire(tables, frame, Hook::Xdp) {
            Ok(Verdict::Pass) => published::uplink_xdp(tables, flows, frame, chosen),
            decided => decided,
        },
        Program::FromGwbridge => published::from_gwbridge(tables, flows, input, frame),
    };
    result.unwrap_or_else(Verdict::Drop)
}

fn from_container(tables: &Tables, input: &Input, frame: &mut Vec<u8>) -> Result<Verdict, Drop> {
    let port = tables.ports.get(&input.ifindex).ok_or(Drop::UnknownPort)?;
    if bytes(frame, 6) != Some(port.mac) {
        return Err(Drop::SpoofedMac);
    }
    match word(frame, 12) {
        _ if input.vlan != 0 => return Err(Drop::EtherType),
        Some(0x0800) => {}
        Some(0x0806) => return container_asks(tables, input.ifindex, frame),
        _ => return Err(Drop::EtherType),
    }
    let ip = Header::read(frame, 14).ok_or(Drop::Truncated)??;
    if mapped(ip.source) != port.address {
        return Err(Drop::SpoofedAddress);
    }
    match endpoint(tables, port.vni, ip.destination) {
        Some(local) if local.ifindex != 0 => {
            frame[..6].copy_from_slice(&local.mac);
            Ok(Verdict::Deliver(local.ifindex))
        }
        Some(remote) => encapsulate(tables, input, frame, port.vni, &ip, remote),
        None if ip.destination[0] >= 224 => Err(Drop::Multicast),
        None => match tables.networks.get(&port.vni) {
            Some(network) if network.gateway == mapped(ip.destination) => {
                gateway(input.ifindex, frame, &ip, network)
            }
            _ => Err(Drop::NoEndpoint),
        },
    }
}

fn container_asks(tables: &Tables, ifindex: u32, frame: &mut [u8]) -> Result<Verdict, Drop> {
    let port = &tables.ports[&ifindex];
    let request = Request::read(frame)?;
    if request.sender_mac != port.mac {
        return Err(Drop::SpoofedMac);
    }
    let claims = request.sender != [0; 4];
    if claims && mapped(request.sender) != port.address {
        return Err(Drop::SpoofedAddress);
    }
    if mapped(request.target) == port.address {
        return Err(Drop::ArpUnanswered);
    }
    let gateway = tables.networks.get(&port.vni);
    let gateway = gateway.filter(|network| network.gateway == mapped(request.target));
    let mac = match endpoint(tables, port.vni, request.target) {
        Some(endpoint) => endpoint.mac,
        None => gateway.ok_or(Drop::ArpUnanswered)?.gateway_mac,
    };
    request.answer(frame, mac);
    Ok(Verdict::Answer(Answer::Arp, ifindex))
}

fn gateway(
    ifindex: u32,
    frame: &mut [u8],
    ip: &Header,
    network: &NetworkValue,
) -> Result<Verdict, Drop> {
    if ip.protocol != 1 || ip.version_ihl != 0x45 || ip.is_fragment() {
        return Err(Drop::ToGateway);
    }
    if frame.len() < 42 {
        return Err(Drop::Truncated);
    }
    if frame[34] != 8 {
        return Err(Drop::ToGateway);
    }
    frame.copy_within(6..12, 0);
    frame[6..12].copy_from_slice(&network.gateway_mac);
    frame[26..30].copy_from_slice(&ip.destination);
    frame[30..34].copy_from_slice(&ip.source);
    let before = [frame[34], frame[35]];
    frame[34] = 0;
    adjust(frame, 36, before, [0, before[1]]);
    Ok(Verdict::Answer(Answer::Echo, ifindex))
}

fn encapsulate(
    tables: &Tables,
    input: &Input,
    frame: &mut Vec<u8>,
    vni: u32,
    ip: &Header,
    to: &EndpointValue,
) -> Result<Verdict, Drop> {
    let config = &tables.config;
    if config.vtep == [0; 16] || config.external_ifindex == 0 {
        return Err(Drop::NotConfigured);
    }
    let slow = |reason| Ok(Verdict::Slow(reason, config.external_ifindex));
    if ip.version_ihl != 0x45 {
        return slow(Slow::IpOptions);
    }
    if ip.is_fragment() {
        return slow(Slow::Fragment);
    }
    let mut length = frame.len() - 14;
    if input.gso_size != 0 {
        let transport = match (ip.protocol, frame.get(14 + 20 + 12)) {
            (6, None) => return slow(Slow::NotLinear),
            (6, Some(offset)) => usize::from(offset >> 4) * 4,
            _ => 8,
        };
        length = input.gso_size as usize + 20 + transport;
    }
    if length + OUTER > usize::from(u16::MAX) {
        return slow(Slow::FragmentationNeeded);
    }
    let vtep = [to.vtep[12], to.vtep[13], to.vtep[14], to.vtep[15]];
    let next_hop = match route(input.ifindex, vtep, length + OUTER) {
        Ok(next_hop) => next_hop,
        Err(reason) => return slow(reason),
    };
    // A test run knows no GSO type, and without one the kernel refuses.
    if input.gso_size != 0 {
        return slow(Slow::NoRoom);
    }
    let mut inner = frame.clone();
    inner[..6].copy_from_slice(&to.mac);
    let outer = Vxlan {
        macs: (next_hop, HOST_A.mac),
        ip: Ipv4::new(HOST_A.address, vtep, UDP).tos(ip.tos & 3),
        ports: (0, u16::from_be(to.vxlan_port_be)),
        udp_checksum: [0, 0],
        flags: [8, 0, 0, 0],
        vni,
        reserved: 0,
    };
    *frame = outer.build(&inner);
    Ok(Verdict::Encapsulate(UPLINK))
}

/// What `bpf_fib_lookup` says in the namespace of `crate::bpf`.
fn route(ifindex: u32, to: Address, length: usize) -> Result<Mac, Slow> {
    if ![PORT_A1, PORT_A2, PORT_A4, PORT_UNKNOWN].contains(&ifindex) {
        return Err(Slow::Fib);
    }
    let (mtu, next_hop) = if to == HOST_E.address {
        (ROUTED_MTU, Ok(ROUTER.mac))
    } else if to == HOST_B.address {
        (UPLINK_MTU, Ok(HOST_B.mac))
    } else if to == HOST_C.address {
        (UPLINK_MTU, Err(Slow::NoNeighbour))
    } else {
        return Err(Slow::Fib);
    };
    if length > mtu { Err(Slow::FragmentationNeeded) } else { next_hop }
}

/// Where a packet of the wire is met.
enum Hook {
    /// At TC; a GSO packet is of no known type in a test run, and the kernel does not shrink it.
    Tc { gso: bool },
    /// At XDP.
    Xdp,
}

/// from_uplink and uplink_xdp.
fn from_wire(tables: &Tables, frame: &mut Vec<u8>, hook: Hook) -> Result<Verdict, Drop> {
    let config = &tables.config;
    if word(frame, 12) != Some(0x0800) {
        return Ok(Verdict::Pass);
    }
    let Some(fixed) = frame.get(14..34) else { return Ok(Verdict::Pass) };
    let (fixed, sum) = (fixed.to_vec(), checksum(fixed));
    let address = |at: usize| [fixed[at], fixed[at + 1], fixed[at + 2], fixed[at + 3]];
    let fragment = u16::from_be_bytes([fixed[6], fixed[7]]) & 0x3fff != 0;
    if fixed[9] != 17 || mapped(address(16)) != config.vtep || fixed[0] != 0x45 || fragment {
        return Ok(Verdict::Pass);
    }
    if frame.len() < 42 || word(frame, 36) != Some(u16::from_be(config.vxlan_port_be)) {
        return Ok(Verdict::Pass);
    }
    if sum != 0 {
        return Err(Drop::OuterChecksum);
    }
    if word(frame, 40) != Some(0) {
        return Ok(Verdict::Pass);
    }
    let vxlan = bytes::<8>(frame, 42).ok_or(Drop::Truncated)?;
    if vxlan[..4] != [8, 0, 0, 0] || vxlan[7] != 0 {
        return Err(Drop::VxlanFlags);
    }
    let vni = u32::from_be_bytes([0, vxlan[4], vxlan[5], vxlan[6]]);
    if vni == PROBE_VNI {
        if !tables.hosts.contains_key(&mapped(address(12))) {
            return Err(Drop::UnknownVtep);
        }
        return match hook {
            Hook::Xdp => Ok(Verdict::Pass),
            Hook::Tc { gso: true } => Err(Drop::NotAProbe),
            Hook::Tc { gso: false } => probe(frame),
        };
    }
    let inner = frame.get(OUTER..).unwrap_or(&[]).to_vec();
    let ip = match word(&inner, 12).ok_or(Drop::Truncated)? {
        0x0806 => return Ok(Verdict::Pass),
        0x0800 => Header::read(&inner, 14).ok_or(Drop::Truncated)??,
        _ => return Err(Drop::EtherType),
    };
    let to = trusted(tables, vni, address(12), &ip)?;
    let long = |mtu: u16| ip.length == 0 || ip.length > mtu.max(500);
    let several = match hook {
        Hook::Tc { gso } => gso && ip.protocol != 6,
        Hook::Xdp => tables.networks.get(&vni).is_some_and(|network| long(network.mtu)),
    };
    if several {
        return Ok(Verdict::Pass);
    }
    let ecn = merged(ip.tos & 3, fixed[1] & 3).ok_or(Drop::EcnInvalid)?;
    if matches!(hook, Hook::Tc { gso: true }) {
        return Err(Drop::DecapFailed);
    }
    *frame = inner;
    frame[..6].copy_from_slice(&to.mac);
    if ecn != ip.tos & 3 {
        set_tos(frame, ip.tos & !3 | ecn);
    }
    Ok(Verdict::Deliver(to.ifindex))
}

/// A question of a peer becomes its own answer.
fn probe(frame: &mut [u8]) -> Result<Verdict, Drop> {
    if frame.len() < 92 {
        return Err(Drop::Truncated);
    }
    let is_question = word(frame, 62) == Some(0x0800)
        && frame[64] == 0x45
        && word(frame, 70).is_some_and(|fragment| fragment & 0x3fff == 0)
        && (frame[73], frame[84]) == (1, 8)
        && frame[76..84] == frame[26..34];
    if !is_question {
        return Err(Drop::NotAProbe);
    }
    for (first, second, length) in [(0, 6, 6), (26, 30, 4), (34, 36, 2), (50, 56, 6), (76, 80, 4)] {
        for at in 0..length {
            frame.swap(first + at, second + at);
        }
    }
    let lived = [frame[22], frame[23]];
    frame[22] = 64;
    adjust(frame, 24, lived, [64, lived[1]]);
    let asked = [frame[84], frame[85]];
    frame[84] = 0;
    adjust(frame, 86, asked, [0, asked[1]]);
    Ok(Verdict::Answer(Answer::Probe, UPLINK))
}

fn from_overlay(tables: &Tables, input: &Input, frame: &mut [u8]) -> Result<Verdict, Drop> {
    let key = input.tunnel_key.ok_or(Drop::TunnelKey)?;
    if mapped(key.local) != tables.config.vtep {
        return Err(Drop::WrongDestination);
    }
    if input.vlan != 0 {
        return Err(Drop::EtherType);
    }
    if frame.len() < 34 {
        return Err(Drop::Truncated);
    }
    match word(frame, 12) {
        Some(0x0806) => {
            let request = Request::read(frame)?;
            is_sent_by(tables, key.vni, key.remote, request.sender)?;
            match endpoint(tables, key.vni, request.target) {
                Some(local) if local.ifindex != 0 => request.answer(frame, local.mac),
                _ => return Err(Drop::ArpUnanswered),
            }
            Ok(Verdict::Answer(Answer::Arp, input.ifindex))
        }
        Some(0x0800) => {
            let ip = Header::read(frame, 14).ok_or(Drop::Truncated)??;
            let to = trusted(tables, key.vni, key.remote, &ip)?;
            frame[..6].copy_from_slice(&to.mac);
            Ok(Verdict::Deliver(to.ifindex))
        }
        _ => Err(Drop::EtherType),
    }
}

fn trusted(tables: &Tables, vni: u32, vtep: Address, ip: &Header) -> Result<EndpointValue, Drop> {
    is_sent_by(tables, vni, vtep, ip.source)?;
    match endpoint(tables, vni, ip.destination) {
        Some(local) if local.ifindex != 0 => Ok(*local),
        _ if ip.destination[0] >= 224 => Err(Drop::Multicast),
        _ => Err(Drop::NotLocal),
    }
}

fn is_sent_by(tables: &Tables, vni: u32, vtep: Address, source: Address) -> Result<(), Drop> {
    let entry = endpoint(tables, vni, source);
    if entry.is_some_and(|it| it.ifindex == 0 && it.vtep == mapped(vtep)) {
        return Ok(());
    }
    if !tables.hosts.contains_key(&mapped(vtep)) {
        return Err(Drop::UnknownVtep);
    }
    if !tables.networks.contains_key(&vni) {
        return Err(Drop::UnknownVni);
    }
    Err(Drop::ForgedSource)
}

/// RFC 6040 figure 4.
fn merged(inner: u8, outer: u8) -> Option<u8> {
    match (inner, outer) {
        (0, 3) => None,
        (_, 3) => Some(3),
        (2, 1) => Some(1),
        _ => Some(inner),
    }
}

fn endpoint(tables: &Tables, vni: u32, address: Address) -> Option<&EndpointValue> {
    tables.endpoints.get(&EndpointKey { vni, address: mapped(address) })
}
