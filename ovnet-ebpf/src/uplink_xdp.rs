//! Wire → container before an skb exists: the trust filter, decapsulation and redirection.
//!
//! What it does not take (everything not ours, ARP, fragments, UDP checksums, merged packets) goes
//! on to `from_uplink`, which decides again.

use aya_ebpf::{helpers::generated::bpf_xdp_adjust_head, programs::XdpContext};
use ovnet_common::{
    ecn,
    headers::{ethernet, ipv4},
    verdict::{DropReason, Verdict},
    vxlan,
};

use crate::{
    from_uplink::mark,
    maps,
    parse::Frame,
    trust::{self, Packet},
};

/// Decides about a frame the driver received.
#[inline(always)]
pub(crate) fn handle(ctx: &XdpContext) -> Verdict {
    match receive(ctx) {
        Ok(verdict) => verdict,
        Err(reason) => Verdict::Drop(reason),
    }
}

#[inline(always)]
fn receive(ctx: &XdpContext) -> Result<Verdict, DropReason> {
    let Some(config) = maps::config() else {
        return Ok(Verdict::Pass);
    };
    let frame = Frame::xdp(ctx);
    let Some(packet) = trust::accept(&frame, config)? else {
        return Ok(Verdict::Pass);
    };
    let Packet { eth, ip, endpoint, vni, outer_tos } = packet;
    if is_merged(&frame, vni) {
        return Ok(Verdict::Pass);
    }
    let tos = ecn::decapsulate(ip.tos, outer_tos).ok_or(DropReason::EcnInvalid)?;
    let (mac, ifindex) = (endpoint.mac, endpoint.ifindex);
    // The inner Ethernet header is in place already; removing the outer bytes is all.
    // SAFETY: the context is the one the kernel gave us; no packet pointer outlives the call.
    if unsafe { bpf_xdp_adjust_head(ctx.ctx, vxlan::OVERHEAD as i32) } != 0 {
        return Err(DropReason::DecapFailed);
    }
    let frame = Frame::xdp(ctx);
    if eth.destination != mac {
        frame.write(ethernet::DESTINATION, &mac).ok_or(DropReason::DecapFailed)?;
    }
    if tos != ip.tos {
        mark(&frame, &ip, tos).ok_or(DropReason::DecapFailed)?;
    }
    Ok(Verdict::Deliver(ifindex))
}

/// Whether the inner packet is longer than its network's MTU: several that GRO or the sender merged.
/// Generic XDP runs after GRO and sees such packets, but a redirect drops what is longer than the
/// target's MTU. TC, or the kernel's device, delivers them whole.
#[inline(always)]
fn is_merged(frame: &Frame, vni: u32) -> bool {
    /// What every network carries, so that short packets are spared the lookup.
    const SHORT: u16 = 500;
    let Some(length) = frame.read(vxlan::INNER_PACKET + ipv4::TOTAL_LENGTH) else {
        return false;
    };
    // Zero is a packet of more than IPv4 can say (BIG TCP).
    let length = u16::from_be_bytes(length);
    let long = length == 0 || length > SHORT;
    long && maps::network(vni).is_some_and(|network| length == 0 || length > network.mtu)
}
