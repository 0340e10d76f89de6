//! Checksums that are still to be written, and where.
//!
//! A packet may come with a checksum left to whoever sends it out (`CHECKSUM_PARTIAL`): the kernel or
//! the NIC then sums up what is behind one place in it and writes the result to another. With a packet
//! socket (`PACKET_VNET_HDR`) or a tap device a sandbox names both, and what is summed up is its own:
//! two bytes of its choice, written after every check here, over the source address for one.

use aya_ebpf::{
    bindings::__sk_buff,
    helpers::generated::{bpf_l4_csum_replace, bpf_skb_change_tail},
    programs::TcContext,
};
use ovnet_common::headers::{ethernet, ipv4, tcp, udp};

use crate::parse::{Frame, Ipv4};

/// Whether the kernel is going to write a checksum over what was looked at: the headers up to the
/// transport's own checksum, or, of protocols we do not know, up to the end of the IPv4 header; 1, or 0.
/// Then the packet may have lost its end, and is to be dropped.
///
/// No field of the context tells. Two helpers behave otherwise with such a packet:
/// `bpf_l4_csum_replace` leaves a checksum that is no pseudo header's alone, and `bpf_skb_change_tail`
/// refuses to cut off the place that is to be written. Packets of TCP and UDP sockets, by far the
/// most, are spared both: the kernel itself made them.
#[inline(never)]
pub(crate) fn is_over_headers(skb: *mut __sk_buff) -> u32 {
    let ctx = &TcContext::new(skb);
    let Some(ip) = Ipv4::read_fields(&Frame::tc(ctx), ethernet::LEN) else { return 0 };
    if is_of_a_stream_or_datagram_socket(ctx) || !is_left_to_the_way_out(ctx) {
        return 0;
    }
    let header = u32::from(ip.version_ihl & 0xf) * 4;
    let field = match ip.protocol {
        ipv4::TCP => tcp::CHECKSUM as u32,
        ipv4::UDP => udp::CHECKSUM as u32,
        _ => 0,
    };
    // Cut off in the middle of the first place where the checksum may be, it has none or a place
    // before; in every other case the helper refuses and nothing is changed.
    let before = ethernet::LEN as u32 + header + field + 1;
    // SAFETY: the context is the one the kernel gave us; no packet pointer outlives the call.
    u32::from(unsafe { bpf_skb_change_tail(skb, before, 0) } == 0)
}

/// Whether the packet still belongs to a socket of the kernel's TCP or UDP.
#[inline(always)]
fn is_of_a_stream_or_datagram_socket(ctx: &TcContext) -> bool {
    const AF_INET: u32 = 2;
    const AF_INET6: u32 = 10;
    // SAFETY: the context is the one the kernel gave us; the verifier sees to it that the socket is
    // looked at only where there is one.
    let family = unsafe {
        let socket = (*ctx.skb.skb).__bindgen_anon_2.sk;
        if socket.is_null() { 0 } else { (*socket).family }
    };
    family == AF_INET || family == AF_INET6
}

/// Whether its checksum is left to whoever sends it out.
#[inline(always)]
fn is_left_to_the_way_out(ctx: &TcContext) -> bool {
    /// Any two bytes will do for a checksum: those of the destination's MAC, which are put back.
    const AT: usize = ethernet::DESTINATION;
    let Some(before) = Frame::tc(ctx).read::<2>(AT) else { return false };
    // SAFETY: the context is the one the kernel gave us; no packet pointer outlives the call.
    if unsafe { bpf_l4_csum_replace(ctx.skb.skb, AT as u32, 0, 1, 2) } != 0 {
        return false;
    }
    let frame = Frame::tc(ctx);
    match frame.read::<2>(AT) {
        // One more in a sum is another sum.
        Some(after) if after != before => {
            frame.write(AT, &before);
            false
        }
        _ => true,
    }
}
