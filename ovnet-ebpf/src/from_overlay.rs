//! The kernel path's way in: what `ovnet-vx` decapsulated, with the tunnel key beside it.
//!
//! Here arrive reassembled fragments, packets with outer options or UDP checksums, packets that
//! came in by another interface than the uplink, and ARP from peers that are plain kernel vxlan
//! devices. The checks are those of `from_uplink`; the kernel has merged ECN already.

use aya_ebpf::{
    bindings::{BPF_F_ZERO_CSUM_TX, bpf_tunnel_key},
    helpers::generated::{bpf_skb_get_tunnel_key, bpf_skb_set_tunnel_key},
    programs::TcContext,
};
use ovnet_common::{
    abi::unmapped,
    headers::{ethernet, ipv4},
    verdict::{Answer, DropReason, Verdict},
    vxlan,
};

use crate::{
    arp, maps,
    parse::{Frame, is_tagged},
    trust::{self, Inner},
};

/// Decides about a packet the kernel's vxlan device decapsulated.
#[inline(always)]
pub(crate) fn handle(ctx: &TcContext) -> Verdict {
    match receive(ctx) {
        Ok(verdict) => verdict,
        Err(reason) => Verdict::Drop(reason),
    }
}

#[inline(always)]
fn receive(ctx: &TcContext) -> Result<Verdict, DropReason> {
    let config = maps::config().ok_or(DropReason::NotConfigured)?;
    let key = tunnel_key(ctx)?;
    let vni = key.tunnel_id;
    // SAFETY: the helper filled the whole key, and answers -EPROTO for a packet that came over IPv6;
    // both are in host order.
    let (vtep, local) = unsafe {
        (key.__bindgen_anon_1.remote_ipv4.to_be_bytes(), key.__bindgen_anon_3.local_ipv4)
    };
    if local.to_be_bytes() != unmapped(&config.vtep) {
        return Err(DropReason::WrongDestination);
    }
    if is_tagged(ctx) {
        return Err(DropReason::EtherType);
    }
    // An ARP packet is longer than this too.
    let frame = Frame::tc_pulled(ctx, ethernet::LEN + ipv4::LEN).ok_or(DropReason::Truncated)?;
    let (eth, ip) = match trust::inner(&frame, 0)? {
        Inner::Ipv4(eth, ip) => (eth, ip),
        Inner::Arp => return answer_arp(ctx, vni, vtep),
    };
    let endpoint = trust::local_endpoint(vni, vtep, ip.source, ip.destination)?;
    if eth.destination != endpoint.mac {
        frame.write(ethernet::DESTINATION, &endpoint.mac).ok_or(DropReason::Truncated)?;
    }
    Ok(Verdict::Deliver(endpoint.ifindex))
}

/// Answers a remote endpoint's request for one of ours, back through the tunnel.
#[inline(always)]
fn answer_arp(ctx: &TcContext, vni: u32, vtep: [u8; 4]) -> Result<Verdict, DropReason> {
    let request = arp::Request::read(ctx)?;
    if !trust::is_sent_by(vni, vtep, request.sender) {
        return Err(trust::why_not_trusted(vni, vtep));
    }
    let mac = match maps::endpoint(vni, request.target) {
        Some(endpoint) if endpoint.ifindex != 0 => endpoint.mac,
        // Somebody else's to answer: the request is sent to every host.
        _ => return Err(DropReason::ArpUnanswered),
    };
    request.reply(mac)?;
    set_tunnel_key(ctx, vni, vtep)?;
    // SAFETY: the context is the one the kernel gave us.
    let ifindex = unsafe { (*ctx.skb.skb).ifindex };
    Ok(Verdict::Answer(Answer::Arp, ifindex))
}

/// The tunnel key of a packet from an `external` device.
#[inline(always)]
fn tunnel_key(ctx: &TcContext) -> Result<bpf_tunnel_key, DropReason> {
    // SAFETY: integers only, so all zero is a value.
    let mut key: bpf_tunnel_key = unsafe { core::mem::zeroed() };
    let size = size_of::<bpf_tunnel_key>() as u32;
    // SAFETY: the key is as large as we say.
    match unsafe { bpf_skb_get_tunnel_key(ctx.skb.skb, &raw mut key, size, 0) } {
        0 => Ok(key),
        _ => Err(DropReason::TunnelKey),
    }
}

/// Tells the `external` device where to send the packet. TTL 64 as on the fast path, no DF, the
/// UDP checksum zero; the device itself sets ECN and the source port.
#[inline(always)]
pub(crate) fn set_tunnel_key(ctx: &TcContext, vni: u32, vtep: [u8; 4]) -> Result<(), DropReason> {
    // SAFETY: integers only, so all zero is a value.
    let mut key: bpf_tunnel_key = unsafe { core::mem::zeroed() };
    key.tunnel_id = vni;
    key.tunnel_ttl = vxlan::TTL;
    key.__bindgen_anon_1.remote_ipv4 = u32::from_be_bytes(vtep);
    let size = size_of::<bpf_tunnel_key>() as u32;
    let flags = u64::from(BPF_F_ZERO_CSUM_TX);
    // SAFETY: the key is as large as we say.
    match unsafe { bpf_skb_set_tunnel_key(ctx.skb.skb, &raw mut key, size, flags) } {
        0 => Ok(()),
        _ => Err(DropReason::TunnelKey),
    }
}
