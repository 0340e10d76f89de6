//! Packets for both sides of a test, and the people in them.
//!
//! The builder shares no code with `ovnet_common`: bytes that only agree with themselves prove
//! nothing.

/// A MAC address.
pub type Mac = [u8; 6];
/// An IPv4 address, network byte order.
pub type Address = [u8; 4];

/// Somebody who sends and receives packets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Party {
    /// Its address.
    pub address: Address,
    /// Its MAC.
    pub mac: Mac,
}

const fn host(address: Address, number: u8) -> Party {
    Party { address, mac: [0x02, 0, 0, 0, 1, number] }
}

const fn container(address: Address) -> Party {
    let [a, b, c, d] = address;
    Party { address, mac: [0x02, 0x42, a, b, c, d] }
}

/// The host under test.
pub const HOST_A: Party = host([192, 168, 1, 11], 11);
/// A known VTEP whose MAC the kernel knows.
pub const HOST_B: Party = host([192, 168, 1, 12], 12);
/// A known VTEP whose MAC nobody has resolved yet.
pub const HOST_C: Party = host([192, 168, 1, 13], 13);
/// A known VTEP without a route to it.
pub const HOST_D: Party = host([172, 16, 0, 14], 14);
/// A known VTEP behind [`ROUTER`], by a route with an MTU of [`ROUTED_MTU`].
pub const HOST_E: Party = host([192, 168, 2, 15], 15);
/// Asks for published ports, by way of [`ROUTER`].
pub const CLIENT: Party = host([203, 0, 113, 5], 5);
/// The sandbox behind published ports, on its gwbridge.
pub const SANDBOX: Party = container([172, 18, 0, 2]);
/// Another address of [`HOST_A`], on its loopback device.
pub const SECOND_ADDRESS: Address = [198, 51, 100, 1];
/// The gwbridge.
pub const GWBRIDGE: Party = container([172, 18, 0, 1]);
/// On the wire, but no VTEP.
pub const INTRUDER: Party = host([192, 168, 1, 66], 66);
/// The next hop to [`HOST_E`].
pub const ROUTER: Party = host([192, 168, 1, 1], 1);
/// MTU of the uplink.
pub const UPLINK_MTU: usize = 1500;
/// MTU of the route to [`HOST_E`].
pub const ROUTED_MTU: usize = 1300;

/// The network most of the containers are in.
pub const VNI_BLUE: u32 = 4096;
/// Another network of the host under test.
pub const VNI_RED: u32 = 4097;
/// A network the host under test has nothing to do with.
pub const VNI_UNKNOWN: u32 = 0x00ab_cdef;
/// The gateway of [`VNI_BLUE`].
pub const GATEWAY: Party = container([10, 0, 0, 1]);
/// The gateway of [`VNI_RED`].
pub const GATEWAY_RED: Party = container([10, 0, 1, 1]);

/// Local, in blue.
pub const CONTAINER_A1: Party = container([10, 0, 0, 2]);
/// Local, in blue.
pub const CONTAINER_A2: Party = container([10, 0, 0, 3]);
/// Local, in blue, behind a veth the kernel does not forward from.
pub const CONTAINER_A3: Party = container([10, 0, 0, 4]);
/// Local, in red.
pub const CONTAINER_A4: Party = container([10, 0, 1, 2]);
/// On [`HOST_B`], in blue.
pub const CONTAINER_B1: Party = container([10, 0, 0, 12]);
/// On [`HOST_B`], in red.
pub const CONTAINER_B4: Party = container([10, 0, 1, 12]);
/// On [`HOST_C`], in blue.
pub const CONTAINER_C1: Party = container([10, 0, 0, 13]);
/// On [`HOST_D`], in blue.
pub const CONTAINER_D1: Party = container([10, 0, 0, 14]);
/// On [`HOST_E`], in blue.
pub const CONTAINER_E1: Party = container([10, 0, 0, 15]);
/// Inside blue's subnet; nobody has it.
pub const NOBODY: Party = container([10, 0, 0, 99]);
/// The Ethernet broadcast address.
pub const BROADCAST: Mac = [0xff; 6];

/// EtherType of IPv4.
pub const IPV4: u16 = 0x0800;
/// EtherType of ARP.
pub const ARP: u16 = 0x0806;
/// Protocol numbers.
pub const ICMP: u8 = 1;
/// Protocol number of TCP.
pub const TCP: u8 = 6;
/// Protocol number of UDP.
pub const UDP: u8 = 17;
/// UDP port of VXLAN.
pub const VXLAN_PORT: u16 = 4789;
/// Bytes from the start of an encapsulated frame to the start of the inner one.
pub const OUTER: usize = 50;

/// An Ethernet frame.
pub fn ethernet(destination: Mac, source: Mac, ethertype: u16, payload: &[u8]) -> Vec<u8> {
    let mut frame = Vec::with_capacity(14 + payload.len());
    frame.extend(destination);
    frame.extend(source);
    frame.extend(ethertype.to_be_bytes());
    frame.extend(payload);
    frame
}

