//! Probes of peers: what is answered, with which bytes, and what is not. Part of the tables of
//! [`super::receive`].

use ovnet_common::{
    abi::{Program, mapped},
    verdict::{
        Answer,
        DropReason::*,
        Verdict::{self, Drop, Pass},
    },
    vxlan::PROBE_VNI,
};
use ovnet_tests::{
    bpf::{UPLINK, bench},
    fixture::{Fixture, check_all, from_wire, return_code, world},
    packet::*,
};

const ANSWERED: Verdict = Verdict::Answer(Answer::Probe, UPLINK);

/// The headers HOST_B asks with.
fn from_b() -> Vxlan {
    Vxlan::new(HOST_B, HOST_A, PROBE_VNI)
}

/// An ICMP echo between two hosts: kind 8 asks, 0 answers.
fn echo_between(from: Party, to: Party, kind: u8, payload: &[u8]) -> Vec<u8> {
    let packet = Ipv4::new(from.address, to.address, ICMP).build(&echo(kind, payload));
    ethernet(to.mac, from.mac, IPV4, &packet)
}

fn question() -> Vec<u8> {
    echo_between(HOST_B, HOST_A, 8, b"is it there?")
}

/// What comes back: everything turned around, to the port that asked.
fn answer(vxlan: &Vxlan, payload: &[u8]) -> Vec<u8> {
    let back = Vxlan {
        macs: (vxlan.macs.1, vxlan.macs.0),
        ip: Ipv4 {
            source: HOST_A.address,
            destination: HOST_B.address,
            ttl: 64,
            ..vxlan.ip.clone()
        },
        ports: (vxlan.ports.1, vxlan.ports.0),
        ..vxlan.clone()
    };
    back.build(&echo_between(HOST_A, HOST_B, 0, payload))
}

pub(crate) fn fixtures(program: Program) -> Vec<Fixture> {
    let received = |name: &str, packet: Vec<u8>, verdict| {
        Fixture::new(&format!("a probe, {name}"), program, UPLINK, packet, verdict)
    };
    // XDP looks who it is from and leaves the rest to TC.
    let later = |verdict| if program == Program::UplinkXdp { Pass } else { verdict };
    let answered = |name: &str, vxlan: Vxlan, payload: &[u8]| {
        let packet = vxlan.build(&echo_between(HOST_B, HOST_A, 8, payload));
        let back = if later(ANSWERED) == Pass { packet.clone() } else { answer(&vxlan, payload) };
        received(name, packet, later(ANSWERED)).becomes(back)
    };
    let refused =
        |name: &str, inner: Vec<u8>| received(name, from_b().build(&inner), later(Drop(NotAProbe)));
    let changed = |change: fn(Ipv4) -> Ipv4| {
        let ip = change(Ipv4::new(HOST_B.address, HOST_A.address, ICMP));
        ethernet(HOST_A.mac, HOST_B.mac, IPV4, &ip.build(&echo(8, b"x")))
    };
    let routed = Vxlan { macs: (HOST_A.mac, ROUTER.mac), ip: from_b().ip.ttl(61), ..from_b() };
    let mut all = vec![
        answered("answered", from_b(), b"is it there?"),
        answered("of a full-size packet", from_b(), &[0x5a; 1500 - 50 - 28]),
        answered(
            "that may not be fragmented",
            Vxlan { ip: from_b().ip.fragment(0x4000), ..from_b() },
            b"x",
        ),
        answered("with nothing in it", from_b(), b""),
        answered("by way of a router", routed, b"x"),
        answered("marked with congestion", from_b().tos(0x2b), b"x"),
        answered(
            "to a port that is VXLAN's, too",
            Vxlan { ports: (VXLAN_PORT, VXLAN_PORT), ..from_b() },
            b"x",
        ),
        received(
            "from an unknown VTEP",
            Vxlan::new(INTRUDER, HOST_A, PROBE_VNI).build(&echo_between(INTRUDER, HOST_A, 8, b"x")),
            Drop(UnknownVtep),
        ),
        received("from a host that was removed", from_b().build(&question()), Drop(UnknownVtep))
            .with(|tables| tables.hosts.retain(|vtep, _| *vtep != mapped(HOST_B.address))),
        refused("that is an answer", echo_between(HOST_B, HOST_A, 0, b"x")),
        refused("in the name of another host", echo_between(HOST_C, HOST_A, 8, b"x")),
        refused("in the name of a container", echo_between(CONTAINER_B1, HOST_A, 8, b"x")),
        refused("for another host", echo_between(HOST_B, HOST_C, 8, b"x")),
        refused("for a container", echo_between(HOST_B, CONTAINER_A1, 8, b"x")),
        refused("that is a fragment", changed(|ip| ip.fragment(0x2000))),
        refused("with IP options inside", changed(|ip| ip.options(&[1; 4]))),
        refused("that is UDP", datagram(HOST_B, HOST_A, b"eight bytes at least")),
        refused("that is IPv6", {
            let mut inner = question();
            inner[12..14].copy_from_slice(&[0x86, 0xdd]);
            inner
        }),
        refused("that is ARP", ethernet(BROADCAST, HOST_B.mac, ARP, &arp(1, HOST_B, HOST_A))),
    ];
    let whole = from_b().build(&question());
    all.extend((50..92).map(|length| {
        let name = format!("cut off at {length}");
        received(&name, whole[..length].to_vec(), later(Drop(Truncated)))
    }));
    if program == Program::FromUplink {
        all.push(received("of several in one", whole, Drop(NotAProbe)).gso(1000));
    }
    all
}

