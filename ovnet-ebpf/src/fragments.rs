//! Fragments of published ports' datagrams. Only the first one has the ports; it decides for all.
//!
//! Where a later one comes first, the kernel gets it and then all others, too: only who has every
//! fragment can put the datagram together.

use aya_ebpf::{bindings::__sk_buff, programs::TcContext};
use ovnet_common::{
    abi::mapped,
    headers::ethernet,
    published::{Direction, FragmentKey, FragmentValue, fate, timeout},
    verdict::KernelReason,
};

use crate::{
    conntrack,
    maps::{self, Scratch},
    parse::{Frame, Ipv4},
    published::Outcome,
    translate::{self, Rewrite, word},
};

/// Decides for all fragments of the datagram with this identification as was decided for the first
/// one, whose key and rewriting are in `scratch`.
#[inline(always)]
pub(crate) fn first(scratch: &mut Scratch, id_be: u16, ifindex: u32) -> Result<(), KernelReason> {
    let Scratch { key, fragment_key, fragment, rewrite, .. } = scratch;
    let now = conntrack::now();
    *fragment_key = FragmentKey {
        source: key.source,
        destination: key.destination,
        id_be,
        protocol: key.protocol,
        reserved: 0,
    };
    if let Some(found) = maps::fragment(fragment_key)
        && found.fate == fate::KERNEL
        && is_fresh(found, now)
    {
        return Err(KernelReason::Fragment);
    }
    *fragment = FragmentValue {
        made_ns: now,
        address: mapped(rewrite.address.to_ne_bytes()),
        ifindex: rewrite.ifindex,
        arrival_ifindex: ifindex,
        destination_mac: rewrite.destination_mac,
        source_mac: rewrite.source_mac,
        direction: rewrite.direction as u8,
        fate: fate::TRANSLATE,
        reserved: [0; 2],
    };
    maps::set_fragment(fragment_key, fragment).map_err(|_| KernelReason::Fragment)
}

/// What becomes of a later fragment. `direction` is a [`Direction`].
#[inline(never)]
pub(crate) fn later(skb: *mut __sk_buff, direction: u32) -> Outcome {
    let ctx = TcContext::new(skb);
    let Some(ip) = Ipv4::read_fields(&Frame::tc(&ctx), ethernet::LEN) else { return Outcome::PASS };
    // SAFETY: the context is the one the kernel gave us.
    let ifindex = unsafe { (*skb).ifindex };
    let direction = if direction == 0 { Direction::In } else { Direction::Back };
    let (key, now) = (key(&ip), conntrack::now());
    let known = maps::fragment(&key).filter(|found| is_fresh(found, now));
    let Some(found) = known else {
        // Whether it is a published port's cannot be known. The kernel has one now.
        let value = FragmentValue {
            made_ns: now,
            address: [0; 16],
            ifindex: 0,
            arrival_ifindex: 0,
            destination_mac: [0; 6],
            source_mac: [0; 6],
            direction: direction as u8,
            fate: fate::KERNEL,
            reserved: [0; 2],
        };
        let _ = maps::set_fragment(&key, &value);
        return Outcome::PASS;
    };
    if found.fate == fate::KERNEL
        || found.direction != direction as u8
        || found.arrival_ifindex != ifindex
    {
        return Outcome::kernel(KernelReason::Fragment);
    }
    if ip.ttl <= 1 {
        return Outcome::kernel(KernelReason::TimeExceeded);
    }
    let rewrite = Rewrite {
        direction,
        address: word(&found.address),
        port_be: 0,
        peer_port_be: 0,
        destination_mac: found.destination_mac,
        source_mac: found.source_mac,
        ifindex: found.ifindex,
    };
    match translate::tc(&ctx, &ip, None, &rewrite) {
        None => Outcome::FAILED,
        Some(()) => Outcome::translated(&rewrite),
    }
}

#[inline(always)]
fn is_fresh(value: &FragmentValue, now: u64) -> bool {
    now < value.made_ns + timeout::FRAGMENTS_NS
}

#[inline(always)]
fn key(ip: &Ipv4) -> FragmentKey {
    FragmentKey {
        source: mapped(ip.source),
        destination: mapped(ip.destination),
        id_be: ip.id_be,
        protocol: ip.protocol,
        reserved: 0,
    }
}
