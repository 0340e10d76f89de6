//! A million packets through each program, valid ones changed by somebody hostile, each checked
//! against the plain model of the rules (`ovnet_tests::model`) and against what must never happen
//! whatever the rules (`ovnet_tests::oracle`): verdict, bytes, the interface it is sent to, the
//! counters, and what is remembered of flows.
//!
//! `OVNET_SEED=<number> OVNET_FRAMES=<number>` replays a run. A packet that fails is written with
//! those before it that it needs into a file, which belongs into `tests/regressions`.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use aya::maps::HashMap;
use ovnet_agent::datapath::Tables;
use ovnet_common::{
    abi::{Program, map},
    published::{FlowKey, FlowValue, FragmentKey, FragmentValue},
    verdict::{DropReason, KernelReason, SlowReason, Verdict, label},
};
use ovnet_tests::{
    bpf::{Bench, Counters, GATEWAY_PORT, Input, PORT_A1, PORT_UNKNOWN, TunnelKey, bench},
    compare::difference,
    fixture::{
        Fixture, SOURCE_PORT_MAX, SOURCE_PORT_MIN, describe, from_wire, moved, movement,
        return_code,
    },
    model::{self, Flows},
    oracle::{self, Outcome, redirection},
    packet::{HOST_A, HOST_B, OUTER, VNI_BLUE, fix_ipv4_checksum},
    random::{from_env, seed},
    replay::{self, Case},
    storm::{Storm, World},
};

/// Packets per program.
const FRAMES: u64 = 1_000_000;
/// Packets from one clean state to the next. Reading the counters costs more than a run, and within
/// a second nothing that is remembered grows old.
const EPOCH: u64 = 1_000;
/// What of an epoch is believed.
const FRESH: Duration = Duration::from_millis(900);

/// Programs, the model beside them, and how both are told apart.
struct Run<'a> {
    bench: &'a mut Bench,
    tables: Tables,
    flows: Flows,
    before: Counters,
    /// Packets each endpoint has received so far, by its veth.
    received: BTreeMap<u32, u64>,
    wanted: Counters,
}

impl<'a> Run<'a> {
    /// Begins with these tables and nothing remembered.
    fn begin(bench: &'a mut Bench, tables: Tables, before: Counters) -> Self {
        bench.set_tables(&tables);
        let (flows, wanted) = (Flows::default(), Counters::default());
        let received = before.ports.iter().map(|(port, it)| (*port, it.rx_packets)).collect();
        Self { bench, tables, flows, before, received, wanted }
    }

    /// Runs a packet; the verdict, or what is wrong.
    fn step(&mut self, input: &Input) -> Result<Verdict, String> {
        let (code, found) = self.bench.run(input);
        let mut expected = input.packet.clone();
        let conntrack = self.bench.datapath.ebpf().map(map::CONNTRACK).unwrap();
        let conntrack: HashMap<_, FlowKey, FlowValue> = conntrack.try_into().unwrap();
        let chosen = |key: &FlowKey| Some(u16::from_be(conntrack.get(key, 0).ok()?.peer_port_be));
        let verdict = model::next(&self.tables, &mut self.flows, input, &mut expected, &chosen);
        let program = input.program;
        if code != return_code(program, verdict) {
            return Err(format!("{verdict:?} expected, the code is {code}"));
        }
        if !same(verdict, &mut expected, &found) {
            return Err(format!("{verdict:?}, {}", difference("a storm", &expected, &found)));
        }
        if let Verdict::Deliver(to) = verdict {
            let received = self.bench.datapath.maps().port_counters(to).unwrap().rx_packets;
            let before = self.received.insert(to, received).unwrap_or(0);
            if received != before + 1 {
                return Err(format!("{verdict:?} expected, and another endpoint received it"));
            }
        }
        let to = redirection(program, verdict);
        let outcome = Outcome { code, frame: &found, to };
        oracle::judge(&self.tables, input, &outcome)
            .map_err(|why| format!("{verdict:?}: {why}"))?;
        add(&mut self.wanted, &movement(input, verdict, &self.tables));
        Ok(verdict)
    }

