//! Published ports, packet after packet: each scenario begins without flows, and every step is
//! compared byte by byte, with its verdict and its counters.

use aya::maps::HashMap;
use ovnet_common::{
    abi::{Program, map, mapped},
    published::{FlowKey, FlowValue, PublishedKey, PublishedValue, published_flags},
    verdict::{
        KernelReason::{Fragment, NoFlow, PortsClash, TimeExceeded, TooLong},
        Verdict::{self, Kernel, Pass, Publish, Return},
    },
};
use ovnet_tests::{
    bpf::{Bench, GATEWAY_PORT, Input, OTHER_GATEWAY_PORT, UPLINK, bench},
    compare::difference,
    fixture::{describe, moved, movement, return_code, world},
    packet::*,
};

/// The host's port and the sandbox's behind it.
pub(crate) const HOST_PORT: u16 = 90;
pub(crate) const PORT: u16 = 80;
/// A second host port that leads to the same.
const SECOND_PORT: u16 = 91;
pub(crate) const CLIENT_PORT: u16 = 40_000;

pub(crate) const SYN: u8 = 2;
pub(crate) const ACK: u8 = 0x10;
const SYN_ACK: u8 = 0x12;
const FIN: u8 = 0x11;
const RST: u8 = 4;

/// Packets one after the other.
pub(crate) struct Scenario {
    pub(crate) name: &'static str,
    pub(crate) steps: Vec<Step>,
}

/// A packet and what must become of it.
pub(crate) struct Step {
    pub(crate) program: Program,
    pub(crate) ifindex: u32,
    pub(crate) packet: Vec<u8>,
    pub(crate) verdict: Verdict,
    pub(crate) output: Vec<u8>,
}

impl Step {
    /// A packet that stays as it is.
    fn stays(program: Program, ifindex: u32, packet: Vec<u8>, verdict: Verdict) -> Self {
        let output = packet.clone();
        Self { program, ifindex, packet, verdict, output }
    }

    fn run(&self, bench: &mut Bench, name: &str) -> Vec<u8> {
        let Self { program, ifindex, packet, verdict, output: _ } = self;
        let input = Input {
            program: *program,
            ifindex: *ifindex,
            gso_size: 0,
            tunnel_key: None,
            vlan: 0,
            packet: packet.clone(),
            repeat: 1,
        };
        let before = bench.counters();
        let (code, found) = bench.run(&input);
        let moved = moved(&before, &bench.counters());
        let wanted = movement(&input, *verdict, &world());
        assert_eq!(describe(&moved), describe(&wanted), "{name}: counters");
        assert_eq!(code, return_code(*program, *verdict), "{name}: return code");
        found
    }

    pub(crate) fn check(&self, bench: &mut Bench, name: &str) {
        let found = self.run(bench, name);
        assert!(found == self.output, "{name}: {}", difference(name, &self.output, &found));
    }
}

/// The tables: two host ports for one of the sandbox's, TCP and UDP.
pub(crate) fn set_up(bench: &mut Bench) {
    let mut tables = world();
    tables.config.published = 1;
    for (protocol, port) in [(TCP, HOST_PORT), (UDP, HOST_PORT), (TCP, SECOND_PORT)] {
        let key = PublishedKey {
            address: mapped(HOST_A.address),
            port_be: port.to_be(),
            protocol,
            reserved: 0,
        };
        let value = PublishedValue {
            address: mapped(SANDBOX.address),
            ifindex: GATEWAY_PORT,
            port_be: PORT.to_be(),
            mac: SANDBOX.mac,
            gateway_mac: GWBRIDGE.mac,
            mtu: 1500,
            flags: published_flags::XDP,
        };
        tables.published.insert(key, value);
    }
    bench.set_tables(&tables);
    forget(bench);
}

/// Removes every flow.
pub(crate) fn forget(bench: &mut Bench) {
    let conntrack = bench.datapath.conntrack().unwrap();
    conntrack.sweep(0, &std::collections::BTreeMap::new()).unwrap();
    assert_eq!(conntrack.entries().unwrap(), []);
}

/// Enters flows by hand.
fn enter(bench: &mut Bench, flows: impl Iterator<Item = (FlowKey, FlowValue)>) {
    let map = bench.datapath.ebpf().map_mut(map::CONNTRACK).unwrap();
    let mut map: HashMap<_, FlowKey, FlowValue> = map.try_into().unwrap();
    for (key, value) in flows {
        map.insert(key, value, 0).unwrap();
    }
}

