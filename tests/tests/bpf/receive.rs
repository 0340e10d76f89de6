//! Wire → container. `from_uplink` and `uplink_xdp` share their rules and so their table; what
//! only one of them does is in [`only_uplink`].

use ovnet_common::{
    abi::Program,
    verdict::{
        DropReason::*,
        Verdict::{self, Deliver, Drop, Pass},
    },
};
use ovnet_tests::{
    bpf::{PORT_A1, PORT_A4, UPLINK, bench},
    fixture::{Fixture, check_all, remote},
    packet::*,
};

/// Both programs' tables.
pub(crate) fn fixtures() -> Vec<Fixture> {
    let mut all = Vec::new();
    for program in [Program::FromUplink, Program::UplinkXdp] {
        all.extend(deliveries(program));
        all.extend(trust(program));
        all.extend(passes(program));
        all.extend(cut_off(program));
        all.extend(congestion(program));
        all.extend(super::probe::fixtures(program));
    }
    all.extend(only_uplink());
    all.extend(only_xdp());
    all
}

fn received(program: Program, name: &str, packet: Vec<u8>, verdict: Verdict) -> Fixture {
    Fixture::new(name, program, UPLINK, packet, verdict)
}

/// The headers HOST_B sends blue packets with.
fn blue() -> Vxlan {
    Vxlan::new(HOST_B, HOST_A, VNI_BLUE)
}

fn from_b1() -> Vec<u8> {
    datagram(CONTAINER_B1, CONTAINER_A1, b"x")
}

/// A packet of B1 with a header of one's own.
fn inner(to: Party, ip: &Ipv4) -> Vec<u8> {
    let payload = udp(ip.source, ip.destination, (1000, 2000), b"x");
    ethernet(to.mac, CONTAINER_B1.mac, IPV4, &ip.build(&payload))
}

fn deliveries(program: Program) -> Vec<Fixture> {
    let delivered = |name: &str, vxlan: Vxlan, packet: Vec<u8>, to| {
        received(program, name, vxlan.build(&packet), Deliver(to)).becomes(packet)
    };
    let mut elsewhere = from_b1();
    elsewhere[..6].copy_from_slice(&BROADCAST);
    let ip = || Ipv4::new(CONTAINER_B1.address, CONTAINER_A1.address, UDP);
    let mut wrong_sum = from_b1();
    wrong_sum[24] ^= 1;
    let routed = Vxlan { macs: (HOST_A.mac, ROUTER.mac), ..blue() };
    let other_port = Vxlan { ports: (1, 8472), ..blue() };
    vec![
        delivered("a packet for a local endpoint", blue(), from_b1(), PORT_A1),
        delivered("by way of a router", routed, from_b1(), PORT_A1),
        delivered(
            "any source port",
            Vxlan { ports: (1, VXLAN_PORT), ..blue() },
            from_b1(),
            PORT_A1,
        ),
        delivered("20 bytes of IPv4", blue(), from_b1()[..34].to_vec(), PORT_A1),
        delivered(
            "an inner fragment",
            blue(),
            inner(CONTAINER_A1, &ip().fragment(0x2000)),
            PORT_A1,
        ),
        // Each by itself is somebody's packet: whether they fit together is the receiver's to see.
        delivered(
            "a middle fragment",
            blue(),
            inner(CONTAINER_A1, &ip().fragment(0x2001)),
            PORT_A1,
        ),
        delivered("the last fragment", blue(), inner(CONTAINER_A1, &ip().fragment(1)), PORT_A1),
        delivered(
            "a fragment beyond 64 KiB",
            blue(),
            inner(CONTAINER_A1, &ip().fragment(0x1fff)),
            PORT_A1,
        ),
        delivered(
            "a fragment of eight bytes",
            blue(),
            ethernet(
                CONTAINER_A1.mac,
                CONTAINER_B1.mac,
                IPV4,
                &ip().fragment(0x2000).build(&[0; 8]),
            ),
            PORT_A1,
        ),
        // The network is one hop, and its packets' own checksums are their receivers' business.
        delivered("no time to live left", blue(), inner(CONTAINER_A1, &ip().ttl(0)), PORT_A1),
        delivered("a wrong inner checksum", blue(), wrong_sum, PORT_A1),
        delivered("inner options", blue(), inner(CONTAINER_A1, &ip().options(&[1; 8])), PORT_A1),
        delivered(
            "the other network",
            Vxlan::new(HOST_B, HOST_A, VNI_RED),
            datagram(CONTAINER_B4, CONTAINER_A4, b"x"),
            PORT_A4,
        ),
        delivered(
            "outer DF",
            Vxlan { ip: blue().ip.fragment(0x4000), ..blue() },
            from_b1(),
            PORT_A1,
        ),
        received(program, "an inner MAC nobody has", blue().build(&elsewhere), Deliver(PORT_A1))
            .becomes(from_b1()),
        delivered("our own VXLAN port", other_port, from_b1(), PORT_A1)
            .with(|tables| tables.config.vxlan_port_be = 8472u16.to_be()),
    ]
}

