//! What a captured frame is, on one line: `10.0.0.2 > 10.0.0.9 icmp echo-request`. Pure.
//!
//! It reads bytes anybody on the wire may have written, so every access is checked and there is
//! one level of VXLAN at most.

use std::{
    fmt::Write as _,
    net::{Ipv4Addr, Ipv6Addr},
};

use ovnet_common::headers::{arp, ethernet, icmp, ipv4, udp, vxlan};

use crate::consul::schema::format_mac;

/// EtherType of IPv6, host byte order.
const IPV6: u16 = 0x86dd;
/// EtherType of an 802.1Q tag, host byte order.
const VLAN: u16 = 0x8100;
/// Length of an IPv6 header.
const IPV6_LEN: usize = 40;
/// Protocol TCP.
const TCP: u8 = 6;

/// Reads a frame from its Ethernet header on. `vxlan_port` is the UDP destination port, host byte
/// order, that VXLAN is looked for on.
pub fn summarize(frame: &[u8], vxlan_port: u16) -> String {
    // A frame that ends inside a header is told as what could be read of it.
    ethernet_frame(frame, Some(vxlan_port)).unwrap_or_else(|| "truncated ethernet".to_owned())
}

fn ethernet_frame(frame: &[u8], vxlan_port: Option<u16>) -> Option<String> {
    let ethertype = u16_at(frame, ethernet::TYPE)?;
    let packet = frame.get(ethernet::LEN..)?;
    let read = match ethertype {
        ethernet::ARP => arp_packet(packet),
        ethernet::IPV4 => ipv4_packet(packet, vxlan_port),
        IPV6 => ipv6_packet(packet),
        VLAN => u16_at(packet, 0).map(|tag| format!("vlan {}", tag & 0x0fff)),
        other => {
            let (to, from) = (mac_at(frame, 0)?, mac_at(frame, ethernet::SOURCE)?);
            Some(format!("{from} > {to} ethertype 0x{other:04x}"))
        }
    };
    let name = match ethertype {
        ethernet::ARP => "arp",
        IPV6 => "ipv6",
        VLAN => "vlan",
        _ => "ipv4",
    };
    Some(read.unwrap_or_else(|| format!("truncated {name}")))
}

fn arp_packet(packet: &[u8]) -> Option<String> {
    let operation = u16_at(packet, arp::OPERATION)?;
    let sender = address_at(packet, arp::SENDER_ADDRESS)?;
    let target = address_at(packet, arp::TARGET_ADDRESS)?;
    Some(match operation {
        arp::REQUEST => format!("arp who has {target}, tell {sender}"),
        arp::REPLY => format!("arp {sender} is at {}", mac_at(packet, arp::SENDER_MAC)?),
        other => format!("arp operation {other} from {sender}"),
    })
}

fn ipv4_packet(packet: &[u8], vxlan_port: Option<u16>) -> Option<String> {
    let first = *packet.get(ipv4::VERSION_IHL)?;
    let header = usize::from(first & 0x0f) * 4;
    if first >> 4 != 4 || header < ipv4::LEN {
        return Some(format!("bad ipv4 header 0x{first:02x}"));
    }
    let source = address_at(packet, ipv4::SOURCE)?;
    let destination = address_at(packet, ipv4::DESTINATION)?;
    let protocol = *packet.get(ipv4::PROTOCOL)?;
    let fragment = u16_at(packet, ipv4::FRAGMENT)?;
    let offset = u32::from(fragment & 0x1fff) * 8;
    let name = match protocol {
        ipv4::ICMP => "icmp".to_owned(),
        TCP => "tcp".to_owned(),
        ipv4::UDP => "udp".to_owned(),
        other => format!("protocol {other}"),
    };
    if offset != 0 {
        return Some(format!("{source} > {destination} {name} fragment at {offset}"));
    }
    let payload = packet.get(header..).unwrap_or_default();
    let read = match protocol {
        ipv4::UDP => udp_datagram(payload, source, destination, vxlan_port),
        TCP => tcp_segment(payload, source, destination),
        ipv4::ICMP => icmp_message(payload, source, destination),
        _ => None,
    };
    let mut line = read.unwrap_or_else(|| format!("{source} > {destination} {name}"));
    if fragment & ipv4::FRAGMENT_MASK != 0 {
        line.push_str(" first fragment");
    }
    Some(line)
}

fn ipv6_packet(packet: &[u8]) -> Option<String> {
    let addresses: [u8; 32] = packet.get(8..IPV6_LEN)?.try_into().ok()?;
    let [source, destination] = [0, 16].map(|at| {
        let mut address = [0; 16];
        address.copy_from_slice(&addresses[at..at + 16]);
        Ipv6Addr::from(address)
    });
    Some(format!("{source} > {destination} ipv6 next header {}", packet.get(6)?))
}

