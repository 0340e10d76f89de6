//! The table `ip ovnet` and iptables: what sandboxes may and may not, and that it stays so.

use std::{
    net::{Ipv4Addr, SocketAddr, UdpSocket},
    os::unix::process::CommandExt as _,
    time::{Duration, Instant},
};

use ovnet_agent::{
    firewall::{Firewall, Mapping, Rules, accept_forwarding, withdraw},
    net::GWBRIDGE,
    publish::Protocol::{Tcp, Udp},
};

use super::{
    host::{ip, on_a_host, skip},
    topology::{
        FIRST, GATEWAY, HOST, OUTSIDE, SECOND, ask, at, connect, counted, echoes, nft, program,
        rules, serve_tcp, serve_udp, with_sandboxes,
    },
};

#[test]
fn sandboxes_reach_the_world_under_the_host_s_address_and_not_each_other() {
    with_sandboxes(
        "sandboxes_reach_the_world_under_the_host_s_address_and_not_each_other",
        async |it| {
            serve_tcp(Some(&it.outside), "0.0.0.0:8000");
            serve_udp(Some(&it.outside), "0.0.0.0:8000");
            serve_tcp(Some(&it.second), "0.0.0.0:80");
            assert_eq!(ask(Some(&it.first), Tcp, OUTSIDE, 8000), None, "not without the table");
            it.firewall.ensure(&rules(&[])).await.unwrap();
            for protocol in [Tcp, Udp] {
                assert_eq!(ask(Some(&it.first), protocol, OUTSIDE, 8000), Some(HOST));
            }
            assert!(counted("out") >= 2);

            assert_eq!(ask(None, Tcp, SECOND, 80), Some(GATEWAY), "the server is there");
            assert_eq!(ask(Some(&it.first), Tcp, SECOND, 80), None, "the ports are isolated");
            it.first.ip("route add 172.18.0.3/32 via 172.18.0.1");
            assert_eq!(ask(Some(&it.first), Tcp, SECOND, 80), None, "nor by the host");
            assert!(counted("sandbox to sandbox") > 0);
            it.outside.ip("route add 172.18.0.0/16 via 192.168.1.11");
            assert_eq!(ask(Some(&it.outside), Tcp, SECOND, 80), None, "nor from outside");
            assert!(counted("nothing else comes in") > 0);
            // As somebody else.
            it.first.ip("address add 10.66.0.1/32 dev lo");
            let spoof = || {
                let socket = UdpSocket::bind("10.66.0.1:0").unwrap();
                socket.send_to(b"x", (OUTSIDE, 8000)).unwrap();
            };
            it.first.run(spoof);
            assert_eq!(counted("spoofed source"), 1);
        },
    );
}

#[test]
fn no_sandbox_speaks_vxlan_as_the_host() {
    with_sandboxes("no_sandbox_speaks_vxlan_as_the_host", async |it| {
        it.firewall.ensure(&rules(&[])).await.unwrap();
        let received = it.outside.run(|| UdpSocket::bind("0.0.0.0:4789").unwrap());
        received.set_read_timeout(Some(Duration::from_millis(500))).unwrap();
        it.first.run(|| {
            let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
            socket.send_to(b"vxlan", (OUTSIDE, 4789)).unwrap();
        });
        let mut buffer = [0; 2000];
        received.recv_from(&mut buffer).unwrap_err();
        assert_eq!(counted("masqueraded"), 1);

        // The kernel's own, which an ARP request makes.
        ip("link add vx7 type vxlan id 7 remote 192.168.1.50 dstport 4789 dev uplink");
        ip("address add 10.77.0.1/24 dev vx7");
        ip("link set vx7 up");
        let ask = UdpSocket::bind("0.0.0.0:0").unwrap();
        received.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        let _ = ask.send_to(b"x", "10.77.0.2:9");
        let (_, from) = received.recv_from(&mut buffer).unwrap();
        assert_eq!(from.ip(), HOST);
        assert_eq!(counted("masqueraded"), 1, "it is none of the guard's");
    });
}