    /// Compares counters and what is remembered, and has the programs forget; the counters now.
    fn end(self) -> Result<Counters, String> {
        let Self { bench, flows, before, wanted, .. } = self;
        let after = bench.counters();
        let moved = moved(&before, &after);
        let remembered = flows_of(bench);
        forget(bench, remembered.keys(), flows.fragments());
        if moved != wanted {
            let (found, wanted) = (describe(&moved), describe(&wanted));
            return Err(format!("counters:\n{}\nnot\n{}", found.join("\n"), wanted.join("\n")));
        }
        if remembered != flows.halves {
            let odd = |these: &BTreeMap<FlowKey, FlowValue>, those: &BTreeMap<_, _>| {
                let odd: Vec<_> = these.iter().filter(|it| those.get(it.0) != Some(it.1)).collect();
                format!("{odd:#?}")
            };
            let (found, expected) =
                (odd(&remembered, &flows.halves), odd(&flows.halves, &remembered));
            return Err(format!("flows: {found}, not {expected}"));
        }
        Ok(after)
    }
}

/// What the programs remember of flows, but for the time.
fn flows_of(bench: &Bench) -> BTreeMap<FlowKey, FlowValue> {
    let entries = bench.datapath.conntrack().unwrap().entries().unwrap();
    entries.into_iter().map(|(key, it)| (key, FlowValue { last_seen_ns: 0, ..it })).collect()
}

fn forget<'a>(
    bench: &mut Bench,
    flows: impl Iterator<Item = &'a FlowKey>,
    fragments: impl Iterator<Item = &'a FragmentKey>,
) {
    let map = bench.datapath.ebpf().map_mut(map::CONNTRACK).unwrap();
    let mut map: HashMap<_, FlowKey, FlowValue> = map.try_into().unwrap();
    flows.for_each(|key| map.remove(key).unwrap());
    let map = bench.datapath.ebpf().map_mut(map::FRAGMENTS).unwrap();
    let mut map: HashMap<_, FragmentKey, FragmentValue> = map.try_into().unwrap();
    fragments.for_each(|key| _ = map.remove(key));
}

