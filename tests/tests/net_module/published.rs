//! Published ports by the kernel's path alone.

use std::{
    io::IoSliceMut,
    net::{Ipv4Addr, UdpSocket},
    os::fd::{AsRawFd as _, OwnedFd},
    time::Duration,
};

use nix::sys::{
    socket::{
        AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, SockaddrIn, recvmsg, sendto,
        setsockopt, socket, sockopt::ReceiveTimeout,
    },
    time::{TimeVal, TimeValLike as _},
};
use ovnet_agent::publish::Protocol::{Tcp, Udp};

use super::{
    host::Sandbox,
    topology::{
        FIRST, GATEWAY, HOST, OUTSIDE, ask, bridges_ask_iptables, counted, rules, serve_tcp,
        serve_udp, with_sandboxes,
    },
};

#[test]
fn a_published_port_is_reached_from_everywhere() {
    with_sandboxes("a_published_port_is_reached_from_everywhere", async |it| {
        serve_tcp(Some(&it.first), "0.0.0.0:80");
        serve_udp(Some(&it.first), "0.0.0.0:53");
        let published = rules(&[(Tcp, 90, 80), (Udp, 1053, 53)]);
        it.firewall.ensure(&published).await.unwrap();
        let ways: [(&str, Option<&Sandbox>, Ipv4Addr, Ipv4Addr); 6] = [
            ("outside", Some(&it.outside), HOST, OUTSIDE),
            ("the host by its address", None, HOST, HOST),
            ("the host by the bridge's", None, GATEWAY, GATEWAY),
            ("the host by 127.0.0.1", None, Ipv4Addr::LOCALHOST, GATEWAY),
            ("itself", Some(&it.first), HOST, GATEWAY),
            ("the neighbour", Some(&it.second), HOST, GATEWAY),
        ];
        for (protocol, port) in [(Tcp, 90), (Udp, 1053)] {
            for (who, place, to, seen) in ways {
                // Twice: what the first answer taught must not be in the way of the second.
                for _ in 0..2 {
                    assert_eq!(ask(place, protocol, to, port), Some(seen), "{who}, {protocol}");
                }
            }
        }
        let route = it.second.ip("route get 192.168.1.11");
        assert!(route.contains("via 172.18.0.1") && !route.contains("redirect"), "{route}");
        // By another 127.0.0.0/8 address of this host too.
        assert_eq!(ask(None, Tcp, [127, 0, 0, 9], 90), Some(GATEWAY));

        // With br_netfilter the bridge itself translates what comes by its ports, and then has to
        // lead it from one isolated port to another or back: the rules alone cannot serve
        // sandboxes of this host there. Whoever comes by another interface is served.
        if bridges_ask_iptables(true) {
            for (protocol, port) in [(Tcp, 90), (Udp, 1053)] {
                for (who, place, to, seen) in ways {
                    let seen = (!["itself", "the neighbour"].contains(&who)).then_some(seen);
                    assert_eq!(ask(place, protocol, to, port), seen, "{who}, {protocol}");
                }
            }
        }
    });
}

#[test]
fn a_port_of_one_address_is_of_that_address_only() {
    with_sandboxes("a_port_of_one_address_is_of_that_address_only", async |it| {
        serve_tcp(Some(&it.first), "0.0.0.0:80");
        let mut published = rules(&[(Tcp, 90, 80)]);
        let asked = |to: Ipv4Addr| ask(None, Tcp, to, 90).is_some();
        for (host_address, reached) in
            [(HOST, [true, false, false]), (Ipv4Addr::LOCALHOST, [false, true, false])]
        {
            published.mappings[0].host_address = host_address;
            it.firewall.ensure(&published).await.unwrap();
            assert_eq!([HOST, Ipv4Addr::LOCALHOST, GATEWAY].map(asked), reached, "{host_address}");
        }
        assert_eq!(ask(Some(&it.outside), Tcp, HOST, 90), None);
        // Docker's are Docker's to translate.
        published.mappings[0].own = false;
        published.mappings[0].host_address = Ipv4Addr::UNSPECIFIED;
        it.firewall.ensure(&published).await.unwrap();
        assert_eq!([HOST, Ipv4Addr::LOCALHOST, GATEWAY].map(asked), [false; 3]);
    });
}

