//! Container → network: every outcome of `from_container`.

use ovnet_common::{
    abi::Program,
    verdict::{
        Answer,
        DropReason::*,
        SlowReason::*,
        Verdict::{self, Answer as Answered, Deliver, Drop, Encapsulate, Slow},
    },
};
use ovnet_tests::{
    bpf::{EXTERNAL, PORT_A1, PORT_A2, PORT_A3, PORT_A4, PORT_UNKNOWN, UPLINK, bench},
    fixture::{Fixture, check_all, remote},
    packet::*,
};

/// Everything a program decides about single packets, with the bytes that come out.
pub(crate) fn fixtures() -> Vec<Fixture> {
    let mut all = checks();
    all.extend(arp_requests());
    all.extend(gateway());
    all.extend(local());
    all.extend(remote_fast());
    all.extend(remote_slow());
    all
}

/// A packet A1 sends, unchanged unless said otherwise.
pub(crate) fn sent(name: &str, packet: Vec<u8>, verdict: Verdict) -> Fixture {
    Fixture::new(name, Program::FromContainer, PORT_A1, packet, verdict)
}

/// A UDP packet with a header of one's own.
fn with_header(to: Party, ip: Ipv4) -> Vec<u8> {
    let payload = udp(ip.source, ip.destination, (1000, 2000), b"x");
    ethernet(to.mac, CONTAINER_A1.mac, IPV4, &ip.build(&payload))
}

fn header(to: Party) -> Ipv4 {
    Ipv4::new(CONTAINER_A1.address, to.address, UDP)
}

/// A UDP packet whose IP packet is this long.
fn long(to: Party, length: usize) -> Vec<u8> {
    datagram(CONTAINER_A1, to, &vec![0x5a; length - 28])
}

/// The frame the wire gets.
pub(crate) fn encapsulated(to: Party, tos: u8, inner: &[u8]) -> Vec<u8> {
    Vxlan::new(HOST_A, to, VNI_BLUE).tos(tos).build(inner)
}