fn icmp_message(message: &[u8], source: Ipv4Addr, destination: Ipv4Addr) -> Option<String> {
    let (kind, code) = (*message.get(icmp::TYPE)?, *message.get(1)?);
    let name = match kind {
        icmp::ECHO_REPLY => "echo-reply".to_owned(),
        icmp::ECHO_REQUEST => "echo-request".to_owned(),
        3 => format!("unreachable code {code}"),
        11 => format!("time-exceeded code {code}"),
        other => format!("type {other} code {code}"),
    };
    let mut line = format!("{source} > {destination} icmp {name}");
    if matches!(kind, icmp::ECHO_REPLY | icmp::ECHO_REQUEST)
        && let Some(sequence) = u16_at(message, 6)
    {
        // Writing to a String cannot fail.
        let _ = write!(line, " seq {sequence}");
    }
    Some(line)
}

fn tcp_segment(segment: &[u8], source: Ipv4Addr, destination: Ipv4Addr) -> Option<String> {
    let (from, to) = (u16_at(segment, 0)?, u16_at(segment, 2)?);
    let mut line = format!("{source}:{from} > {destination}:{to} tcp");
    if let Some(bits) = segment.get(13) {
        // The letters tcpdump uses, FIN first.
        let letters = "FSRP.UEW".chars().enumerate();
        let set: String =
            letters.filter(|(bit, _)| bits & (1 << bit) != 0).map(|(_, letter)| letter).collect();
        let _ = write!(line, " [{set}]");
    }
    Some(line)
}

fn udp_datagram(
    datagram: &[u8],
    source: Ipv4Addr,
    destination: Ipv4Addr,
    vxlan_port: Option<u16>,
) -> Option<String> {
    let (from, to) = (u16_at(datagram, udp::SOURCE)?, u16_at(datagram, udp::DESTINATION)?);
    if Some(to) != vxlan_port {
        return Some(format!("{source}:{from} > {destination}:{to} udp"));
    }
    let outer = format!("{source} > {destination} vxlan");
    let Some(header) = datagram.get(udp::LEN..udp::LEN + vxlan::LEN) else {
        return Some(format!("{outer} truncated"));
    };
    let [f0, f1, f2, f3, v0, v1, v2, _] = *header else { return Some(outer) };
    let flags = u32::from_be_bytes([f0, f1, f2, f3]);
    let mut line = format!("{outer} vni {}", u32::from_be_bytes([0, v0, v1, v2]));
    if flags != vxlan::VALID_VNI {
        let _ = write!(line, " flags 0x{flags:08x}");
    }
    // No port the second time: an overlay inside an overlay is told as UDP.
    let inner = datagram.get(udp::LEN + vxlan::LEN..).unwrap_or_default();
    let inner = ethernet_frame(inner, None).unwrap_or_else(|| "truncated ethernet".to_owned());
    let _ = write!(line, ": {inner}");
    Some(line)
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    let bytes = bytes.get(at..at.checked_add(2)?)?;
    bytes.try_into().ok().map(u16::from_be_bytes)
}

fn address_at(bytes: &[u8], at: usize) -> Option<Ipv4Addr> {
    let bytes: [u8; 4] = bytes.get(at..at.checked_add(4)?)?.try_into().ok()?;
    Some(bytes.into())
}

fn mac_at(bytes: &[u8], at: usize) -> Option<String> {
    bytes.get(at..at.checked_add(6)?)?.try_into().ok().map(format_mac)
}

#[cfg(test)]
mod tests {
    use ovnet_common::vxlan::Outer;
    use proptest::prelude::*;

    use super::*;

    fn frame(ethertype: u16, packet: &[u8]) -> Vec<u8> {
        let mut frame = vec![2, 0x42, 10, 0, 0, 9, 2, 0x42, 10, 0, 0, 2];
        frame.extend(ethertype.to_be_bytes());
        frame.extend(packet);
        frame
    }

    fn ip(protocol: u8, fragment: u16, payload: &[u8]) -> Vec<u8> {
        let [f0, f1] = fragment.to_be_bytes();
        let mut packet =
            vec![0x45, 0, 0, 40, 0, 1, f0, f1, 64, protocol, 0, 0, 10, 0, 0, 2, 10, 0, 0, 9];
        packet.extend(payload);
        packet
    }

    fn vxlan(inner: &[u8]) -> Vec<u8> {
        let outer = Outer {
            next_hop: [2; 6],
            interface_mac: [4; 6],
            source: [192, 168, 1, 11],
            destination: [192, 168, 1, 12],
            inner_length: 84,
            tos: 0,
            id: 1,
            source_port: 40000,
            port_be: 4789u16.to_be(),
            vni: 4096,
            inner_destination: [2, 0x42, 10, 0, 0, 9],
            inner_source: [2, 0x42, 10, 0, 0, 2],
        };
        [&outer.to_bytes()[..], inner].concat()
    }