#[test]
fn probes_are_answered_by_their_table() {
    bench("probes_are_answered_by_their_table", |bench| {
        check_all(bench, &fixtures(Program::FromUplink));
        check_all(bench, &fixtures(Program::UplinkXdp));
    });
}

/// What generic XDP passes on may reach TC without its Ethernet header, so its program answers.
#[test]
fn generic_xdp_answers_itself() {
    bench("generic_xdp_answers_itself", |bench| {
        bench.reload_for_generic_xdp();
        bench.set_tables(&world());
        let program = Program::UplinkXdp;
        let whole = from_b().build(&question());
        let (code, after) = bench.run(&from_wire(program, whole.clone()));
        assert_eq!(code, return_code(program, ANSWERED));
        assert_eq!(after, answer(&from_b(), b"is it there?"));
        let refused = [(0, HOST_B), (8, HOST_C), (8, CONTAINER_B1)]
            .map(|(kind, from)| from_b().build(&echo_between(from, HOST_A, kind, b"x")));
        for packet in refused.into_iter().chain((50..92).map(|length| whole[..length].to_vec())) {
            let (code, after) = bench.run(&from_wire(program, packet.clone()));
            assert_eq!(code, return_code(program, Drop(NotAProbe)), "{packet:02x?}");
            assert_eq!(after, packet, "and it is not touched");
        }
    });
}

/// Two hosts must never be made to answer each other for ever, whatever a question was made to look
/// like on its way.
#[test]
fn an_answer_is_not_answered() {
    bench("an_answer_is_not_answered", |bench| {
        bench.set_tables(&world());
        let vxlan = Vxlan { ports: (VXLAN_PORT, VXLAN_PORT), ..from_b() };
        // As HOST_B would get it, seen from HOST_A: the two are alike.
        let back =
            Vxlan { macs: from_b().macs, ..vxlan }.build(&echo_between(HOST_B, HOST_A, 0, b"x"));
        let (code, after) = bench.run(&from_wire(Program::FromUplink, back.clone()));
        assert_eq!(code, return_code(Program::FromUplink, Drop(NotAProbe)));
        assert_eq!(after, back, "and it is not touched");
    });
}