/// Compares frames; an outer identification and a source port in its range are free.
fn same(verdict: Verdict, expected: &mut [u8], found: &[u8]) -> bool {
    if matches!(verdict, Verdict::Encapsulate(_)) && found.len() == expected.len() {
        if found.len() < OUTER + 14 {
            return false;
        }
        let port = u16::from_be_bytes([found[34], found[35]]);
        if !(SOURCE_PORT_MIN..SOURCE_PORT_MAX).contains(&port) {
            return false;
        }
        expected[18..20].copy_from_slice(&found[18..20]);
        expected[34..36].copy_from_slice(&found[34..36]);
        fix_ipv4_checksum(expected, 14);
    }
    expected == found
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

/// A storm over one program. What a few packets in a million must reach is what `coverage.rs` says
/// the program can give, but for `rare`.
fn storm(name: &str, program: Program, fixtures: fn() -> Vec<Fixture>, rare: &[u8]) {
    bench(name, |bench| {
        let (seed, frames) = (seed(), from_env("OVNET_FRAMES").unwrap_or(FRAMES));
        println!("{}: OVNET_SEED={seed} OVNET_FRAMES={frames}", program.name());
        let started = Instant::now();
        let mut storm = Storm::new(program, seed, corpus(program, fixtures));
        let (mut done, mut lost, mut reached) = (0, 0, BTreeMap::new());
        let mut before = bench.counters();
        while done < frames {
            let world = storm.world();
            let start = Instant::now();
            let mut run = Run::begin(bench, world.tables(), before.clone());
            let mut inputs = Vec::new();
            let (mut here, mut wrong) = (BTreeMap::new(), None);
            let mut count = 0;
            while count < EPOCH && wrong.is_none() && start.elapsed() < FRESH {
                inputs.push(storm.next(&run.flows));
                let input = &inputs[inputs.len() - 1];
                match run.step(input) {
                    Ok(verdict) => *here.entry((input.program, verdict.code())).or_insert(0) += 1,
                    Err(why) => wrong = Some(why),
                }
                count += u64::from(input.program == program);
            }
            let wrong = match wrong {
                None => match run.end() {
                    Ok(counters) => {
                        before = counters;
                        None
                    }
                    Err(why) => Some(why),
                },
                why => why,
            };
            if start.elapsed() >= FRESH {
                // Somebody else had the processor; what is old is another test's.
                lost += 1;
                assert!(lost < 1000, "{lost} epochs took longer than {FRESH:?}");
                before = clean(bench);
                continue;
            }
            if let Some(why) = wrong {
                clean(bench);
                let name = format!("{}-{seed}", program.name());
                let path = keep(bench, &name, world, inputs, &why);
                panic!(
                    "OVNET_SEED={seed}, after {done} packets: {why}\nkept in {}",
                    path.display()
                );
            }
            done += count;
            for (key, count) in here {
                *reached.entry(key).or_insert(0) += count;
            }
        }
        println!("{done} packets in {:?}, {lost} epochs lost", started.elapsed());
        for ((program, code), count) in &reached {
            println!("{:15} {:28} {count}", program.name(), label(*code).unwrap_or("?"));
        }
        // One in fifty thousand; of fewer packets nothing is expected.
        let few = frames / 50_000;
        for code in super::coverage::possible(program).iter().filter(|code| !rare.contains(code)) {
            let count = reached.get(&(program, *code)).copied().unwrap_or(0);
            assert!(count >= few, "{} was reached {count} times", label(*code).unwrap_or("?"));
        }
    });
}

/// Short packets of the tables. What is cut off comes of mutation.
fn corpus(program: Program, fixtures: fn() -> Vec<Fixture>) -> Vec<Vec<u8>> {
    let derived = ["cut off", "VXLAN byte", "VNI bit"];
    let mut corpus: Vec<Vec<u8>> = fixtures()
        .into_iter()
        .filter(|it| it.input.program == program && it.input.packet.len() < 400)
        .filter(|it| !derived.iter().any(|word| it.name.contains(word)))
        .map(|it| it.input.packet)
        .collect();
    for step in super::published::scenarios().into_iter().flat_map(|it| it.steps) {
        if step.program == program && step.packet.len() < 400 {
            corpus.push(step.packet);
        }
    }
    corpus
}

/// Forgets everything, whatever there is; the counters afterwards.
fn clean(bench: &mut Bench) -> Counters {
    let flows = flows_of(bench);
    let map = bench.datapath.ebpf().map(map::FRAGMENTS).unwrap();
    let map: HashMap<_, FragmentKey, FragmentValue> = map.try_into().unwrap();
    let fragments: Vec<FragmentKey> = map.keys().map(Result::unwrap).collect();
    forget(bench, flows.keys(), fragments.iter());
    bench.counters()
}

/// Writes down what fails: the last packet, where it does so alone, or all that came before.
fn keep(
    bench: &mut Bench,
    name: &str,
    world: World,
    mut inputs: Vec<Input>,
    why: &str,
) -> std::path::PathBuf {
    let last = inputs.split_off(inputs.len() - 1);
    let mut whole = inputs;
    let title = why.lines().next().unwrap_or_default().to_owned();
    let alone = Case { title: title.clone(), world, inputs: last };
    let fails = replayed(bench, &alone).is_err();
    clean(bench);
    if fails {
        return replay::save(name, &alone);
    }
    whole.extend(alone.inputs);
    replay::save(name, &Case { title, world, inputs: whole })
}

/// Runs a case; what is wrong.
fn replayed(bench: &mut Bench, case: &Case) -> Result<(), String> {
    let before = clean(bench);
    let mut run = Run::begin(bench, case.world.tables(), before);
    for (at, input) in case.inputs.iter().enumerate() {
        let verdict = run.step(input).map_err(|why| format!("packet {at}: {why}"))?;
        println!("{}, packet {at}: {verdict:?}", case.title);
    }
    run.end().map(|_| ())
}

/// Every packet of every table, cut off at every length, through every program: whoever gets it, and
/// whatever is told to come behind, nothing is read that is not there and the rules are the same.
#[test]
fn packets_cut_off_anywhere_follow_the_model() {
    bench("packets_cut_off_anywhere_follow_the_model", |bench| {
        let fixtures = [
            super::from_container::fixtures as fn() -> Vec<Fixture>,
            super::receive::fixtures,
            super::from_overlay::fixtures,
        ];
        let mut count = 0;
        for program in Program::ALL {
            let mut packets: Vec<Vec<u8>> =
                fixtures.iter().flat_map(|fixtures| corpus(program, *fixtures)).collect();
            packets.sort_unstable();
            packets.dedup();
            for packet in packets {
                let before = bench.counters();
                let mut run = Run::begin(bench, World::Ordinary.tables(), before);
                for length in 14..=packet.len() {
                    let mut input = from_wire(program, packet[..length].to_vec());
                    input.ifindex = match program {
                        Program::FromContainer => PORT_A1,
                        Program::FromOverlay => PORT_UNKNOWN,
                        Program::FromGwbridge => GATEWAY_PORT,
                        Program::FromUplink | Program::UplinkXdp => input.ifindex,
                    };
                    if program == Program::FromOverlay {
                        let (remote, local) = (HOST_B.address, HOST_A.address);
                        input.tunnel_key = Some(TunnelKey { vni: VNI_BLUE, remote, local });
                    }
                    run.step(&input).unwrap_or_else(|why| panic!("{input:02x?}: {why}"));
                    count += 1;
                }
                run.end().unwrap();
            }
        }
        println!("{count} packets");
    });
}

/// What was found once is not found again.
#[test]
fn packets_that_were_wrong_once_are_right() {
    bench("packets_that_were_wrong_once_are_right", |bench| {
        let kept = replay::kept();
        assert!(!kept.is_empty(), "tests/regressions has files");
        let mut wrong = Vec::new();
        for (path, case) in &kept {
            assert!(!case.title.is_empty() && !case.inputs.is_empty(), "{}", path.display());
            if let Err(why) = replayed(bench, case) {
                wrong.push(format!("{}: {why}", path.display()));
            }
        }
        assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    });
}

#[test]
fn a_million_packets_of_containers() {
    // A test run repeats a program only by a number; see `encapsulate.rs`.
    let rare = [SlowReason::AlreadyEncapsulated as u8, DropReason::ForgedChecksum as u8];
    let name = "a_million_packets_of_containers";
    storm(name, Program::FromContainer, super::from_container::fixtures, &rare);
}

#[test]
fn a_million_packets_of_the_wire() {
    // The map must be full for it; see `published.rs`.
    let rare = [KernelReason::PortsClash as u8, KernelReason::ConntrackFull as u8];
    let name = "a_million_packets_of_the_wire";
    storm(name, Program::FromUplink, super::receive::fixtures, &rare);
}

#[test]
fn a_million_packets_of_the_wire_at_xdp() {
    let name = "a_million_packets_of_the_wire_at_xdp";
    storm(name, Program::UplinkXdp, super::receive::fixtures, &[]);
}

#[test]
fn a_million_packets_of_the_vxlan_device() {
    let name = "a_million_packets_of_the_vxlan_device";
    storm(name, Program::FromOverlay, super::from_overlay::fixtures, &[]);
}

#[test]
fn a_million_packets_of_gateway_ports() {
    let rare = [DropReason::ForgedChecksum as u8];
    storm("a_million_packets_of_gateway_ports", Program::FromGwbridge, Vec::new, &rare);
}
