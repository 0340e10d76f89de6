//! Random packets, checked against the plain model of the rules in `ovnet_tests::model`.
//!
//! `OVNET_SEED=<number>` replays a run; a failure prints the number and the packet.

use std::time::{SystemTime, UNIX_EPOCH};

use ovnet_agent::datapath::Tables;
use ovnet_common::abi::Program;
use ovnet_tests::{
    bpf::{
        Bench, Counters, Input, PORT_A1, PORT_A2, PORT_A3, PORT_A4, PORT_UNKNOWN, TunnelKey, bench,
    },
    fixture::{Fixture, assert_same, describe, moved, movement, return_code, world},
    model,
    packet::*,
};

const PACKETS: usize = 20_000;
/// The counters are compared after this many packets; reading them costs more than a run.
const BATCH: usize = 100;

/// A generator of random numbers (SplitMix64); a test wants a seed more than quality.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, limit: usize) -> usize {
        usize::try_from(self.next() % limit as u64).unwrap()
    }

    fn one_in(&mut self, chance: usize) -> bool {
        self.below(chance) == 0
    }

    fn byte(&mut self) -> u8 {
        self.next().to_le_bytes()[0]
    }

    fn pick<T: Clone>(&mut self, from: &[T]) -> T {
        from[self.below(from.len())].clone()
    }
}

fn seed() -> u64 {
    match std::env::var("OVNET_SEED") {
        Ok(text) => text.parse().expect("OVNET_SEED is a number"),
        Err(_) => u64::from(SystemTime::now().duration_since(UNIX_EPOCH).unwrap().subsec_nanos()),
    }
}

/// Values that mean something somewhere in a packet.
fn words() -> Vec<Vec<u8>> {
    let parties = [
        HOST_A,
        HOST_B,
        HOST_C,
        HOST_E,
        INTRUDER,
        GATEWAY,
        CONTAINER_A1,
        CONTAINER_A2,
        CONTAINER_A4,
        CONTAINER_B1,
        CONTAINER_B4,
        CONTAINER_C1,
        CONTAINER_E1,
        NOBODY,
    ];
    let mut words: Vec<Vec<u8>> = Vec::new();
    for party in parties {
        words.push(party.address.to_vec());
        words.push(party.mac.to_vec());
    }
    for vni in [VNI_BLUE, VNI_RED, 0] {
        words.push(vni.to_be_bytes()[1..].to_vec());
    }
    for number in [0u16, 1, 2, 0x0800, 0x0806, 0x86dd, 0x8100, 0x2000, 0x4000, 0xffff, VXLAN_PORT] {
        words.push(number.to_be_bytes().to_vec());
    }
    for byte in [0, 1, 6, 8, 17, 0x40, 0x44, 0x45, 0x46, 0x4f, 0x65, 0x80, 0xe0, 0xff] {
        words.push(vec![byte]);
    }
    words
}

/// Offsets at which a header field starts, with and without the outer headers.
const FIELDS: [usize; 27] = [
    0, 6, 12, 14, 15, 16, 18, 20, 22, 23, 24, 26, 28, 30, 32, 34, 36, 38, 40, 42, 46, 50, 56, 62,
    64, 76, 80,
];

fn mutate(random: &mut Random, packet: &mut Vec<u8>, words: &[Vec<u8>]) {
    for _ in 0..random.below(4) {
        let length = packet.len();
        match random.below(7) {
            0 => packet[random.below(length)] ^= 1 << random.below(8),
            1 => packet[random.below(length)] = random.byte(),
            2 => packet.truncate(14 + random.below(length - 13)),
            3 => {
                let more = random.below(100);
                packet.extend((0..more).map(|_| random.byte()));
            }
            _ => {
                let (word, at) = (random.pick(words), random.pick(&FIELDS));
                if at + word.len() <= length {
                    packet[at..at + word.len()].copy_from_slice(&word);
                }
            }
        }
    }
    // Most of the rules are behind the checksum.
    if !random.one_in(4) {
        for at in [14, 64] {
            let header = packet.get(at).map(|byte| usize::from(byte & 15) * 4);
            if header.is_some_and(|it| it >= 20 && at + it <= packet.len()) {
                fix_ipv4_checksum(packet, at);
            }
        }
    }
}