/// An ARP packet: operation 1 asks, 2 answers.
pub fn arp(operation: u16, sender: Party, target: Party) -> Vec<u8> {
    let mut packet = vec![0, 1, 8, 0, 6, 4];
    packet.extend(operation.to_be_bytes());
    packet.extend(sender.mac);
    packet.extend(sender.address);
    packet.extend(target.mac);
    packet.extend(target.address);
    packet
}

/// The fields of an IPv4 header a test may want to choose.
#[derive(Clone, Debug)]
pub struct Ipv4 {
    /// Source address.
    pub source: Address,
    /// Destination address.
    pub destination: Address,
    /// Protocol.
    pub protocol: u8,
    /// DSCP and ECN.
    pub tos: u8,
    /// Time to live.
    pub ttl: u8,
    /// Identification.
    pub id: u16,
    /// Flags and fragment offset.
    pub fragment: u16,
    /// Options, a multiple of four bytes.
    pub options: Vec<u8>,
}

impl Ipv4 {
    /// A plain header.
    pub fn new(source: Address, destination: Address, protocol: u8) -> Self {
        let options = Vec::new();
        Self { source, destination, protocol, tos: 0, ttl: 64, id: 0x4f56, fragment: 0, options }
    }

    /// The same with another TOS byte.
    pub fn tos(self, tos: u8) -> Self {
        Self { tos, ..self }
    }

    /// The same with other flags and offset.
    pub fn fragment(self, fragment: u16) -> Self {
        Self { fragment, ..self }
    }

    /// The same with another time to live.
    pub fn ttl(self, ttl: u8) -> Self {
        Self { ttl, ..self }
    }

    /// The same with options.
    pub fn options(self, options: &[u8]) -> Self {
        Self { options: options.to_vec(), ..self }
    }

    /// The packet around a payload, with its checksum.
    pub fn build(&self, payload: &[u8]) -> Vec<u8> {
        let Self { source, destination, protocol, tos, ttl, id, fragment, options } = self;
        let header = 20 + options.len();
        let mut packet = vec![0x40 | low_byte(header / 4), *tos];
        packet.extend(low_word(header + payload.len()).to_be_bytes());
        packet.extend(id.to_be_bytes());
        packet.extend(fragment.to_be_bytes());
        packet.extend([*ttl, *protocol, 0, 0]);
        packet.extend(source);
        packet.extend(destination);
        packet.extend(options);
        let sum = checksum(&packet).to_be_bytes();
        packet[10..12].copy_from_slice(&sum);
        packet.extend(payload);
        packet
    }
}

/// A UDP datagram with its checksum.
pub fn udp(source: Address, destination: Address, ports: (u16, u16), payload: &[u8]) -> Vec<u8> {
    let mut datagram = Vec::new();
    datagram.extend(ports.0.to_be_bytes());
    datagram.extend(ports.1.to_be_bytes());
    datagram.extend(low_word(8 + payload.len()).to_be_bytes());
    datagram.extend([0, 0]);
    datagram.extend(payload);
    let sum = transport_checksum(source, destination, UDP, &datagram).to_be_bytes();
    datagram[6..8].copy_from_slice(&sum);
    datagram
}

/// A TCP segment with ACK and PSH, `options` a multiple of four bytes, and its checksum.
pub fn tcp(
    source: Address,
    destination: Address,
    ports: (u16, u16),
    options: &[u8],
    payload: &[u8],
) -> Vec<u8> {
    segment(source, destination, ports, 0x18, options, payload)
}

/// A TCP segment with these flags.
pub fn segment(
    source: Address,
    destination: Address,
    ports: (u16, u16),
    flags: u8,
    options: &[u8],
    payload: &[u8],
) -> Vec<u8> {
    let mut segment = Vec::new();
    segment.extend(ports.0.to_be_bytes());
    segment.extend(ports.1.to_be_bytes());
    segment.extend([0, 0, 0, 1, 0, 0, 0, 2]);
    segment.extend([low_byte((20 + options.len()) / 4) << 4, flags, 0xff, 0xff, 0, 0, 0, 0]);
    segment.extend(options);
    segment.extend(payload);
    let sum = transport_checksum(source, destination, TCP, &segment).to_be_bytes();
    segment[16..18].copy_from_slice(&sum);
    segment
}

/// An ICMP echo: kind 8 asks, 0 answers.
pub fn echo(kind: u8, payload: &[u8]) -> Vec<u8> {
    let mut message = vec![kind, 0, 0, 0, 0x12, 0x34, 0, 1];
    message.extend(payload);
    let sum = checksum(&message).to_be_bytes();
    message[2..4].copy_from_slice(&sum);
    message
}

/// An ICMP error about a packet (RFC 792), with the word after the checksum; of a "fragmentation
/// needed" its second half is the MTU (RFC 1191).
pub fn icmp_error(kind: u8, code: u8, word: u32, about: &[u8]) -> Vec<u8> {
    let mut message = vec![kind, code, 0, 0];
    message.extend(word.to_be_bytes());
    message.extend(about);
    let sum = checksum(&message).to_be_bytes();
    message[2..4].copy_from_slice(&sum);
    message
}

