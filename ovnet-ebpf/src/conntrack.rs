//! The flows of published ports: known ones are looked up, new ones entered in both directions.

use aya_ebpf::helpers::{bpf_get_prandom_u32, generated::bpf_ktime_get_coarse_ns};
use ovnet_common::{
    abi::{Mac, mapped},
    headers::{ipv4, tcp},
    published::{Direction, FlowKey, FlowValue, PublishedValue, seen},
    verdict::KernelReason,
};

use crate::{
    maps::{self, Scratch},
    parse::{Ipv4, Transport},
    translate::{Rewrite, word},
};

/// `EEXIST`, as helpers return it.
const EXISTS: i32 = -17;
/// How many source ports are tried where two flows would be alike inside.
const ATTEMPTS: u32 = 4;
/// How old the time in an entry may get before it is written again: an entry that every packet
/// writes would be carried from one processor's cache to another's.
const TOUCH_NS: u64 = 1_000_000_000;

/// Nanoseconds since boot, to the tick.
#[inline(always)]
pub(crate) fn now() -> u64 {
    // SAFETY: a helper without arguments.
    unsafe { bpf_ktime_get_coarse_ns() }
}

/// The key of a packet.
#[inline(always)]
pub(crate) fn key(ip: &Ipv4, transport: &Transport) -> FlowKey {
    FlowKey {
        source: mapped(ip.source),
        destination: mapped(ip.destination),
        source_port_be: transport.source_be,
        destination_port_be: transport.destination_be,
        protocol: ip.protocol,
        reserved: [0; 3],
    }
}

/// What becomes of a packet to a published port, its key being in `scratch`.
#[inline(always)]
pub(crate) fn towards_container(
    scratch: &mut Scratch,
    flags: u8,
    to: &PublishedValue,
    ifindex: u32,
) -> Result<Rewrite, KernelReason> {
    let Scratch { key, other, source_mac, destination_mac, .. } = scratch;
    let now = now();
    let begins = flags & (tcp::SYN | tcp::ACK | tcp::RST | tcp::FIN) == tcp::SYN;
    let is_tcp = key.protocol == ipv4::TCP;
    if let Some(flow) = maps::flow(key) {
        // SAFETY: the map's memory; a concurrent write makes a field old or new, and either will
        // do for one packet.
        let flow = unsafe { &mut *flow };
        let same = flow.direction == Direction::In as u8
            && flow.address == to.address
            && flow.port_be == to.port_be
            && flow.ifindex == to.ifindex;
        // A client may use a port again before we forgot what it was used for.
        let again = is_tcp && begins && flow.is_over();
        if same && !again {
            note(flow, key, other, Direction::In, flags, now);
            if flow.arrival_mac != *source_mac || flow.arrival_ifindex != ifindex {
                follow(flow, key, other, (source_mac, destination_mac), ifindex);
            }
            return Ok(Rewrite::of(flow, Direction::In));
        }
    }
    if is_tcp && !begins {
        return Err(KernelReason::NoFlow);
    }
    // Where a port is published on every address, this host's own are all in the table: who else
    // sends from one would be the host to the container, and to whatever trusts it there.
    scratch.published.address = scratch.key.source;
    if scratch.key.source[12] == 127 || maps::published(&scratch.published).is_some() {
        return Err(KernelReason::Martian);
    }
    create(scratch, to, ifindex, now)
}

/// What becomes of a packet that came in by a port of a gwbridge: `None` where it is not of a flow of
/// a published port. Its key is in `scratch`.
#[inline(always)]
pub(crate) fn back(scratch: &mut Scratch, flags: u8, ifindex: u32) -> Option<Rewrite> {
    let Scratch { key, other, .. } = scratch;
    let flow = known(key, Direction::Back, ifindex)?;
    note(flow, key, other, Direction::Back, flags, now());
    Some(Rewrite::of(flow, Direction::Back))
}

/// The entry under this key, where it is of this direction and, from a container, of the one behind
/// this interface: nobody speaks in another's connections.
#[inline(always)]
pub(crate) fn known(
    key: &FlowKey,
    direction: Direction,
    ifindex: u32,
) -> Option<&'static mut FlowValue> {
    // SAFETY: as in `towards_container`.
    let flow = unsafe { &mut *maps::flow(key)? };
    let ours = flow.direction == direction as u8
        && (matches!(direction, Direction::In) || flow.arrival_ifindex == ifindex);
    ours.then_some(flow)
}

/// Notes what a packet shows of its flow, in both entries: each must say alone how long the flow may
/// be silent, and both must look used to the LRU.
#[inline(always)]
fn note(
    flow: &mut FlowValue,
    key: &FlowKey,
    other: &mut FlowKey,
    direction: Direction,
    flags: u8,
    now: u64,
) {
    let mut bits = seen::ANY;
    if flags & tcp::FIN != 0 {
        bits |= seen::FIN;
    }
    if flags & tcp::RST != 0 {
        bits |= seen::RST;
    }
    let had = flow.seen[direction as usize];
    let is_new = had & bits != bits;
    let is_old = now > flow.last_seen_ns && now - flow.last_seen_ns > TOUCH_NS;
    if !is_new && !is_old {
        return;
    }
    flow.seen[direction as usize] = had | bits;
    flow.last_seen_ns = now;
    *other = flow.other(key);
    if let Some(other) = maps::flow(other) {
        // SAFETY: as in `towards_container`.
        let other = unsafe { &mut *other };
        other.seen[direction as usize] |= bits;
        other.last_seen_ns = now;
    }
}

