//! Packets as somebody hostile makes them: valid ones of every kind the programs know, changed in
//! places that mean something, from a seed.

use ovnet_agent::datapath::Tables;
use ovnet_common::{
    abi::{PortValue, Program, mapped},
    published::{PublishedKey, PublishedValue, published_flags},
};

use crate::{
    bpf::{
        GATEWAY_PORT, Input, OTHER_GATEWAY_PORT, PORT_A1, PORT_A2, PORT_A3, PORT_A4, PORT_UNKNOWN,
        TunnelKey,
    },
    fixture::{from_wire, world},
    model::Flows,
    mutate::{mutate, words},
    packet::*,
    random::Random,
};

/// The tables a storm meets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum World {
    /// Everybody is there, and ports are published.
    Ordinary,
    /// The same without an address of this host's own.
    NoVtep,
    /// The same without a published port.
    Unpublished,
    /// The same after a change: endpoints moved, networks and hosts went.
    Changed,
}

impl World {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Ordinary, Self::NoVtep, Self::Unpublished, Self::Changed];

    /// What files call it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Ordinary => "ordinary",
            Self::NoVtep => "no-vtep",
            Self::Unpublished => "unpublished",
            Self::Changed => "changed",
        }
    }

    /// The one with this name.
    pub fn by_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|it| it.name() == name)
    }

    /// Its tables.
    pub fn tables(self) -> Tables {
        let mut tables = published();
        match self {
            Self::Ordinary => {}
            Self::NoVtep => tables.config.vtep = [0; 16],
            Self::Unpublished => {
                tables.published.clear();
                tables.config.published = 0;
                tables.config.gwbridge_ifindex = 0;
            }
            Self::Changed => {
                tables.networks.remove(&VNI_RED);
                tables.hosts.remove(&mapped(HOST_C.address));
                let gone = [CONTAINER_C1, CONTAINER_B4].map(|it| mapped(it.address));
                tables.endpoints.retain(|key, _| !gone.contains(&key.address));
                crate::fixture::remote(&mut tables, VNI_BLUE, CONTAINER_E1, HOST_B);
            }
        }
        tables
    }
}

/// A second sandbox, which XDP does not reach and the tables of ports do not know, as Docker's.
pub const NEIGHBOUR: Party = Party { address: [172, 18, 0, 3], mac: [0x02, 0x42, 172, 18, 0, 3] };
/// What the tables call the gwbridge.
pub const BRIDGE: u32 = 108;
/// The port inside.
const INSIDE: u16 = 80;

fn published() -> Tables {
    let mut tables = world();
    tables.config.published = 1;
    tables.config.gwbridge_ifindex = BRIDGE;
    tables.config.gwbridge_mac = GWBRIDGE.mac;
    let second = Party { address: SECOND_ADDRESS, ..HOST_A };
    for (at, port, protocol, to, ifindex) in [
        (HOST_A, 90, TCP, SANDBOX, GATEWAY_PORT),
        (HOST_A, 90, UDP, SANDBOX, GATEWAY_PORT),
        (HOST_A, 91, TCP, SANDBOX, GATEWAY_PORT),
        (HOST_A, 91, UDP, SANDBOX, GATEWAY_PORT),
        (second, 90, TCP, SANDBOX, GATEWAY_PORT),
        (HOST_A, 92, TCP, NEIGHBOUR, OTHER_GATEWAY_PORT),
        (HOST_A, 92, UDP, NEIGHBOUR, OTHER_GATEWAY_PORT),
    ] {
        let port_be = u16::to_be(port);
        let key = PublishedKey { address: mapped(at.address), port_be, protocol, reserved: 0 };
        let value = PublishedValue {
            address: mapped(to.address),
            ifindex,
            port_be: INSIDE.to_be(),
            mac: to.mac,
            gateway_mac: GWBRIDGE.mac,
            mtu: 1500,
            flags: if to == SANDBOX { published_flags::XDP } else { 0 },
        };
        tables.published.insert(key, value);
    }
    let (address, mac) = (mapped(SANDBOX.address), SANDBOX.mac);
    tables.ports.insert(GATEWAY_PORT, PortValue { vni: 0, address, mac, reserved: 0 });
    tables
}

/// Makes packets for one program, and those for others that it needs to have something to do.
#[derive(Clone, Debug)]
pub struct Storm {
    program: Program,
    random: Random,
    corpus: Vec<Vec<u8>>,
    words: Vec<Vec<u8>>,
    talks: Vec<Talk>,
}

/// Who spoke to a published port, or tried to.
#[derive(Clone, Copy, Debug)]
struct Talk {
    client: Address,
    client_port: u16,
    host: Address,
    host_port: u16,
    protocol: u8,
}

