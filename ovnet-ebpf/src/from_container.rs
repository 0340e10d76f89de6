//! Container → network: source check, ARP, local delivery or encapsulation.

use aya_ebpf::programs::TcContext;
use ovnet_common::{
    abi::{mapped, unmapped},
    headers::{ethernet, ipv4},
    verdict::{DropReason, Verdict},
};

use crate::{
    arp, encapsulate, gateway, maps,
    parse::{Ethernet, Frame, Ipv4, is_tagged},
    partial,
};

/// Decides about a packet that came in by a host-side veth.
#[inline(always)]
pub(crate) fn handle(ctx: &TcContext) -> Verdict {
    // SAFETY: the context is the one the kernel gave us.
    let ifindex = unsafe { (*ctx.skb.skb).ifindex };
    let Some(port) = maps::port(ifindex) else {
        return Verdict::Drop(DropReason::UnknownPort);
    };
    let Some(eth) = Ethernet::read(&Frame::tc(ctx), 0) else {
        return Verdict::Drop(DropReason::Truncated);
    };
    // Encapsulation is a trust boundary: what leaves a sandbox under another's name would pass
    // every check on the far side (invariant 4).
    if eth.source != port.mac {
        return Verdict::Drop(DropReason::SpoofedMac);
    }
    // A container that sends a tag would choose the VLAN its packets cross our wire in.
    if is_tagged(ctx) {
        return Verdict::Drop(DropReason::EtherType);
    }
    match eth.ethertype {
        ethernet::IPV4 => {}
        ethernet::ARP => return arp::from_container(ctx, ifindex, &port, eth.source),
        _ => return Verdict::Drop(DropReason::EtherType),
    }
    let Some(frame) = Frame::tc_pulled(ctx, ethernet::LEN + ipv4::LEN) else {
        return Verdict::Drop(DropReason::Truncated);
    };
    let Some(ip) = Ipv4::read(&frame, ethernet::LEN) else {
        return Verdict::Drop(DropReason::Truncated);
    };
    if !ip.is_valid() {
        return Verdict::Drop(DropReason::BadIpHeader);
    }
    if ip.source != unmapped(&port.address) || port.address != mapped(ip.source) {
        return Verdict::Drop(DropReason::SpoofedAddress);
    }
    let Some(endpoint) = maps::endpoint(port.vni, ip.destination) else {
        return nobody(ctx, ifindex, port.vni, &ip);
    };
    if endpoint.ifindex == 0 {
        // A neighbour's kernel takes such a checksum for right, and writes nothing.
        if partial::is_over_headers(ctx.skb.skb) != 0 {
            return Verdict::Drop(DropReason::ForgedChecksum);
        }
        return encapsulate::towards(ctx, ifindex, port.vni, port.mac, &ip, &endpoint);
    }
    // A container may send to a neighbour by the gateway's MAC; the neighbour only takes its own.
    if eth.destination != endpoint.mac
        && frame.write(ethernet::DESTINATION, &endpoint.mac).is_none()
    {
        return Verdict::Drop(DropReason::Truncated);
    }
    Verdict::Deliver(endpoint.ifindex)
}

/// What to do with a packet for an address no endpoint has.
#[inline(always)]
fn nobody(ctx: &TcContext, ifindex: u32, vni: u32, ip: &Ipv4) -> Verdict {
    if ip.destination[0] >= 224 {
        return Verdict::Drop(DropReason::Multicast);
    }
    match maps::network(vni) {
        Some(network) if network.gateway == mapped(ip.destination) => {
            gateway::answer(ctx, ifindex, ip, &network)
        }
        _ => Verdict::Drop(DropReason::NoEndpoint),
    }
}