    #[test]
    fn frames_are_read() {
        let arp = |operation| {
            [
                &[0, 1, 8, 0, 6, 4, 0, operation, 2, 0x42, 10, 0, 0, 2, 10, 0, 0, 2][..],
                &[0, 0, 0, 0, 0, 0, 10, 0, 0, 9],
            ]
            .concat()
        };
        let tcp = [0x9c, 0x40, 0, 80, 0, 0, 0, 1, 0, 0, 0, 0, 0x50, 0x12];
        let echo = [8, 0, 0, 0, 0, 1, 0, 7];
        let mut v6 = vec![0x60, 0, 0, 0, 0, 8, 58, 255];
        v6.extend([0xfe, 0x80, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1]);
        v6.extend([0xff, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2]);
        for (frame, line) in [
            (frame(0x0806, &arp(1)), "arp who has 10.0.0.9, tell 10.0.0.2"),
            (frame(0x0806, &arp(2)), "arp 10.0.0.2 is at 02:42:0a:00:00:02"),
            (frame(0x0800, &ip(1, 0, &echo)), "10.0.0.2 > 10.0.0.9 icmp echo-request seq 7"),
            (frame(0x0800, &ip(6, 0x4000, &tcp)), "10.0.0.2:40000 > 10.0.0.9:80 tcp [S.]"),
            (
                frame(0x0800, &ip(17, 0, &[0, 53, 0x13, 0x88, 0, 8, 0, 0])),
                "10.0.0.2:53 > 10.0.0.9:5000 udp",
            ),
            (
                frame(0x0800, &ip(17, 0x2000, &[0, 53, 0x13, 0x88, 0, 8, 0, 0])),
                "10.0.0.2:53 > 10.0.0.9:5000 udp first fragment",
            ),
            (frame(0x0800, &ip(17, 185, &[1; 8])), "10.0.0.2 > 10.0.0.9 udp fragment at 1480"),
            (frame(0x0800, &ip(47, 0, &[])), "10.0.0.2 > 10.0.0.9 protocol 47"),
            (frame(0x86dd, &v6), "fe80::1 > ff02::2 ipv6 next header 58"),
            (frame(0x8100, &[0x20, 7]), "vlan 7"),
            (frame(0x88cc, &[]), "02:42:0a:00:00:02 > 02:42:0a:00:00:09 ethertype 0x88cc"),
            (
                vxlan(&ip(1, 0, &echo)),
                "192.168.1.11 > 192.168.1.12 vxlan vni 4096: 10.0.0.2 > 10.0.0.9 icmp \
                 echo-request seq 7",
            ),
            (frame(0x0800, &[0x44; 20]), "bad ipv4 header 0x44"),
            (vec![], "truncated ethernet"),
        ] {
            assert_eq!(summarize(&frame, 4789), line);
        }
    }

    #[test]
    fn vxlan_on_another_port_is_udp() {
        let frame = vxlan(&ip(47, 0, &[]));
        assert_eq!(summarize(&frame, 8472), "192.168.1.11:40000 > 192.168.1.12:4789 udp");
    }

    #[test]
    fn a_cut_anywhere_is_told() {
        let whole = vxlan(&ip(1, 0, &[8, 0, 0, 0, 0, 1, 0, 7]));
        for cut in 0..whole.len() {
            assert!(!summarize(&whole[..cut], 4789).is_empty(), "{cut}");
        }
        assert_eq!(summarize(&whole[..20], 4789), "truncated ipv4");
        assert_eq!(summarize(&whole[..36], 4789), "192.168.1.11 > 192.168.1.12 udp");
        assert_eq!(summarize(&whole[..44], 4789), "192.168.1.11 > 192.168.1.12 vxlan truncated");
        assert_eq!(
            summarize(&whole[..52], 4789),
            "192.168.1.11 > 192.168.1.12 vxlan vni 4096: truncated ethernet"
        );
    }

    proptest! {
        #[test]
        fn any_bytes_are_one_line(bytes in proptest::collection::vec(any::<u8>(), 0..=96)) {
            let line = summarize(&bytes, 4789);
            prop_assert!(!line.is_empty() && !line.contains('\n'));
        }

        #[test]
        fn any_bytes_after_real_headers_are_one_line(
            bytes in proptest::collection::vec(any::<u8>(), 0..=96),
            ethertype in prop_oneof![Just(0x0800u16), Just(0x0806), Just(0x86dd), Just(0x8100)],
            protocol in prop_oneof![Just(1u8), Just(6), Just(17)],
        ) {
            for frame in [
                frame(ethertype, &bytes),
                frame(0x0800, &ip(protocol, 0, &bytes)),
                vxlan(&bytes),
                vxlan(&ip(protocol, 0, &bytes)),
            ] {
                prop_assert!(!summarize(&frame, 4789).contains('\n'));
            }
        }
    }
}
