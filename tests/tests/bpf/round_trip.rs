//! What one program sends, the other one receives: `from_container` → wire → `from_uplink` or
//! `uplink_xdp` gives the inner packet back byte for byte.

use ovnet_agent::datapath::Tables;
use ovnet_common::{
    abi::{Program, mapped},
    verdict::Verdict,
};
use ovnet_tests::{
    bpf::{PORT_A1, UPLINK, bench},
    compare::difference,
    fixture::{from_wire, remote, return_code, world},
    packet::*,
};

/// The tables of a host on which A1 is remote and B1 local, so that what HOST_A sends to HOST_B
/// is received: the two hosts change places, but for the MAC of the uplink.
fn other_side() -> Tables {
    let mut tables = world();
    tables.config.vtep = mapped(HOST_B.address);
    for endpoint in tables.endpoints.values_mut() {
        if endpoint.vtep == mapped(HOST_B.address) {
            endpoint.vtep = [0; 16];
            endpoint.ifindex = PORT_A1;
        }
    }
    remote(&mut tables, VNI_BLUE, CONTAINER_A1, HOST_A);
    tables
}

#[test]
fn what_is_encapsulated_is_decapsulated_to_the_same_bytes() {
    bench("what_is_encapsulated_is_decapsulated_to_the_same_bytes", |bench| {
        let (from, to) = (CONTAINER_A1, CONTAINER_B1);
        let ip = |protocol| Ipv4::new(from.address, to.address, protocol);
        let frame = |packet: &[u8]| ethernet(to.mac, from.mac, IPV4, packet);
        let mut packets = vec![
            frame(&ip(TCP).build(&tcp(from.address, to.address, (1, 2), &[1; 12], b"data"))),
            frame(&ip(ICMP).build(&echo(8, b"ping"))),
            frame(&ip(132).build(b"a protocol nobody looks into")),
            frame(&ip(4).build(&[])),
        ];
        packets
            .extend((0..=1422).step_by(79).map(|length| datagram(from, to, &vec![0xa5; length])));
        packets.extend((0..4).map(|ecn| marked(from, to, 0xb8 | ecn)));
        for packet in packets {
            let name = format!("a round trip of {} bytes", packet.len());
            bench.set_tables(&world());
            let mut input = from_wire(Program::FromContainer, packet.clone());
            input.ifindex = PORT_A1;
            let (code, mut wire) = bench.run(&input);
            let encapsulated = Verdict::Encapsulate(UPLINK);
            assert_eq!(code, return_code(Program::FromContainer, encapsulated), "{name}");
            assert_eq!(wire.len(), packet.len() + OUTER, "{name}");
            // The switch carries it to HOST_B, whose part the same uplink plays.
            wire[..6].copy_from_slice(&HOST_A.mac);
            bench.set_tables(&other_side());
            for program in [Program::FromUplink, Program::UplinkXdp] {
                let (code, back) = bench.run(&from_wire(program, wire.clone()));
                let name = format!("{name} by {}", program.name());
                let delivered = Verdict::Deliver(PORT_A1);
                assert_eq!(code, return_code(program, delivered), "{name}");
                assert!(back == packet, "{name}: {}", difference(&name, &packet, &back));
            }
        }
    });
}