fn checks() -> Vec<Fixture> {
    let good = datagram(CONTAINER_A1, CONTAINER_B1, b"x");
    let other = |at: usize, byte: u8| {
        let mut packet = good.clone();
        packet[at] = byte;
        packet
    };
    let unknown = Fixture::new(
        "a veth without an endpoint",
        Program::FromContainer,
        PORT_UNKNOWN,
        good.clone(),
        Drop(UnknownPort),
    );
    let multicast = |address| header(Party { address, mac: [1, 0, 0x5e, 0, 0, 1] });
    let mut all = vec![
        unknown,
        sent("source MAC of a neighbour", datagram_as(CONTAINER_A2.mac), Drop(SpoofedMac)),
        sent("a MAC one bit off", other(11, CONTAINER_A1.mac[5] ^ 1), Drop(SpoofedMac)),
        sent("no IPv4 but IPv6", other(12, 0x86), Drop(EtherType)),
        sent("VLAN tag", ethernet(BROADCAST, CONTAINER_A1.mac, 0x8100, &good), Drop(EtherType)),
        sent("VLAN tag beside the packet", good.clone(), Drop(EtherType)).vlan(5),
        sent(
            "VLAN tag to a neighbour",
            datagram(CONTAINER_A1, CONTAINER_A2, b"x"),
            Drop(EtherType),
        )
        .vlan(5),
        sent(
            "ARP with a VLAN tag",
            ethernet(BROADCAST, CONTAINER_A1.mac, ARP, &arp(1, CONTAINER_A1, CONTAINER_A2)),
            Drop(EtherType),
        )
        .vlan(5),
        sent("QinQ", ethernet(BROADCAST, CONTAINER_A1.mac, 0x88a8, &good), Drop(EtherType)),
        sent(
            "a loopback source",
            with_header(CONTAINER_B1, Ipv4 { source: [127, 0, 0, 1], ..header(CONTAINER_B1) }),
            Drop(SpoofedAddress),
        ),
        sent(
            "the receiver's own address",
            with_header(
                CONTAINER_B1,
                Ipv4 { source: CONTAINER_B1.address, ..header(CONTAINER_B1) },
            ),
            Drop(SpoofedAddress),
        ),
        sent(
            "VXLAN to a VTEP",
            {
                let vxlan = &Vxlan::new(HOST_A, HOST_B, VNI_RED).build(&good)[42..];
                let (from, to) = (CONTAINER_A1.address, HOST_B.address);
                let payload = udp(from, to, (1, VXLAN_PORT), vxlan);
                ethernet(
                    GATEWAY.mac,
                    CONTAINER_A1.mac,
                    IPV4,
                    &Ipv4::new(from, to, UDP).build(&payload),
                )
            },
            Drop(NoEndpoint),
        ),
        sent("802.3 length", ethernet(BROADCAST, CONTAINER_A1.mac, 60, &good), Drop(EtherType)),
        sent("IPv6 after an IPv4 ethertype", other(14, 0x65), Drop(BadIpHeader)),
        sent("header length of four words", other(14, 0x44), Drop(BadIpHeader)),
        sent(
            "source address of a neighbour",
            with_header(
                CONTAINER_B1,
                Ipv4 { source: CONTAINER_A2.address, ..header(CONTAINER_B1) },
            ),
            Drop(SpoofedAddress),
        ),
        sent(
            "a neighbour's address towards the gateway",
            with_header(GATEWAY, Ipv4 { source: CONTAINER_A2.address, ..header(GATEWAY) }),
            Drop(SpoofedAddress),
        ),
        sent("mDNS", with_header(NOBODY, multicast([224, 0, 0, 251])), Drop(Multicast)),
        sent(
            "last multicast",
            with_header(NOBODY, multicast([239, 255, 255, 255])),
            Drop(Multicast),
        ),
        sent("limited broadcast", with_header(NOBODY, multicast([255; 4])), Drop(Multicast)),
        sent(
            "just below multicast",
            with_header(NOBODY, multicast([223, 0, 0, 1])),
            Drop(NoEndpoint),
        ),
        sent("an address nobody has", long(NOBODY, 100), Drop(NoEndpoint)),
        sent("subnet broadcast", with_header(NOBODY, multicast([10, 0, 0, 255])), Drop(NoEndpoint)),
        sent("an endpoint of another network", long(CONTAINER_A4, 100), Drop(NoEndpoint)),
        sent("the gateway of another network", long(GATEWAY_RED, 100), Drop(NoEndpoint)),
        sent("nobody in a network that is not there", long(GATEWAY, 100), Drop(NoEndpoint))
            .with(|tables| tables.networks.clear()),
        sent("no VTEP address", good.clone(), Drop(NotConfigured))
            .with(|tables| tables.config.vtep = [0; 16]),
        sent("no external device", good.clone(), Drop(NotConfigured))
            .with(|tables| tables.config.external_ifindex = 0),
    ];
    for length in 14..34 {
        let name = format!("IPv4 cut off at {length}");
        all.push(sent(&name, good[..length].to_vec(), Drop(Truncated)));
    }
    all
}

fn datagram_as(mac: Mac) -> Vec<u8> {
    datagram(Party { mac, ..CONTAINER_A1 }, CONTAINER_B1, b"x")
}

fn arp_requests() -> Vec<Fixture> {
    let asks = |sender: Party, target: Party| {
        let target = Party { mac: [0; 6], ..target };
        ethernet(BROADCAST, CONTAINER_A1.mac, ARP, &arp(1, sender, target))
    };
    let answered = |name: &str, target: Party| {
        let reply = ethernet(CONTAINER_A1.mac, target.mac, ARP, &arp(2, target, CONTAINER_A1));
        let answer = Answered(Answer::Arp, PORT_A1);
        sent(name, asks(CONTAINER_A1, target), answer).becomes(reply)
    };
    let silent = |name: &str, target| sent(name, asks(CONTAINER_A1, target), Drop(ArpUnanswered));
    let probe = Party { address: [0; 4], ..CONTAINER_A1 };
    let probe_reply =
        ethernet(CONTAINER_A1.mac, CONTAINER_A2.mac, ARP, &arp(2, CONTAINER_A2, probe));
    let request = asks(CONTAINER_A1, CONTAINER_A2);
    let mut all = vec![
        answered("ARP for a local endpoint", CONTAINER_A2),
        answered("ARP for a remote endpoint", CONTAINER_B1),
        answered("ARP for the gateway", GATEWAY),
        answered("ARP for a remote endpoint without a VTEP address", CONTAINER_B1)
            .with(|tables| tables.config.vtep = [0; 16]),
        sent(
            "a probe for an address that is taken",
            asks(probe, CONTAINER_A2),
            Answered(Answer::Arp, PORT_A1),
        )
        .becomes(probe_reply),
        silent("ARP for an address nobody has", NOBODY),
        silent("an announcement of one's own address", CONTAINER_A1),
        silent("ARP for an endpoint of another network", CONTAINER_A4),
        silent("ARP for the gateway of another network", GATEWAY_RED),
        silent("ARP for the gateway of a network that is not there", GATEWAY)
            .with(|tables| tables.networks.clear()),
        sent("a probe for one's own address", asks(probe, CONTAINER_A1), Drop(ArpUnanswered)),
        sent(
            "an ARP reply nobody asked for",
            ethernet(BROADCAST, CONTAINER_A1.mac, ARP, &arp(2, CONTAINER_A1, CONTAINER_A2)),
            Drop(ArpUnanswered),
        ),
        sent(
            "ARP with a neighbour's MAC inside",
            asks(Party { mac: CONTAINER_A2.mac, ..CONTAINER_A1 }, CONTAINER_B1),
            Drop(SpoofedMac),
        ),
        sent(
            "ARP with a neighbour's address",
            asks(Party { address: CONTAINER_A2.address, ..CONTAINER_A1 }, CONTAINER_B1),
            Drop(SpoofedAddress),
        ),
        sent(
            "ARP with the gateway's address",
            asks(Party { address: GATEWAY.address, ..CONTAINER_A1 }, CONTAINER_B1),
            Drop(SpoofedAddress),
        ),
    ];
    // The first six bytes say that it is ARP for IPv4 over Ethernet, the next two what it wants.
    for at in 14..22 {
        let mut packet = request.clone();
        packet[at] ^= 0x40;
        all.push(sent(&format!("ARP with byte {at} wrong"), packet, Drop(ArpUnanswered)));
    }
    for length in 14..42 {
        let name = format!("ARP cut off at {length}");
        all.push(sent(&name, request[..length].to_vec(), Drop(Truncated)));
    }
    all
}

