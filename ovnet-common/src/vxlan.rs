//! The outer 50 bytes: built for a packet on its way out, validated on its way in (RFC 7348).

use crate::{
    checksum,
    headers::{ethernet, ipv4, udp, vxlan},
    verdict::DropReason,
};

/// What encapsulation adds to a packet: IPv4, UDP, VXLAN and the inner Ethernet header.
pub const OVERHEAD: usize = ipv4::LEN + udp::LEN + vxlan::LEN + ethernet::LEN;

/// What the outer IPv4 total length says more than the inner packet's length.
const OUTER_IP_EXTRA: u16 = 50;
/// What the outer UDP length says more than the inner packet's length.
const OUTER_UDP_EXTRA: u16 = 30;
const _: () = assert!(OUTER_IP_EXTRA as usize == OVERHEAD);
const _: () = assert!(OUTER_UDP_EXTRA as usize == OVERHEAD - ipv4::LEN);

/// Everything from the outer Ethernet header to the inner one, both included.
pub const HEADERS: usize = ethernet::LEN + OVERHEAD;

/// Offset of the outer IPv4 header in an encapsulated frame.
pub const OUTER_IP: usize = ethernet::LEN;
/// Offset of the outer UDP header.
pub const OUTER_UDP: usize = OUTER_IP + ipv4::LEN;
/// Offset of the VXLAN header.
pub const VXLAN: usize = OUTER_UDP + udp::LEN;
/// Offset of the inner Ethernet header.
pub const INNER_ETHERNET: usize = VXLAN + vxlan::LEN;
/// Offset of the inner packet.
pub const INNER_PACKET: usize = INNER_ETHERNET + ethernet::LEN;

/// The VNI of probes, in which hosts ask one another whether VXLAN gets through. No network has it:
/// ours begin above, and a record with it is not read.
pub const PROBE_VNI: u32 = 4095;

/// TTL of the outer header; the tunnel is one hop for the inner packet whatever it crosses.
pub const TTL: u8 = 64;

/// What the headers of an encapsulated packet are made of.
#[derive(Clone, Copy, Debug)]
pub struct Outer {
    /// Next hop's MAC.
    pub next_hop: [u8; 6],
    /// MAC of the outgoing interface.
    pub interface_mac: [u8; 6],
    /// Our VTEP address, network byte order.
    pub source: [u8; 4],
    /// The peer's VTEP address, network byte order.
    pub destination: [u8; 4],
    /// Length of the inner IP packet in bytes; of the whole GSO packet where it is one.
    pub inner_length: u16,
    /// Outer TOS byte, see [`crate::ecn::encapsulate`].
    pub tos: u8,
    /// IPv4 identification, host byte order. DF is off, so it must differ between packets.
    pub id: u16,
    /// See [`crate::flow::source_port`], host byte order.
    pub source_port: u16,
    /// The peer's VXLAN port, network byte order.
    pub port_be: u16,
    /// The network's VNI, host byte order; its upper 8 bits are ignored.
    pub vni: u32,
    /// The destination endpoint's MAC.
    pub inner_destination: [u8; 6],
    /// The source endpoint's MAC.
    pub inner_source: [u8; 6],
}

impl Outer {
    /// The bytes before the inner IP packet. The UDP checksum is zero (RFC 7348 §4.1), which is
    /// what lets the kernel segment the packet without a checksum of its own for the outside.
    #[inline(always)]
    pub fn to_bytes(&self) -> [u8; HEADERS] {
        let [n0, n1, n2, n3, n4, n5] = self.next_hop;
        let [i0, i1, i2, i3, i4, i5] = self.interface_mac;
        let [s0, s1, s2, s3] = self.source;
        let [d0, d1, d2, d3] = self.destination;
        let [v0, v1, v2] = {
            let [_, v0, v1, v2] = self.vni.to_be_bytes();
            [v0, v1, v2]
        };
        let [p0, p1] = self.source_port.to_be_bytes();
        let [q0, q1] = self.port_be.to_ne_bytes();
        let [e0, e1, e2, e3, e4, e5] = self.inner_destination;
        let [f0, f1, f2, f3, f4, f5] = self.inner_source;
        let [t0, t1] = self.inner_length.saturating_add(OUTER_IP_EXTRA).to_be_bytes();
        let [u0, u1] = self.inner_length.saturating_add(OUTER_UDP_EXTRA).to_be_bytes();
        let [id0, id1] = self.id.to_be_bytes();
        let header = [
            ipv4::NO_OPTIONS,
            self.tos,
            t0,
            t1,
            id0,
            id1,
            0,
            0,
            TTL,
            ipv4::UDP,
            0,
            0,
            s0,
            s1,
            s2,
            s3,
            d0,
            d1,
            d2,
            d3,
        ];
        let [c0, c1] = checksum::ipv4_checksum(&header);
        #[rustfmt::skip]
        let bytes = [
            n0, n1, n2, n3, n4, n5, i0, i1, i2, i3, i4, i5, 0x08, 0x00,
            ipv4::NO_OPTIONS, self.tos, t0, t1, id0, id1, 0, 0, TTL, ipv4::UDP, c0, c1,
            s0, s1, s2, s3, d0, d1, d2, d3,
            p0, p1, q0, q1, u0, u1, 0, 0,
            0x08, 0, 0, 0, v0, v1, v2, 0,
            e0, e1, e2, e3, e4, e5, f0, f1, f2, f3, f4, f5, 0x08, 0x00,
        ];
        bytes
    }
}

