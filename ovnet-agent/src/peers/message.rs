//! The bytes of a question and of its answer: what goes into a UDP datagram to or from a peer's
//! VXLAN port. Pure. The other half is `ovnet-ebpf/src/probe.rs`.

use std::net::Ipv4Addr;

use ovnet_common::{
    checksum,
    headers::{ethernet, icmp, ipv4, vxlan},
    vxlan::{INNER_ETHERNET, OUTER_UDP, OVERHEAD, PROBE_VNI, TTL},
};

use crate::consul::schema::mac_of;

/// Offsets in the datagram's payload, which begins with the VXLAN header.
const ETHERNET: usize = vxlan::LEN;
const IP: usize = ETHERNET + ethernet::LEN;
const ICMP: usize = IP + ipv4::LEN;
/// Behind the fixed part of ICMP.
const TOKEN: usize = ICMP + icmp::LEN;
/// The shortest datagram.
pub(super) const SHORTEST: usize = TOKEN + size_of::<u64>();
/// IPv4 and UDP around a datagram: what it is shorter by than the packet on the wire.
const AROUND: usize = OVERHEAD - (INNER_ETHERNET - OUTER_UDP) - ethernet::LEN + 8;

/// A question from one VTEP to another, which its answer repeats the token of. It fills a packet of
/// `length` bytes, outer IPv4 header included, or is as short as can be where that is absent.
pub(super) fn question(from: Ipv4Addr, to: Ipv4Addr, token: u64, length: Option<u32>) -> Vec<u8> {
    let length = length.and_then(|it| usize::try_from(it).ok()).unwrap_or(0);
    let payload = length.clamp(SHORTEST + AROUND, usize::from(u16::MAX)) - AROUND;
    let mut bytes = vec![0; payload];
    bytes[..4].copy_from_slice(&vxlan::VALID_VNI.to_be_bytes());
    bytes[4..7].copy_from_slice(&PROBE_VNI.to_be_bytes()[1..]);
    bytes[ETHERNET..ETHERNET + 6].copy_from_slice(&mac_of(to));
    bytes[ETHERNET + 6..ETHERNET + 12].copy_from_slice(&mac_of(from));
    bytes[ETHERNET + ethernet::TYPE..IP].copy_from_slice(&ethernet::IPV4.to_be_bytes());
    let total = u16::try_from(payload - IP).unwrap_or(u16::MAX).to_be_bytes();
    let mut header = [0; ipv4::LEN];
    header[ipv4::VERSION_IHL] = ipv4::NO_OPTIONS;
    header[ipv4::TOTAL_LENGTH..ipv4::TOTAL_LENGTH + 2].copy_from_slice(&total);
    header[ipv4::TTL] = TTL;
    header[ipv4::PROTOCOL] = ipv4::ICMP;
    header[ipv4::SOURCE..ipv4::SOURCE + 4].copy_from_slice(&from.octets());
    header[ipv4::DESTINATION..].copy_from_slice(&to.octets());
    let sum = checksum::ipv4_checksum(&header);
    header[ipv4::CHECKSUM..ipv4::CHECKSUM + 2].copy_from_slice(&sum);
    bytes[IP..ICMP].copy_from_slice(&header);
    bytes[ICMP] = icmp::ECHO_REQUEST;
    bytes[TOKEN..SHORTEST].copy_from_slice(&token.to_be_bytes());
    let sum = internet_checksum(&bytes[ICMP..]);
    bytes[ICMP + icmp::CHECKSUM..ICMP + icmp::CHECKSUM + 2].copy_from_slice(&sum);
    bytes
}

/// The token of an answer, `None` for anything else. What is not looked at is no one's word: who
/// could forge the rest could forge it all, but for the token.
pub(super) fn answered(bytes: &[u8]) -> Option<u64> {
    let vni = u32::from_be_bytes([0, *bytes.get(4)?, *bytes.get(5)?, *bytes.get(6)?]);
    if vni != PROBE_VNI || *bytes.get(ICMP)? != icmp::ECHO_REPLY {
        return None;
    }
    let token = bytes.get(TOKEN..SHORTEST)?;
    token.try_into().ok().map(u64::from_be_bytes)
}

/// The Internet checksum (RFC 1071), as it lies in memory.
fn internet_checksum(bytes: &[u8]) -> [u8; 2] {
    let mut sum = 0u32;
    for pair in bytes.chunks(2) {
        let word = [pair[0], pair.get(1).copied().unwrap_or(0)];
        sum += u32::from(u16::from_be_bytes(word));
        // A packet of 64 KiB of ones would not fit otherwise.
        sum = (sum & 0xffff) + (sum >> 16);
    }
    (!checksum::fold(sum)).to_be_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: Ipv4Addr = Ipv4Addr::new(192, 168, 1, 11);
    const B: Ipv4Addr = Ipv4Addr::new(192, 168, 1, 12);

    #[test]
    fn a_question_is_byte_exact() {
        #[rustfmt::skip]
        let expected = [
            8, 0, 0, 0, 0, 0x0f, 0xff, 0,
            2, 0x42, 192, 168, 1, 12, 2, 0x42, 192, 168, 1, 11, 8, 0,
            0x45, 0, 0, 36, 0, 0, 0, 0, 64, 1, 0xf7, 0x71, 192, 168, 1, 11, 192, 168, 1, 12,
            8, 0, 0xe7, 0xeb, 0, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8,
        ];
        assert_eq!(question(A, B, 0x0102_0304_0506_0708, None), expected);
    }

    #[test]
    fn a_question_fills_the_packet_it_is_to_fill() {
        // 20 bytes of IPv4 and 8 of UDP are the kernel's.
        assert_eq!(question(A, B, 1, Some(1500)).len(), 1472);
        assert_eq!(question(A, B, 1, Some(9000)).len(), 8972);
        assert_eq!(question(A, B, 1, Some(10)).len(), SHORTEST);
        assert_eq!(question(A, B, 1, Some(u32::MAX)).len(), 65_535 - 28);
        for length in [None, Some(576), Some(1501)] {
            let bytes = question(A, B, u64::MAX, length);
            assert_eq!(internet_checksum(&bytes[ICMP..]), [0, 0], "{length:?}");
            assert_eq!(internet_checksum(&bytes[IP..ICMP]), [0, 0], "{length:?}");
            let total = u16::from_be_bytes([bytes[IP + 2], bytes[IP + 3]]);
            assert_eq!(usize::from(total), bytes.len() - IP);
        }
    }

    #[test]
    fn only_an_answer_is_one() {
        let asked = question(A, B, 77, None);
        assert_eq!(answered(&asked), None, "our own question");
        let mut answer = asked.clone();
        answer[ICMP] = 0;
        assert_eq!(answered(&answer), Some(77));
        for cut in 0..SHORTEST {
            assert_eq!(answered(&answer[..cut]), None, "{cut}");
        }
        answer[6] ^= 1;
        assert_eq!(answered(&answer), None, "of another network");
    }
}