/// By the kernel's NAT, which is left what the programs do not take.
#[test]
fn no_published_port_and_no_user_speaks_vxlan_as_the_host() {
    with_sandboxes("no_published_port_and_no_user_speaks_vxlan_as_the_host", async |it| {
        serve_udp(Some(&it.first), "0.0.0.0:80");
        it.firewall.ensure(&rules(&[(Udp, 90, 80)])).await.unwrap();
        let bound = |port| {
            let socket = it.outside.run(move || UdpSocket::bind(("0.0.0.0", port)).unwrap());
            socket.set_read_timeout(Some(Duration::from_millis(500))).unwrap();
            socket
        };
        let (other, vxlan) = (bound(4790), bound(4789));
        let mut buffer = [0; 100];
        other.send_to(b"who am I", (HOST, 90)).unwrap();
        other.recv_from(&mut buffer).unwrap();
        vxlan.send_to(b"who am I", (HOST, 90)).unwrap();
        vxlan.recv_from(&mut buffer).unwrap_err();
        assert_eq!(counted("an answer of a published port"), 1);

        // The kernel tells who sends that it may not.
        let sends = |user: u32| {
            let mut shell = std::process::Command::new("bash");
            shell.args(["-c", "echo vxlan > /dev/udp/192.168.1.50/4789"]).uid(user);
            shell.status().unwrap().success()
        };
        assert!(!sends(65_534));
        vxlan.recv_from(&mut buffer).unwrap_err();
        assert_eq!(counted("VXLAN by a user"), 1);
        // Root may do worse than this.
        assert!(sends(0));
        assert_eq!(vxlan.recv_from(&mut buffer).unwrap().1.ip(), HOST);
    });
}

#[test]
fn the_host_s_loopback_is_its_own() {
    with_sandboxes("the_host_s_loopback_is_its_own", async |it| {
        serve_tcp(None, "127.0.0.1:7000");
        serve_udp(None, "127.0.0.1:7000");
        // As somebody does who has root inside.
        it.first.ip("address delete 127.0.0.1/8 dev lo");
        it.first.ip("route add 127.0.0.1/32 via 172.18.0.1");
        let all = "/proc/sys/net/ipv4/conf/all/route_localnet";
        it.first.run(move || std::fs::write(all, "1").unwrap());
        let attempt = || ask(Some(&it.first), Tcp, Ipv4Addr::LOCALHOST, 7000);
        assert_eq!(attempt(), Some(FIRST), "the bridge lets it pass");
        it.firewall.ensure(&rules(&[])).await.unwrap();
        assert_eq!(attempt(), None);
        assert_eq!(ask(Some(&it.first), Udp, Ipv4Addr::LOCALHOST, 7000), None);
        assert!(counted("route_localnet") >= 2);
    });
}

#[test]
fn the_table_is_put_right_and_connections_live_through_it() {
    with_sandboxes("the_table_is_put_right_and_connections_live_through_it", async |it| {
        serve_tcp(Some(&it.outside), "0.0.0.0:8000");
        serve_tcp(Some(&it.first), "0.0.0.0:80");
        nft("add table ip others");
        let firewall = it.firewall.clone();
        let published = rules(&[(Tcp, 90, 80)]);
        assert!(!firewall.exists().await.unwrap());
        assert!(firewall.ensure(&published).await.unwrap());
        assert!(!firewall.ensure(&published).await.unwrap(), "as it must be");
        let to = |address, port| move || connect(SocketAddr::from((address, port))).unwrap().0;
        let mut streams = [
            it.first.run(to(OUTSIDE, 8000)),
            it.outside.run(to(HOST, 90)),
            at(None, to(Ipv4Addr::LOCALHOST, 90)),
            it.first.run(to(HOST, 90)),
        ];
        for spoil in [
            "flush chain ip ovnet forward",
            "flush chain ip ovnet prerouting",
            "delete chain ip ovnet guard",
            "add chain ip ovnet more",
            "flush table ip ovnet",
            "delete table ip ovnet",
        ] {
            if spoil.starts_with("delete chain") {
                nft("flush chain ip ovnet guard");
            }
            nft(spoil);
            assert!(firewall.ensure(&published).await.unwrap(), "{spoil}");
            assert!(!firewall.ensure(&published).await.unwrap(), "{spoil}");
        }
        // With other rules, and without the port they came by.
        for other in [rules(&[(Tcp, 90, 80), (Udp, 53, 53)]), rules(&[])] {
            assert!(firewall.ensure(&other).await.unwrap());
            for (number, stream) in streams.iter_mut().enumerate() {
                assert!(echoes(stream), "connection {number} with {other:?}");
            }
        }
        assert_eq!(ask(Some(&it.outside), Tcp, HOST, 90), None, "a new one does not come in");
        for _ in 0..2 {
            firewall.remove().await.unwrap();
            assert_eq!(nft("list tables").trim(), "table ip others");
        }
    });
}

