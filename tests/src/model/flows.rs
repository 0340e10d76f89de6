//! What is remembered of published ports: flows, each of two halves, and fragments.
//!
//! A half is what a flow's packets of one direction become. It is found by the packet as it arrives,
//! and either half can be there without the other.

use std::collections::BTreeMap;

use ovnet_common::{
    abi::mapped,
    published::{FlowKey, FlowValue, FragmentKey, PublishedValue},
    verdict::KernelReason as Kernel,
};

use crate::packet::{Address, CLIENT, HOST_A, HOST_E, Mac, TCP};

/// Towards the container.
pub(super) const IN: u8 = 0;
/// Back to the client.
pub(super) const BACK: u8 = 1;

/// The port that the program chose for the flow with this key, towards the container.
pub type Chosen<'a> = &'a dyn Fn(&FlowKey) -> Option<u16>;

/// What is remembered.
#[derive(Clone, Debug, Default)]
pub struct Flows {
    /// Halves of flows, as `CONNTRACK` has them, but for the time.
    pub halves: BTreeMap<FlowKey, FlowValue>,
    pub(super) fragments: BTreeMap<FragmentKey, Fate>,
}

/// What becomes of a datagram's fragments.
#[derive(Clone, Copy, Debug)]
pub(super) enum Fate {
    /// The kernel has one, so it gets all.
    Kernel,
    /// As the first one, which came by this interface.
    Way(Way, u32),
}

/// What a packet becomes.
#[derive(Clone, Copy, Debug)]
pub(super) struct Way {
    pub(super) direction: u8,
    /// In place of the destination, or of the source on the way back; so with the port.
    pub(super) address: Address,
    pub(super) port: u16,
    pub(super) peer_port: u16,
    pub(super) macs: (Mac, Mac),
    pub(super) ifindex: u32,
}

impl Way {
    fn of(half: &FlowValue) -> Self {
        Self {
            direction: half.direction,
            address: [half.address[12], half.address[13], half.address[14], half.address[15]],
            port: u16::from_be(half.port_be),
            peer_port: u16::from_be(half.peer_port_be),
            macs: (half.destination_mac, half.source_mac),
            ifindex: half.ifindex,
        }
    }
}

/// How a packet arrived.
#[derive(Clone, Copy)]
pub(super) struct Arrival {
    pub(super) key: FlowKey,
    /// Flags of TCP, 0 for anything else.
    pub(super) flags: u8,
    pub(super) ifindex: u32,
    /// Destination and source.
    pub(super) macs: (Mac, Mac),
}

impl Arrival {
    /// A SYN and nothing that answers or ends.
    fn begins(&self) -> bool {
        self.flags & 0x17 == 2
    }
}

impl Flows {
    /// The datagrams in fragments that something is remembered of.
    pub fn fragments(&self) -> impl Iterator<Item = &FragmentKey> {
        self.fragments.keys()
    }

    /// A packet to a published port.
    pub(super) fn towards(
        &mut self,
        arrival: &Arrival,
        to: &PublishedValue,
        chosen: Chosen<'_>,
    ) -> Result<Way, Kernel> {
        let Arrival { key, flags, ifindex, macs } = *arrival;
        let is_tcp = key.protocol == TCP;
        if let Some(half) = self.halves.get_mut(&key) {
            let leads = (half.direction, half.address, half.port_be, half.ifindex);
            let same = leads == (IN, to.address, to.port_be, to.ifindex);
            let again = is_tcp && arrival.begins() && is_over(half);
            if same && !again {
                let way_back = (half.uplink_mac, half.arrival_mac, half.arrival_ifindex);
                let moved = way_back != (macs.0, macs.1, ifindex);
                (half.uplink_mac, half.arrival_mac, half.arrival_ifindex) =
                    (macs.0, macs.1, ifindex);
                let half = *half;
                let whole = self.note(&key, IN, flags, arrival.begins() || moved);
                let half = self.halves.get(&key).copied().unwrap_or(half);
                if whole || self.bring_back(&key, &half) {
                    return Ok(Way::of(&half));
                }
                self.halves.remove(&key);
            }
        }
        if is_tcp && !arrival.begins() {
            return self.bring_in(arrival, to).ok_or(Kernel::NoFlow);
        }
        if is_martian([key.source[12], key.source[13], key.source[14], key.source[15]]) {
            return Err(Kernel::Martian);
        }
        let (inside, peer) = (inside(&key, to), key.source_port_be);
        let back = FlowValue {
            ifindex,
            arrival_ifindex: to.ifindex,
            destination_mac: macs.1,
            source_mac: macs.0,
            seen: [1, 0],
            ..way_back(&key)
        };
        let is_taken = |key: &FlowKey| {
            let same = |it: &FlowValue| {
                (it.address, it.port_be, it.peer_port_be) == (back.address, back.port_be, peer)
            };
            self.halves.get(key).is_some_and(|it| !(same(it) || is_tcp && is_over(it)))
        };
        let mut inside = inside;
        if is_taken(&inside) {
            let chosen = chosen(&key);
            inside.destination_port_be = chosen.unwrap_or(0).to_be();
            if chosen.is_none_or(|port| port < 0x8000) || is_taken(&inside) {
                return Err(Kernel::PortsClash);
            }
        }
        self.halves.insert(inside, back);
        let half = way_in(arrival, to, inside.destination_port_be, [1, 0]);
        self.halves.insert(key, half);
        Ok(Way::of(&half))
    }

    /// A packet of a sandbox, where it is of a flow of that sandbox.
    pub(super) fn back(&mut self, arrival: &Arrival) -> Option<Way> {
        let way = self.known(&arrival.key, BACK, arrival.ifindex)?;
        self.note(&arrival.key, BACK, arrival.flags, false);
        Some(way)
    }