fn trust(program: Program) -> Vec<Fixture> {
    let dropped =
        |name: &str, packet: Vec<u8>, reason| received(program, name, packet, Drop(reason));
    let sent_by = |from: Party, packet: &[u8]| Vxlan::new(from, HOST_A, VNI_BLUE).build(packet);
    let ip = |to: Address| Ipv4::new(CONTAINER_B1.address, to, UDP);
    let to = |address: Address| blue().build(&inner(CONTAINER_A1, &ip(address)));
    let from = |source: Address| {
        let ip = Ipv4::new(source, CONTAINER_A1.address, UDP);
        blue().build(&inner(CONTAINER_A1, &ip))
    };
    let replaced = |at: usize, byte: u8| {
        let mut packet = blue().build(&from_b1());
        packet[at] = byte;
        packet
    };
    let mut all = vec![
        dropped("from an unknown VTEP", sent_by(INTRUDER, &from_b1()), UnknownVtep),
        dropped("from a VTEP that was removed", sent_by(HOST_B, &from_b1()), UnknownVtep).with(
            |tables| {
                tables.hosts.remove(&ovnet_common::abi::mapped(HOST_B.address));
                tables.endpoints.retain(|key, _| {
                    key.address != ovnet_common::abi::mapped(CONTAINER_B1.address)
                });
            },
        ),
        dropped(
            "from an unknown VTEP in an unknown network",
            Vxlan::new(INTRUDER, HOST_A, VNI_UNKNOWN).build(&from_b1()),
            UnknownVtep,
        ),
        dropped(
            "in an unknown network",
            Vxlan::new(HOST_B, HOST_A, VNI_UNKNOWN).build(&from_b1()),
            UnknownVni,
        ),
        dropped("in VNI 0", Vxlan::new(HOST_B, HOST_A, 0).build(&from_b1()), UnknownVni),
        dropped(
            "in another network than its endpoint's",
            Vxlan::new(HOST_B, HOST_A, VNI_RED).build(&from_b1()),
            ForgedSource,
        ),
        dropped("for another host's endpoint", sent_by(HOST_C, &from_b1()), ForgedSource),
        dropped(
            "for an endpoint of ours",
            sent_by(HOST_B, &datagram(CONTAINER_A2, CONTAINER_A1, b"x")),
            ForgedSource,
        ),
        dropped(
            "from our own address",
            sent_by(HOST_A, &datagram(CONTAINER_A2, CONTAINER_A1, b"x")),
            ForgedSource,
        ),
        dropped("for nobody", sent_by(HOST_B, &datagram(NOBODY, CONTAINER_A1, b"x")), ForgedSource),
        dropped(
            "for the gateway",
            sent_by(HOST_B, &datagram(GATEWAY, CONTAINER_A1, b"x")),
            ForgedSource,
        ),
        dropped("from whom it is for", from(CONTAINER_A1.address), ForgedSource),
        dropped("from a loopback address", from([127, 0, 0, 1]), ForgedSource),
        dropped("from 0.0.0.0", from([0; 4]), ForgedSource),
        dropped("from a group", from([224, 0, 0, 1]), ForgedSource),
        dropped("from limited broadcast", from([255; 4]), ForgedSource),
        dropped("from our own VTEP address, inside", from(HOST_A.address), ForgedSource),
        dropped("from its own VTEP address, inside", from(HOST_B.address), ForgedSource),
        dropped(
            "QinQ inside",
            {
                let mut packet = blue().build(&from_b1());
                packet[62..64].copy_from_slice(&[0x88, 0xa8]);
                packet
            },
            EtherType,
        ),
        dropped("to an endpoint elsewhere", to(CONTAINER_C1.address), NotLocal),
        dropped("back to where it came from", to(CONTAINER_B1.address), NotLocal),
        dropped("to nobody", to(NOBODY.address), NotLocal),
        dropped("to the gateway", to(GATEWAY.address), NotLocal),
        dropped("to an endpoint of another network", to(CONTAINER_A4.address), NotLocal),
        dropped("to mDNS", to([224, 0, 0, 251]), Multicast),
        dropped("to limited broadcast", to([255; 4]), Multicast),
        dropped("to just below multicast", to([223, 255, 255, 255]), NotLocal),
        dropped("a wrong outer checksum", replaced(24, 0), OuterChecksum),
        dropped("an outer TTL changed without the checksum", replaced(22, 63), OuterChecksum),
        dropped("IPv6 inside", replaced(62, 0x86), EtherType),
        dropped("VLAN inside", replaced(62, 0x81), EtherType),
        dropped("inner IP version 6", replaced(64, 0x65), BadIpHeader),
        dropped("inner header of four words", replaced(64, 0x44), BadIpHeader),
        dropped("inner header of no words", replaced(64, 0x40), BadIpHeader),
        dropped(
            "VXLAN in VXLAN to ourselves",
            blue().build(&blue().build(&from_b1())),
            ForgedSource,
        ),
    ];
    for at in [42, 43, 44, 45, 49] {
        for bit in 0..8 {
            let mut packet = blue().build(&from_b1());
            packet[at] ^= 1 << bit;
            all.push(dropped(&format!("VXLAN byte {} bit {bit}", at - 42), packet, VxlanFlags));
        }
    }
    // The VNI is 24 bits: each of them tells networks apart.
    for bit in 0..24 {
        let packet = Vxlan { vni: VNI_BLUE ^ 1 << bit, ..blue() }.build(&from_b1());
        let reason = if VNI_BLUE ^ 1 << bit == VNI_RED { ForgedSource } else { UnknownVni };
        all.push(dropped(&format!("VNI bit {bit}"), packet, reason));
    }
    all
}

