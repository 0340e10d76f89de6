//! Published ports, packet after packet: each scenario begins without flows, and every step is
//! compared byte by byte, with its verdict and its counters.

use aya::maps::HashMap;
use ovnet_common::{
    abi::{PortValue, Program, map, mapped},
    published::{FlowKey, FlowValue, PublishedKey, PublishedValue, published_flags},
    verdict::{
        KernelReason::{NoFlow, PortsClash},
        Verdict::{self, Kernel, Pass, Publish, Return},
    },
};
use ovnet_tests::{
    bpf::{Bench, GATEWAY_PORT, Input, UPLINK, bench},
    compare::difference,
    fixture::{describe, from_wire, moved, movement, return_code, world},
    model::{self, Flows},
    packet::*,
};

/// The host's port and the sandbox's behind it.
pub(crate) const HOST_PORT: u16 = 90;
pub(crate) const PORT: u16 = 80;
/// A second host port that leads to the same.
pub(crate) const SECOND_PORT: u16 = 91;
pub(crate) const CLIENT_PORT: u16 = 40_000;

pub(crate) const SYN: u8 = 2;
pub(crate) const ACK: u8 = 0x10;
pub(crate) const SYN_ACK: u8 = 0x12;
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
    /// VLAN tag the kernel found on it, 0 where there was none.
    pub(crate) vlan: u16,
    pub(crate) verdict: Verdict,
    pub(crate) output: Vec<u8>,
}

impl Step {
    /// A packet that stays as it is.
    pub(crate) fn stays(program: Program, ifindex: u32, packet: Vec<u8>, verdict: Verdict) -> Self {
        let output = packet.clone();
        Self { program, ifindex, packet, vlan: 0, verdict, output }
    }

    /// The packet, as a program gets it.
    pub(crate) fn input(&self) -> Input {
        let Self { program, ifindex, packet, vlan, .. } = self;
        Input { ifindex: *ifindex, vlan: *vlan, ..from_wire(*program, packet.clone()) }
    }

    fn run(&self, bench: &mut Bench, name: &str) -> Vec<u8> {
        let Self { program, verdict, .. } = self;
        let input = self.input();
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
    let (address, mac) = (mapped(SANDBOX.address), SANDBOX.mac);
    tables.ports.insert(GATEWAY_PORT, PortValue { vni: 0, address, mac, reserved: 0 });
    bench.set_tables(&tables);
    forget(bench);
}

/// Removes every flow.
pub(crate) fn forget(bench: &mut Bench) {
    evict(bench, |_, _| true);
    assert_eq!(bench.datapath.conntrack().unwrap().entries().unwrap(), []);
}

/// Removes the entries that are so, as the LRU may.
pub(crate) fn evict(bench: &mut Bench, is_so: impl Fn(&FlowKey, &FlowValue) -> bool) {
    let entries = bench.datapath.conntrack().unwrap().entries().unwrap();
    let map = bench.datapath.ebpf().map_mut(map::CONNTRACK).unwrap();
    let mut map: HashMap<_, FlowKey, FlowValue> = map.try_into().unwrap();
    for (key, _) in entries.iter().filter(|(key, value)| is_so(key, value)) {
        map.remove(key).unwrap();
    }
}

/// Enters flows by hand.
pub(crate) fn enter(bench: &mut Bench, flows: impl Iterator<Item = (FlowKey, FlowValue)>) {
    let map = bench.datapath.ebpf().map_mut(map::CONNTRACK).unwrap();
    let mut map: HashMap<_, FlowKey, FlowValue> = map.try_into().unwrap();
    for (key, value) in flows {
        map.insert(key, value, 0).unwrap();
    }
}

/// A packet of the client, in its frame: it comes by the router.
pub(crate) fn from_client(ip: &Ipv4, payload: &[u8]) -> Vec<u8> {
    ethernet(HOST_A.mac, ROUTER.mac, IPV4, &ip.build(payload))
}

/// The same as the sandbox gets it.
pub(crate) fn to_sandbox(ip: &Ipv4, payload: &[u8]) -> Vec<u8> {
    ethernet(SANDBOX.mac, GWBRIDGE.mac, IPV4, &ip.clone().ttl(63).build(payload))
}

/// A packet of the sandbox.
pub(crate) fn from_sandbox(ip: &Ipv4, payload: &[u8]) -> Vec<u8> {
    ethernet(GWBRIDGE.mac, SANDBOX.mac, IPV4, &ip.build(payload))
}

/// The same as it goes back to the router.
pub(crate) fn to_client(ip: &Ipv4, payload: &[u8]) -> Vec<u8> {
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
        vlan: 0,
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
        vlan: 0,
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
        vlan: 0,
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
        vlan: 0,
        packet: from_sandbox(&sent, &build(&sent, PORT)),
        verdict: Return(way_back(arrived)),
        output: to_client(&got, &build(&got, HOST_PORT)),
    }
}

impl Step {
    /// The same packet, which is left as it is.
    pub(crate) fn left(self, verdict: Verdict) -> Self {
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
    all.extend(super::published_edges::scenarios());
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

pub(crate) fn not_ours(to: Party, port: u16) -> Vec<u8> {
    let ip = Ipv4::new(CLIENT.address, to.address, TCP);
    let syn = segment(ip.source, ip.destination, (CLIENT_PORT, port), SYN, &[], b"");
    from_client(&ip, &syn)
}

#[test]
fn packets_of_published_ports_are_translated() {
    bench("packets_of_published_ports_are_translated", |bench| {
        for Scenario { name, steps } in scenarios() {
            set_up(bench);
            let (tables, mut flows) = (bench.datapath.maps().read().unwrap(), Flows::default());
            for (number, step) in steps.iter().enumerate() {
                let name = format!("{name}, step {number}");
                step.check(bench, &name);
                let mut predicted = step.packet.clone();
                let input = step.input();
                let verdict = model::next(&tables, &mut flows, &input, &mut predicted, &|_| None);
                assert_eq!(verdict, step.verdict, "{name}: the model of the rules says otherwise");
                let difference = || difference(&name, &step.output, &predicted);
                assert!(predicted == step.output, "{name}, by the model: {}", difference());
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
            vlan: 0,
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
