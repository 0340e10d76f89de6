//! The kernel's vxlan device → container: `from_overlay`.
//!
//! BPF_PROG_TEST_RUN has no field for a tunnel key, so a program in front sets one
//! (`ovnet_tests::syscall::Prelude`). That the kernel's device sets the same is the net layer's to
//! show.

use ovnet_common::{
    abi::Program,
    verdict::{
        Answer,
        DropReason::*,
        Verdict::{self, Answer as Answered, Deliver, Drop},
    },
};
use ovnet_tests::{
    bpf::{EXTERNAL, PORT_A1, PORT_A4, PORT_UNKNOWN, bench},
    fixture::{Fixture, check_all},
    packet::*,
};

/// The interface packets come in by here: any that exists.
const OVERLAY: u32 = PORT_UNKNOWN;

pub(crate) fn fixtures() -> Vec<Fixture> {
    let bare = Fixture::new(
        "a packet without a tunnel key",
        Program::FromOverlay,
        OVERLAY,
        datagram(CONTAINER_B1, CONTAINER_A1, b"x"),
        Drop(TunnelKey),
    );
    let mut all = vec![bare];
    all.extend(packets());
    all.extend(arp_requests());
    all
}

/// A packet HOST_B sent in blue, unchanged unless said otherwise.
fn received(name: &str, packet: Vec<u8>, verdict: Verdict) -> Fixture {
    Fixture::new(name, Program::FromOverlay, OVERLAY, packet, verdict)
        .tunnel(VNI_BLUE, HOST_B, HOST_A)
}

fn packets() -> Vec<Fixture> {
    let from_b1 = || datagram(CONTAINER_B1, CONTAINER_A1, b"x");
    let to = |address| {
        let to = Party { address, ..CONTAINER_A1 };
        datagram(CONTAINER_B1, to, b"x")
    };
    let from = |address| datagram(Party { address, ..CONTAINER_B1 }, CONTAINER_A1, b"x");
    let replaced = |at: usize, byte: u8| {
        let mut packet = from_b1();
        packet[at] = byte;
        packet
    };
    let mut elsewhere = from_b1();
    elsewhere[..6].copy_from_slice(&BROADCAST);
    let large = datagram(CONTAINER_B1, CONTAINER_A1, &[0x5a; 3000]);
    let from_b4 = datagram(CONTAINER_B4, CONTAINER_A4, b"x");
    let mut all = vec![
        received("a packet for a local endpoint", from_b1(), Deliver(PORT_A1)),
        received("a reassembled packet", large.clone(), Deliver(PORT_A1)),
        received("a GSO packet", large, Deliver(PORT_A1)).gso(1000),
        received("an inner MAC nobody has", elsewhere, Deliver(PORT_A1)).becomes(from_b1()),
        received(
            "CE, as the kernel merged it",
            marked(CONTAINER_B1, CONTAINER_A1, 3),
            Deliver(PORT_A1),
        ),
        received("the other network", from_b4, Deliver(PORT_A4)).tunnel(VNI_RED, HOST_B, HOST_A),
        received("to another address of ours", from_b1(), Drop(WrongDestination))
            .tunnel(VNI_BLUE, HOST_B, HOST_C),
        received("while we have no address", from_b1(), Drop(WrongDestination))
            .with(|tables| tables.config.vtep = [0; 16]),
        received("from an unknown VTEP", from_b1(), Drop(UnknownVtep))
            .tunnel(VNI_BLUE, INTRUDER, HOST_A),
        received("in an unknown network", from_b1(), Drop(UnknownVni)).tunnel(
            VNI_UNKNOWN,
            HOST_B,
            HOST_A,
        ),
        received("in another network than its endpoint's", from_b1(), Drop(ForgedSource))
            .tunnel(VNI_RED, HOST_B, HOST_A),
        received("for another host's endpoint", from_b1(), Drop(ForgedSource))
            .tunnel(VNI_BLUE, HOST_C, HOST_A),
        received(
            "for an endpoint of ours",
            datagram(CONTAINER_A2, CONTAINER_A1, b"x"),
            Drop(ForgedSource),
        ),
        received("from a loopback address", from([127, 0, 0, 1]), Drop(ForgedSource)),
        received("from whom it is for", from(CONTAINER_A1.address), Drop(ForgedSource)),
        received("from the gateway", from(GATEWAY.address), Drop(ForgedSource)),
        received("to an endpoint elsewhere", to(CONTAINER_C1.address), Drop(NotLocal)),
        received("to nobody", to(NOBODY.address), Drop(NotLocal)),
        received("to the gateway", to(GATEWAY.address), Drop(NotLocal)),
        received("to mDNS", to([224, 0, 0, 251]), Drop(Multicast)),
        received("to limited broadcast", to([255; 4]), Drop(Multicast)),
        received("a VLAN tag inside", from_b1(), Drop(EtherType)).vlan(5),
        received("IPv6", replaced(12, 0x86), Drop(EtherType)),
        received("IP version 6", replaced(14, 0x65), Drop(BadIpHeader)),
        received("a header of four words", replaced(14, 0x44), Drop(BadIpHeader)),
    ];
    for length in 14..34 {
        let name = format!("cut off at {length}");
        all.push(received(&name, from_b1()[..length].to_vec(), Drop(Truncated)));
    }
    all
}

