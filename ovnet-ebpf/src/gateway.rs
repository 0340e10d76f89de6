//! The gateway address: no host has it, yet people ping it to see whether the network is there.

use aya_ebpf::programs::TcContext;
use ovnet_common::{
    abi::NetworkValue,
    checksum,
    headers::{ethernet, icmp, ipv4},
    verdict::{Answer, DropReason, Verdict},
};

use crate::parse::{Ethernet, Frame, Ipv4};

/// Answers an ICMP echo request (RFC 792) to the gateway in place; drops everything else.
#[inline(always)]
pub(crate) fn answer(ctx: &TcContext, ifindex: u32, ip: &Ipv4, network: &NetworkValue) -> Verdict {
    if ip.protocol != ipv4::ICMP || ip.version_ihl != ipv4::NO_OPTIONS || ip.is_fragment() {
        return Verdict::Drop(DropReason::ToGateway);
    }
    match turn_around(ctx, ip, network.gateway_mac) {
        Some(true) => Verdict::Answer(Answer::Echo, ifindex),
        Some(false) => Verdict::Drop(DropReason::ToGateway),
        None => Verdict::Drop(DropReason::Truncated),
    }
}

/// Makes the request its own reply; false where it is no request.
#[inline(always)]
fn turn_around(ctx: &TcContext, ip: &Ipv4, mac: [u8; 6]) -> Option<bool> {
    const AT: usize = ethernet::LEN + ipv4::LEN;
    let frame = Frame::tc_pulled(ctx, AT + icmp::LEN)?;
    let eth = Ethernet::read(&frame, 0)?;
    let [kind, code, c0, c1]: [u8; 4] = frame.read(AT)?;
    if kind != icmp::ECHO_REQUEST {
        return Some(false);
    }
    // Swapped addresses leave the IPv4 checksum as it is; the type is all that changes in ICMP's.
    let [c0, c1] = checksum::update([c0, c1], [kind, code], [icmp::ECHO_REPLY, code]);
    frame.write(ethernet::DESTINATION, &eth.source)?;
    // Not the request's destination, which may have been a broadcast: no frame comes from there.
    frame.write(ethernet::SOURCE, &mac)?;
    frame.write(ethernet::LEN + ipv4::SOURCE, &ip.destination)?;
    frame.write(ethernet::LEN + ipv4::DESTINATION, &ip.source)?;
    frame.write(AT, &[icmp::ECHO_REPLY, code, c0, c1])?;
    Some(true)
}
