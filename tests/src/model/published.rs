//! The rules of published ports.

use ovnet_agent::datapath::Tables;
use ovnet_common::{
    abi::mapped,
    published::{FragmentKey, PublishedKey, published_flags},
    verdict::{DropReason as Drop, KernelReason as Kernel, Verdict},
};

use super::{
    flows::{Arrival, BACK, Chosen, Fate, Flows, IN, Way, is_martian, key},
    header::{adjust, bytes, word},
};
use crate::{
    bpf::{Input, UPLINK},
    packet::{Address, ICMP, TCP, UDP, UPLINK_MTU},
};

/// An XDP program of a test run has its packets from the loopback device.
const LOOPBACK: u32 = 1;
const LOOPBACK_MTU: usize = 65_536;

/// An IPv4 header of 20 bytes, and the ports behind it where they are.
struct Packet {
    protocol: u8,
    ttl: u8,
    length: u16,
    id: u16,
    fragment: u16,
    source: Address,
    destination: Address,
    /// Both ports and the flags, where the header of TCP or UDP is whole.
    transport: Option<(u16, u16, u8)>,
}

impl Packet {
    /// `None` is a packet with options, or none of IPv4.
    fn read(frame: &[u8]) -> Option<Self> {
        let header = bytes::<20>(frame, 14)?;
        if word(frame, 12) != Some(0x0800) || header[0] != 0x45 {
            return None;
        }
        let needed = if header[9] == TCP { 54 } else { 42 };
        let flags = if header[9] == TCP { frame.get(47).copied().unwrap_or(0) } else { 0 };
        let whole = frame.len() >= needed;
        let ports = word(frame, 34).zip(word(frame, 36)).filter(|_| whole);
        Some(Self {
            protocol: header[9],
            ttl: header[8],
            length: u16::from_be_bytes([header[2], header[3]]),
            id: u16::from_be_bytes([header[4], header[5]]),
            fragment: u16::from_be_bytes([header[6], header[7]]),
            source: bytes(&header, 12)?,
            destination: bytes(&header, 16)?,
            transport: ports.map(|(source, destination)| (source, destination, flags)),
        })
    }

    fn has_ports(&self) -> bool {
        matches!(self.protocol, TCP | UDP)
    }

    fn is_fragment(&self) -> bool {
        self.fragment & 0x3fff != 0
    }

    fn is_later(&self) -> bool {
        self.fragment & 0x1fff != 0
    }

    fn fragments(&self) -> FragmentKey {
        FragmentKey {
            source: mapped(self.source),
            destination: mapped(self.destination),
            id_be: self.id.to_be(),
            protocol: self.protocol,
            reserved: 0,
        }
    }

    fn arrival(&self, frame: &[u8], ifindex: u32) -> Option<Arrival> {
        let (source, destination, flags) = self.transport?;
        let addresses = (self.source, self.destination);
        let key = key(addresses, (source, destination), self.protocol);
        Some(Arrival { key, flags, ifindex, macs: (bytes(frame, 0)?, bytes(frame, 6)?) })
    }
}

/// What is no VXLAN to us, at TC.
pub(super) fn from_uplink(
    tables: &Tables,
    flows: &mut Flows,
    input: &Input,
    frame: &mut [u8],
    chosen: Chosen<'_>,
) -> Result<Verdict, Drop> {
    let packet = Packet::read(frame).filter(|_| tables.config.published != 0);
    let Some(packet) = packet else { return Ok(Verdict::Pass) };
    let ifindex = input.ifindex;
    let decided = match packet.protocol {
        _ if packet.has_ports() && packet.is_later() => later(flows, &packet, ifindex, frame, IN),
        _ if packet.has_ports() => inwards(tables, flows, &packet, ifindex, frame, chosen)?,
        ICMP if !packet.is_fragment() => error(flows, &packet, ifindex, frame, IN),
        _ => Err(None),
    };
    Ok(verdict(decided))
}

/// The same at XDP, which takes whole packets with ports and says nothing of what it leaves to TC.
pub(super) fn uplink_xdp(
    tables: &Tables,
    flows: &mut Flows,
    frame: &mut [u8],
    chosen: Chosen<'_>,
) -> Result<Verdict, Drop> {
    let packet = Packet::read(frame).filter(|_| tables.config.published != 0);
    let packet = packet.filter(|it| it.has_ports() && !it.is_fragment());
    let Some(packet) = packet else { return Ok(Verdict::Pass) };
    let takes = |to: &ovnet_common::published::PublishedValue| {
        to.flags & published_flags::XDP != 0 && packet.length != 0 && packet.length <= to.mtu
    };
    if !published(tables, &packet).is_some_and(takes) {
        return Ok(Verdict::Pass);
    }
    let decided = inwards(tables, flows, &packet, LOOPBACK, frame, chosen)?;
    Ok(decided.map_or(Verdict::Pass, Verdict::Publish))
}