fn arp_requests() -> Vec<Fixture> {
    let asks = |sender: Party, target: Party| {
        let target = Party { mac: [0; 6], ..target };
        ethernet(BROADCAST, sender.mac, ARP, &arp(1, sender, target))
    };
    let request = asks(CONTAINER_B1, CONTAINER_A1);
    let reply =
        ethernet(CONTAINER_B1.mac, CONTAINER_A1.mac, ARP, &arp(2, CONTAINER_A1, CONTAINER_B1));
    let answer = Answered(Answer::Arp, OVERLAY);
    let dropped = |name: &str, packet: Vec<u8>, reason| received(name, packet, Drop(reason));
    let not_ours = ethernet(BROADCAST, CONTAINER_B1.mac, ARP, &arp(2, CONTAINER_B1, CONTAINER_A1));
    let probe = Party { address: [0; 4], ..CONTAINER_B1 };
    let mut all = vec![
        received("ARP for a local endpoint", request.clone(), answer).becomes(reply),
        dropped("ARP for an endpoint elsewhere", asks(CONTAINER_B1, CONTAINER_C1), ArpUnanswered),
        dropped("ARP for nobody", asks(CONTAINER_B1, NOBODY), ArpUnanswered),
        dropped("ARP for the gateway", asks(CONTAINER_B1, GATEWAY), ArpUnanswered),
        dropped(
            "ARP for an endpoint of another network",
            asks(CONTAINER_B1, CONTAINER_A4),
            ArpUnanswered,
        ),
        dropped("an ARP reply", not_ours, ArpUnanswered),
        dropped("ARP for another host's endpoint", asks(CONTAINER_C1, CONTAINER_A1), ForgedSource),
        dropped("ARP for an endpoint of ours", asks(CONTAINER_A2, CONTAINER_A1), ForgedSource),
        dropped(
            "an ARP probe, which nobody can be trusted with",
            asks(probe, CONTAINER_A1),
            ForgedSource,
        ),
        dropped("ARP from an unknown VTEP", request.clone(), UnknownVtep)
            .tunnel(VNI_BLUE, INTRUDER, HOST_A),
        dropped("ARP in an unknown network", request.clone(), UnknownVni).tunnel(
            VNI_UNKNOWN,
            HOST_B,
            HOST_A,
        ),
        dropped("ARP to another address of ours", request.clone(), WrongDestination)
            .tunnel(VNI_BLUE, HOST_B, HOST_C),
    ];
    for length in 14..42 {
        let name = format!("ARP cut off at {length}");
        all.push(dropped(&name, request[..length].to_vec(), Truncated));
    }
    all
}

#[test]
fn from_overlay_follows_its_table() {
    assert_ne!(OVERLAY, EXTERNAL, "an interface that exists");
    bench("from_overlay_follows_its_table", |bench| check_all(bench, &fixtures()));
}
