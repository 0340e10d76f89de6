//! Container → client of a published port: the address and port the client knows in place of the
//! container's, out of the interface and to the next hop the client's packets come by.
//!
//! It sits on the gwbridge's port, before the bridge and whatever filters bridged packets. What is not
//! of a known flow goes on to the bridge: it is ordinary egress, or the kernel's own NAT.

use aya_ebpf::{
    EbpfContext as _,
    bindings::{__sk_buff, bpf_check_mtu_flags::BPF_MTU_CHK_SEGS},
    helpers::generated::bpf_check_mtu,
    programs::TcContext,
};
use ovnet_common::{
    abi::mapped,
    headers::{ethernet, ipv4},
    published::Direction,
    verdict::{DropReason, KernelReason, Verdict},
};

use crate::{
    arp, conntrack, fragments, icmp_error, maps,
    parse::{Ethernet, Frame, Ipv4, Transport, is_tagged},
    partial,
    published::{Outcome, is_vxlan},
    translate,
};

/// Decides about a packet that came in by a port of a gwbridge.
#[inline(always)]
pub(crate) fn handle(ctx: &TcContext) -> Verdict {
    if is_forging(ctx) {
        return Verdict::Drop(DropReason::ForgedChecksum);
    }
    match answer(ctx) {
        left @ (Verdict::Pass | Verdict::Kernel(_)) => {
            // An answer of a known flow is by its own sandbox already.
            if let Err(reason) = is_itself(ctx) {
                return Verdict::Drop(reason);
            }
            // What is left to the kernel goes the same way as all egress: a datagram's fragments
            // must meet again.
            match egress(ctx) {
                Verdict::Pass => left,
                egress => egress,
            }
        }
        decided => decided,
    }
}

/// Whether IPv4 of a sandbox is to become something else after it was looked at here, and by the
/// kernel's rules.
#[inline(always)]
fn is_forging(ctx: &TcContext) -> bool {
    let frame = Frame::tc_pulled(ctx, ethernet::LEN + ipv4::LEN);
    let kind = frame.and_then(|frame| frame.read(ethernet::TYPE));
    kind == Some(ethernet::IPV4.to_be_bytes()) && partial::is_over_headers(ctx.skb.skb) != 0
}

/// Whether a sandbox of ours speaks in its own name: the bridge keeps sandboxes apart, but it, and
/// the kernel's connection tracking behind it, would believe one that says it is another. Docker's
/// containers have no entry, and are Docker's business.
#[inline(always)]
fn is_itself(ctx: &TcContext) -> Result<(), DropReason> {
    // SAFETY: the context is the one the kernel gave us.
    let Some(port) = maps::port(unsafe { (*ctx.skb.skb).ifindex }) else { return Ok(()) };
    let Some(eth) = Ethernet::read(&Frame::tc(ctx), 0) else { return Err(DropReason::Truncated) };
    if eth.source != port.mac {
        return Err(DropReason::SpoofedMac);
    }
    if is_tagged(ctx) {
        return Err(DropReason::EtherType);
    }
    match eth.ethertype {
        ethernet::IPV4 => {
            let frame = Frame::tc_pulled(ctx, ethernet::LEN + ipv4::LEN);
            let ip = frame.and_then(|frame| Ipv4::read(&frame, ethernet::LEN));
            let ip = ip.ok_or(DropReason::Truncated)?;
            if mapped(ip.source) != port.address {
                return Err(DropReason::SpoofedAddress);
            }
            // The bridge routes its host's 127.0.0.1 to sandboxes. That nothing comes back this way
            // must not hang on rules that somebody may flush.
            if ip.destination[0] == 127 { Err(DropReason::HostLoopback) } else { Ok(()) }
        }
        ethernet::ARP => arp::is_by(ctx, &port),
        _ => Ok(()),
    }
}

