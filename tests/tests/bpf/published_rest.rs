//! What a published port's flows live through: time, a change of the way back, a port that goes,
//! a restart, another capacity.

use std::collections::BTreeMap;

use ovnet_common::{
    abi::{Program, mapped},
    published::{Direction, FlowValue, timeout},
    verdict::{
        KernelReason::NoFlow,
        Verdict::{Kernel, Pass, Publish},
    },
};
use ovnet_tests::{
    bpf::{Bench, GATEWAY_PORT, UPLINK, bench, ip},
    packet::*,
};

use super::published::{
    ACK, CLIENT_PORT, PORT, SECOND_PORT, SYN, Step, addresses, enter, evict, from_client, set_up,
    tcp_back, tcp_in, to_sandbox, udp_back, udp_in,
};

/// The flag alone.
const FIN: u8 = 1;
const PROGRAM: Program = Program::FromUplink;

/// CLOCK_MONOTONIC so many seconds from now.
fn in_seconds(seconds: u64) -> u64 {
    let now = nix::time::clock_gettime(nix::time::ClockId::CLOCK_MONOTONIC).unwrap();
    u64::try_from(now.tv_sec()).unwrap() * 1_000_000_000 + seconds * 1_000_000_000
}

/// How many entries a sweep at that time removes.
fn removed(bench: &mut Bench, seconds: u64) -> u64 {
    let conntrack = bench.datapath.conntrack().unwrap();
    let swept = conntrack.sweep(in_seconds(seconds)).unwrap();
    assert_eq!(swept.put_back, 0);
    swept.removed
}

#[test]
fn flows_are_forgotten_when_their_time_is_over_and_not_before() {
    bench("flows_are_forgotten_when_their_time_is_over_and_not_before", |bench| {
        let lasts = |bench: &mut Bench, what: &str, seconds: u64| {
            assert_eq!(removed(bench, seconds - 2), 0, "{what}: too early");
            assert_eq!(removed(bench, seconds + 2), 2, "{what}: too late");
        };
        set_up(bench);
        udp_in(PROGRAM, b"x").check(bench, "udp");
        lasts(bench, "one way", timeout::UDP_ONE_WAY);
        udp_in(PROGRAM, b"x").check(bench, "udp");
        udp_back(PROGRAM, b"x").check(bench, "udp");
        lasts(bench, "both ways", timeout::UDP);
        tcp_in(PROGRAM, SYN, b"").check(bench, "syn");
        lasts(bench, "opening", timeout::TCP_OPENING);
        tcp_in(PROGRAM, SYN, b"").check(bench, "syn");
        tcp_back(PROGRAM, SYN | ACK, b"").check(bench, "syn-ack");
        tcp_in(PROGRAM, ACK | 1, b"").check(bench, "fin of the client");
        lasts(bench, "established, half closed", timeout::TCP_ESTABLISHED);
        tcp_in(PROGRAM, SYN, b"").check(bench, "syn");
        tcp_back(PROGRAM, ACK | 1, b"").check(bench, "fin of the server");
        tcp_in(PROGRAM, ACK | 1, b"").check(bench, "fin of the client");
        lasts(bench, "closed", timeout::TCP_CLOSING);
        tcp_in(PROGRAM, ACK, b"").left_to_the_kernel().check(bench, "after that");
    });
}

#[test]
fn answers_leave_by_the_next_hop_the_last_packet_came_by() {
    bench("answers_leave_by_the_next_hop_the_last_packet_came_by", |bench| {
        set_up(bench);
        udp_in(PROGRAM, b"x").check(bench, "by the router");
        udp_back(PROGRAM, b"x").check(bench, "by the router");
        let mut moved = udp_in(PROGRAM, b"x");
        moved.packet[6..12].copy_from_slice(&HOST_B.mac);
        moved.check(bench, "by another one");
        let mut answer = udp_back(PROGRAM, b"x");
        answer.output[..6].copy_from_slice(&HOST_B.mac);
        answer.check(bench, "by another one");
        ip("link set ens33 address 02:00:00:00:01:0d");
        let mut moved = udp_in(PROGRAM, b"x");
        moved.packet[..6].copy_from_slice(&HOST_C.mac);
        moved.check(bench, "to the uplink's new MAC");
        let mut answer = udp_back(PROGRAM, b"x");
        answer.output[6..12].copy_from_slice(&HOST_C.mac);
        answer.check(bench, "from the uplink's new MAC");
    });
}

#[test]
fn a_port_that_is_gone_takes_its_flows_with_it_and_nobody_elses() {
    bench("a_port_that_is_gone_takes_its_flows_with_it_and_nobody_elses", |bench| {
        set_up(bench);
        udp_in(PROGRAM, b"x").check(bench, "udp");
        tcp_in(PROGRAM, SYN, b"").check(bench, "tcp");
        let mut tables = ovnet_tests::fixture::world();
        tables.config.published = 1;
        tables.published = bench.datapath.maps().read().unwrap().published;
        tables.published.retain(|key, _| key.protocol != TCP);
        bench.set_tables(&tables);
        let mut unknown = tcp_in(PROGRAM, SYN, b"");
        (unknown.verdict, unknown.output) = (Pass, unknown.packet.clone());
        unknown.check(bench, "new ones at once");
        assert_eq!(removed(bench, 0), 2);
        udp_back(PROGRAM, b"x").check(bench, "the other port's");
        // The address goes to another sandbox.
        for to in tables.published.values_mut() {
            to.address = mapped([172, 18, 0, 9]);
        }
        bench.set_tables(&tables);
        assert_eq!(removed(bench, 0), 2);
        assert_eq!(bench.datapath.conntrack().unwrap().entries().unwrap(), []);
    });
}