/// What a sandbox sends by its way out.
pub(super) fn from_gwbridge(
    tables: &Tables,
    flows: &mut Flows,
    input: &Input,
    frame: &mut [u8],
) -> Result<Verdict, Drop> {
    let left = match answer(tables, flows, input, frame)? {
        Ok(to) => return Ok(Verdict::Return(to)),
        Err(reason) => reason.map_or(Verdict::Pass, Verdict::Kernel),
    };
    let kind = word(frame, 12);
    if let Some(port) = tables.ports.get(&input.ifindex) {
        if bytes(frame, 6) != Some(port.mac) {
            return Err(Drop::SpoofedMac);
        }
        if input.vlan != 0 {
            return Err(Drop::EtherType);
        }
        if kind == Some(0x0800) {
            let source: Address = bytes(frame, 26).ok_or(Drop::Truncated)?;
            let [first, ..]: Address = bytes(frame, 30).ok_or(Drop::Truncated)?;
            if mapped(source) != port.address {
                return Err(Drop::SpoofedAddress);
            }
            if first == 127 {
                return Err(Drop::HostLoopback);
            }
        } else if kind == Some(0x0806) {
            let request = bytes::<28>(frame, 14).ok_or(Drop::Truncated)?;
            let sender: Address = bytes(&request, 14).ok_or(Drop::Truncated)?;
            if bytes(&request, 8) != Some(port.mac) {
                return Err(Drop::SpoofedMac);
            }
            if sender != [0; 4] && mapped(sender) != port.address {
                return Err(Drop::SpoofedAddress);
            }
        }
    }
    let config = &tables.config;
    let to_bridge = config.gwbridge_ifindex != 0 && bytes(frame, 0) == Some(config.gwbridge_mac);
    if to_bridge && kind == Some(0x0800) && input.vlan == 0 {
        return Ok(Verdict::Egress(config.gwbridge_ifindex));
    }
    Ok(left)
}

/// Translated, to leave by this interface; or left to the kernel, with or without a word.
type Decided = Result<u32, Option<Kernel>>;

fn verdict(decided: Decided) -> Verdict {
    match decided {
        Ok(to) => Verdict::Publish(to),
        Err(None) => Verdict::Pass,
        Err(Some(reason)) => Verdict::Kernel(reason),
    }
}

fn published<'a>(
    tables: &'a Tables,
    packet: &Packet,
) -> Option<&'a ovnet_common::published::PublishedValue> {
    let (_, port, _) = packet.transport?;
    tables.published.get(&PublishedKey {
        address: mapped(packet.destination),
        port_be: port.to_be(),
        protocol: packet.protocol,
        reserved: 0,
    })
}

/// Whether a packet from, or to, this port could be taken for VXLAN of this host.
fn is_vxlan(tables: &Tables, packet: &Packet, port: u16) -> bool {
    packet.protocol == UDP && port.to_be() == tables.config.vxlan_port_be
}

fn inwards(
    tables: &Tables,
    flows: &mut Flows,
    packet: &Packet,
    ifindex: u32,
    frame: &mut [u8],
    chosen: Chosen<'_>,
) -> Result<Decided, Drop> {
    let to = published(tables, packet).zip(packet.transport);
    let Some((to, (source, ..))) = to else { return Ok(Err(None)) };
    if is_vxlan(tables, packet, source) {
        return Err(Drop::VxlanPort);
    }
    if packet.ttl <= 1 {
        return Ok(Err(Some(Kernel::TimeExceeded)));
    }
    let Some(arrival) = packet.arrival(frame, ifindex) else { return Ok(Err(None)) };
    Ok(flows.towards(&arrival, to, chosen).map_err(Some).and_then(|way| {
        first(flows, packet, ifindex, way)?;
        Ok(translate(frame, packet, &way, true))
    }))
}

fn answer(
    tables: &Tables,
    flows: &mut Flows,
    input: &Input,
    frame: &mut [u8],
) -> Result<Decided, Drop> {
    let packet = Packet::read(frame).filter(|_| input.vlan == 0);
    let Some(packet) = packet else { return Ok(Err(None)) };
    let ifindex = input.ifindex;
    if packet.has_ports() && packet.is_later() {
        return Ok(later(flows, &packet, ifindex, frame, BACK));
    }
    if packet.protocol == ICMP && !packet.is_fragment() {
        return Ok(error(flows, &packet, ifindex, frame, BACK));
    }
    let arrival = packet.arrival(frame, ifindex).filter(|_| packet.has_ports());
    let Some((arrival, (_, destination, _))) = arrival.zip(packet.transport) else {
        return Ok(Err(None));
    };
    if is_vxlan(tables, &packet, destination) {
        return Err(Drop::VxlanPort);
    }
    let Some(way) = flows.back(&arrival) else { return Ok(Err(None)) };
    if packet.ttl <= 1 {
        return Ok(Err(Some(Kernel::TimeExceeded)));
    }
    let mtu = match way.ifindex {
        UPLINK => UPLINK_MTU,
        _ => LOOPBACK_MTU,
    };
    if frame.len() > mtu + 14 {
        return Ok(Err(Some(Kernel::TooLong)));
    }
    Ok(first(flows, &packet, ifindex, way).map(|()| translate(frame, &packet, &way, true)))
}