    /// What becomes of a packet in this direction, from a sandbox only by its own interface.
    pub(super) fn known(&self, key: &FlowKey, direction: u8, ifindex: u32) -> Option<Way> {
        let half = self.halves.get(key).filter(|half| half.direction == direction)?;
        (direction == IN || half.arrival_ifindex == ifindex).then(|| Way::of(half))
    }

    /// Both halves know what was seen; false where the other one was looked for and is not there.
    fn note(&mut self, key: &FlowKey, direction: u8, flags: u8, look: bool) -> bool {
        let at = usize::from(direction);
        let bits = shown(flags);
        let Some(half) = self.halves.get_mut(key) else { return false };
        if half.seen[at] & bits == bits && !look {
            return true;
        }
        half.seen[at] |= bits;
        let half = *half;
        let Some(other) = self.halves.get_mut(&other(key, &half)) else { return false };
        if !is_half_of(other, key, direction) {
            return false;
        }
        other.seen[at] |= bits;
        if direction == IN {
            other.ifindex = half.arrival_ifindex;
            other.destination_mac = half.arrival_mac;
            other.source_mac = half.uplink_mac;
        }
        true
    }

    /// Enters the way back again; false where it is another flow's now.
    fn bring_back(&mut self, key: &FlowKey, half: &FlowValue) -> bool {
        let at = other(key, half);
        let back = FlowValue {
            ifindex: half.arrival_ifindex,
            arrival_ifindex: half.ifindex,
            destination_mac: half.arrival_mac,
            source_mac: half.uplink_mac,
            seen: half.seen,
            ..way_back(key)
        };
        is_half_of(self.halves.entry(at).or_insert(back), key, IN)
    }

    /// Enters the way in again, where there is one back.
    fn bring_in(&mut self, arrival: &Arrival, to: &PublishedValue) -> Option<Way> {
        let key = &arrival.key;
        let inside = inside(key, to);
        let back = self.halves.get_mut(&inside)?;
        if !is_half_of(back, key, IN) || back.arrival_ifindex != to.ifindex {
            return None;
        }
        back.seen[0] |= shown(arrival.flags);
        let half = way_in(arrival, to, key.source_port_be, back.seen);
        self.halves.insert(*key, half);
        Some(Way::of(&half))
    }
}

/// The way in of a flow whose client has this port inside.
fn way_in(arrival: &Arrival, to: &PublishedValue, peer_port_be: u16, seen: [u8; 2]) -> FlowValue {
    FlowValue {
        last_seen_ns: 0,
        address: to.address,
        ifindex: to.ifindex,
        arrival_ifindex: arrival.ifindex,
        port_be: to.port_be,
        peer_port_be,
        destination_mac: to.mac,
        source_mac: to.gateway_mac,
        arrival_mac: arrival.macs.1,
        uplink_mac: arrival.macs.0,
        seen,
        direction: IN,
        reserved: 0,
    }
}

/// What the way back says whatever else: where the client's packets were sent to.
fn way_back(key: &FlowKey) -> FlowValue {
    FlowValue {
        address: key.destination,
        port_be: key.destination_port_be,
        peer_port_be: key.source_port_be,
        direction: BACK,
        ..FlowValue::default()
    }
}

/// The key of the answers, where the client has its own port inside.
fn inside(key: &FlowKey, to: &PublishedValue) -> FlowKey {
    FlowKey {
        source: to.address,
        destination: key.source,
        source_port_be: to.port_be,
        destination_port_be: key.source_port_be,
        ..*key
    }
}

/// The key of a flow's other half.
fn other(key: &FlowKey, half: &FlowValue) -> FlowKey {
    let FlowValue { address, port_be, peer_port_be, .. } = *half;
    let (source, source_port_be, destination, destination_port_be) = match half.direction {
        IN => (address, port_be, key.source, peer_port_be),
        _ => (key.destination, peer_port_be, address, port_be),
    };
    FlowKey { source, destination, source_port_be, destination_port_be, ..*key }
}

/// Whether it is the other half of the flow that packets with this key and direction are of.
fn is_half_of(half: &FlowValue, key: &FlowKey, direction: u8) -> bool {
    let (address, port_be, peer_port_be) = match direction {
        IN => (key.destination, key.destination_port_be, key.source_port_be),
        _ => (key.source, key.source_port_be, key.destination_port_be),
    };
    half.direction != direction
        && (half.address, half.port_be, half.peer_port_be) == (address, port_be, peer_port_be)
}

/// A packet, a FIN (2), a RST (4).
fn shown(flags: u8) -> u8 {
    1 | (flags & 1) << 1 | flags & 4
}

/// Reset by one side, or closed by both.
fn is_over(half: &FlowValue) -> bool {
    let [client, container] = half.seen;
    (client | container) & 4 != 0 || client & container & 2 != 0
}

/// Whether the uplink of `crate::bpf` does not lead to this address.
pub(super) fn is_martian(source: Address) -> bool {
    let on_the_wire =
        source[..3] == HOST_A.address[..3] && source != HOST_A.address && source[3] != 255;
    !on_the_wire && ![CLIENT.address, HOST_E.address].contains(&source)
}

/// The key of a packet.
pub(super) fn key(addresses: (Address, Address), ports: (u16, u16), protocol: u8) -> FlowKey {
    FlowKey {
        source: mapped(addresses.0),
        destination: mapped(addresses.1),
        source_port_be: ports.0.to_be(),
        destination_port_be: ports.1.to_be(),
        protocol,
        reserved: [0; 3],
    }
}