/// A packet of the client, in its frame: it comes by the router.
fn from_client(ip: &Ipv4, payload: &[u8]) -> Vec<u8> {
    ethernet(HOST_A.mac, ROUTER.mac, IPV4, &ip.build(payload))
}

/// The same as the sandbox gets it.
fn to_sandbox(ip: &Ipv4, payload: &[u8]) -> Vec<u8> {
    ethernet(SANDBOX.mac, GWBRIDGE.mac, IPV4, &ip.clone().ttl(63).build(payload))
}

/// A packet of the sandbox.
fn from_sandbox(ip: &Ipv4, payload: &[u8]) -> Vec<u8> {
    ethernet(GWBRIDGE.mac, SANDBOX.mac, IPV4, &ip.build(payload))
}

/// The same as it goes back to the router.
fn to_client(ip: &Ipv4, payload: &[u8]) -> Vec<u8> {
    ethernet(ROUTER.mac, HOST_A.mac, IPV4, &ip.clone().ttl(63).build(payload))
}

/// The four headers of a flow: as the client sends and the sandbox gets it, and back.
pub(crate) fn addresses(protocol: u8) -> [Ipv4; 4] {
    let (client, host, sandbox) = (CLIENT.address, HOST_A.address, SANDBOX.address);
    [
        Ipv4::new(client, host, protocol),
        Ipv4::new(client, sandbox, protocol),
        Ipv4::new(sandbox, client, protocol),
        Ipv4::new(host, client, protocol),
    ]
}

/// A segment of the client that is delivered.
pub(crate) fn tcp_in(program: Program, flags: u8, payload: &[u8]) -> Step {
    let [sent, got, ..] = addresses(TCP);
    let build = |ip: &Ipv4, port| {
        segment(ip.source, ip.destination, (CLIENT_PORT, port), flags, &[1; 12], payload)
    };
    Step {
        program,
        ifindex: UPLINK,
        packet: from_client(&sent, &build(&sent, HOST_PORT)),
        verdict: Publish(GATEWAY_PORT),
        output: to_sandbox(&got, &build(&got, PORT)),
    }
}

/// A segment of the sandbox that goes back. What XDP saw came by the loopback device of the test run.
pub(crate) fn tcp_back(arrived: Program, flags: u8, payload: &[u8]) -> Step {
    let [.., sent, got] = addresses(TCP);
    let build = |ip: &Ipv4, port| {
        segment(ip.source, ip.destination, (port, CLIENT_PORT), flags, &[], payload)
    };
    Step {
        program: Program::FromGwbridge,
        ifindex: GATEWAY_PORT,
        packet: from_sandbox(&sent, &build(&sent, PORT)),
        verdict: Return(way_back(arrived)),
        output: to_client(&got, &build(&got, HOST_PORT)),
    }
}

fn way_back(arrived: Program) -> u32 {
    if arrived == Program::UplinkXdp { 1 } else { UPLINK }
}

pub(crate) fn udp_in(program: Program, payload: &[u8]) -> Step {
    let [sent, got, ..] = addresses(UDP);
    let build = |ip: &Ipv4, port| udp(ip.source, ip.destination, (CLIENT_PORT, port), payload);
    Step {
        program,
        ifindex: UPLINK,
        packet: from_client(&sent, &build(&sent, HOST_PORT)),
        verdict: Publish(GATEWAY_PORT),
        output: to_sandbox(&got, &build(&got, PORT)),
    }
}

pub(crate) fn udp_back(arrived: Program, payload: &[u8]) -> Step {
    let [.., sent, got] = addresses(UDP);
    let build = |ip: &Ipv4, port| udp(ip.source, ip.destination, (port, CLIENT_PORT), payload);
    Step {
        program: Program::FromGwbridge,
        ifindex: GATEWAY_PORT,
        packet: from_sandbox(&sent, &build(&sent, PORT)),
        verdict: Return(way_back(arrived)),
        output: to_client(&got, &build(&got, HOST_PORT)),
    }
}

impl Step {
    /// The same packet, which is left as it is.
    fn left(self, verdict: Verdict) -> Self {
        Self { output: self.packet.clone(), verdict, ..self }
    }

