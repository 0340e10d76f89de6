//! Drop events: what is in them, and that a flood of drops is no flood of events.

use std::{collections::BTreeSet, time::Instant};

use aya::maps::{MapData, RingBuf};
use ovnet_common::{
    abi::{DropEvent, EVENT_DATA, EVENT_INTERVAL_NS, Program},
    verdict::Verdict,
};
use ovnet_tests::{
    bpf::{Bench, PORT_A1, bench},
    fixture::Fixture,
    packet::*,
    syscall::now_ns as now,
};

fn take(bench: &mut Bench) -> RingBuf<MapData> {
    let events = bench.datapath.maps().take_events().expect("nobody took the events yet");
    assert!(bench.datapath.maps().take_events().is_none(), "they can be taken once");
    events
}

fn read(events: &mut RingBuf<MapData>) -> Vec<DropEvent> {
    let mut all = Vec::new();
    while let Some(item) = events.next() {
        assert_eq!(item.len(), size_of::<DropEvent>());
        // SAFETY: the item is as long as the event, of which any bytes are a value.
        all.push(unsafe { item.as_ptr().cast::<DropEvent>().read_unaligned() });
    }
    all
}

#[test]
fn each_drop_reason_of_each_program_has_its_event() {
    bench("each_drop_reason_of_each_program_has_its_event", |bench| {
        let mut events = take(bench);
        let mut seen = BTreeSet::new();
        let tables = [
            super::from_container::fixtures(),
            super::receive::fixtures(),
            super::from_overlay::fixtures(),
        ];
        for fixture in tables.into_iter().flatten() {
            let Fixture { name, tables, input, verdict, output } = fixture;
            // Only the first of a kind is certain to be due.
            let due = seen.insert((input.program, verdict.code()));
            if !due {
                continue;
            }
            bench.set_tables(&tables);
            let before = now();
            bench.run(&input);
            let found = read(&mut events);
            let Verdict::Drop(reason) = verdict else {
                assert!(found.is_empty(), "{name}: no drop, yet {found:?}");
                continue;
            };
            assert_eq!(found.len(), 1, "{name}");
            let DropEvent {
                timestamp_ns,
                ifindex,
                length,
                program,
                reason: code,
                captured,
                reserved,
                data,
            } = found[0];
            assert!((before..=now()).contains(&timestamp_ns), "{name}: {timestamp_ns}");
            // A test run of an XDP program comes from the loopback device.
            let expected = if input.program == Program::UplinkXdp { 1 } else { input.ifindex };
            assert_eq!(ifindex, expected, "{name}");
            assert_eq!(length as usize, input.packet.len(), "{name}");
            assert_eq!((program, code), (input.program as u8, reason as u8), "{name}");
            assert_eq!(reserved, 0, "{name}");
            let captured = usize::from(captured);
            let lengths = [EVENT_DATA, 84, 64, 42, 34, 14];
            let longest = lengths.into_iter().find(|length| *length <= output.len());
            assert_eq!(Some(captured), longest, "{name}");
            assert_eq!(data[..captured], output[..captured], "{name}");
        }
    });
}

#[test]
fn a_flood_of_drops_is_sampled_and_counted_in_full() {
    bench("a_flood_of_drops_is_sampled_and_counted_in_full", |bench| {
        const PACKETS: u64 = 5_000;
        let mut events = take(bench);
        let reason = ovnet_common::verdict::DropReason::NoEndpoint;
        let packet = datagram(CONTAINER_A1, NOBODY, b"x");
        let drop = Verdict::Drop(reason);
        let flood = Fixture::new("a flood", Program::FromContainer, PORT_A1, packet, drop);
        bench.set_tables(&flood.tables);
        let start = Instant::now();
        for _ in 0..PACKETS {
            bench.run(&flood.input);
        }
        let intervals = start.elapsed().as_nanos() / u128::from(EVENT_INTERVAL_NS) + 1;
        let cpus = std::thread::available_parallelism().unwrap().get() as u128;
        let found = read(&mut events).len() as u128;
        assert!(found >= 1 && found <= intervals * cpus, "{found} events in {intervals} intervals");
        assert!(found < u128::from(PACKETS) / 2, "{found} events for {PACKETS} drops");
        let counted = bench.counters().verdicts[&(Program::FromContainer, drop.code())];
        assert_eq!(counted.packets, PACKETS);
    });
}