/// Gives what is for our own bridge to route to the bridge itself. By its port the packet would meet
/// br_netfilter where that is on, which translates it there and then, finds the container in the
/// same bridge, and sends it from port to port, where the isolation of the ports ends it.
#[inline(always)]
fn egress(ctx: &TcContext) -> Verdict {
    let Some(config) = maps::config() else { return Verdict::Pass };
    let is_for_bridge = config.gwbridge_ifindex != 0
        && Frame::tc(ctx).read(ethernet::DESTINATION) == Some(config.gwbridge_mac)
        && Frame::tc(ctx).read(ethernet::TYPE) == Some(ethernet::IPV4.to_be_bytes());
    if is_for_bridge && !is_tagged(ctx) {
        Verdict::Egress(config.gwbridge_ifindex)
    } else {
        Verdict::Pass
    }
}

/// Translates an answer of a published port; everything else passes.
#[inline(always)]
fn answer(ctx: &TcContext) -> Verdict {
    // SAFETY: the context is the one the kernel gave us.
    let protocol = unsafe { (*ctx.skb.skb).protocol };
    if protocol != u32::from(ethernet::IPV4.to_be()) || is_tagged(ctx) {
        return Verdict::Pass;
    }
    let Some(frame) = Frame::tc_pulled(ctx, ethernet::LEN + ipv4::LEN) else {
        return Verdict::Pass;
    };
    let Some(ip) = Ipv4::read(&frame, ethernet::LEN) else { return Verdict::Pass };
    if ip.version_ihl != ipv4::NO_OPTIONS {
        return Verdict::Pass;
    }
    match ip.protocol {
        ipv4::TCP | ipv4::UDP if ip.is_later_fragment() => {
            fragments::later(ctx.skb.skb, Direction::Back as u32).verdict()
        }
        ipv4::TCP | ipv4::UDP => translate::then(ctx.skb.skb, packet(ctx.skb.skb)).verdict(),
        ipv4::ICMP if !ip.is_fragment() => {
            icmp_error::handle(ctx.skb.skb, Direction::Back as u32, 0).verdict()
        }
        _ => Verdict::Pass,
    }
}

/// Decides about a packet with ports; what to make of it is in the scratch space.
#[inline(never)]
fn packet(skb: *mut __sk_buff) -> Outcome {
    let ctx = TcContext::new(skb);
    let Some(ip) = Ipv4::read_fields(&Frame::tc(&ctx), ethernet::LEN) else { return Outcome::PASS };
    let Some(frame) = Frame::tc_pulled(&ctx, Transport::end(ip.protocol)) else {
        return Outcome::PASS;
    };
    let Some(transport) = Transport::read(&frame, ip.protocol) else { return Outcome::PASS };
    if is_vxlan(ip.protocol, transport.destination_be) {
        return Outcome::VXLAN_PORT;
    }
    // SAFETY: the context is the one the kernel gave us.
    let ifindex = unsafe { (*skb).ifindex };
    let Some(scratch) = maps::scratch() else { return Outcome::PASS };
    scratch.key = conntrack::key(&ip, &transport);
    if conntrack::back(scratch, transport.flags, ifindex).is_none() {
        return Outcome::PASS;
    }
    if ip.ttl <= 1 {
        return Outcome::kernel(KernelReason::TimeExceeded);
    }
    if !fits(&ctx, scratch.rewrite.ifindex) {
        return Outcome::kernel(KernelReason::TooLong);
    }
    if ip.is_fragment()
        && let Err(reason) = fragments::first(scratch, ip.id_be, ifindex)
    {
        return Outcome::kernel(reason);
    }
    Outcome::translated(&scratch.rewrite)
}

/// Whether the packet, or each segment of a GSO packet, fits the interface: a redirection does not
/// look.
#[inline(always)]
fn fits(ctx: &TcContext, ifindex: u32) -> bool {
    let mut mtu = 0;
    // SAFETY: the context is the one the kernel gave us, and the helper writes one word.
    let answer = unsafe {
        bpf_check_mtu(ctx.as_ptr(), ifindex, &raw mut mtu, 0, u64::from(BPF_MTU_CHK_SEGS))
    };
    answer == 0
}