    /// What XDP cannot say: it passes, and TC says why.
    fn left_by(self, program: Program, verdict: Verdict) -> Self {
        self.left(if program == Program::UplinkXdp { Pass } else { verdict })
    }
}

pub(crate) fn scenarios() -> Vec<Scenario> {
    let mut all = Vec::new();
    for program in [Program::FromUplink, Program::UplinkXdp] {
        all.extend(flows(program));
    }
    all.extend(fragments());
    all.extend(errors());
    all.extend(limits());
    all
}

fn flows(program: Program) -> Vec<Scenario> {
    let arrival = |flags, payload: &[u8]| tcp_in(program, flags, payload);
    let answer = |flags, payload: &[u8]| tcp_back(program, flags, payload);
    let no_flow = |step: Step| step.left_by(program, Kernel(NoFlow));
    let scenario = |name, steps| Scenario { name, steps };
    let mut unmarked = udp_in(program, b"no checksum");
    for packet in [&mut unmarked.packet, &mut unmarked.output] {
        packet[40..42].fill(0);
    }
    vec![
        scenario(
            "a connection from its first segment to its last",
            vec![
                arrival(SYN, b""),
                answer(SYN_ACK, b""),
                arrival(ACK, b"GET /"),
                answer(ACK, b"an answer of odd length"),
                arrival(FIN, b""),
                answer(ACK, b"more"),
                answer(FIN, b""),
                arrival(ACK, b""),
            ],
        ),
        scenario(
            "datagrams",
            vec![
                udp_in(program, b"odd"),
                udp_back(program, b"even"),
                udp_in(program, b""),
                udp_back(program, &[7; 1400]),
            ],
        ),
        scenario("a datagram without checksum", vec![unmarked]),
        scenario(
            "a segment in the middle of an unknown connection is the kernel's",
            vec![
                no_flow(arrival(ACK, b"")),
                no_flow(arrival(FIN, b"")),
                no_flow(arrival(RST, b"")),
                no_flow(arrival(SYN_ACK, b"")),
            ],
        ),
        scenario(
            "a SYN opens again what was reset",
            vec![
                arrival(SYN, b""),
                answer(RST, b""),
                // What is still on its way goes where it would have gone.
                arrival(ACK, b"late"),
                arrival(SYN, b""),
                answer(SYN_ACK, b""),
            ],
        ),
        scenario(
            "another port, and a packet to another address, are not ours",
            vec![
                Step::stays(program, UPLINK, not_ours(HOST_A, 92), Pass),
                Step::stays(program, UPLINK, not_ours(HOST_B, HOST_PORT), Pass),
            ],
        ),
    ]
}

fn not_ours(to: Party, port: u16) -> Vec<u8> {
    let ip = Ipv4::new(CLIENT.address, to.address, TCP);
    let syn = segment(ip.source, ip.destination, (CLIENT_PORT, port), SYN, &[], b"");
    from_client(&ip, &syn)
}