fn gateway() -> Vec<Fixture> {
    let to_gateway = |ip: Ipv4, payload: &[u8]| {
        ethernet(GATEWAY.mac, CONTAINER_A1.mac, IPV4, &ip.build(payload))
    };
    let icmp = || Ipv4::new(CONTAINER_A1.address, GATEWAY.address, ICMP);
    let back = Ipv4::new(GATEWAY.address, CONTAINER_A1.address, ICMP);
    let answer = Answered(Answer::Echo, PORT_A1);
    let ping = to_gateway(icmp(), &echo(8, b"some ping"));
    let pong = ethernet(CONTAINER_A1.mac, GATEWAY.mac, IPV4, &back.build(&echo(0, b"some ping")));
    let broadcast =
        ethernet(BROADCAST, CONTAINER_A1.mac, IPV4, &icmp().build(&echo(8, b"some ping")));
    let to = |name: &str, packet| sent(name, packet, Drop(ToGateway));
    let mut all = vec![
        sent("a ping of the gateway", ping.clone(), answer).becomes(pong.clone()),
        sent("a ping of the gateway by broadcast", broadcast, answer).becomes(pong),
        to("UDP to the gateway", long(GATEWAY, 100)),
        to("an echo reply to the gateway", to_gateway(icmp(), &echo(0, b"x"))),
        to("an ICMP error to the gateway", to_gateway(icmp(), &echo(3, b"x"))),
        to("a fragmented ping", to_gateway(icmp().fragment(0x2000), &echo(8, b"x"))),
        to("a later fragment of a ping", to_gateway(icmp().fragment(7), &echo(8, b"x"))),
        to("a ping with options", to_gateway(icmp().options(&[1; 4]), &echo(8, b"x"))),
    ];
    // The sum passes through zero with a payload that makes it so.
    for filler in [[0xf7, 0xff], [0xff, 0xff], [0xe5, 0xcb], [0, 0]] {
        let ping = to_gateway(icmp(), &echo(8, &filler));
        let back = Ipv4::new(GATEWAY.address, CONTAINER_A1.address, ICMP).build(&echo(0, &filler));
        let pong = ethernet(CONTAINER_A1.mac, GATEWAY.mac, IPV4, &back);
        all.push(sent(&format!("a ping with {filler:02x?}"), ping, answer).becomes(pong));
    }
    for length in 34..42 {
        let name = format!("a ping cut off at {length}");
        all.push(sent(&name, ping[..length].to_vec(), Drop(Truncated)));
    }
    all
}

