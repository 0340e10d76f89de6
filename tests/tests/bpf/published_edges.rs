//! Published ports at their edges: fragments, ICMP errors, and what is too long, too old or not ours.

use ovnet_common::{
    abi::Program,
    verdict::{
        DropReason::{EtherType, HostLoopback, SpoofedAddress, SpoofedMac, Truncated, VxlanPort},
        KernelReason::{Fragment, Martian, TimeExceeded, TooLong},
        Verdict::{Drop, Kernel, Pass, Publish, Return},
    },
};
use ovnet_tests::{
    bpf::{GATEWAY_PORT, OTHER_GATEWAY_PORT, UPLINK},
    packet::*,
};

use super::published::{
    ACK, CLIENT_PORT, HOST_PORT, PORT, SYN, SYN_ACK, Scenario, Step, addresses, from_client,
    from_sandbox, tcp_back, tcp_in, to_client, to_sandbox, udp_in,
};

pub(crate) fn scenarios() -> Vec<Scenario> {
    let mut all = fragments();
    all.extend(errors());
    all.extend(limits());
    all.extend([Program::FromUplink, Program::UplinkXdp].map(vxlan));
    all
}

/// What leaves a published port or a gateway port leaves as this host, which is a VTEP: it may not be
/// VXLAN to anybody. The client is another host; a container there may choose its port, and one here
/// what the answer holds.
fn vxlan(program: Program) -> Scenario {
    let datagram = |from: Party, to: Party, ports, payload: &[u8]| {
        let ip = Ipv4::new(from.address, to.address, UDP);
        ip.build(&udp(from.address, to.address, ports, payload))
    };
    let inner = datagram(CONTAINER_A4, CONTAINER_B4, (1, 2), b"into another network");
    let inner = ethernet(CONTAINER_B4.mac, CONTAINER_A4.mac, IPV4, &inner);
    let vxlan = &Vxlan::new(HOST_A, HOST_B, VNI_RED).build(&inner)[42..];
    let asks = datagram(HOST_B, HOST_A, (VXLAN_PORT, HOST_PORT), b"x");
    let asks = ethernet(HOST_A.mac, HOST_B.mac, IPV4, &asks);
    let says = |from: Party, ports, gateway| {
        let packet = ethernet(GWBRIDGE.mac, from.mac, IPV4, &datagram(from, HOST_B, ports, vxlan));
        Step::stays(Program::FromGwbridge, gateway, packet, Drop(VxlanPort))
    };
    let neighbour = Party { address: [172, 18, 0, 9], ..CONTAINER_A2 };
    Scenario {
        name: "nobody speaks VXLAN as this host",
        steps: vec![
            Step::stays(program, UPLINK, asks, Drop(VxlanPort)),
            says(SANDBOX, (PORT, VXLAN_PORT), GATEWAY_PORT),
            says(SANDBOX, (40_000, VXLAN_PORT), GATEWAY_PORT),
            // Docker's containers, which have no entry.
            says(neighbour, (40_000, VXLAN_PORT), OTHER_GATEWAY_PORT),
        ],
    }
}

/// A datagram in fragments of so many bytes, one in another order than the other.
fn pieces(ip: &Ipv4, datagram: &[u8], size: usize) -> Vec<(Ipv4, Vec<u8>)> {
    let count = datagram.len().div_ceil(size);
    let piece = |(number, bytes): (usize, &[u8])| {
        let offset = u16::try_from(number * size / 8).unwrap();
        let more = if number + 1 < count { 0x2000 } else { 0 };
        (ip.clone().fragment(offset | more), bytes.to_vec())
    };
    datagram.chunks(size).enumerate().map(piece).collect()
}