/// A datagram in fragments of so many bytes, one in another order than the other.
pub(crate) fn pieces(ip: &Ipv4, datagram: &[u8], size: usize) -> Vec<(Ipv4, Vec<u8>)> {
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
            packet: from_sandbox(&said.0, &said.1),
            verdict: Return(UPLINK),
            output: to_client(&heard.0, &heard.1),
        };
        let again = || Step { packet: inwards.packet.clone(), output: Vec::new(), ..inwards };
        let echo = from_client(&router(HOST_A), &echo(8, b"is no error"));
        let begin = match protocol {
            TCP => tcp_in(Program::FromUplink, SYN, b""),
            _ => udp_in(Program::FromUplink, b"begin"),
        };
        let elsewhere = Step { ifindex: OTHER_GATEWAY_PORT, ..again() };
        let elsewhere =
            Step { packet: back.packet.clone(), program: Program::FromGwbridge, ..elsewhere };
        scenarios.push(Scenario {
            name,
            steps: vec![
                again().left(Pass),
                begin,
                inwards,
                back,
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
    vec![
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

#[test]
fn packets_of_published_ports_are_translated() {
    bench("packets_of_published_ports_are_translated", |bench| {
        for Scenario { name, steps } in scenarios() {
            set_up(bench);
            for (number, step) in steps.iter().enumerate() {
                step.check(bench, &format!("{name}, step {number}"));
            }
        }
    });
}

/// Past the bridge's own port, where br_netfilter would have it.
#[test]
fn what_is_for_the_bridge_to_route_is_given_to_it() {
    bench("what_is_for_the_bridge_to_route_is_given_to_it", |bench| {
        const BRIDGE: u32 = UPLINK;
        let mut tables = world();
        (tables.config.gwbridge_ifindex, tables.config.gwbridge_mac) = (BRIDGE, GWBRIDGE.mac);
        bench.set_tables(&tables);
        let ip = Ipv4::new(SANDBOX.address, CLIENT.address, TCP);
        let syn = segment(ip.source, ip.destination, (1, 443), SYN, &[], b"");
        let program = Program::FromGwbridge;
        let step = |packet, verdict| Step::stays(program, GATEWAY_PORT, packet, verdict);
        step(from_sandbox(&ip, &syn), Verdict::Egress(BRIDGE)).check(bench, "to the bridge");
        let beside = ethernet(CONTAINER_A2.mac, SANDBOX.mac, IPV4, &ip.build(&syn));
        step(beside, Pass).check(bench, "to a neighbour, whom the bridge keeps apart");
        let request = ethernet(GWBRIDGE.mac, SANDBOX.mac, ARP, &arp(1, SANDBOX, GWBRIDGE));
        step(request, Pass).check(bench, "ARP");
    });
}

/// The client uses one port for two published ports that lead to the same: inside, both would be
/// one connection.
#[test]
fn two_flows_that_would_be_alike_inside_are_told_apart() {
    bench("two_flows_that_would_be_alike_inside_are_told_apart", |bench| {
        set_up(bench);
        let program = Program::FromUplink;
        tcp_in(program, SYN, b"").check(bench, "the first");
        let [sent, got, back, returned] = addresses(TCP);
        let ports = (CLIENT_PORT, SECOND_PORT);
        let syn = segment(sent.source, sent.destination, ports, SYN, &[], b"");
        let second = Step::stays(program, UPLINK, from_client(&sent, &syn), Publish(GATEWAY_PORT));
        let found = second.run(bench, "the second");
        let chosen = u16::from_be_bytes([found[34], found[35]]);
        assert_ne!(chosen, CLIENT_PORT);
        let expected = segment(got.source, got.destination, (chosen, PORT), SYN, &[], b"");
        assert_eq!(found, to_sandbox(&got, &expected));
        // The same again for its next packet, and each answer goes to its own.
        assert_eq!(second.run(bench, "the second again"), found);
        let answer =
            |ip: &Ipv4, ports| segment(ip.source, ip.destination, ports, SYN_ACK, &[], b"");
        Step {
            program: Program::FromGwbridge,
            ifindex: GATEWAY_PORT,
            packet: from_sandbox(&back, &answer(&back, (PORT, chosen))),
            verdict: Return(UPLINK),
            output: to_client(&returned, &answer(&returned, (SECOND_PORT, CLIENT_PORT))),
        }
        .check(bench, "the second's answer");
        tcp_back(program, SYN_ACK, b"").check(bench, "the first's answer");
    });
}

#[test]
fn a_flow_for_which_there_is_no_port_left_is_the_kernels() {
    bench("a_flow_for_which_there_is_no_port_left_is_the_kernels", |bench| {
        set_up(bench);
        let program = Program::FromUplink;
        tcp_in(program, SYN, b"").check(bench, "the first");
        let entries = bench.datapath.conntrack().unwrap().entries().unwrap();
        let taken = entries.into_iter().find(|(_, value)| value.direction == 1).unwrap();
        enter(
            bench,
            (0x8000..=0xffff_u16).map(|port| {
                let key = FlowKey { destination_port_be: port.to_be(), ..taken.0 };
                (key, FlowValue { peer_port_be: 1, ..taken.1 })
            }),
        );
        let [sent, ..] = addresses(TCP);
        let ports = (CLIENT_PORT, SECOND_PORT);
        let syn = segment(sent.source, sent.destination, ports, SYN, &[], b"");
        let packet = from_client(&sent, &syn);
        Step::stays(program, UPLINK, packet, Kernel(PortsClash)).check(bench, "the second");
        forget(bench);
    });
}