impl Storm {
    /// A storm for `program` of packets like those of the corpus, which is not empty.
    pub fn new(program: Program, seed: u64, corpus: Vec<Vec<u8>>) -> Self {
        let random = Random::new(seed);
        Self { program, random, corpus, words: words(), talks: Vec::new() }
    }

    /// The tables of the next packets.
    pub fn world(&mut self) -> World {
        self.talks.clear();
        match self.random.below(20) {
            0 => World::NoVtep,
            1 => World::Unpublished,
            2 | 3 => World::Changed,
            _ => World::Ordinary,
        }
    }

    /// The next packet; `flows` is what is known of published ports.
    pub fn next(&mut self, flows: &Flows) -> Input {
        let mut input = match self.program {
            Program::FromUplink | Program::UplinkXdp if self.random.one_in(12) => {
                self.answer(flows)
            }
            Program::FromUplink | Program::UplinkXdp if self.random.one_in(2) => {
                let packet = self.question();
                from_wire(self.program, packet)
            }
            Program::FromGwbridge if self.random.one_in(3) => {
                let packet = self.question();
                return from_wire(Program::FromUplink, packet);
            }
            Program::FromGwbridge if !self.random.one_in(4) => self.answer(flows),
            program => {
                let packet = self.any();
                from_wire(program, packet)
            }
        };
        let random = &mut self.random;
        if random.one_in(2) {
            mutate(random, &mut input.packet, &self.words);
        }
        let gso = random.one_in(8);
        input.vlan = match input.program {
            Program::UplinkXdp => 0,
            _ => u16::from(random.one_in(30)) * 5,
        };
        match input.program {
            Program::FromContainer => {
                let ports = [PORT_A1, PORT_A2, PORT_A3, PORT_A4, PORT_UNKNOWN];
                input.ifindex = if random.one_in(8) { random.pick(&ports) } else { PORT_A1 };
                input.gso_size = if gso { 1 + u32::from(random.byte()) * 8 } else { 0 };
            }
            Program::FromUplink => input.gso_size = if gso { 1000 } else { 0 },
            Program::FromOverlay => {
                let remotes = [HOST_B, HOST_B, HOST_B, HOST_B, HOST_A, HOST_C, INTRUDER];
                let remote = random.pick(&remotes).address;
                let local = if random.one_in(10) { HOST_B } else { HOST_A }.address;
                let vnis = [VNI_BLUE, VNI_BLUE, VNI_BLUE, VNI_BLUE, VNI_RED, VNI_UNKNOWN];
                let vni = random.pick(&vnis);
                let key = TunnelKey { vni, remote, local };
                input.tunnel_key = (!random.one_in(100)).then_some(key);
                input.ifindex = PORT_UNKNOWN;
            }
            Program::FromGwbridge => {
                let ports = [GATEWAY_PORT, OTHER_GATEWAY_PORT];
                if random.one_in(10) {
                    input.ifindex = random.pick(&ports);
                }
            }
            Program::UplinkXdp => {}
        }
        input
    }

    /// A packet of the corpus, or of nothing at all.
    fn any(&mut self) -> Vec<u8> {
        let random = &mut self.random;
        if random.one_in(25) {
            let length = 14 + random.below(200);
            return (0..length).map(|_| random.byte()).collect();
        }
        self.corpus[random.below(self.corpus.len())].clone()
    }

    /// A packet to a published port, or about one, from wherever.
    fn question(&mut self) -> Vec<u8> {
        let talk = self.talk();
        let random = &mut self.random;
        let Talk { client, client_port, host, host_port, protocol } = talk;
        let from = random.pick(&[ROUTER, ROUTER, ROUTER, ROUTER, ROUTER, HOST_B]);
        let ip = header(random, client, host, protocol);
        let payload = match random.below(10) {
            0 => {
                // About an answer of the sandbox, from a router or whoever.
                let about = transport(random, host, client, (host_port, client_port), protocol);
                let about = Ipv4::new(host, client, protocol).build(&about);
                let source = if random.one_in(4) { random.pick(&STRANGERS) } else { client };
                let ip = Ipv4::new(source, host, ICMP).ttl(ip.ttl);
                let error = error(random, &about);
                return ethernet(HOST_A.mac, from.mac, IPV4, &ip.build(&error));
            }
            _ => transport(random, client, host, (client_port, host_port), protocol),
        };
        ethernet(HOST_A.mac, from.mac, IPV4, &ip.build(&payload))
    }