#[test]
fn every_kind_of_mapping_is_taken_by_nft() {
    with_sandboxes("every_kind_of_mapping_is_taken_by_nft", async |it| {
        let mut all: Rules = rules(&[]);
        for protocol in [Tcp, Udp] {
            for host_address in [Ipv4Addr::UNSPECIFIED, HOST, Ipv4Addr::LOCALHOST] {
                for own in [true, false] {
                    all.mappings.push(Mapping {
                        protocol,
                        host_address,
                        host_port: 65535,
                        backend: FIRST,
                        container_port: 1,
                        bridge: "docker_gwbridge".into(),
                        own,
                    });
                }
            }
        }
        assert!(it.firewall.ensure(&all).await.unwrap());
        assert!(!it.firewall.ensure(&all).await.unwrap());
        let none = Rules { egress: None, ..rules(&[]) };
        assert!(it.firewall.ensure(&none).await.unwrap());
        assert!(!it.firewall.ensure(&none).await.unwrap());
        assert_eq!(counted("masqueraded"), 0, "the guard is there");
        // Many at once, whoever is first.
        let ports: Vec<_> = (1..=500).map(|port| (Tcp, port, port)).collect();
        let many = rules(&ports);
        let started = Instant::now();
        let (a, b) = tokio::join!(it.firewall.ensure(&many), it.firewall.ensure(&many));
        assert!(a.unwrap() != b.unwrap(), "once");
        println!("500 ports set and read in {:?}", started.elapsed());
    });
}

#[test]
fn a_policy_of_iptables_to_drop_is_answered_in_its_own_words() {
    const NAME: &str = "a_policy_of_iptables_to_drop_is_answered_in_its_own_words";
    if std::process::Command::new("iptables").arg("-V").output().is_err() {
        return skip(NAME, "`iptables` is not installed");
    }
    with_sandboxes(NAME, async |it| {
        serve_tcp(Some(&it.outside), "0.0.0.0:8000");
        it.firewall.ensure(&rules(&[])).await.unwrap();
        assert!(!accept_forwarding(GWBRIDGE).await.unwrap(), "nothing drops");
        let rules_of = |chain| program("iptables", &format!("-w -S {chain}"));
        for chain in ["FORWARD", "DOCKER-USER"] {
            program("iptables", "-w -P FORWARD DROP");
            if chain == "DOCKER-USER" {
                program("iptables", "-w -N DOCKER-USER");
                program("iptables", "-w -A DOCKER-USER -j RETURN");
                program("iptables", "-w -A FORWARD -j DOCKER-USER");
            }
            let before = (rules_of("FORWARD"), rules_of(chain));
            assert_eq!(ask(Some(&it.first), Tcp, OUTSIDE, 8000), None);
            assert!(accept_forwarding(GWBRIDGE).await.unwrap());
            assert!(!accept_forwarding(GWBRIDGE).await.unwrap());
            assert_eq!(rules_of(chain).matches("--comment ovnet ").count(), 2, "{chain}");
            assert_eq!(ask(Some(&it.first), Tcp, OUTSIDE, 8000), Some(HOST));
            assert!(withdraw().await.unwrap());
            assert!(!withdraw().await.unwrap());
            assert_eq!((rules_of("FORWARD"), rules_of(chain)), before);
        }
    });
}

#[test]
fn where_there_is_no_table_there_is_none_to_remove() {
    const NAME: &str = "where_there_is_no_table_there_is_none_to_remove";
    if !Firewall::available() {
        return skip(NAME, "`nft` (nftables) is not installed");
    }
    on_a_host(NAME, async |_| {
        let firewall = Firewall::default();
        firewall.remove().await.unwrap();
        assert!(!firewall.exists().await.unwrap());
    });
}