/// A large datagram of the client, fragment by fragment, each delivered.
fn fragments_in(payload: &[u8]) -> Vec<Step> {
    let [sent, got, ..] = addresses(UDP);
    let build = |ip: &Ipv4, port| {
        pieces(ip, &udp(ip.source, ip.destination, (CLIENT_PORT, port), payload), 1000)
    };
    let steps = build(&sent, HOST_PORT).into_iter().zip(build(&got, PORT));
    steps
        .map(|((ip, bytes), (after, expected))| Step {
            program: Program::FromUplink,
            ifindex: UPLINK,
            vlan: 0,
            packet: from_client(&ip, &bytes),
            verdict: Publish(GATEWAY_PORT),
            output: to_sandbox(&after, &expected),
        })
        .collect()
}

fn fragments_back(payload: &[u8]) -> Vec<Step> {
    let [.., sent, got] = addresses(UDP);
    let build = |ip: &Ipv4, port| {
        let ip = Ipv4 { id: 0x5151, ..ip.clone() };
        pieces(&ip, &udp(ip.source, ip.destination, (port, CLIENT_PORT), payload), 1000)
    };
    let steps = build(&sent, PORT).into_iter().zip(build(&got, HOST_PORT));
    steps
        .map(|((ip, bytes), (after, expected))| Step {
            program: Program::FromGwbridge,
            ifindex: GATEWAY_PORT,
            vlan: 0,
            packet: from_sandbox(&ip, &bytes),
            verdict: Return(UPLINK),
            output: to_client(&after, &expected),
        })
        .collect()
}

fn fragments() -> Vec<Scenario> {
    let payload = vec![0x5a; 2500];
    let mut both = fragments_in(&payload);
    both.extend(fragments_back(&payload));
    let with_id = |id: u16, mut steps: Vec<Step>| {
        for step in &mut steps {
            for packet in [&mut step.packet, &mut step.output] {
                packet[18..20].copy_from_slice(&id.to_be_bytes());
                fix_ipv4_checksum(packet, 14);
            }
        }
        steps
    };
    let mut late = with_id(0x1111, fragments_in(&payload));
    late.swap(0, 1);
    let [middle, first, last] = <[Step; 3]>::try_from(late).ok().unwrap();
    let stranger = with_id(0x2222, fragments_in(&payload)).remove(1);
    let mut spoofed = with_id(0x3333, fragments_back(&payload));
    spoofed.insert(0, udp_in(Program::FromUplink, b"hello"));
    spoofed[2].ifindex = OTHER_GATEWAY_PORT;
    let spoofed: Vec<Step> = spoofed
        .into_iter()
        .enumerate()
        .map(|(at, step)| if at == 2 { step.left(Kernel(Fragment)) } else { step })
        .collect();
    let mut by_xdp = fragments_in(&payload).remove(0);
    by_xdp.program = Program::UplinkXdp;
    vec![
        Scenario { name: "fragments follow the first one, both ways", steps: both },
        Scenario {
            name: "where a later fragment comes first the kernel gets all",
            steps: vec![
                middle.left(Pass),
                first.left(Kernel(Fragment)),
                last.left(Kernel(Fragment)),
            ],
        },
        Scenario { name: "a fragment of nothing known", steps: vec![stranger.left(Pass)] },
        Scenario {
            name: "a fragment of another sandbox is none of the datagram's",
            steps: spoofed,
        },
        Scenario { name: "XDP leaves fragments to TC", steps: vec![by_xdp.left(Pass)] },
    ]
}