/// The first fragment decides for all, unless the kernel has one.
fn first(flows: &mut Flows, packet: &Packet, ifindex: u32, way: Way) -> Result<(), Option<Kernel>> {
    if !packet.is_fragment() {
        return Ok(());
    }
    if let Some(Fate::Kernel) = flows.fragments.get(&packet.fragments()) {
        return Err(Some(Kernel::Fragment));
    }
    flows.fragments.insert(packet.fragments(), Fate::Way(way, ifindex));
    Ok(())
}

fn later(
    flows: &mut Flows,
    packet: &Packet,
    ifindex: u32,
    frame: &mut [u8],
    direction: u8,
) -> Decided {
    match flows.fragments.get(&packet.fragments()).copied() {
        None => {
            flows.fragments.insert(packet.fragments(), Fate::Kernel);
            Err(None)
        }
        Some(Fate::Way(way, arrived)) if way.direction == direction && arrived == ifindex => {
            if packet.ttl <= 1 {
                return Err(Some(Kernel::TimeExceeded));
            }
            Ok(translate(frame, packet, &way, false))
        }
        Some(_) => Err(Some(Kernel::Fragment)),
    }
}

/// An ICMP error about a packet of a flow that went the other way.
fn error(flows: &Flows, packet: &Packet, ifindex: u32, frame: &mut [u8], direction: u8) -> Decided {
    let Some(about) = bytes::<28>(frame, 42) else { return Err(None) };
    let address = |at: usize| [about[at], about[at + 1], about[at + 2], about[at + 3]];
    let (from, to) = (address(12), address(16));
    let about_us = match direction {
        IN => from == packet.destination,
        _ => to == packet.source && from == packet.destination,
    };
    let later = u16::from_be_bytes([about[6], about[7]]) & 0x1fff != 0;
    let plain = about[0] == 0x45 && !later && matches!(about[9], TCP | UDP);
    if ![3, 11, 12].contains(&frame[34]) || !plain || !about_us {
        return Err(None);
    }
    let port = |at: usize| u16::from_be_bytes([about[at], about[at + 1]]);
    let turned = key((to, from), (port(22), port(20)), about[9]);
    let way = flows.known(&turned, direction, ifindex).ok_or(None)?;
    if packet.ttl <= 1 {
        return Err(Some(Kernel::TimeExceeded));
    }
    if direction == IN && is_martian(packet.source) {
        return Err(Some(Kernel::Martian));
    }
    let to = translate(frame, packet, &way, false);
    // The packet inside came from the container, or went to it.
    let (at, ports) = match direction {
        IN => (54, (way.port, way.peer_port)),
        _ => (58, (way.peer_port, way.port)),
    };
    replace(frame, at, 52, way.address);
    replace_ports(frame, 62, 36, ports);
    Ok(to)
}

/// Rewrites a packet; `ports` where they are in it. Returns the interface it leaves by.
fn translate(frame: &mut [u8], packet: &Packet, way: &Way, ports: bool) -> u32 {
    frame[..6].copy_from_slice(&way.macs.0);
    frame[6..12].copy_from_slice(&way.macs.1);
    let (at, new) = match way.direction {
        IN => (30, (way.peer_port, way.port)),
        _ => (26, (way.port, way.peer_port)),
    };
    let old: Address = bytes(frame, at).unwrap_or_default();
    replace(frame, at, 24, way.address);
    let before = [frame[22], frame[23]];
    frame[22] -= 1;
    adjust(frame, 24, before, [before[0] - 1, before[1]]);
    if !ports {
        return way.ifindex;
    }
    let sum = if packet.protocol == TCP { 50 } else { 40 };
    if packet.protocol == UDP && word(frame, sum) == Some(0) {
        frame[34..36].copy_from_slice(&new.0.to_be_bytes());
        frame[36..38].copy_from_slice(&new.1.to_be_bytes());
        return way.ifindex;
    }
    // The transport's checksum covers the addresses, too.
    adjust(frame, sum, [old[0], old[1]], [way.address[0], way.address[1]]);
    adjust(frame, sum, [old[2], old[3]], [way.address[2], way.address[3]]);
    replace_ports(frame, 34, sum, new);
    if packet.protocol == UDP && word(frame, sum) == Some(0) {
        frame[sum..sum + 2].fill(0xff);
    }
    way.ifindex
}

/// Puts an address in its place, and corrects a checksum that covers it.
fn replace(frame: &mut [u8], at: usize, sum: usize, address: Address) {
    for half in [0, 2] {
        let old = [frame[at + half], frame[at + half + 1]];
        adjust(frame, sum, old, [address[half], address[half + 1]]);
    }
    frame[at..at + 4].copy_from_slice(&address);
}

fn replace_ports(frame: &mut [u8], at: usize, sum: usize, ports: (u16, u16)) {
    let ([a, b], [c, d]) = (ports.0.to_be_bytes(), ports.1.to_be_bytes());
    replace(frame, at, sum, [a, b, c, d]);
}
