//! Container → another host: 50 bytes in front, GSO kept whole, out of the interface the FIB names.
//!
//! Nothing is changed until it is certain that the fast path can carry the packet; whatever it
//! cannot goes, unmodified, to the kernel's vxlan device with a tunnel key (invariant 3).

use aya_ebpf::{
    EbpfContext as _,
    bindings::{
        BPF_F_ADJ_ROOM_ENCAP_L2_ETH, BPF_F_ADJ_ROOM_ENCAP_L3_IPV4, BPF_F_ADJ_ROOM_ENCAP_L4_UDP,
        BPF_F_ADJ_ROOM_FIXED_GSO, BPF_F_ADJ_ROOM_NO_CSUM_RESET, BPF_FIB_LKUP_RET_FRAG_NEEDED,
        BPF_FIB_LKUP_RET_NO_NEIGH, BPF_FIB_LKUP_RET_SUCCESS, bpf_adj_room_mode::BPF_ADJ_ROOM_MAC,
        bpf_fib_lookup as FibLookup,
    },
    helpers::{
        bpf_get_prandom_u32,
        generated::{bpf_fib_lookup, bpf_get_hash_recalc, bpf_skb_adjust_room},
    },
    programs::TcContext,
};
use ovnet_common::{
    abi::{EndpointValue, HostConfig, unmapped},
    ecn, flow,
    headers::{ethernet, ipv4},
    verdict::{DropReason, SlowReason, Verdict},
    vxlan::{self, Outer},
};

use crate::{
    from_overlay::set_tunnel_key,
    maps,
    parse::{Frame, Ipv4},
};

/// `AF_INET`.
const IPV4_FAMILY: u8 = 2;
/// `EALREADY`, as helpers return it.
const ALREADY: i64 = -114;

/// What makes the kernel treat the packet as a tunnel's: it can then segment a GSO packet with the
/// outer headers repeated, in software or in a NIC. `ENCAP_L2(14)` and `ENCAP_L2_ETH` say where
/// the inner packet begins; without them NICs refuse tunnel offloads (`vxlan_features_check()`).
/// FIXED_GSO keeps the segments' size, which the container's MTU already leaves room for.
const FLAGS: u64 = BPF_F_ADJ_ROOM_FIXED_GSO as u64
    | BPF_F_ADJ_ROOM_NO_CSUM_RESET as u64
    | BPF_F_ADJ_ROOM_ENCAP_L3_IPV4 as u64
    | BPF_F_ADJ_ROOM_ENCAP_L4_UDP as u64
    | BPF_F_ADJ_ROOM_ENCAP_L2_ETH as u64
    | (ethernet::LEN as u64) << 56;

/// Sends a packet to an endpoint on another host.
#[inline(always)]
pub(crate) fn towards(
    ctx: &TcContext,
    ifindex: u32,
    vni: u32,
    source_mac: [u8; 6],
    ip: &Ipv4,
    endpoint: &EndpointValue,
) -> Verdict {
    let Some(config) = maps::config() else {
        return Verdict::Drop(DropReason::NotConfigured);
    };
    if config.external_ifindex == 0 || config.vtep == [0; 16] {
        return Verdict::Drop(DropReason::NotConfigured);
    }
    match fast(ctx, ifindex, vni, source_mac, ip, endpoint, config) {
        Ok(out) => Verdict::Encapsulate(out),
        Err(Refusal::Slow(reason)) => match set_tunnel_key(ctx, vni, unmapped(&endpoint.vtep)) {
            Ok(()) => Verdict::Slow(reason, config.external_ifindex),
            Err(reason) => Verdict::Drop(reason),
        },
        Err(Refusal::Drop(reason)) => Verdict::Drop(reason),
    }
}

/// Why the fast path did not carry a packet.
enum Refusal {
    /// It is unmodified, and the kernel's path takes it.
    Slow(SlowReason),
    /// It is modified and lost.
    Drop(DropReason),
}

impl From<SlowReason> for Refusal {
    fn from(reason: SlowReason) -> Self {
        Self::Slow(reason)
    }
}