fn passes(program: Program) -> Vec<Fixture> {
    let passed = |name: &str, packet: Vec<u8>| received(program, name, packet, Pass);
    let outer = |ip: Ipv4| Vxlan { ip, ..blue() }.build(&from_b1());
    let to_us = |protocol| Ipv4::new(HOST_B.address, HOST_A.address, protocol);
    let frame = |ethertype, payload: &[u8]| ethernet(HOST_A.mac, HOST_B.mac, ethertype, payload);
    let segment = tcp(HOST_B.address, HOST_A.address, (VXLAN_PORT, VXLAN_PORT), &[], b"x");
    let asks = ethernet(BROADCAST, CONTAINER_B1.mac, ARP, &arp(1, CONTAINER_B1, CONTAINER_A1));
    let gre = Ipv4 { protocol: 47, ..blue().ip };
    vec![
        passed("TCP to us", frame(IPV4, &to_us(TCP).build(&segment))),
        passed("ICMP to us", frame(IPV4, &to_us(ICMP).build(&echo(8, b"x")))),
        passed("GRE to us", outer(gre)),
        passed("another UDP port", Vxlan { ports: (VXLAN_PORT, 53), ..blue() }.build(&from_b1())),
        passed(
            "another destination address",
            outer(Ipv4 { destination: HOST_C.address, ..blue().ip }),
        ),
        passed("a first outer fragment", outer(blue().ip.fragment(0x2000))),
        passed("a later outer fragment", outer(blue().ip.fragment(0x00b9))),
        passed("outer options", outer(blue().ip.options(&[1; 4]))),
        passed(
            "an outer UDP checksum",
            Vxlan { udp_checksum: [0x12, 0x34], ..blue() }.build(&from_b1()),
        ),
        passed(
            "half an outer UDP checksum",
            Vxlan { udp_checksum: [0, 0x34], ..blue() }.build(&from_b1()),
        ),
        passed(
            "another outer UDP checksum",
            Vxlan { udp_checksum: [0x12, 0], ..blue() }.build(&from_b1()),
        ),
        passed("ARP inside", blue().build(&asks)),
        passed(
            "ARP inside from an unknown VTEP",
            Vxlan::new(INTRUDER, HOST_A, VNI_BLUE).build(&asks),
        ),
        passed("outer ARP", frame(ARP, &arp(1, HOST_B, HOST_A))),
        passed("IPv6", frame(0x86dd, &blue().build(&from_b1())[14..])),
        passed("802.3", frame(100, &blue().build(&from_b1())[14..])),
        passed("IPv6 after an IPv4 ethertype", {
            let mut packet = blue().build(&from_b1());
            packet[14] = 0x65;
            packet
        }),
        passed("VXLAN while we have no address", blue().build(&from_b1()))
            .with(|tables| tables.config.vtep = [0; 16]),
        passed("VXLAN while nothing is configured", blue().build(&from_b1()))
            .with(|tables| tables.config = Default::default()),
        passed(
            "VXLAN to 0.0.0.0 while nothing is configured",
            outer(Ipv4 { destination: [0; 4], ..blue().ip }),
        )
        .with(|tables| tables.config = Default::default()),
        passed("VXLAN on another port than ours", blue().build(&from_b1()))
            .with(|tables| tables.config.vxlan_port_be = 8472u16.to_be()),
    ]
}