/// An ICMP error both ways, about what went the other way.
fn errors() -> Vec<Scenario> {
    let mut scenarios = Vec::new();
    for (protocol, name) in [(TCP, "about a segment"), (UDP, "about a datagram")] {
        let [sent, got, back, returned] = addresses(protocol);
        let about = |ip: &Ipv4, ports: (u16, u16)| {
            let payload = if protocol == TCP {
                tcp(ip.source, ip.destination, ports, &[], &[3; 1400])
            } else {
                udp(ip.source, ip.destination, ports, &[3; 1400])
            };
            let mut packet = ip.build(&payload);
            // The checksum of the packet it is about stays that of before: nobody can compute it.
            let at = if protocol == TCP { 36 } else { 26 };
            packet[at..at + 2].fill(0x11);
            packet.truncate(20 + 8 + 20);
            packet
        };
        // A router on the way back: the answer is too long for its next link.
        let error = |ip: Ipv4, about: Vec<u8>| (ip, icmp_error(3, 4, 1280, &about));
        let router = |to: Party| Ipv4::new(ROUTER.address, to.address, ICMP);
        let (asked, wanted) = (
            error(router(HOST_A), about(&returned, (HOST_PORT, CLIENT_PORT))),
            error(router(SANDBOX), about(&back, (PORT, CLIENT_PORT))),
        );
        let inwards = Step {
            program: Program::FromUplink,
            ifindex: UPLINK,
            vlan: 0,
            packet: from_client(&asked.0, &asked.1),
            verdict: Publish(GATEWAY_PORT),
            output: to_sandbox(&wanted.0, &wanted.1),
        };
        // The sandbox: nobody listens there.
        let unreachable = |from: Party, about: Vec<u8>| {
            let ip = Ipv4::new(from.address, CLIENT.address, ICMP);
            (ip, icmp_error(3, 3, 0, &about))
        };
        let (said, heard) = (
            unreachable(SANDBOX, about(&got, (CLIENT_PORT, PORT))),
            unreachable(HOST_A, about(&sent, (CLIENT_PORT, HOST_PORT))),
        );
        let back = Step {
            program: Program::FromGwbridge,
            ifindex: GATEWAY_PORT,
            vlan: 0,
            packet: from_sandbox(&said.0, &said.1),
            verdict: Return(UPLINK),
            output: to_client(&heard.0, &heard.1),
        };
        let again = || Step { packet: inwards.packet.clone(), output: Vec::new(), ..inwards };
        let forged = |from: [u8; 4]| {
            let ip = Ipv4 { source: from, ..asked.0.clone() };
            Step::stays(Program::FromUplink, UPLINK, from_client(&ip, &asked.1), Kernel(Martian))
        };
        let echo = from_client(&router(HOST_A), &echo(8, b"is no error"));
        let begin = match protocol {
            TCP => tcp_in(Program::FromUplink, SYN, b""),
            _ => udp_in(Program::FromUplink, b"begin"),
        };
        // About the client's packet, and to somebody else.
        let turned = Ipv4::new(SANDBOX.address, HOST_B.address, ICMP);
        let turned = from_sandbox(&turned, &icmp_error(3, 3, 0, &about(&got, (CLIENT_PORT, PORT))));
        let turned = Step::stays(Program::FromGwbridge, GATEWAY_PORT, turned, Pass);
        let elsewhere = Step { ifindex: OTHER_GATEWAY_PORT, ..again() };
        let elsewhere =
            Step { packet: back.packet.clone(), program: Program::FromGwbridge, ..elsewhere };
        scenarios.push(Scenario {
            name,
            steps: vec![
                again().left(Pass),
                begin,
                forged([127, 0, 0, 1]),
                forged(HOST_A.address),
                forged(GWBRIDGE.address),
                forged(SANDBOX.address),
                inwards,
                back,
                turned,
                elsewhere.left(Pass),
                Step::stays(Program::FromUplink, UPLINK, echo, Pass),
            ],
        });
    }
    scenarios
}