fn input(random: &mut Random, program: Program, corpus: &[Vec<u8>], words: &[Vec<u8>]) -> Input {
    let mut packet = match random.one_in(20) {
        true => (0..14 + random.below(200)).map(|_| random.byte()).collect(),
        false => random.pick(corpus),
    };
    mutate(random, &mut packet, words);
    let mut input = ovnet_tests::fixture::from_wire(program, packet);
    let gso = random.one_in(8);
    input.vlan = match program {
        Program::UplinkXdp => 0,
        _ => u16::from(random.one_in(30)) * 5,
    };
    match program {
        Program::FromContainer => {
            let ports = [PORT_A1, PORT_A2, PORT_A3, PORT_A4, PORT_UNKNOWN];
            input.ifindex = if random.one_in(8) { random.pick(&ports) } else { PORT_A1 };
            input.gso_size = if gso { 1 + u32::from(random.byte()) * 8 } else { 0 };
        }
        Program::FromUplink => input.gso_size = if gso { 1000 } else { 0 },
        Program::FromOverlay => {
            let remote = random.pick(&[HOST_B, HOST_B, HOST_B, HOST_A, HOST_C, INTRUDER]).address;
            let local = random.pick(&[HOST_A, HOST_A, HOST_A, HOST_B]).address;
            let vni = random.pick(&[VNI_BLUE, VNI_BLUE, VNI_BLUE, VNI_RED, VNI_UNKNOWN]);
            input.tunnel_key = Some(TunnelKey { vni, remote, local });
            input.ifindex = PORT_UNKNOWN;
        }
        Program::UplinkXdp | Program::FromGwbridge => {}
    }
    input
}

fn check(bench: &mut Bench, program: Program, fixtures: Vec<Fixture>) {
    let seed = seed();
    println!("{}: OVNET_SEED={seed}", program.name());
    let mut random = Random(seed);
    // Packets of the MTU's size are for the tables; short ones make the runs short. What is cut
    // off comes of mutation.
    let corpus: Vec<Vec<u8>> = fixtures
        .into_iter()
        .filter(|fixture| fixture.input.program == program && fixture.input.packet.len() < 400)
        .filter(|fixture| {
            !["cut off", "VXLAN byte", "VNI bit"].iter().any(|it| fixture.name.contains(it))
        })
        .map(|fixture| fixture.input.packet)
        .collect();
    let (tables, words) = (world(), words());
    bench.set_tables(&tables);
    let mut before = bench.counters();
    for batch in 0..PACKETS / BATCH {
        let inputs: Vec<Input> =
            (0..BATCH).map(|_| input(&mut random, program, &corpus, &words)).collect();
        let mut wanted = Counters::default();
        for (at, input) in inputs.iter().enumerate() {
            let name = format!("OVNET_SEED={seed} packet {}", batch * BATCH + at);
            let (verdict, output) = model::predict(&tables, input);
            let (code, packet) = bench.run(input);
            assert_eq!(code, return_code(program, verdict), "{name}: {verdict:?} {input:02x?}");
            assert_same(&name, verdict, &output, &packet);
            add(&mut wanted, &movement(input, verdict, &tables));
        }
        let after = bench.counters();
        if moved(&before, &after) != wanted {
            find_offender(bench, &tables, &inputs, seed);
            panic!("OVNET_SEED={seed}: {:?}, not {:?}", moved(&before, &after), wanted);
        }
        before = after;
    }
    let mut reached: Vec<String> = describe(&before);
    reached.retain(|line| !line.starts_with("port"));
    println!("{}", reached.join("\n"));
    assert!(reached.len() > 4, "random packets reach more than {reached:?}");
}

/// Runs the packets of a batch one by one, to panic at the one that was counted wrongly.
fn find_offender(bench: &mut Bench, tables: &Tables, inputs: &[Input], seed: u64) {
    for input in inputs {
        let (verdict, output) = model::predict(tables, input);
        let name = format!("OVNET_SEED={seed}: {input:02x?}");
        Fixture { name, tables: tables.clone(), input: input.clone(), verdict, output }
            .check(bench);
    }
}

fn add(sum: &mut Counters, more: &Counters) {
    for (key, counter) in &more.verdicts {
        let entry = sum.verdicts.entry(*key).or_default();
        entry.packets += counter.packets;
        entry.bytes += counter.bytes;
    }
    for (port, counter) in &more.ports {
        let entry = sum.ports.entry(*port).or_default();
        entry.tx_packets += counter.tx_packets;
        entry.tx_bytes += counter.tx_bytes;
        entry.rx_packets += counter.rx_packets;
        entry.rx_bytes += counter.rx_bytes;
    }
}

#[test]
fn random_packets_of_containers_follow_the_model() {
    bench("random_packets_of_containers_follow_the_model", |bench| {
        check(bench, Program::FromContainer, super::from_container::fixtures());
    });
}

#[test]
fn random_packets_of_the_wire_follow_the_model() {
    bench("random_packets_of_the_wire_follow_the_model", |bench| {
        check(bench, Program::FromUplink, super::receive::fixtures());
    });
}

#[test]
fn random_packets_of_the_wire_follow_the_model_in_xdp() {
    bench("random_packets_of_the_wire_follow_the_model_in_xdp", |bench| {
        check(bench, Program::UplinkXdp, super::receive::fixtures());
    });
}

#[test]
fn random_packets_of_the_vxlan_device_follow_the_model() {
    bench("random_packets_of_the_vxlan_device_follow_the_model", |bench| {
        check(bench, Program::FromOverlay, super::from_overlay::fixtures());
    });
}
