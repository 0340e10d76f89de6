//! Wire → container before an skb exists: the trust filter, decapsulation and redirection.
//!
//! TCP and UDP to published ports are translated, too. What it does not take (everything not ours, ARP,
//! fragments, UDP checksums, merged packets, and probes but under generic XDP) goes on to `from_uplink`,
//! which decides again.

use aya_ebpf::{
    Global, bindings::xdp_md, helpers::generated::bpf_xdp_adjust_head, programs::XdpContext,
};
use ovnet_common::{
    ecn,
    headers::{ethernet, ipv4},
    published::published_flags,
    verdict::{Answer, DropReason, Verdict},
    vxlan,
};

use crate::{
    from_uplink::mark,
    maps,
    parse::{Frame, Ipv4},
    probe,
    published::{self, Outcome},
    translate,
    trust::{self, Accepted, Packet},
};

/// Whether the program is run by generic XDP: 1, or 0. Set when it is loaded.
#[unsafe(no_mangle)]
static XDP_IS_GENERIC: Global<u8> = Global::new(0);

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
    // A NIC in promiscuous mode brings what is for others, too; the kernel drops that.
    if frame.read(ethernet::DESTINATION) != Some(config.uplink_mac) {
        return Ok(Verdict::Pass);
    }
    let packet = match trust::accept(&frame, config)? {
        Accepted::Nothing if config.published != 0 => return Ok(published_port(ctx.ctx).verdict()),
        // A probe of a known host is answered at TC, which sees it as it came; after generic XDP it
        // may come there without its Ethernet header.
        Accepted::Probe if XDP_IS_GENERIC.load() != 0 => return answer_probe(ctx.ctx).verdict(),
        Accepted::Nothing | Accepted::Probe => return Ok(Verdict::Pass),
        Accepted::Packet(packet) => packet,
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

/// Answers a probe in place, to leave by the uplink again. A function of its own for its stack.
#[inline(never)]
fn answer_probe(xdp: *mut xdp_md) -> Answered {
    // Moves nothing. LLVM would else hand over the packet's bounds in place of the context, as the 32
    // bits that the context declares them to be, which the verifier refuses ("pointer arithmetic with
    // <<="); a context that a helper takes stays one.
    // SAFETY: the context is the one the kernel gave us, and no packet pointer is held.
    if unsafe { bpf_xdp_adjust_head(xdp, 0) } != 0 {
        return Answered(DropReason::Truncated as u32);
    }
    let ctx = XdpContext::new(xdp);
    match probe::turn_around(&Frame::xdp(&ctx)) {
        None => Answered(DropReason::Truncated as u32),
        Some(Err(reason)) => Answered(reason as u32),
        Some(Ok(())) => Answered(0),
    }
}

/// What became of a probe: 0, or the number of the reason to drop it. A function of its own returns
/// a number.
#[repr(transparent)]
struct Answered(u32);

impl Answered {
    #[inline(always)]
    fn verdict(self) -> Result<Verdict, DropReason> {
        const TRUNCATED: u32 = DropReason::Truncated as u32;
        match self.0 {
            0 => Ok(Verdict::Answer(Answer::Probe, 0)),
            TRUNCATED => Err(DropReason::Truncated),
            _ => Err(DropReason::NotAProbe),
        }
    }
}

/// Decides about a frame that is not VXLAN: TCP and UDP to a published port are translated here;
/// fragments, errors and what the container's end does not take, as XDP, are left to TC.
#[inline(never)]
fn published_port(xdp: *mut xdp_md) -> Outcome {
    let ctx = XdpContext::new(xdp);
    let frame = &Frame::xdp(&ctx);
    let Some(ip) = Ipv4::read_fields(frame, ethernet::LEN) else { return Outcome::PASS };
    if frame.read(ethernet::TYPE) != Some(ethernet::IPV4.to_be_bytes())
        || ip.version_ihl != ipv4::NO_OPTIONS
        || ip.is_fragment()
        || !matches!(ip.protocol, ipv4::TCP | ipv4::UDP)
    {
        return Outcome::PASS;
    }
    let Some(scratch) = maps::scratch() else { return Outcome::PASS };
    let Some((transport, to)) = published::find(scratch, frame, &ip) else {
        return Outcome::PASS;
    };
    let length = frame.read(ethernet::LEN + ipv4::TOTAL_LENGTH).map(u16::from_be_bytes);
    // Zero is a packet of more than IPv4 can say.
    let fits = length.is_some_and(|length| length != 0 && length <= to.mtu);
    if to.flags & published_flags::XDP == 0 || !fits {
        return Outcome::PASS;
    }
    if published::is_vxlan(ip.protocol, transport.source_be) {
        return Outcome::VXLAN_PORT;
    }
    let ifindex = ctx.ingress_ifindex() as u32;
    // TC says the same, and then the kernel has it.
    if published::decide(xdp.cast(), scratch, &ip, &transport, to, ifindex).is_err() {
        return Outcome::PASS;
    }
    match translate::xdp(frame, &ip, &transport, &scratch.rewrite) {
        None => Outcome::FAILED,
        Some(()) => Outcome::translated(&scratch.rewrite),
    }
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
