//! Wire → container: trust checks, decapsulation, delivery. What is no VXLAN may be for a published
//! port.

use aya_ebpf::{
    bindings::{
        BPF_CSUM_LEVEL_DEC, BPF_F_ADJ_ROOM_FIXED_GSO, BPF_F_ADJ_ROOM_NO_CSUM_RESET,
        bpf_adj_room_mode::BPF_ADJ_ROOM_MAC,
    },
    helpers::generated::{bpf_csum_level, bpf_skb_adjust_room},
    programs::TcContext,
};
use ovnet_common::{
    abi::{EndpointValue, HostConfig, mapped},
    checksum, ecn,
    headers::{ethernet, ipv4},
    verdict::{DropReason, Verdict},
    vxlan,
};

use crate::{
    finish::PACKET_HOST,
    maps,
    parse::{Ethernet, Frame, Ipv4, is_tagged},
    probe, published,
    trust::{self, Accepted, Packet},
};

/// FIXED_GSO: the segments' size is that of the inner packet already. NO_CSUM_RESET: what the NIC
/// verified stays verified; the level is lowered instead, see `decapsulate`.
const FLAGS: u64 = BPF_F_ADJ_ROOM_FIXED_GSO as u64 | BPF_F_ADJ_ROOM_NO_CSUM_RESET as u64;

/// Decides about a packet that came in by the uplink.
#[inline(always)]
pub(crate) fn handle(ctx: &TcContext) -> Verdict {
    match receive(ctx) {
        Ok(verdict) => verdict,
        Err(reason) => Verdict::Drop(reason),
    }
}

#[inline(always)]
fn receive(ctx: &TcContext) -> Result<Verdict, DropReason> {
    let Some(config) = maps::config() else {
        return Ok(Verdict::Pass);
    };
    // Everything else of the host comes by here too, so the cheapest test is first. The length is
    // that of the whole packet, linear or not: what is shorter cannot be VXLAN.
    // SAFETY: the context is the one the kernel gave us.
    let (protocol, pkt_type) = unsafe { ((*ctx.skb.skb).protocol, (*ctx.skb.skb).pkt_type) };
    if protocol != u32::from(ethernet::IPV4.to_be()) || pkt_type != PACKET_HOST {
        return Ok(Verdict::Pass);
    }
    // Somebody else's VLAN on the same wire: the kernel has an interface for it, or drops it.
    if is_tagged(ctx) {
        return Ok(Verdict::Pass);
    }
    let Some(outer) = Frame::tc_pulled(ctx, vxlan::OUTER_IP + ipv4::LEN) else {
        return Ok(Verdict::Pass);
    };
    // The type is looked at again in the frame: after generic XDP, Linux 6.18 may give a packet
    // without its Ethernet header (`mac_len` is lost where XDP copied it), which the kernel's own
    // path does not mind. Here a sender would choose what is read as its addresses.
    if outer.read(ethernet::TYPE) != Some(ethernet::IPV4.to_be_bytes()) {
        return Ok(Verdict::Pass);
    }
    let Some(outer_ip) = Ipv4::read_fields(&outer, vxlan::OUTER_IP) else {
        return Ok(Verdict::Pass);
    };
    // Before more is pulled: the host's own TCP has its payload right behind its headers, and
    // pulling at it would be a copy for each of its packets.
    let may_be_vxlan =
        outer_ip.protocol == ipv4::UDP && mapped(outer_ip.destination) == config.vtep;
    if may_be_vxlan {
        match from_overlay(ctx, config)? {
            Verdict::Pass => {}
            decided => return Ok(decided),
        }
    }
    if config.published == 0 || !outer_ip.is_valid() {
        return Ok(Verdict::Pass);
    }
    Ok(published::from_uplink(ctx, &outer_ip))
}

/// Decides about a UDP packet to our VTEP address.
#[inline(always)]
fn from_overlay(ctx: &TcContext, config: &HostConfig) -> Result<Verdict, DropReason> {
    let length = ctx.len() as usize;
    let wanted = vxlan::INNER_PACKET + ipv4::LEN;
    let pulled = if length < wanted { Some(Frame::tc(ctx)) } else { Frame::tc_pulled(ctx, wanted) };
    let Some(frame) = pulled else {
        return Ok(Verdict::Pass);
    };
    let packet = match trust::accept(&frame, config)? {
        Accepted::Nothing => return Ok(Verdict::Pass),
        Accepted::Probe => return probe::answer(ctx),
        Accepted::Packet(packet) => packet,
    };
    let Packet { eth, ip, endpoint, vni: _, outer_tos } = packet;
    // SAFETY: the context is the one the kernel gave us.
    let segment = unsafe { (*ctx.skb.skb).gso_size };
    if segment != 0 && ip.protocol != ipv4::TCP {
        // Datagrams in one GSO packet (`UDP_SEGMENT`; or SCTP, which the helper refuses), which the
        // receiving socket's kernel cuts. It would still take it for a tunnel's:
        // `bpf_skb_adjust_room` cannot take that mark off, and the kernel's device does. TCP is
        // delivered uncut, where the mark does no harm.
        return Ok(Verdict::Pass);
    }
    let tos = ecn::decapsulate(ip.tos, outer_tos).ok_or(DropReason::EcnInvalid)?;
    decapsulate(ctx, &eth, &ip, tos, &endpoint).ok_or(DropReason::DecapFailed)?;
    Ok(Verdict::Deliver(endpoint.ifindex))
}

/// Removes the outer headers and puts the inner Ethernet header where the outer one was.
#[inline(always)]
fn decapsulate(
    ctx: &TcContext,
    eth: &Ethernet,
    ip: &Ipv4,
    tos: u8,
    endpoint: &EndpointValue,
) -> Option<()> {
    let (mac, skb) = (endpoint.mac, ctx.skb.skb);
    // SAFETY: the context is the one the kernel gave us; no packet pointer outlives the call.
    unsafe {
        if bpf_skb_adjust_room(skb, -(vxlan::OVERHEAD as i32), BPF_ADJ_ROOM_MAC, FLAGS) != 0 {
            return None;
        }
        // A checksum verified for the outer UDP header says nothing about the inner one. Fails
        // where nothing was verified, which is right as it is.
        bpf_csum_level(skb, u64::from(BPF_CSUM_LEVEL_DEC));
    }
    let frame = Frame::tc(ctx);
    frame.write(ethernet::DESTINATION, &mac)?;
    frame.write(ethernet::SOURCE, &eth.source)?;
    if tos != ip.tos {
        mark(&frame, ip, tos)?;
    }
    Some(())
}

/// Sets the TOS byte of the packet's IPv4 header.
#[inline(always)]
pub(crate) fn mark(frame: &Frame, ip: &Ipv4, tos: u8) -> Option<()> {
    const CHECKSUM: usize = ethernet::LEN + ipv4::CHECKSUM;
    let old = frame.read::<2>(CHECKSUM)?;
    let new = checksum::update(old, [ip.version_ihl, ip.tos], [ip.version_ihl, tos]);
    frame.write(CHECKSUM, &new)?;
    frame.write(ethernet::LEN + ipv4::TOS, &[tos])
}