/// Keeps the way back that of the last packet in, whose MACs these are: its next hop changed.
#[inline(always)]
fn follow(
    flow: &mut FlowValue,
    key: &FlowKey,
    other: &mut FlowKey,
    (source, destination): (&Mac, &Mac),
    ifindex: u32,
) {
    flow.arrival_mac = *source;
    flow.arrival_ifindex = ifindex;
    *other = flow.other(key);
    if let Some(back) = maps::flow(other) {
        // SAFETY: as in `towards_container`.
        let back = unsafe { &mut *back };
        back.ifindex = ifindex;
        back.destination_mac = *source;
        back.source_mac = *destination;
    }
}

/// Enters a flow. The way back is first: a container must never see a packet whose answer we would
/// not know.
#[inline(always)]
fn create(
    scratch: &mut Scratch,
    to: &PublishedValue,
    ifindex: u32,
    now: u64,
) -> Result<Rewrite, KernelReason> {
    let Scratch { key, back_key, flow: value, source_mac, destination_mac, .. } = scratch;
    *back_key = FlowKey {
        source: to.address,
        destination: key.source,
        source_port_be: to.port_be,
        destination_port_be: key.source_port_be,
        protocol: key.protocol,
        reserved: [0; 3],
    };
    *value = FlowValue {
        last_seen_ns: now,
        address: key.destination,
        ifindex,
        arrival_ifindex: to.ifindex,
        port_be: key.destination_port_be,
        peer_port_be: key.source_port_be,
        destination_mac: *source_mac,
        source_mac: *destination_mac,
        arrival_mac: [0; 6],
        seen: [seen::ANY, 0],
        direction: Direction::Back as u8,
        reserved: [0; 7],
    };
    enter_back(back_key, value, now)?;
    value.address = to.address;
    value.ifindex = to.ifindex;
    value.arrival_ifindex = ifindex;
    value.port_be = to.port_be;
    value.peer_port_be = back_key.destination_port_be;
    value.destination_mac = to.mac;
    value.source_mac = to.gateway_mac;
    value.arrival_mac = *source_mac;
    value.direction = Direction::In as u8;
    // LRU maps refuse under contention where they are not full, so once more.
    if maps::set_flow(key, value).is_err() && maps::set_flow(key, value).is_err() {
        maps::remove_flow(back_key);
        return Err(KernelReason::ConntrackFull);
    }
    Ok(Rewrite::of(value, Direction::In))
}

/// Enters the way back under the client's own port, or, where another flow of this client to the
/// same container has it (by another published port or address), under a free one.
#[inline(always)]
fn enter_back(key: &mut FlowKey, value: &FlowValue, now: u64) -> Result<(), KernelReason> {
    let mut clashes = 0;
    let mut refusals = 0;
    for _ in 0..ATTEMPTS {
        match maps::add_flow(key, value) {
            Ok(()) => return Ok(()),
            Err(EXISTS) if is_free(key, value, now) => {
                if maps::set_flow(key, value).is_ok() {
                    return Ok(());
                }
                refusals += 1;
            }
            Err(EXISTS) => {
                clashes += 1;
                // SAFETY: a helper without arguments.
                let random = unsafe { bpf_get_prandom_u32() } as u16;
                // Not a well-known one: some servers believe those.
                key.destination_port_be = (random | 0x8000).to_be();
            }
            Err(_) => refusals += 1,
        }
        if refusals > 1 {
            break;
        }
    }
    Err(if clashes > 0 { KernelReason::PortsClash } else { KernelReason::ConntrackFull })
}

/// Whether the entry under this key may be replaced: it is this very flow's, left from before, or
/// one that is over.
#[inline(always)]
fn is_free(key: &FlowKey, value: &FlowValue, now: u64) -> bool {
    let Some(found) = maps::flow(key) else { return true };
    // SAFETY: as in `towards_container`.
    let found = unsafe { &*found };
    let same = found.address == value.address
        && found.port_be == value.port_be
        && found.peer_port_be == value.peer_port_be;
    let is_over = key.protocol == ipv4::TCP && found.is_over();
    same || is_over || found.is_stale(key.protocol, now)
}

impl Rewrite {
    /// What an entry says.
    #[inline(always)]
    pub(crate) fn of(flow: &FlowValue, direction: Direction) -> Self {
        Self {
            direction,
            address: word(&flow.address),
            port_be: flow.port_be,
            peer_port_be: flow.peer_port_be,
            destination_mac: flow.destination_mac,
            source_mac: flow.source_mac,
            ifindex: flow.ifindex,
        }
    }
}