    /// A conversation, which may have begun before.
    fn talk(&mut self) -> Talk {
        let random = &mut self.random;
        if !self.talks.is_empty() && !random.one_in(5) {
            return random.pick(&self.talks);
        }
        let clients = [CLIENT, CLIENT, CLIENT, HOST_B, HOST_E, INTRUDER].map(|it| it.address);
        let (near, odd) = (40_000 + random.word() % 4, random.word());
        let talk = Talk {
            client: if random.one_in(15) { random.pick(&STRANGERS) } else { random.pick(&clients) },
            client_port: random.pick(&[near, near, near, near, near, odd, VXLAN_PORT]),
            host: random.pick(&[HOST_A.address, HOST_A.address, HOST_A.address, SECOND_ADDRESS]),
            host_port: random.pick(&[90, 90, 90, 91, 91, 92, 93]),
            protocol: random.pick(&[TCP, UDP]),
        };
        if self.talks.len() < 64 {
            self.talks.push(talk);
        } else {
            let at = random.below(64);
            self.talks[at] = talk;
        }
        talk
    }

    /// A packet of a sandbox, mostly to who spoke to it.
    fn answer(&mut self, flows: &Flows) -> Input {
        let mut talk = self.talk();
        let random = &mut self.random;
        let to_neighbour = talk.host_port == 92;
        let (from, ifindex) = match to_neighbour {
            true => (NEIGHBOUR, OTHER_GATEWAY_PORT),
            false => (SANDBOX, GATEWAY_PORT),
        };
        // A port that the program chose is only in what it remembers.
        if random.one_in(8) && !flows.halves.is_empty() {
            let at = random.below(flows.halves.len());
            if let Some((key, _)) = flows.halves.iter().nth(at) {
                let [.., a, b, c, d] = key.destination;
                let client_port = u16::from_be(key.destination_port_be);
                talk = Talk { client: [a, b, c, d], client_port, protocol: key.protocol, ..talk };
            }
        }
        let Talk { client, client_port, protocol, .. } = talk;
        let ip = header(random, from.address, client, protocol);
        let to = if random.one_in(8) { NEIGHBOUR.mac } else { GWBRIDGE.mac };
        let packet = match random.below(12) {
            0 => {
                let about =
                    transport(random, client, from.address, (client_port, INSIDE), protocol);
                let about = Ipv4::new(client, from.address, protocol).build(&about);
                let error = error(random, &about);
                let ip = Ipv4::new(from.address, client, ICMP).ttl(ip.ttl);
                ethernet(to, from.mac, IPV4, &ip.build(&error))
            }
            1 => {
                let target = Party { mac: [0; 6], ..GWBRIDGE };
                let operation = 1 + random.word() % 2;
                ethernet(to, from.mac, ARP, &arp(operation, from, target))
            }
            2 => {
                let destination = random.pick(&STRANGERS);
                let ip = Ipv4 { destination, ..ip };
                let payload = udp(ip.source, destination, (1, VXLAN_PORT), b"out");
                ethernet(to, from.mac, IPV4, &Ipv4 { protocol: UDP, ..ip }.build(&payload))
            }
            _ => {
                let ports = (INSIDE, client_port);
                let payload = transport(random, from.address, client, ports, protocol);
                ethernet(to, from.mac, IPV4, &ip.build(&payload))
            }
        };
        Input { ifindex, ..from_wire(Program::FromGwbridge, packet) }
    }
}

/// Addresses that no client has.
const STRANGERS: [Address; 10] = [
    HOST_A.address,
    SECOND_ADDRESS,
    GWBRIDGE.address,
    SANDBOX.address,
    [127, 0, 0, 1],
    [0; 4],
    [224, 0, 0, 1],
    [255; 4],
    CONTAINER_A1.address,
    HOST_D.address,
];

/// A header, now and then of a fragment or with little time left.
fn header(random: &mut Random, source: Address, destination: Address, protocol: u8) -> Ipv4 {
    let later = random.word() % 200;
    let fragment = match random.below(12) {
        0 => 0x2000,
        1 => later,
        2 => later | 0x2000,
        _ => 0x4000,
    };
    let ttl = if random.one_in(25) { random.byte() % 3 } else { 64 };
    let id = random.word() % 16;
    Ipv4 { id, ..Ipv4::new(source, destination, protocol).fragment(fragment).ttl(ttl) }
}

fn transport(
    random: &mut Random,
    source: Address,
    destination: Address,
    ports: (u16, u16),
    protocol: u8,
) -> Vec<u8> {
    let length = if random.one_in(50) { 1440 + random.below(60) } else { random.below(24) };
    let payload = vec![random.byte(); length];
    if protocol != TCP {
        let mut datagram = udp(source, destination, ports, &payload);
        if random.one_in(4) {
            datagram[6..8].fill(0);
        }
        return datagram;
    }
    let odd = random.byte();
    let flags = random.pick(&[2, 2, 2, 0x10, 0x18, 0x11, 0x11, 0x12, 4, 0x14, odd]);
    segment(source, destination, ports, flags, &[], &payload)
}

fn error(random: &mut Random, about: &[u8]) -> Vec<u8> {
    let kind = random.pick(&[3, 3, 3, 11, 12, 5, 8]);
    icmp_error(kind, random.byte() % 5, 1280, &about[..about.len().min(48)])
}
