//! Address translation of a packet: Ethernet and IPv4 headers, ports and checksums.

use aya_ebpf::{
    bindings::{__sk_buff, BPF_F_MARK_MANGLED_0, BPF_F_PSEUDO_HDR},
    helpers::generated::bpf_l4_csum_replace,
    programs::TcContext,
};
use ovnet_common::{
    abi::Address,
    checksum,
    headers::{ethernet, ipv4, tcp, udp},
    published::Direction,
};

use crate::{
    maps,
    parse::{Frame, Ipv4, Transport},
    published::Outcome,
};

/// Where the transport header begins.
const TRANSPORT: usize = ethernet::LEN + ipv4::LEN;

/// What to make of a packet.
#[derive(Clone, Copy)]
pub(crate) struct Rewrite {
    pub(crate) direction: Direction,
    /// The container's address in place of the destination, or, on the way back, the address the
    /// client knows in place of the source; as it lies in the packet.
    pub(crate) address: u32,
    /// The port beside that address, network byte order.
    pub(crate) port_be: u16,
    /// The other port, network byte order.
    pub(crate) peer_port_be: u16,
    pub(crate) destination_mac: [u8; 6],
    pub(crate) source_mac: [u8; 6],
    /// Interface to leave by.
    pub(crate) ifindex: u32,
}

impl Rewrite {
    /// The address that is replaced.
    #[inline(always)]
    pub(crate) fn replaced(&self, ip: &Ipv4) -> [u8; 4] {
        match self.direction {
            Direction::In => ip.destination,
            Direction::Back => ip.source,
        }
    }

    /// Both ports afterwards, as they lie in the packet.
    #[inline(always)]
    fn ports(&self) -> [u8; 4] {
        let (ours, peer) = (self.port_be.to_ne_bytes(), self.peer_port_be.to_ne_bytes());
        let (source, destination) = match self.direction {
            Direction::In => (peer, ours),
            Direction::Back => (ours, peer),
        };
        [source[0], source[1], destination[0], destination[1]]
    }
}

/// Carries out what was decided, where that is to translate the packet. Deciding and translating are
/// called one after the other, not one from the other: each has the stack for itself.
#[inline(always)]
pub(crate) fn then(skb: *mut __sk_buff, decided: Outcome) -> Outcome {
    if decided.is_translated() && carry_out(skb) != 0 { Outcome::FAILED } else { decided }
}

/// Translates the packet as the scratch space says; 0, or 1 where it is left half done.
#[inline(never)]
fn carry_out(skb: *mut __sk_buff) -> u64 {
    let ctx = TcContext::new(skb);
    let frame = Frame::tc(&ctx);
    let Some(scratch) = maps::scratch() else { return 1 };
    let Some(ip) = Ipv4::read_fields(&frame, ethernet::LEN) else { return 1 };
    let Some(transport) = Transport::read(&frame, ip.protocol) else { return 1 };
    let done = tc(&ctx, &ip, Some(&transport), &scratch.rewrite);
    u64::from(done.is_none())
}

/// Translates an skb. Its checksum may be complete, partial or verified by the NIC: the helper
/// knows, a program does not. `transport` is absent for a fragment without ports. `None` leaves the
/// packet half done.
#[inline(always)]
pub(crate) fn tc(
    ctx: &TcContext,
    ip: &Ipv4,
    transport: Option<&Transport>,
    rewrite: &Rewrite,
) -> Option<()> {
    let frame = Frame::tc(ctx);
    headers(&frame, ip, rewrite)?;
    let Some(transport) = transport else { return Some(()) };
    let (old, new) = (ports(transport), rewrite.ports());
    frame.write(TRANSPORT, &new)?;
    // The helpers last: they invalidate the frame.
    let (at, zero_is_none) = match ip.protocol {
        ipv4::TCP => (TRANSPORT + tcp::CHECKSUM, 0),
        _ => (TRANSPORT + udp::CHECKSUM, u64::from(BPF_F_MARK_MANGLED_0)),
    };
    let replace = |from: [u8; 4], to: [u8; 4], flags: u64| {
        let (from, to) = (u32::from_ne_bytes(from), u32::from_ne_bytes(to));
        let flags = flags | zero_is_none | 4;
        // SAFETY: the context is the one the kernel gave us; no packet pointer outlives the call.
        let result = unsafe {
            bpf_l4_csum_replace(ctx.skb.skb, at as u32, u64::from(from), u64::from(to), flags)
        };
        (result == 0).then_some(())
    };
    let address = rewrite.address.to_ne_bytes();
    replace(rewrite.replaced(ip), address, u64::from(BPF_F_PSEUDO_HDR))?;
    if old == new {
        return Some(());
    }
    replace(old, new, 0)
}