/// A frame that ends anywhere: as long as it may be somebody else's it passes.
fn cut_off(program: Program) -> Vec<Fixture> {
    let whole = blue().build(&from_b1());
    let asks = ethernet(BROADCAST, CONTAINER_B1.mac, ARP, &arp(1, CONTAINER_B1, CONTAINER_A1));
    let arp = blue().build(&asks);
    let mut all = Vec::new();
    for length in 14..84 {
        let verdict = if length < 42 { Pass } else { Drop(Truncated) };
        let name = format!("cut off at {length}");
        all.push(received(program, &name, whole[..length].to_vec(), verdict));
        let verdict = if (42..64).contains(&length) { Drop(Truncated) } else { Pass };
        let name = format!("ARP inside, cut off at {length}");
        all.push(received(program, &name, arp[..length].to_vec(), verdict));
    }
    all
}

/// RFC 6040 figure 4, with the inner checksum corrected.
fn congestion(program: Program) -> Vec<Fixture> {
    // Inner, then for the outer Not-ECT, ECT(1), ECT(0), CE what comes out.
    let table = [
        (0b00, [Some(0b00), Some(0b00), Some(0b00), None]),
        (0b01, [Some(0b01), Some(0b01), Some(0b01), Some(0b11)]),
        (0b10, [Some(0b10), Some(0b01), Some(0b10), Some(0b11)]),
        (0b11, [Some(0b11); 4]),
    ];
    let mut all = Vec::new();
    for (inner, row) in table {
        for (outer, result) in (0u8..).zip(row) {
            let packet = marked(CONTAINER_B1, CONTAINER_A1, 0xb8 | inner);
            // The outer DSCP says nothing about the inner packet.
            let frame = blue().tos(0x28 | outer).build(&packet);
            let name = format!("ECN {inner:02b} in {outer:02b}");
            all.push(match result {
                None => received(program, &name, frame, Drop(EcnInvalid)),
                Some(ecn) => received(program, &name, frame, Deliver(PORT_A1)).becomes(marked(
                    CONTAINER_B1,
                    CONTAINER_A1,
                    0xb8 | ecn,
                )),
            });
        }
    }
    all
}

fn only_uplink() -> Vec<Fixture> {
    let uplink = |name: &str, packet, verdict| received(Program::FromUplink, name, packet, verdict);
    let other_mac = Vxlan { macs: (HOST_C.mac, HOST_B.mac), ..blue() };
    let broadcast = Vxlan { macs: (BROADCAST, HOST_B.mac), ..blue() };
    let large = datagram(CONTAINER_B1, CONTAINER_A1, &[0x5a; 3000]);
    let tcp = inner(CONTAINER_A1, &Ipv4::new(CONTAINER_B1.address, CONTAINER_A1.address, 6));
    vec![
        uplink("a frame for another MAC", other_mac.build(&from_b1()), Pass),
        uplink("a frame of another VLAN", blue().build(&from_b1()), Pass).vlan(5),
        uplink("a broadcast frame", broadcast.build(&from_b1()), Pass),
        uplink("a long packet", blue().build(&large), Deliver(PORT_A1)).becomes(large),
        // Which type of GSO it is a test run cannot say, and without one the kernel refuses.
        uplink("a packet the kernel does not shrink", blue().build(&tcp), Drop(DecapFailed))
            .gso(1000),
        uplink("datagrams in one GSO packet", blue().build(&from_b1()), Pass).gso(1000),
        uplink(
            "a forged packet of GSO",
            blue().build(&datagram(NOBODY, CONTAINER_A1, b"x")),
            Drop(ForgedSource),
        )
        .gso(1000),
        uplink(
            "an endpoint that moved to another host",
            blue().build(&from_b1()),
            Drop(ForgedSource),
        )
        .with(|tables| remote(tables, VNI_BLUE, CONTAINER_B1, HOST_C)),
    ]
}

fn only_xdp() -> Vec<Fixture> {
    let large = datagram(CONTAINER_B1, CONTAINER_A1, &[0x5a; 3200]);
    let xdp = |name, verdict| received(Program::UplinkXdp, name, blue().build(&large), verdict);
    vec![
        xdp("several packets merged into one", Pass),
        xdp("3242 bytes in a network of jumbo frames", Deliver(PORT_A1))
            .with(|tables| {
                tables.networks.entry(VNI_BLUE).and_modify(|network| network.mtu = 8950);
            })
            .becomes(large.clone()),
    ]
}

#[test]
fn what_the_wire_brings_follows_its_table() {
    bench("what_the_wire_brings_follows_its_table", |bench| check_all(bench, &fixtures()));
}