/// The VNI, host byte order, of a VXLAN header, or why it is not one. The kernel's `vxlan_rcv()`
/// drops unknown flags and reserved bits too, although RFC 7348 would let a receiver ignore them.
#[inline(always)]
pub const fn parse_vni(header: [u8; vxlan::LEN]) -> Result<u32, DropReason> {
    let [f0, f1, f2, f3, v0, v1, v2, reserved] = header;
    if u32::from_be_bytes([f0, f1, f2, f3]) != vxlan::VALID_VNI || reserved != 0 {
        return Err(DropReason::VxlanFlags);
    }
    Ok(u32::from_be_bytes([0, v0, v1, v2]))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn outer() -> Outer {
        Outer {
            next_hop: [2, 0, 0, 0, 0, 2],
            interface_mac: [2, 0, 0, 0, 0, 1],
            source: [192, 168, 1, 11],
            destination: [192, 168, 1, 12],
            inner_length: 84,
            tos: 2,
            id: 0x1234,
            source_port: 40000,
            port_be: 4789u16.to_be(),
            vni: 4096,
            inner_destination: [2, 0x42, 10, 0, 0, 3],
            inner_source: [2, 0x42, 10, 0, 0, 2],
        }
    }

    #[test]
    fn headers_are_byte_exact() {
        #[rustfmt::skip]
        let expected = [
            2, 0, 0, 0, 0, 2, 2, 0, 0, 0, 0, 1, 8, 0,
            0x45, 2, 0, 134, 0x12, 0x34, 0, 0, 64, 17, 0xe4, 0xc2, 192, 168, 1, 11, 192, 168, 1, 12,
            0x9c, 0x40, 0x12, 0xb5, 0, 114, 0, 0,
            8, 0, 0, 0, 0, 0x10, 0, 0,
            2, 0x42, 10, 0, 0, 3, 2, 0x42, 10, 0, 0, 2, 8, 0,
        ];
        let mut bytes = outer().to_bytes();
        let header: [u8; 20] = bytes[OUTER_IP..OUTER_UDP].try_into().unwrap();
        assert!(checksum::ipv4_valid(&header));
        bytes[OUTER_IP + 10..OUTER_IP + 12].copy_from_slice(&[0xe4, 0xc2]);
        assert_eq!(bytes, expected);
    }

    #[test]
    fn a_built_header_parses_to_its_vni() {
        let mut outer = outer();
        outer.vni = 0x00ab_cdef;
        let header = outer.to_bytes()[VXLAN..INNER_ETHERNET].try_into().unwrap();
        assert_eq!(parse_vni(header), Ok(0x00ab_cdef));
    }

    #[test]
    fn flags_and_reserved_bits_are_refused() {
        for byte in [0, 1, 2, 3, 7] {
            for bit in 0..8 {
                let mut header = [8, 0, 0, 0, 0, 0x10, 0, 0];
                header[byte] ^= 1 << bit;
                assert_eq!(parse_vni(header), Err(DropReason::VxlanFlags), "{byte}.{bit}");
            }
        }
    }

    #[test]
    fn the_longest_packet_does_not_wrap_its_length() {
        let mut outer = outer();
        outer.inner_length = u16::MAX;
        let bytes = outer.to_bytes();
        assert_eq!(bytes[OUTER_IP + 2..OUTER_IP + 4], [0xff, 0xff]);
    }
}
