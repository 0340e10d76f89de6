//! The flows of published ports: known ones are looked up, new ones entered in both directions.

use core::ffi::c_void;

use aya_ebpf::helpers::{bpf_get_prandom_u32, generated::bpf_ktime_get_coarse_ns};
use ovnet_common::{
    abi::mapped,
    headers::{ipv4, tcp},
    published::{Direction, FlowKey, FlowValue, PublishedValue, seen},
    verdict::KernelReason,
};

use crate::{
    maps::{self, Scratch},
    martian::is_martian,
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

/// What becomes of a packet to a published port, its key being in `scratch`: the way it is to be
/// rewritten is there afterwards. The context is that of the program, of whichever type.
#[inline(always)]
pub(crate) fn towards_container(
    ctx: *mut c_void,
    scratch: &mut Scratch,
    flags: u8,
    to: &PublishedValue,
    ifindex: u32,
) -> Result<(), KernelReason> {
    let Scratch { key, other, flow: value, source_mac, destination_mac, rewrite, .. } = scratch;
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
            // The way back is that of the last packet in, whose next hop may have changed.
            let moved = flow.arrival_mac != *source_mac
                || flow.uplink_mac != *destination_mac
                || flow.arrival_ifindex != ifindex;
            if moved {
                flow.arrival_mac = *source_mac;
                flow.uplink_mac = *destination_mac;
                flow.arrival_ifindex = ifindex;
            }
            let is_whole = note(flow, key, other, Direction::In, flags, now, begins || moved);
            if is_whole || restore_back(flow, key, other, value, now) {
                rewrite.fill(flow, Direction::In);
                return Ok(());
            }
            // Another flow's answers have the key of ours meanwhile.
            maps::remove_flow(key);
        }
    }
    if is_tcp && !begins {
        return restore_in(scratch, to, flags, ifindex, now).ok_or(KernelReason::NoFlow);
    }
    if is_martian(ctx, scratch) {
        return Err(KernelReason::Martian);
    }
    create(scratch, to, ifindex, now)
}