/// Translates an XDP frame, whose checksum is complete: it came over a wire. `None` leaves it half
/// done.
#[inline(always)]
pub(crate) fn xdp(
    frame: &Frame,
    ip: &Ipv4,
    transport: &Transport,
    rewrite: &Rewrite,
) -> Option<()> {
    headers(frame, ip, rewrite)?;
    let (old, new) = (ports(transport), rewrite.ports());
    frame.write(TRANSPORT, &new)?;
    let (replaced, address) = (rewrite.replaced(ip), rewrite.address.to_ne_bytes());
    if ip.protocol == ipv4::TCP {
        const AT: usize = TRANSPORT + tcp::CHECKSUM;
        let sum = update4(frame.read(AT)?, replaced, address);
        return frame.write(AT, &update4(sum, old, new));
    }
    const AT: usize = TRANSPORT + udp::CHECKSUM;
    let sum: [u8; 2] = frame.read(AT)?;
    if sum == [0, 0] {
        return Some(());
    }
    let sum = update4(update4(sum, replaced, address), old, new);
    // Zero would say that there is none (RFC 768).
    frame.write(AT, if sum == [0, 0] { &[0xff, 0xff] } else { &sum })
}

/// The Ethernet header, and of the IPv4 header the address, the time to live and the checksum.
#[inline(always)]
pub(crate) fn headers(frame: &Frame, ip: &Ipv4, rewrite: &Rewrite) -> Option<()> {
    const CHECKSUM: usize = ethernet::LEN + ipv4::CHECKSUM;
    let (replaced, address) = (rewrite.replaced(ip), rewrite.address.to_ne_bytes());
    frame.write(ethernet::DESTINATION, &rewrite.destination_mac)?;
    frame.write(ethernet::SOURCE, &rewrite.source_mac)?;
    let sum = update4(frame.read(CHECKSUM)?, replaced, address);
    // A hop as any router's; who calls has made sure that it is not the last one.
    let ttl = ip.ttl.wrapping_sub(1);
    let sum = checksum::update(sum, [ip.ttl, ip.protocol], [ttl, ip.protocol]);
    frame.write(CHECKSUM, &sum)?;
    frame.write(ethernet::LEN + ipv4::TTL, &[ttl])?;
    match rewrite.direction {
        Direction::In => frame.write(ethernet::LEN + ipv4::DESTINATION, &address),
        Direction::Back => frame.write(ethernet::LEN + ipv4::SOURCE, &address),
    }
}

/// The IPv4 address inside an IPv4-mapped one, in one access.
#[inline(always)]
pub(crate) fn word(address: &Address) -> u32 {
    let [.., a, b, c, d] = *address;
    u32::from_ne_bytes([a, b, c, d])
}

/// The checksum after four bytes of the data changed.
#[inline(always)]
pub(crate) fn update4(sum: [u8; 2], old: [u8; 4], new: [u8; 4]) -> [u8; 2] {
    let sum = checksum::update(sum, [old[0], old[1]], [new[0], new[1]]);
    checksum::update(sum, [old[2], old[3]], [new[2], new[3]])
}

/// The ports of a packet, as they lie in it.
#[inline(always)]
fn ports(transport: &Transport) -> [u8; 4] {
    let source = transport.source_be.to_ne_bytes();
    let destination = transport.destination_be.to_ne_bytes();
    [source[0], source[1], destination[0], destination[1]]
}