/// Encapsulates; the ifindex to send it out of.
#[inline(always)]
fn fast(
    ctx: &TcContext,
    ifindex: u32,
    vni: u32,
    source_mac: [u8; 6],
    ip: &Ipv4,
    endpoint: &EndpointValue,
    config: &HostConfig,
) -> Result<u32, Refusal> {
    if ip.version_ihl != ipv4::NO_OPTIONS {
        return Err(SlowReason::IpOptions.into());
    }
    if ip.is_fragment() {
        return Err(SlowReason::Fragment.into());
    }
    // SAFETY: the context is the one the kernel gave us.
    let hash = unsafe { bpf_get_hash_recalc(ctx.skb.skb) };
    let source_port = flow::source_port(hash, config.source_port_min, config.source_port_max);
    let port_be = endpoint.vxlan_port_be;
    let (source, destination) = (unmapped(&config.vtep), unmapped(&endpoint.vtep));
    let inner_destination = endpoint.mac;
    let tos = ecn::encapsulate(ip.tos);
    let inner_length = ctx.len() - ethernet::LEN as u32;

    let mut words = [0u64; size_of::<FibLookup>() / 8];
    for word in &mut words {
        // Cleared as a whole it would be by a call to a loop over its bytes.
        // SAFETY: the reference is valid.
        unsafe { core::ptr::write_volatile(word, 0) };
    }
    // SAFETY: integers only, so all zero is a value; the words are as large and more than as aligned.
    let fib = unsafe { &mut *(&raw mut words).cast::<FibLookup>() };
    fib.family = IPV4_FAMILY;
    fib.l4_protocol = ipv4::UDP;
    fib.sport = source_port.to_be();
    fib.dport = port_be;
    fib.ifindex = ifindex;
    fib.__bindgen_anon_1.tot_len = wire_length(ctx, ip, inner_length)?;
    fib.__bindgen_anon_3.ipv4_src = u32::from_ne_bytes(source);
    fib.__bindgen_anon_4.ipv4_dst = u32::from_ne_bytes(destination);
    let size = size_of::<FibLookup>() as i32;
    // SAFETY: the structure is as large as we say.
    let answer = unsafe { bpf_fib_lookup(ctx.as_ptr(), &raw mut *fib, size, 0) };
    if answer != i64::from(BPF_FIB_LKUP_RET_SUCCESS) {
        return Err(fib_refusal(answer).into());
    }

    // SAFETY: the context is the one the kernel gave us; no packet pointer outlives the call.
    let result = unsafe {
        bpf_skb_adjust_room(ctx.skb.skb, vxlan::OVERHEAD as i32, BPF_ADJ_ROOM_MAC, FLAGS)
    };
    match result {
        0 => {}
        ALREADY => return Err(SlowReason::AlreadyEncapsulated.into()),
        _ => return Err(SlowReason::NoRoom.into()),
    }
    let outer = Outer {
        next_hop: fib.dmac,
        interface_mac: fib.smac,
        source,
        destination,
        inner_length: inner_length as u16,
        tos,
        // SAFETY: a helper without arguments.
        id: unsafe { bpf_get_prandom_u32() } as u16,
        source_port,
        port_be,
        vni,
        inner_destination,
        inner_source: source_mac,
    };
    match Frame::tc(ctx).write(0, &outer.to_bytes()) {
        Some(()) => Ok(fib.ifindex),
        None => Err(Refusal::Drop(DropReason::Truncated)),
    }
}

/// Length in bytes of the outer IP packets this one becomes on the wire: for a GSO packet that of
/// one segment, which is what the route's MTU bounds.
#[inline(always)]
fn wire_length(ctx: &TcContext, ip: &Ipv4, inner_length: u32) -> Result<u16, Refusal> {
    // SAFETY: the context is the one the kernel gave us.
    let segment = unsafe { (*ctx.skb.skb).gso_size };
    let mut length = inner_length;
    if segment != 0 {
        // The headers each segment repeats: IPv4, and TCP with its options or UDP.
        const DATA_OFFSET: usize = ethernet::LEN + ipv4::LEN + 12;
        let transport = if ip.protocol == ipv4::TCP {
            let frame = Frame::tc_pulled(ctx, DATA_OFFSET + 1).ok_or(SlowReason::NotLinear)?;
            let [offset]: [u8; 1] = frame.read(DATA_OFFSET).ok_or(SlowReason::NotLinear)?;
            u32::from(offset >> 4) * 4
        } else {
            8
        };
        length = segment + ipv4::LEN as u32 + transport;
    }
    let length = length + vxlan::OVERHEAD as u32;
    // Longer than IP can say: BIG TCP, which only the kernel's path segments.
    if length > u32::from(u16::MAX) || inner_length > u32::from(u16::MAX) {
        return Err(SlowReason::FragmentationNeeded.into());
    }
    Ok(length as u16)
}

/// The reason to count for a FIB answer other than success.
#[inline(always)]
fn fib_refusal(answer: i64) -> SlowReason {
    if answer == i64::from(BPF_FIB_LKUP_RET_NO_NEIGH) {
        SlowReason::NoNeighbour
    } else if answer == i64::from(BPF_FIB_LKUP_RET_FRAG_NEEDED) {
        SlowReason::FragmentationNeeded
    } else {
        SlowReason::Fib
    }
}
