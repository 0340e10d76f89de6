//! The frames that are injected: a UDP packet between two containers, in VXLAN between two hosts.

use std::net::Ipv4Addr;

/// Port of inner datagrams: nobody answers there (RFC 863).
const DISCARD: u16 = 9;
/// Outer source port; one flow is enough for one processor.
const SOURCE_PORT: u16 = 50_000;

/// Somebody who sends and receives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Party {
    /// MAC address.
    pub(super) mac: [u8; 6],
    /// IPv4 address.
    pub(super) address: Ipv4Addr,
}

/// A VXLAN frame's headers.
#[derive(Clone, Copy, Debug)]
pub(super) struct Vxlan {
    /// The host that sends.
    pub(super) from: Party,
    /// The host that receives.
    pub(super) to: Party,
    /// Destination port.
    pub(super) port: u16,
    /// VNI.
    pub(super) vni: u32,
}

impl Vxlan {
    /// The frame around an inner one. The outer UDP checksum is zero, as VXLAN senders set it (RFC
    /// 7348 §4.1).
    pub(super) fn around(&self, inner: &[u8]) -> Vec<u8> {
        let mut payload = vec![8, 0, 0, 0];
        payload.extend((self.vni << 8).to_be_bytes());
        payload.extend(inner);
        frame(self.from, self.to, (SOURCE_PORT, self.port), &payload)
    }
}

/// A UDP datagram of so many bytes of payload between two containers, in its frame.
pub(super) fn datagram(from: Party, to: Party, payload: u16) -> Vec<u8> {
    frame(from, to, (DISCARD, DISCARD), &vec![0; usize::from(payload)])
}

fn frame(from: Party, to: Party, ports: (u16, u16), payload: &[u8]) -> Vec<u8> {
    const UDP: u8 = 17;
    let length = u16::try_from(payload.len() + 28).unwrap_or(u16::MAX);
    let mut frame = [to.mac, from.mac].concat();
    frame.extend([0x08, 0x00]);
    let mut ip = vec![0x45, 0];
    ip.extend(length.to_be_bytes());
    ip.extend([0, 1, 0, 0, 64, UDP, 0, 0]);
    ip.extend(from.address.octets());
    ip.extend(to.address.octets());
    let [c0, c1] = checksum(&ip).to_be_bytes();
    ip.splice(10..12, [c0, c1]);
    frame.extend(ip);
    for field in [ports.0, ports.1, length - 20, 0] {
        frame.extend(field.to_be_bytes());
    }
    frame.extend(payload);
    frame
}

/// The Internet checksum (RFC 1071) of an even number of bytes.
fn checksum(bytes: &[u8]) -> u16 {
    let words = bytes.chunks_exact(2).filter_map(|pair| <[u8; 2]>::try_from(pair).ok());
    let sum: u32 = words.map(|pair| u32::from(u16::from_be_bytes(pair))).sum();
    let folded = (sum & 0xffff) + (sum >> 16);
    let folded = (folded & 0xffff) + (folded >> 16);
    !u16::try_from(folded).unwrap_or(u16::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: Party = Party { mac: [2, 0, 0, 0, 0, 1], address: Ipv4Addr::new(192, 168, 1, 11) };
    const B: Party = Party { mac: [2, 0, 0, 0, 0, 2], address: Ipv4Addr::new(192, 168, 1, 12) };

    #[test]
    fn a_frame_has_the_headers_that_were_asked_for() {
        let inner = datagram(B, A, 18);
        assert_eq!(inner.len(), 60);
        let outer = Vxlan { from: B, to: A, port: 4789, vni: 4097 }.around(&inner);
        assert_eq!(outer.len(), 110);
        assert_eq!(outer[..14], [2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2, 8, 0]);
        // Length of the outer packet, and of its datagram.
        assert_eq!(outer[16..18], [0, 96]);
        assert_eq!(outer[36..42], [0x12, 0xb5, 0, 76, 0, 0]);
        assert_eq!(outer[42..50], [8, 0, 0, 0, 0, 0x10, 0x01, 0]);
        assert_eq!(outer[50..], inner[..]);
        assert_eq!(checksum(&outer[14..34]), 0);
        assert_eq!(checksum(&inner[14..34]), 0);
    }

    #[test]
    fn a_known_header_has_its_known_checksum() {
        let header = [
            0x45, 0, 0, 0x73, 0, 0, 0x40, 0, 0x40, 0x11, 0, 0, 0xc0, 0xa8, 0, 1, 0xc0, 0xa8, 0,
            0xc7,
        ];
        assert_eq!(checksum(&header), 0xb861);
    }
}