fn limits() -> Vec<Scenario> {
    let program = Program::FromUplink;
    let spent = |mut step: Step| {
        step.packet[22] = 1;
        fix_ipv4_checksum(&mut step.packet, 14);
        step.left(Kernel(TimeExceeded))
    };
    let long = tcp_back(program, ACK, &[1; 1500]);
    let long_in = Step { program: Program::UplinkXdp, ..tcp_in(program, SYN, &[1; 1500]) };
    let mut other_sandbox = tcp_back(program, SYN_ACK, b"");
    other_sandbox.ifindex = OTHER_GATEWAY_PORT;
    let options = Ipv4::new(CLIENT.address, HOST_A.address, TCP).options(&[1; 4]);
    let syn = segment(options.source, options.destination, (1, HOST_PORT), SYN, &[], b"");
    let forged = |from: [u8; 4]| {
        let ip = Ipv4::new(from, HOST_A.address, TCP);
        let syn = segment(from, ip.destination, (1, HOST_PORT), SYN, &[], b"");
        Step::stays(program, UPLINK, from_client(&ip, &syn), Kernel(Martian))
    };
    let spoofed = |change: fn(&mut Vec<u8>), reason| {
        let ip = Ipv4::new(SANDBOX.address, CLIENT.address, UDP);
        let datagram = udp(ip.source, ip.destination, (1, 2), b"x");
        let mut packet = from_sandbox(&ip, &datagram);
        change(&mut packet);
        Step::stays(Program::FromGwbridge, GATEWAY_PORT, packet, Drop(reason))
    };
    let tagged = Step { vlan: 7, ..spoofed(|_| {}, EtherType) };
    let announced = |by: Party, sender: Party, verdict| {
        let packet = ethernet(BROADCAST, by.mac, ARP, &arp(2, sender, sender));
        Step::stays(Program::FromGwbridge, GATEWAY_PORT, packet, verdict)
    };
    let mut for_others = tcp_in(Program::UplinkXdp, SYN, b"");
    for_others.packet[..6].copy_from_slice(&HOST_B.mac);
    vec![
        Scenario {
            name: "nobody else is this host",
            steps: vec![
                forged(HOST_A.address),
                forged([127, 0, 0, 1]),
                // Another address of this host, on which the port is not published.
                forged(SECOND_ADDRESS),
                // The gwbridge, and another sandbox behind it.
                forged(GWBRIDGE.address),
                forged([172, 18, 0, 7]),
                // Nobody whom anything leads to.
                forged(HOST_D.address),
                forged([224, 0, 0, 1]),
                forged([192, 168, 1, 255]),
                forged([0, 0, 0, 0]),
                forged([255; 4]),
            ],
        },
        Scenario {
            name: "a sandbox speaks for itself",
            steps: vec![
                spoofed(|frame| frame[6..12].copy_from_slice(&CONTAINER_A1.mac), SpoofedMac),
                spoofed(|frame| frame[29] = 7, SpoofedAddress),
                spoofed(|frame| frame.truncate(33), Truncated),
                spoofed(|frame| frame[30] = 127, HostLoopback),
                tagged,
                announced(SANDBOX, SANDBOX, Pass),
                announced(SANDBOX, Party { address: [0; 4], ..SANDBOX }, Pass),
                announced(SANDBOX, GWBRIDGE, Drop(SpoofedMac)),
                announced(SANDBOX, Party { mac: SANDBOX.mac, ..GWBRIDGE }, Drop(SpoofedAddress)),
                announced(GWBRIDGE, GWBRIDGE, Drop(SpoofedMac)),
            ],
        },
        Scenario { name: "what is for another MAC, at XDP", steps: vec![for_others.left(Pass)] },
        Scenario {
            name: "a time to live that ends here",
            steps: vec![
                spent(tcp_in(program, SYN, b"")),
                tcp_in(program, SYN, b""),
                spent(tcp_back(program, SYN_ACK, b"")),
            ],
        },
        Scenario {
            name: "an answer that is too long for its way out",
            steps: vec![tcp_in(program, SYN, b""), long.left(Kernel(TooLong))],
        },
        Scenario { name: "several in one, at XDP", steps: vec![long_in.left(Pass)] },
        Scenario {
            name: "another sandbox cannot answer",
            steps: vec![tcp_in(program, SYN, b""), other_sandbox.left(Pass)],
        },
        Scenario {
            name: "options are the kernel's",
            steps: vec![Step::stays(program, UPLINK, from_client(&options, &syn), Pass)],
        },
        Scenario {
            name: "ordinary egress of Docker's containers is the bridge's",
            steps: vec![tcp_back(program, SYN, b"").left(Pass)],
        },
    ]
}
