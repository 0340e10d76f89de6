//! A map that takes no more flows. The one the agent makes never is full: it is an LRU, and where it
//! refuses, it is under contention or for want of memory. So here the programs are loaded over a plain
//! hash map with room for one entry; to a program it is the same map.

use aya::{
    Ebpf, EbpfLoader,
    maps::{Array, HashMap, PerCpuArray},
    programs::{SchedClassifier, Xdp},
};
use ovnet_agent::datapath::object;
use ovnet_common::{
    abi::{Counter, HostConfig, Program, counter_index, map},
    published::{FlowKey, FlowValue, PublishedKey, PublishedValue},
    verdict::{KernelReason::ConntrackFull, Verdict},
};
use ovnet_tests::{
    bpf::{build_links, context, with_bpffs},
    fixture::return_code,
    storm::World,
    syscall,
};

use super::published::{SYN, tcp_in, udp_in};

/// `BPF_MAP_TYPE_HASH`.
const HASH: u32 = 1;

fn count(ebpf: &Ebpf, program: Program, verdict: Verdict) -> u64 {
    let counters = ebpf.map(map::COUNTERS).unwrap();
    let counters: PerCpuArray<_, Counter> = counters.try_into().unwrap();
    let values = counters.get(&counter_index(program, verdict.code()), 0).unwrap();
    values.iter().map(|it| it.packets).sum()
}

#[test]
fn where_no_flow_can_be_remembered_the_kernel_has_it() {
    with_bpffs("where_no_flow_can_be_remembered_the_kernel_has_it", |folder| {
        build_links();
        let pin = folder.join(map::CONNTRACK);
        let (key, value) = (size_of::<FlowKey>(), size_of::<FlowValue>());
        let (key, value) = (u32::try_from(key).unwrap(), u32::try_from(value).unwrap());
        let small = syscall::create_map(HASH, key, value, 1).unwrap();
        syscall::pin(std::os::fd::AsFd::as_fd(&small), &pin).unwrap();
        let mut ebpf = EbpfLoader::new()
            .override_global("AYA_LOG_LEVEL", &0u8, false)
            .map_pin_path(map::CONNTRACK, &pin)
            .load(object())
            .unwrap();
        let tables = World::Ordinary.tables();
        let config = ebpf.map_mut(map::CONFIG).unwrap();
        let mut config: Array<_, HostConfig> = config.try_into().unwrap();
        config.set(0, tables.config, 0).unwrap();
        let published = ebpf.map_mut(map::PUBLISHED).unwrap();
        let mut published: HashMap<_, PublishedKey, PublishedValue> = published.try_into().unwrap();
        for (key, value) in tables.published {
            published.insert(key, value, 0).unwrap();
        }
        for program in [Program::FromUplink, Program::UplinkXdp] {
            let handle = ebpf.program_mut(program.name()).unwrap();
            match program {
                Program::UplinkXdp => TryInto::<&mut Xdp>::try_into(handle).unwrap().load(),
                _ => TryInto::<&mut SchedClassifier>::try_into(handle).unwrap().load(),
            }
            .unwrap();
            // XDP says nothing: it passes, and TC decides again.
            let verdict = match program {
                Program::UplinkXdp => Verdict::Pass,
                _ => Verdict::Kernel(ConntrackFull),
            };
            for (step, busy) in
                [tcp_in(program, SYN, b""), udp_in(program, b"x")].iter().flat_map(|it| {
                    // Room for one half, which is taken back; and for none.
                    [(it, false), (it, true)]
                })
            {
                let flows = ebpf.map_mut(map::CONNTRACK).unwrap();
                let mut flows: HashMap<_, FlowKey, FlowValue> = flows.try_into().unwrap();
                let other = FlowKey { protocol: 132, ..FlowKey::default() };
                if busy {
                    flows.insert(other, FlowValue::default(), 0).unwrap();
                }
                let before = count(&ebpf, program, verdict);
                let input = step.input();
                let context = match program {
                    Program::UplinkXdp => vec![],
                    _ => context(&input).to_vec(),
                };
                let fd = ebpf.program(program.name()).unwrap().fd().unwrap();
                let fd = std::os::fd::AsFd::as_fd(fd);
                let (code, found) = syscall::test_run(fd, &step.packet, &context, 1).unwrap();
                assert_eq!(code, return_code(program, verdict));
                assert_eq!(found, step.packet, "unmodified");
                assert_eq!(count(&ebpf, program, verdict), before + 1);
                let flows = ebpf.map_mut(map::CONNTRACK).unwrap();
                let mut flows: HashMap<_, FlowKey, FlowValue> = flows.try_into().unwrap();
                let left: Vec<FlowKey> = flows.keys().map(Result::unwrap).collect();
                assert_eq!(left, if busy { vec![other] } else { vec![] }, "no half is left");
                if busy {
                    flows.remove(&other).unwrap();
                }
            }
        }
    });
}