#[test]
fn an_answer_the_kernel_sees_first_stays_on_its_port() {
    with_sandboxes("an_answer_the_kernel_sees_first_stays_on_its_port", async |it| {
        it.firewall.ensure(&rules(&[(Tcp, 90, 80), (Udp, 1053, 53)])).await.unwrap();
        // As if the question had come by the programs.
        let heard = it.outside.run(|| UdpSocket::bind((OUTSIDE, 5000)).unwrap());
        heard.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        it.first.run(|| {
            let socket = UdpSocket::bind("0.0.0.0:53").unwrap();
            socket.send_to(b"answer", (OUTSIDE, 5000)).unwrap();
        });
        let (_, from) = heard.recv_from(&mut [0; 100]).unwrap();
        assert_eq!(from, (HOST, 1053).into());

        const ACK: u8 = 0x10;
        const SYN: u8 = 0x02;
        let raw = it.outside.run(raw_tcp);
        it.first.run(|| send_tcp(80, 6000, ACK));
        assert_eq!(next_tcp(&raw), (HOST, 90, 6000));
        // One that the sandbox itself opens is none.
        it.first.run(|| send_tcp(80, 6001, SYN));
        let (from, port, to) = next_tcp(&raw);
        assert_eq!((from, to), (HOST, 6001));
        assert_ne!(port, 90);
        assert_eq!(counted(&format!("answers of {FIRST}:80")), 1);
        assert_eq!(counted(&format!("answers of {FIRST}:53")), 1);
    });
}

fn raw_tcp() -> OwnedFd {
    let raw = socket(AddressFamily::Inet, SockType::Raw, SockFlag::SOCK_CLOEXEC, SockProtocol::Tcp);
    let raw = raw.unwrap();
    setsockopt(&raw, ReceiveTimeout, &TimeVal::seconds(5)).unwrap();
    raw
}

/// Sends a segment without data from the first sandbox to somebody outside.
fn send_tcp(from: u16, to: u16, flags: u8) {
    let mut segment = [0_u8; 20];
    segment[..2].copy_from_slice(&from.to_be_bytes());
    segment[2..4].copy_from_slice(&to.to_be_bytes());
    segment[4..8].copy_from_slice(&1_u32.to_be_bytes());
    segment[8..12].copy_from_slice(&1_u32.to_be_bytes());
    segment[12] = 5 << 4;
    segment[13] = flags;
    segment[14..16].copy_from_slice(&1000_u16.to_be_bytes());
    let pseudo = [&FIRST.octets()[..], &OUTSIDE.octets(), &[0, 6, 0, 20], &segment].concat();
    let words = pseudo.chunks(2).map(|two| u32::from(u16::from_be_bytes([two[0], two[1]])));
    let mut sum: u32 = words.sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    segment[16..18].copy_from_slice(&(!u16::try_from(sum).unwrap()).to_be_bytes());
    let [a, b, c, d] = OUTSIDE.octets();
    let address = SockaddrIn::new(a, b, c, d, 0);
    sendto(raw_tcp().as_raw_fd(), &segment, &address, MsgFlags::empty()).unwrap();
}

/// The next segment from outside the namespace: source address, source port, destination port.
fn next_tcp(raw: &OwnedFd) -> (Ipv4Addr, u16, u16) {
    let mut packet = [0_u8; 100];
    let mut buffers = [IoSliceMut::new(&mut packet)];
    recvmsg::<()>(raw.as_raw_fd(), &mut buffers, None, MsgFlags::empty()).unwrap();
    let word = |at: usize| u16::from_be_bytes([packet[at], packet[at + 1]]);
    let from = Ipv4Addr::from([packet[12], packet[13], packet[14], packet[15]]);
    (from, word(20), word(22))
}
