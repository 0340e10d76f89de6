//! Probes: a peer asks, by VXLAN, whether VXLAN gets through to this host, and is answered here, on
//! the path of the packets of containers and without an agent.
//!
//! A question is an ICMP echo request from VTEP to VTEP in the network [`PROBE_VNI`], sent from a
//! port of the peer's agent. The answer is the same packet turned around, as long as it came and
//! addressed to that port: not to the VXLAN port, where it would be for a program again, so no
//! two hosts can be made to answer each other for ever. Only a known VTEP is answered, and only what
//! is a question.
//!
//! [`PROBE_VNI`]: ovnet_common::vxlan::PROBE_VNI

use aya_ebpf::programs::TcContext;
use ovnet_common::{
    checksum,
    headers::{ethernet, icmp, ipv4, udp},
    verdict::{Answer, DropReason, Verdict},
    vxlan,
};

use crate::parse::{Ethernet, Frame, Ipv4};

/// Offset of the ICMP header in a question.
const ICMP: usize = vxlan::INNER_PACKET + ipv4::LEN;

/// Answers a question in place, of which `trust` has read the outer headers and found the sender
/// among the hosts.
#[inline(always)]
pub(crate) fn answer(ctx: &TcContext) -> Result<Verdict, DropReason> {
    // SAFETY: the context is the one the kernel gave us.
    let (ifindex, segment) = unsafe { ((*ctx.skb.skb).ifindex, (*ctx.skb.skb).gso_size) };
    // Several in one: nobody asks like that.
    if segment != 0 {
        return Err(DropReason::NotAProbe);
    }
    let frame = Frame::tc_pulled(ctx, ICMP + icmp::LEN).ok_or(DropReason::Truncated)?;
    turn_around(&frame).ok_or(DropReason::Truncated)??;
    Ok(Verdict::Answer(Answer::Probe, ifindex))
}

/// Makes a question its own answer; `None` where it is cut off.
#[inline(always)]
pub(crate) fn turn_around(frame: &Frame) -> Option<Result<(), DropReason>> {
    let outer = Ipv4::read_fields(frame, vxlan::OUTER_IP)?;
    let inner = Ipv4::read_fields(frame, vxlan::INNER_PACKET)?;
    let ethertype: [u8; 2] = frame.read(vxlan::INNER_ETHERNET + ethernet::TYPE)?;
    let [kind, code, c0, c1, ..]: [u8; icmp::LEN] = frame.read(ICMP)?;
    let is_question = ethertype == ethernet::IPV4.to_be_bytes()
        && inner.version_ihl == ipv4::NO_OPTIONS
        && !inner.is_fragment()
        && inner.protocol == ipv4::ICMP
        && kind == icmp::ECHO_REQUEST
        && inner.source == outer.source
        && inner.destination == outer.destination;
    if !is_question {
        return Some(Err(DropReason::NotAProbe));
    }
    swap_macs(frame, 0)?;
    swap_addresses(frame, vxlan::OUTER_IP, &outer)?;
    // Each way has its own hops. What stays as it is: DF, which makes a path that takes no full-size
    // packet show in both directions.
    let old: [u8; 2] = frame.read(vxlan::OUTER_IP + ipv4::CHECKSUM)?;
    let (before, after) = ([outer.ttl, ipv4::UDP], [vxlan::TTL, ipv4::UDP]);
    let new = checksum::update(old, before, after);
    frame.write(vxlan::OUTER_IP + ipv4::CHECKSUM, &new)?;
    frame.write(vxlan::OUTER_IP + ipv4::TTL, &[vxlan::TTL])?;
    let [s0, s1, d0, d1]: [u8; 4] = frame.read(vxlan::OUTER_UDP + udp::SOURCE)?;
    frame.write(vxlan::OUTER_UDP + udp::SOURCE, &[d0, d1, s0, s1])?;
    swap_macs(frame, vxlan::INNER_ETHERNET)?;
    swap_addresses(frame, vxlan::INNER_PACKET, &inner)?;
    // Swapped addresses leave checksums as they are; the type is all that changes in ICMP's.
    let [c0, c1] = checksum::update([c0, c1], [kind, code], [icmp::ECHO_REPLY, code]);
    frame.write(ICMP, &[icmp::ECHO_REPLY, code, c0, c1])?;
    Some(Ok(()))
}

#[inline(always)]
fn swap_macs(frame: &Frame, at: usize) -> Option<()> {
    let Ethernet { destination, source, .. } = Ethernet::read(frame, at)?;
    frame.write(at + ethernet::DESTINATION, &source)?;
    frame.write(at + ethernet::SOURCE, &destination)
}

#[inline(always)]
fn swap_addresses(frame: &Frame, at: usize, ip: &Ipv4) -> Option<()> {
    frame.write(at + ipv4::SOURCE, &ip.destination)?;
    frame.write(at + ipv4::DESTINATION, &ip.source)
}