fn local() -> Vec<Fixture> {
    let to_a2 = datagram(CONTAINER_A1, CONTAINER_A2, b"x");
    let mut by_gateway = to_a2.clone();
    by_gateway[..6].copy_from_slice(&GATEWAY.mac);
    let fragment = with_header(CONTAINER_A2, header(CONTAINER_A2).fragment(0x2000));
    let options = with_header(CONTAINER_A2, header(CONTAINER_A2).options(&[1; 8]));
    let from_a4 = Fixture::new(
        "local delivery knows networks apart",
        Program::FromContainer,
        PORT_A4,
        datagram(CONTAINER_A4, CONTAINER_A2, b"x"),
        Drop(NoEndpoint),
    );
    vec![
        from_a4,
        sent("local delivery", to_a2.clone(), Deliver(PORT_A2)),
        sent("local delivery by the gateway's MAC", by_gateway, Deliver(PORT_A2))
            .becomes(to_a2.clone()),
        sent("local delivery without a VTEP address", to_a2.clone(), Deliver(PORT_A2))
            .with(|tables| tables.config = Default::default()),
        // Its own kernel drops what comes from its own address.
        sent("to oneself", datagram(CONTAINER_A1, CONTAINER_A1, b"x"), Deliver(PORT_A1)),
        sent("local delivery of a fragment", fragment, Deliver(PORT_A2)),
        sent("local delivery of options", options, Deliver(PORT_A2)),
        sent("local delivery of a GSO packet", long(CONTAINER_A2, 3000), Deliver(PORT_A2))
            .gso(1400),
        sent("local delivery of 20 bytes of IPv4", to_a2[..34].to_vec(), Deliver(PORT_A2)),
    ]
}

fn remote_fast() -> Vec<Fixture> {
    let fast = |name: &str, to: Party, tos: u8, packet: Vec<u8>| {
        let out = encapsulated(to, tos, &packet);
        sent(name, packet, Encapsulate(UPLINK)).becomes(out)
    };
    let to_b1 = datagram(CONTAINER_A1, CONTAINER_B1, b"x");
    let mut by_gateway = to_b1.clone();
    by_gateway[..6].copy_from_slice(&GATEWAY.mac);
    let routed = Vxlan { macs: (ROUTER.mac, HOST_A.mac), ..Vxlan::new(HOST_A, HOST_E, VNI_BLUE) };
    let to_e1 = long(CONTAINER_E1, ROUTED_MTU - OUTER);
    let other_port = Vxlan { ports: (0, 8472), ..Vxlan::new(HOST_A, HOST_B, VNI_BLUE) };
    let tcp = tcp(CONTAINER_A1.address, CONTAINER_B1.address, (1000, 80), &[], b"GET /");
    let tcp = Ipv4::new(CONTAINER_A1.address, CONTAINER_B1.address, TCP).build(&tcp);
    let tcp = ethernet(CONTAINER_B1.mac, CONTAINER_A1.mac, IPV4, &tcp);
    let from_a4 = datagram(CONTAINER_A4, CONTAINER_B4, b"x");
    let red = Fixture::new(
        "the other network has its own VNI",
        Program::FromContainer,
        PORT_A4,
        from_a4.clone(),
        Encapsulate(UPLINK),
    );
    let mut all = vec![
        red.becomes(Vxlan::new(HOST_A, HOST_B, VNI_RED).build(&from_a4)),
        fast("UDP to another host", HOST_B, 0, to_b1.clone()),
        fast("TCP to another host", HOST_B, 0, tcp),
        fast("20 bytes of IPv4 to another host", HOST_B, 0, to_b1[..34].to_vec()),
        fast(
            "as long as the uplink's MTU allows",
            HOST_B,
            0,
            long(CONTAINER_B1, UPLINK_MTU - OUTER),
        ),
        fast(
            "no time to live left",
            HOST_B,
            0,
            with_header(CONTAINER_B1, header(CONTAINER_B1).ttl(0)),
        ),
        fast("VXLAN inside, to an endpoint", HOST_B, 0, {
            let vxlan = &Vxlan::new(HOST_A, HOST_B, VNI_RED).build(&to_b1)[42..];
            let (from, to) = (CONTAINER_A1, CONTAINER_B1);
            let payload = udp(from.address, to.address, (1, VXLAN_PORT), vxlan);
            let packet = Ipv4::new(from.address, to.address, UDP).build(&payload);
            ethernet(to.mac, from.mac, IPV4, &packet)
        }),
        fast(
            "DF inside is not copied",
            HOST_B,
            0,
            with_header(CONTAINER_B1, header(CONTAINER_B1).fragment(0x4000)),
        ),
        fast("DSCP stays inside", HOST_B, 1, marked(CONTAINER_A1, CONTAINER_B1, 0xb9)),
        sent("by the gateway's MAC to another host", by_gateway, Encapsulate(UPLINK))
            .becomes(encapsulated(HOST_B, 0, &to_b1)),
        sent("by a router, as long as its route allows", to_e1.clone(), Encapsulate(UPLINK))
            .becomes(routed.build(&to_e1)),
        sent("the peer's own port", to_b1.clone(), Encapsulate(UPLINK))
            .becomes(other_port.build(&to_b1))
            .with(|tables| {
                for endpoint in tables.endpoints.values_mut() {
                    endpoint.vxlan_port_be = 8472u16.to_be();
                }
            }),
    ];
    for ecn in 0..4 {
        let packet = marked(CONTAINER_A1, CONTAINER_B1, 0x28 | ecn);
        all.push(fast(&format!("ECN {ecn:02b} is copied"), HOST_B, ecn, packet));
    }
    all
}