/// What becomes of a packet that came in by a port of a gwbridge: `None` where it is not of a flow of
/// a published port. Its key is in `scratch`, and afterwards the way it is to be rewritten.
#[inline(always)]
pub(crate) fn back(scratch: &mut Scratch, flags: u8, ifindex: u32) -> Option<()> {
    let Scratch { key, other, rewrite, .. } = scratch;
    let flow = known(key, Direction::Back, ifindex)?;
    // Where the other half is gone, the client's next packet restores it.
    note(flow, key, other, Direction::Back, flags, now(), false);
    rewrite.fill(flow, Direction::Back);
    Some(())
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
/// be silent, both must look used to the LRU, and one says where the other's packets go. False where the other one was looked for, which is
/// once a second or where `look`, and is gone: the LRU takes entries, not flows.
#[inline(always)]
fn note(
    flow: &mut FlowValue,
    key: &FlowKey,
    other: &mut FlowKey,
    direction: Direction,
    flags: u8,
    now: u64,
    look: bool,
) -> bool {
    let bits = shown(flags);
    let had = flow.seen[direction as usize];
    let is_new = had & bits != bits;
    let is_old = now > flow.last_seen_ns && now - flow.last_seen_ns > TOUCH_NS;
    if !is_new && !is_old && !look {
        return true;
    }
    flow.seen[direction as usize] = had | bits;
    flow.last_seen_ns = now;
    *other = flow.other(key);
    let Some(other) = maps::flow(other) else { return false };
    // SAFETY: as in `towards_container`.
    let other = unsafe { &mut *other };
    if !is_half_of(other, key, direction) {
        return false;
    }
    other.seen[direction as usize] |= bits;
    other.last_seen_ns = now;
    if matches!(direction, Direction::In) {
        other.ifindex = flow.arrival_ifindex;
        other.destination_mac = flow.arrival_mac;
        other.source_mac = flow.uplink_mac;
    }
    true
}

/// The bits of [`seen`] that a packet with these flags of TCP shows.
#[inline(always)]
fn shown(flags: u8) -> u8 {
    let mut bits = seen::ANY;
    if flags & tcp::FIN != 0 {
        bits |= seen::FIN;
    }
    if flags & tcp::RST != 0 {
        bits |= seen::RST;
    }
    bits
}

/// Whether an entry is the other one of the flow whose packets have `key` in `direction`.
#[inline(always)]
fn is_half_of(other: &FlowValue, key: &FlowKey, direction: Direction) -> bool {
    let (address, port_be, peer_port_be) = match direction {
        Direction::In => (&key.destination, key.destination_port_be, key.source_port_be),
        Direction::Back => (&key.source, key.source_port_be, key.destination_port_be),
    };
    other.direction == direction.other() as u8
        && other.address == *address
        && other.port_be == port_be
        && other.peer_port_be == peer_port_be
}

/// Enters the way back of a flow again, under `other`, where the LRU took it; false where another
/// flow has that key now.
#[inline(always)]
fn restore_back(
    flow: &FlowValue,
    key: &FlowKey,
    other: &FlowKey,
    value: &mut FlowValue,
    now: u64,
) -> bool {
    value.last_seen_ns = now;
    value.seen = flow.seen;
    value.ifindex = flow.arrival_ifindex;
    value.arrival_ifindex = flow.ifindex;
    value.destination_mac = flow.arrival_mac;
    value.source_mac = flow.uplink_mac;
    fill_back(key, value);
    match maps::add_flow(other, value) {
        Ok(()) => true,
        // Another processor was quicker, or the key is taken.
        Err(EXISTS) => maps::flow(other).is_some_and(|found| {
            // SAFETY: as in `towards_container`.
            is_half_of(unsafe { &*found }, key, Direction::In)
        }),
        // The answers go through the kernel, until the next look.
        Err(_) => true,
    }
}

/// Enters the way to the container again where the way back says that there is such a flow.
#[inline(always)]
fn restore_in(
    scratch: &mut Scratch,
    to: &PublishedValue,
    flags: u8,
    ifindex: u32,
    now: u64,
) -> Option<()> {
    fill_back_key(scratch, to);
    let Scratch { key, back_key, flow: value, .. } = scratch;
    // SAFETY: as in `towards_container`.
    let back = unsafe { &mut *maps::flow(back_key)? };
    if !is_half_of(back, key, Direction::In) || back.arrival_ifindex != to.ifindex {
        return None;
    }
    back.seen[Direction::In as usize] |= shown(flags);
    value.last_seen_ns = now;
    value.seen = back.seen;
    fill_in(scratch, to, ifindex);
    let Scratch { key, flow: value, rewrite, .. } = scratch;
    // If it is refused, so it is for the next packet, which does the same.
    let _ = maps::set_flow(key, value);
    rewrite.fill(value, Direction::In);
    Some(())
}

/// Enters a flow. The way back is first: a container must never see a packet whose answer we would
/// not know.
#[inline(always)]
fn create(
    scratch: &mut Scratch,
    to: &PublishedValue,
    ifindex: u32,
    now: u64,
) -> Result<(), KernelReason> {
    fill_back_key(scratch, to);
    let Scratch { key, back_key, flow: value, source_mac, destination_mac, .. } = scratch;
    value.last_seen_ns = now;
    value.seen = [seen::ANY, 0];
    value.ifindex = ifindex;
    value.arrival_ifindex = to.ifindex;
    value.destination_mac = *source_mac;
    value.source_mac = *destination_mac;
    fill_back(key, value);
    enter_back(back_key, value, now)?;
    fill_in(scratch, to, ifindex);
    let Scratch { key, back_key, flow: value, rewrite, .. } = scratch;
    // LRU maps refuse under contention where they are not full, so once more.
    if maps::set_flow(key, value).is_err() && maps::set_flow(key, value).is_err() {
        maps::remove_flow(back_key);
        return Err(KernelReason::ConntrackFull);
    }
    rewrite.fill(value, Direction::In);
    Ok(())
}

/// Makes `back_key` what the container's answers have where the client keeps its port.
#[inline(always)]
fn fill_back_key(scratch: &mut Scratch, to: &PublishedValue) {
    let Scratch { key, back_key, .. } = scratch;
    *back_key = FlowKey {
        source: to.address,
        destination: key.source,
        source_port_be: to.port_be,
        destination_port_be: key.source_port_be,
        protocol: key.protocol,
        reserved: [0; 3],
    };
}

/// What the way back always says of a flow whose packets have `key`. It is written field by field,
/// here and there, for a whole value would be made on the stack first, which is small.
#[inline(always)]
fn fill_back(key: &FlowKey, value: &mut FlowValue) {
    value.address = key.destination;
    value.port_be = key.destination_port_be;
    value.peer_port_be = key.source_port_be;
    value.arrival_mac = [0; 6];
    value.uplink_mac = [0; 6];
    value.direction = Direction::Back as u8;
    value.reserved = 0;
}

/// Makes `flow` the way to the container of the flow whose answers have `back_key`; what was seen,
/// and when, it keeps.
#[inline(always)]
fn fill_in(scratch: &mut Scratch, to: &PublishedValue, ifindex: u32) {
    let Scratch { back_key, flow: value, source_mac, destination_mac, .. } = scratch;
    value.address = to.address;
    value.ifindex = to.ifindex;
    value.arrival_ifindex = ifindex;
    value.port_be = to.port_be;
    value.peer_port_be = back_key.destination_port_be;
    value.destination_mac = to.mac;
    value.source_mac = to.gateway_mac;
    value.arrival_mac = *source_mac;
    value.uplink_mac = *destination_mac;
    value.direction = Direction::In as u8;
    value.reserved = 0;
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

    /// Makes it what an entry says.
    #[inline(always)]
    fn fill(&mut self, flow: &FlowValue, direction: Direction) {
        self.direction = direction;
        self.address = word(&flow.address);
        self.port_be = flow.port_be;
        self.peer_port_be = flow.peer_port_be;
        self.destination_mac = flow.destination_mac;
        self.source_mac = flow.source_mac;
        self.ifindex = flow.ifindex;
    }
}