/// The headers around an inner frame. The defaults are what a peer of HOST_A sends.
#[derive(Clone, Debug)]
pub struct Vxlan {
    /// Destination and source of the outer Ethernet header.
    pub macs: (Mac, Mac),
    /// The outer IPv4 header.
    pub ip: Ipv4,
    /// Outer UDP ports.
    pub ports: (u16, u16),
    /// Outer UDP checksum, as it lies on the wire.
    pub udp_checksum: [u8; 2],
    /// VXLAN flags and reserved bits.
    pub flags: [u8; 4],
    /// VNI.
    pub vni: u32,
    /// The last byte of the header.
    pub reserved: u8,
}

impl Vxlan {
    /// From one host to another.
    pub fn new(from: Party, to: Party, vni: u32) -> Self {
        Self {
            macs: (to.mac, from.mac),
            ip: Ipv4::new(from.address, to.address, UDP),
            ports: (40_000, VXLAN_PORT),
            udp_checksum: [0, 0],
            flags: [8, 0, 0, 0],
            vni,
            reserved: 0,
        }
    }

    /// The same with another outer TOS byte.
    pub fn tos(self, tos: u8) -> Self {
        Self { ip: self.ip.tos(tos), ..self }
    }

    /// The outer frame around an inner one.
    pub fn build(&self, inner: &[u8]) -> Vec<u8> {
        let Self { macs, ip, ports, udp_checksum, flags, vni, reserved } = self;
        let mut datagram = Vec::new();
        datagram.extend(ports.0.to_be_bytes());
        datagram.extend(ports.1.to_be_bytes());
        datagram.extend(low_word(16 + inner.len()).to_be_bytes());
        datagram.extend(udp_checksum);
        datagram.extend(flags);
        datagram.extend(&vni.to_be_bytes()[1..]);
        datagram.push(*reserved);
        datagram.extend(inner);
        ethernet(macs.0, macs.1, IPV4, &ip.build(&datagram))
    }
}

/// A UDP packet between two containers, in its frame.
pub fn datagram(from: Party, to: Party, payload: &[u8]) -> Vec<u8> {
    let datagram = udp(from.address, to.address, (1000, 2000), payload);
    let packet = Ipv4::new(from.address, to.address, UDP).build(&datagram);
    ethernet(to.mac, from.mac, IPV4, &packet)
}

/// [`datagram`] with another TOS byte.
pub fn marked(from: Party, to: Party, tos: u8) -> Vec<u8> {
    let datagram = udp(from.address, to.address, (1000, 2000), b"marked");
    let packet = Ipv4::new(from.address, to.address, UDP).tos(tos).build(&datagram);
    ethernet(to.mac, from.mac, IPV4, &packet)
}

/// The Internet checksum (RFC 1071), bytes taken in network byte order.
pub fn checksum(bytes: &[u8]) -> u16 {
    let mut sum: u32 = 0;
    for pair in bytes.chunks(2) {
        sum += u32::from(u16::from_be_bytes([pair[0], pair.get(1).copied().unwrap_or(0)]));
    }
    while sum >> 16 != 0 {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !low_word(sum as usize)
}

/// Computes the checksum of the IPv4 header at `offset` of a frame again.
pub fn fix_ipv4_checksum(frame: &mut [u8], offset: usize) {
    frame[offset + 10..offset + 12].fill(0);
    let length = usize::from(frame[offset] & 15) * 4;
    let sum = checksum(&frame[offset..offset + length]).to_be_bytes();
    frame[offset + 10..offset + 12].copy_from_slice(&sum);
}

fn transport_checksum(source: Address, destination: Address, protocol: u8, data: &[u8]) -> u16 {
    let mut pseudo = Vec::new();
    pseudo.extend(source);
    pseudo.extend(destination);
    pseudo.extend([0, protocol]);
    pseudo.extend(low_word(data.len()).to_be_bytes());
    pseudo.extend(data);
    checksum(&pseudo)
}

fn low_word(number: usize) -> u16 {
    u16::try_from(number & 0xffff).unwrap_or(u16::MAX)
}

fn low_byte(number: usize) -> u8 {
    u8::try_from(number & 0xff).unwrap_or(u8::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_known_header_has_its_known_checksum() {
        let ip = Ipv4 { id: 0, ..Ipv4::new([192, 168, 0, 1], [192, 168, 0, 199], UDP) };
        let packet = ip.fragment(0x4000).build(&[0; 95]);
        assert_eq!(packet[..12], [0x45, 0, 0, 0x73, 0, 0, 0x40, 0, 0x40, 0x11, 0xb8, 0x61]);
    }

    #[test]
    fn the_checksum_of_a_checked_message_is_zero() {
        assert_eq!(checksum(&echo(8, b"odd")), 0);
    }

    #[test]
    fn a_vxlan_frame_carries_its_inner_frame_after_50_bytes() {
        let inner = datagram(CONTAINER_B1, CONTAINER_A1, b"x");
        let frame = Vxlan::new(HOST_B, HOST_A, VNI_BLUE).build(&inner);
        assert_eq!(frame[OUTER..], inner[..]);
        assert_eq!(checksum(&frame[14..34]), 0);
    }
}