/// The LRU takes entries, not flows. What is left of one brings the other back.
#[test]
fn a_flow_survives_the_eviction_of_either_half() {
    bench("a_flow_survives_the_eviction_of_either_half", |bench| {
        for direction in [Direction::In, Direction::Back] {
            set_up(bench);
            let lose = |bench: &mut Bench| evict(bench, |_, it| it.direction == direction as u8);
            let what = format!("{direction:?} evicted");
            tcp_in(PROGRAM, SYN, b"").check(bench, &what);
            lose(bench);
            // The client sends its first segment again.
            tcp_in(PROGRAM, SYN, b"").check(bench, &what);
            tcp_back(PROGRAM, SYN | ACK, b"").check(bench, &what);
            lose(bench);
            // The FIN is news, and what is news is told to both halves.
            tcp_in(PROGRAM, ACK | FIN, b"").check(bench, &what);
            tcp_back(PROGRAM, ACK | FIN, b"").check(bench, &what);
            let entries = bench.datapath.conntrack().unwrap().entries().unwrap();
            assert!(
                entries.len() == 2 && entries.iter().all(|(_, it)| it.is_over()),
                "{entries:?}"
            );
            // A client that sends and sends brings no news, so it is looked at once a second.
            set_up(bench);
            udp_in(PROGRAM, b"x").check(bench, &what);
            lose(bench);
            let left = bench.datapath.conntrack().unwrap().entries().unwrap().into_iter();
            let old = left.map(|(key, value)| (key, FlowValue { last_seen_ns: 1, ..value }));
            enter(bench, old);
            udp_in(PROGRAM, b"x").check(bench, &what);
            assert_eq!(bench.datapath.conntrack().unwrap().entries().unwrap().len(), 2, "{what}");
        }
    });
}

/// The way back of a flow is evicted, and another one of the same client to the same container gets
/// its key.
#[test]
fn a_flow_whose_way_back_is_anothers_is_given_up() {
    bench("a_flow_whose_way_back_is_anothers_is_given_up", |bench| {
        set_up(bench);
        tcp_in(PROGRAM, SYN, b"").check(bench, "the first");
        evict(bench, |_, it| it.direction == Direction::Back as u8);
        let [sent, got, ..] = addresses(TCP);
        let syn = |ip: &Ipv4, port| {
            segment(ip.source, ip.destination, (CLIENT_PORT, port), SYN, &[], b"")
        };
        let second = Step {
            program: PROGRAM,
            ifindex: UPLINK,
            vlan: 0,
            packet: from_client(&sent, &syn(&sent, SECOND_PORT)),
            verdict: Publish(GATEWAY_PORT),
            output: to_sandbox(&got, &syn(&got, PORT)),
        };
        second.check(bench, "the second");
        tcp_in(PROGRAM, ACK | FIN, b"").left_to_the_kernel().check(bench, "the first");
        second.check(bench, "the second again");
    });
}

#[test]
fn flows_outlive_a_restart() {
    bench("flows_outlive_a_restart", |bench| {
        set_up(bench);
        tcp_in(PROGRAM, SYN, b"").check(bench, "before");
        bench.reload();
        tcp_back(PROGRAM, SYN | ACK, b"").check(bench, "after");
        tcp_in(PROGRAM, ACK, b"after").check(bench, "after");
    });
}

#[test]
fn flows_move_into_a_map_of_another_capacity() {
    ovnet_tests::bpf::with_bpffs("flows_move_into_a_map_of_another_capacity", |folder| {
        use ovnet_common::published::{FlowKey, FlowValue};
        let load = |max| {
            let datapath = ovnet_tests::bpf::load_with(folder, Some(max));
            let conntrack = datapath.conntrack().unwrap();
            assert_eq!(conntrack.capacity(), max);
            (datapath, conntrack)
        };
        let (mut first, _) = load(2048);
        let map = first.ebpf().map_mut(ovnet_common::abi::map::CONNTRACK).unwrap();
        let mut map: aya::maps::HashMap<_, FlowKey, FlowValue> = map.try_into().unwrap();
        for port in 0..100u16 {
            let key = FlowKey { source_port_be: port, ..FlowKey::default() };
            let value = FlowValue { last_seen_ns: port.into(), ..FlowValue::default() };
            map.insert(key, value, 0).unwrap();
        }
        drop(first);
        let sorted = |entries: Vec<(FlowKey, FlowValue)>| {
            let sorted: BTreeMap<_, _> =
                entries.into_iter().map(|(key, value)| (key.source_port_be, value)).collect();
            assert!(sorted.iter().all(|(port, value)| value.last_seen_ns == u64::from(*port)));
            sorted.len()
        };
        let (second, larger) = load(8192);
        assert_eq!(sorted(larger.entries().unwrap()), 100);
        drop(second);
        let (_third, same) = load(8192);
        assert_eq!(sorted(same.entries().unwrap()), 100);
    });
}

impl Step {
    fn left_to_the_kernel(mut self) -> Self {
        self.output = self.packet.clone();
        self.verdict = Kernel(NoFlow);
        self
    }
}
