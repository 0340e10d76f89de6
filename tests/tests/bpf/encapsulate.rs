//! What `from_container` makes of more than one packet: source ports, identifications, and a packet
//! that was encapsulated before.

use ovnet_common::{
    abi::{Counter, Program, mapped},
    verdict::{SlowReason, Verdict::Encapsulate},
};
use ovnet_tests::{
    bpf::{PORT_A1, UPLINK, bench},
    fixture::{assert_same, moved, remote, world},
    packet::*,
};

use super::from_container::{encapsulated, sent};

#[test]
fn one_flow_has_one_source_port_and_many_flows_have_many() {
    bench("one_flow_has_one_source_port_and_many_flows_have_many", |bench| {
        bench.set_tables(&world());
        let mut ports = Vec::new();
        for flow in 0..200u16 {
            let (from, to) = (CONTAINER_A1, CONTAINER_B1);
            let fixture = |payload: &[u8]| {
                let segment = udp(from.address, to.address, (flow, 2000), payload);
                let packet = Ipv4::new(from.address, to.address, UDP).build(&segment);
                let frame = ethernet(to.mac, from.mac, IPV4, &packet);
                let out = encapsulated(HOST_B, 0, &frame);
                sent("a flow", frame, Encapsulate(UPLINK)).becomes(out)
            };
            let mut port = |payload: &[u8]| {
                let fixture = fixture(payload);
                fixture.check(bench);
                let (_, packet) = bench.run(&fixture.input);
                u16::from_be_bytes([packet[34], packet[35]])
            };
            let first = port(b"one packet");
            assert_eq!(first, port(b"and another, longer one"), "flow {flow}");
            ports.push(first);
        }
        ports.sort_unstable();
        ports.dedup();
        // 200 flows over 100 ports: about 87 different ones, and 60 is ten deviations off.
        assert!(ports.len() > 60, "only {} ports for 200 flows", ports.len());
    });
}

#[test]
fn outer_identifications_differ() {
    bench("outer_identifications_differ", |bench| {
        bench.set_tables(&world());
        let input = sent("x", datagram(CONTAINER_A1, CONTAINER_B1, b"x"), Encapsulate(0)).input;
        let mut seen: Vec<[u8; 2]> = Vec::new();
        for _ in 0..64 {
            let (_, packet) = bench.run(&input);
            seen.push([packet[18], packet[19]]);
        }
        seen.sort_unstable();
        seen.dedup();
        // DF is off, so equal ones could be reassembled into each other. Two of 64 random ones
        // meet once in 30 runs, six never.
        assert!(seen.len() > 58, "{} different of 64", seen.len());
    });
}

/// The program runs a second time on what it made of the packet, with tables in which that is
/// again a packet of a container to another host: the kernel then says -EALREADY. So far the
/// container's MAC and address are those of the host.
#[test]
fn a_packet_encapsulated_before_goes_to_the_kernel_unmodified() {
    bench("a_packet_encapsulated_before_goes_to_the_kernel_unmodified", |bench| {
        let (outside, peer) = (HOST_A, Party { address: HOST_B.address, mac: HOST_B.mac });
        let first = datagram(outside, peer, b"x");
        let fixture = sent("twice", first.clone(), Encapsulate(UPLINK)).with(|tables| {
            let port = tables.ports.get_mut(&PORT_A1).unwrap();
            port.address = mapped(outside.address);
            port.mac = outside.mac;
            remote(tables, VNI_BLUE, peer, HOST_B);
        });
        let once = fixture.becomes(encapsulated(HOST_B, 0, &first));
        once.check(bench);
        let mut twice = once.clone();
        twice.input.repeat = 2;
        let before = bench.counters();
        let (code, packet) = bench.run(&twice.input);
        let moved = moved(&before, &bench.counters());
        assert_eq!(code, 7, "TC_ACT_REDIRECT");
        assert_same("twice", once.verdict, &once.output, &packet);
        let count = |bytes: usize| Counter { packets: 1, bytes: bytes as u64 };
        let expected = [
            ((Program::FromContainer, once.verdict.code()), count(first.len())),
            ((Program::FromContainer, SlowReason::AlreadyEncapsulated as u8), count(packet.len())),
        ];
        assert_eq!(moved.verdicts, expected.into());
        assert_eq!(moved.ports[&PORT_A1].tx_packets, 2);
    });
}
