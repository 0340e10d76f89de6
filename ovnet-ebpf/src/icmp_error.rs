//! ICMP errors about packets of published ports (RFC 792; RFC 5508 §4.2): "fragmentation needed"
//! and its like carry the start of the packet they are about, as it was where it met its end. Who
//! sent it would not know it again, so it is translated too; path MTU discovery lives by that.

use aya_ebpf::{EbpfContext as _, bindings::__sk_buff, programs::TcContext};
use ovnet_common::{
    abi::mapped,
    checksum,
    headers::{ethernet, icmp, ipv4},
    published::{Direction, FlowKey},
    verdict::KernelReason,
};

use crate::{
    conntrack, maps,
    martian::is_martian,
    parse::{Frame, Ipv4},
    published::Outcome,
    translate::{self, Rewrite, update4},
};

/// Where the ICMP header begins.
const ICMP: usize = ethernet::LEN + ipv4::LEN;
/// Where the packet that the error is about begins.
const ABOUT: usize = ICMP + icmp::LEN;
/// Where its ports are.
const PORTS: usize = ABOUT + ipv4::LEN;
/// What every error must carry of it: the header and eight bytes.
const END: usize = PORTS + 8;

/// Translates an error that goes in `direction`, a [`Direction`], about a packet that went in the
/// other one. `forged` is what [`is_forged`] says of it.
#[inline(never)]
pub(crate) fn handle(skb: *mut __sk_buff, direction: u32, forged: u32) -> Outcome {
    let ctx = TcContext::new(skb);
    // SAFETY: the context is the one the kernel gave us.
    let ifindex = unsafe { (*skb).ifindex };
    let direction = if direction == 0 { Direction::In } else { Direction::Back };
    let Some(frame) = Frame::tc_pulled(&ctx, END) else { return Outcome::PASS };
    let Some(ip) = Ipv4::read(&frame, ethernet::LEN) else { return Outcome::PASS };
    let Some((about, rewrite, ports)) = find(&frame, &ip, direction, ifindex) else {
        return Outcome::PASS;
    };
    if ip.ttl <= 1 {
        return Outcome::kernel(KernelReason::TimeExceeded);
    }
    if forged != 0 {
        return Outcome::kernel(KernelReason::Martian);
    }
    match translate(&frame, &ip, &about, ports, &rewrite) {
        None => Outcome::FAILED,
        Some(()) => Outcome::translated(&rewrite),
    }
}

/// Whether an error of the uplink comes in the name of this host or of somebody behind another of its
/// interfaces: 1, or 0, also for what is no error. Whoever it is about was looked at when the flow
/// began; routers on the way were not. Asked before [`handle`], which has no stack left for it.
#[inline(never)]
pub(crate) fn is_forged(skb: *mut __sk_buff) -> u32 {
    let ctx = TcContext::new(skb);
    let Some(frame) = Frame::tc_pulled(&ctx, END) else { return 0 };
    let Some([kind]) = frame.read(ICMP) else { return 0 };
    let Some(scratch) = maps::scratch() else { return 0 };
    let Some(ip) = Ipv4::read_fields(&frame, ethernet::LEN) else { return 0 };
    let Some([protocol]) = frame.read(ABOUT + ipv4::PROTOCOL) else { return 0 };
    let Some(port) = frame.read(PORTS) else { return 0 };
    if !is_error(kind) {
        return 0;
    }
    scratch.published.port_be = u16::from_ne_bytes(port);
    scratch.published.protocol = protocol;
    scratch.published.reserved = 0;
    scratch.key.source = mapped(ip.source);
    scratch.key.destination = mapped(ip.destination);
    scratch.key.protocol = ipv4::ICMP;
    (scratch.key.source_port_be, scratch.key.destination_port_be) = (0, 0);
    u32::from(is_martian(ctx.as_ptr(), scratch))
}

/// Whether an ICMP message of this type carries the packet it is about.
#[inline(always)]
fn is_error(kind: u8) -> bool {
    matches!(kind, icmp::UNREACHABLE | icmp::TIME_EXCEEDED | icmp::PARAMETER_PROBLEM)
}

/// The packet it is about, what becomes of it, and that packet's ports; `None` where it is no error
/// about a flow of a published port.
#[inline(always)]
fn find(
    frame: &Frame,
    ip: &Ipv4,
    direction: Direction,
    ifindex: u32,
) -> Option<(Ipv4, Rewrite, [u8; 4])> {
    let [kind]: [u8; 1] = frame.read(ICMP)?;
    if !is_error(kind) {
        return None;
    }
    let about = Ipv4::read(frame, ABOUT)?;
    let sender = match direction {
        // Sent to whom the packet is said to come from.
        Direction::In => about.source == ip.destination,
        // Sent by whom the packet was for, to whom it came from.
        Direction::Back => about.destination == ip.source && about.source == ip.destination,
    };
    if about.version_ihl != ipv4::NO_OPTIONS
        || about.is_later_fragment()
        || !matches!(about.protocol, ipv4::TCP | ipv4::UDP)
        || !sender
    {
        return None;
    }
    let ports: [u8; 4] = frame.read(PORTS)?;
    let [s0, s1, d0, d1] = ports;
    // Turned around it is a packet of the direction the error goes in.
    let key = FlowKey {
        source: mapped(about.destination),
        destination: mapped(about.source),
        source_port_be: u16::from_ne_bytes([d0, d1]),
        destination_port_be: u16::from_ne_bytes([s0, s1]),
        protocol: about.protocol,
        reserved: [0; 3],
    };
    let flow = conntrack::known(&key, direction, ifindex)?;
    Some((about, Rewrite::of(flow, direction), ports))
}

/// Writes what [`find`] found.
#[inline(always)]
fn translate(
    frame: &Frame,
    ip: &Ipv4,
    about: &Ipv4,
    ports: [u8; 4],
    rewrite: &Rewrite,
) -> Option<()> {
    const SUM: usize = ICMP + icmp::CHECKSUM;
    const ABOUT_SUM: usize = ABOUT + ipv4::CHECKSUM;
    translate::headers(frame, ip, rewrite)?;
    let (ours, peer) = (rewrite.port_be.to_ne_bytes(), rewrite.peer_port_be.to_ne_bytes());
    let (replaced, at, new) = match rewrite.direction {
        Direction::In => (about.source, ABOUT + ipv4::SOURCE, (ours, peer)),
        Direction::Back => (about.destination, ABOUT + ipv4::DESTINATION, (peer, ours)),
    };
    let ((s, d), old) = (new, ports);
    let new = [s[0], s[1], d[0], d[1]];
    let address = rewrite.address.to_ne_bytes();
    frame.write(at, &address)?;
    // Address and checksum of that header change together, so that their sum, which the checksum of
    // ICMP covers, stays what it was. Of that packet's TCP or UDP checksum nobody can say whether
    // it is all there; receivers do not look at it.
    frame.write(ABOUT_SUM, &update4(frame.read(ABOUT_SUM)?, replaced, address))?;
    frame.write(PORTS, &new)?;
    let sum = checksum::update(frame.read(SUM)?, [old[0], old[1]], [new[0], new[1]]);
    frame.write(SUM, &checksum::update(sum, [old[2], old[3]], [new[2], new[3]]))
}