fn remote_slow() -> Vec<Fixture> {
    let slow = |name: &str, packet, reason| sent(name, packet, Slow(reason, EXTERNAL));
    let to_b1 = datagram(CONTAINER_A1, CONTAINER_B1, b"x");
    let fragment = |bits| with_header(CONTAINER_B1, header(CONTAINER_B1).fragment(bits));
    let gso_tcp = |options: &[u8]| {
        let (from, to) = (CONTAINER_A1.address, CONTAINER_B1.address);
        let segment = tcp(from, to, (1000, 80), options, &[0x5a; 3000]);
        let packet = Ipv4::new(from, to, TCP).build(&segment);
        ethernet(CONTAINER_B1.mac, CONTAINER_A1.mac, IPV4, &packet)
    };
    // What a segment carries beside its payload: the outer headers, IPv4 and TCP or UDP.
    let room = |headers: usize| u32::try_from(UPLINK_MTU - OUTER - 20 - headers).unwrap();
    let tcp = gso_tcp(&[]);
    let from_a3 = Fixture::new(
        "forwarding off on the veth",
        Program::FromContainer,
        PORT_A3,
        datagram(CONTAINER_A3, CONTAINER_B1, b"x"),
        Slow(Fib, EXTERNAL),
    );
    vec![
        from_a3,
        slow("a first fragment", fragment(0x2000), Fragment),
        slow("a later fragment", fragment(0x2001), Fragment),
        slow("the last fragment", fragment(0x1fff), Fragment),
        slow(
            "options",
            with_header(CONTAINER_B1, header(CONTAINER_B1).options(&[1; 4])),
            IpOptions,
        ),
        slow(
            "40 bytes of options",
            with_header(CONTAINER_B1, header(CONTAINER_B1).options(&[1; 40])),
            IpOptions,
        ),
        slow("a neighbour not resolved yet", long(CONTAINER_C1, 100), NoNeighbour),
        slow("no route", long(CONTAINER_D1, 100), Fib),
        slow("to our own address", to_b1.clone(), Fib)
            .with(|tables| remote(tables, VNI_BLUE, CONTAINER_B1, HOST_A)),
        slow(
            "a byte longer than the uplink's MTU",
            long(CONTAINER_B1, UPLINK_MTU - OUTER + 1),
            FragmentationNeeded,
        ),
        slow(
            "a byte longer than the route's MTU",
            long(CONTAINER_E1, ROUTED_MTU - OUTER + 1),
            FragmentationNeeded,
        ),
        // A test run cannot say of what type a GSO packet is, so one that fits gets as far as the
        // kernel's refusal to resize it. That GSO is kept is shown by the net layer.
        slow("TCP segments that fit, of no known type", tcp.clone(), NoRoom).gso(room(20)),
        slow("TCP segments a byte too long", tcp.clone(), FragmentationNeeded).gso(room(20) + 1),
        slow("TCP options count for each segment", gso_tcp(&[1; 12]), NoRoom).gso(room(32)),
        slow("TCP options make segments too long", gso_tcp(&[1; 12]), FragmentationNeeded)
            .gso(room(32) + 1),
        slow("UDP segments that fit", long(CONTAINER_B1, 3000), NoRoom).gso(room(8)),
        slow("UDP segments a byte too long", long(CONTAINER_B1, 3000), FragmentationNeeded)
            .gso(room(8) + 1),
        slow("segments longer than IP can say", tcp.clone(), FragmentationNeeded).gso(0xffff),
        slow("a GSO packet without a TCP header", tcp[..46].to_vec(), NotLinear).gso(1000),
    ]
}

#[test]
fn from_container_follows_its_table() {
    bench("from_container_follows_its_table", |bench| check_all(bench, &fixtures()));
}
