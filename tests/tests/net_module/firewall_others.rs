//! The table `ip ovnet` and who else is on the host: other bridges' containers, and what is left of
//! sandboxes that are gone.

use std::{
    net::{Ipv4Addr, SocketAddr, UdpSocket},
    time::Duration,
};

use ovnet_agent::{
    net::{SandboxOffloads, VethSpec},
    publish::Protocol::{Tcp, Udp},
};

use super::{
    host::{Sandbox, bridge, ip},
    topology::{
        FIRST, HOST, OUTSIDE, Topology, ask, connect, counted, echoes, nft, rules, serve_tcp,
        serve_udp, with_sandboxes,
    },
};

/// The container on the other bridge.
const OTHER: Ipv4Addr = Ipv4Addr::new(172, 17, 0, 2);

/// A container behind a bridge as Docker's, on the host of the topology.
async fn another_bridge_s_container(it: &Topology) -> Sandbox {
    bridge("docker0", &["172.17.0.1/16"]);
    let container = Sandbox::new();
    let veth = VethSpec {
        host_ifname: "veth0other".into(),
        netns: container.path().into(),
        ifname: None,
        mac: [0x02, 0x42, 172, 17, 0, 2],
        address: "172.17.0.2/16".parse().unwrap(),
        mtu: 1500,
        offloads: SandboxOffloads { gro: true, tx_checksum: true },
    };
    it.net.create_veth(&veth).await.unwrap();
    ip("link set veth0other master docker0");
    container.ip("route add default via 172.17.0.1");
    it.net.forward_ipv4("docker0").await.unwrap();
    container
}

#[test]
fn other_bridges_containers_answer_sandboxes_on_published_ports_only() {
    with_sandboxes(
        "other_bridges_containers_answer_sandboxes_on_published_ports_only",
        async |it| {
            let container = another_bridge_s_container(it).await;
            serve_tcp(Some(&container), "0.0.0.0:6379");
            serve_tcp(Some(&it.first), "0.0.0.0:80");
            it.firewall.ensure(&rules(&[(Tcp, 90, 80)])).await.unwrap();
            assert!(ask(None, Tcp, OTHER, 6379).is_some(), "the server is there");
            assert_eq!(ask(Some(&it.first), Tcp, OTHER, 6379), None, "nobody published it");
            assert!(counted("other bridges' containers") > 0);
            // What connection tracking knows nothing of is no exception.
            let received = container.run(|| UdpSocket::bind("0.0.0.0:7000").unwrap());
            received.set_read_timeout(Some(Duration::from_millis(500))).unwrap();
            nft("add table ip others");
            nft("add chain ip others raw { type filter hook prerouting priority -300 ; }");
            nft("add rule ip others raw udp dport 7000 notrack");
            let before = counted("other bridges' containers");
            it.first.run(|| {
                let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
                socket.send_to(b"untracked", (OTHER, 7000)).unwrap();
            });
            assert!(received.recv_from(&mut [0; 100]).is_err());
            assert_eq!(counted("other bridges' containers"), before + 1);
            // As Docker does for `-p 6380:6379`.
            nft("add chain ip others in { type nat hook prerouting priority -100 ; }");
            nft("add rule ip others in tcp dport 6380 dnat to 172.17.0.2:6379");
            assert!(ask(Some(&it.first), Tcp, HOST, 6380).is_some(), "a published port");
            // The other way round: neither waits for the other to publish more.
            assert_eq!(ask(Some(&container), Tcp, FIRST, 80), None);
            assert_eq!(ask(Some(&container), Tcp, HOST, 90), Some(OTHER));

            // A bridge that leads out is the world.
            let mut out = rules(&[]);
            out.outward.push("docker0".into());
            it.firewall.ensure(&out).await.unwrap();
            assert!(ask(Some(&it.first), Tcp, OTHER, 6379).is_some());
        },
    );
}

#[test]
fn nobody_elsewhere_passes_for_a_sandbox_or_its_gateway() {
    with_sandboxes("nobody_elsewhere_passes_for_a_sandbox_or_its_gateway", async |it| {
        for interface in ["all", "uplink"] {
            let setting = format!("/proc/sys/net/ipv4/conf/{interface}/rp_filter");
            std::fs::write(setting, "0").unwrap();
        }
        let received = it.first.run(|| UdpSocket::bind("0.0.0.0:53").unwrap());
        received.set_read_timeout(Some(Duration::from_millis(500))).unwrap();
        it.firewall.ensure(&rules(&[(Udp, 1053, 53)])).await.unwrap();
        it.outside.ip("address add 172.18.0.3/32 dev lo");
        let send = |from: Ipv4Addr| {
            it.outside.run(move || {
                UdpSocket::bind((from, 0)).unwrap().send_to(b"x", (HOST, 1053)).unwrap();
            });
        };
        let mut buffer = [0; 100];
        send(OUTSIDE);
        assert!(received.recv_from(&mut buffer).is_ok(), "the port is published");
        send(super::topology::SECOND);
        assert!(received.recv_from(&mut buffer).is_err());
        assert_eq!(counted("a sandbox's address, from elsewhere"), 1);
    });
}

#[test]
fn no_container_speaks_vxlan_in_another_host_s_name() {
    with_sandboxes("no_container_speaks_vxlan_in_another_host_s_name", async |it| {
        let container = another_bridge_s_container(it).await;
        for interface in ["all", "docker0"] {
            let setting = format!("/proc/sys/net/ipv4/conf/{interface}/rp_filter");
            std::fs::write(setting, "0").unwrap();
        }
        let received = it.outside.run(|| UdpSocket::bind("0.0.0.0:4789").unwrap());
        let here = UdpSocket::bind((HOST, 4789)).unwrap();
        for socket in [&received, &here] {
            socket.set_read_timeout(Some(Duration::from_millis(500))).unwrap();
        }
        // A host that there could be in the outside's network.
        container.ip("address add 192.168.1.12/32 dev lo");
        let send = |from: &'static str, to: Ipv4Addr, port: u16| {
            container.run(move || {
                UdpSocket::bind(from).unwrap().send_to(b"vxlan", (to, port)).unwrap();
            });
        };
        let mut buffer = [0; 100];
        let mut arrives = |socket: &UdpSocket| socket.recv_from(&mut buffer).is_ok();
        send("192.168.1.12:0", OUTSIDE, 4789);
        assert!(arrives(&received), "nothing else on this host forbids it");
        send("192.168.1.12:0", HOST, 4789);
        assert!(arrives(&here), "nothing else on this host forbids it");

        it.firewall.ensure(&rules(&[])).await.unwrap();
        send("192.168.1.12:0", OUTSIDE, 4789);
        assert!(!arrives(&received));
        send("192.168.1.12:0", HOST, 4789);
        assert!(!arrives(&here));
        assert_eq!(counted("VXLAN in another host's name"), 2);
        // A VTEP of its own is its own business, as a virtual machine's may be.
        send("172.17.0.2:0", HOST, 4789);
        assert!(arrives(&here));
        assert_eq!(counted("VXLAN in another host's name"), 2);
    });
}

#[test]
fn answers_by_udp_do_not_come_to_published_ports() {
    with_sandboxes("answers_by_udp_do_not_come_to_published_ports", async |it| {
        // Tells each who asks the port it came from.
        let server = it.outside.run(|| UdpSocket::bind("0.0.0.0:8000").unwrap());
        std::thread::spawn(move || {
            let mut buffer = [0; 100];
            while let Ok((_, peer)) = server.recv_from(&mut buffer) {
                let _ = server.send_to(peer.port().to_string().as_bytes(), peer);
            }
        });
        let port_of = |from: u16| {
            it.first.run(move || {
                let socket = UdpSocket::bind((FIRST, from)).unwrap();
                socket.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
                socket.send_to(b"x", (OUTSIDE, 8000)).unwrap();
                let mut buffer = [0; 100];
                let length = socket.recv(&mut buffer).unwrap();
                std::str::from_utf8(&buffer[..length]).unwrap().parse::<u16>().unwrap()
            })
        };
        it.firewall.ensure(&rules(&[])).await.unwrap();
        assert_eq!(port_of(40000), 40000, "as it is");
        it.firewall
            .ensure(&rules(&[(Udp, 40001, 53), (Udp, 53, 54), (Tcp, 2000, 1)]))
            .await
            .unwrap();
        assert_eq!(port_of(2000), 2000, "what need not change does not");
        assert!((1024..=40000).contains(&port_of(40001)), "a published one");
    });
}

#[test]
fn what_the_kernel_knows_of_an_address_is_forgotten_with_it() {
    with_sandboxes("what_the_kernel_knows_of_an_address_is_forgotten_with_it", async |it| {
        serve_udp(Some(&it.first), "0.0.0.0:53");
        serve_tcp(Some(&it.first), "0.0.0.0:80");
        serve_tcp(Some(&it.second), "0.0.0.0:80");
        serve_tcp(Some(&it.outside), "0.0.0.0:8000");
        let mut published = rules(&[(Udp, 1053, 53), (Tcp, 90, 80)]);
        let second = ovnet_agent::firewall::Mapping {
            host_port: 91,
            backend: super::topology::SECOND,
            ..published.mappings[1].clone()
        };
        published.mappings.push(second);
        it.firewall.ensure(&published).await.unwrap();
        let to = |port| move || connect(SocketAddr::from((HOST, port))).unwrap().0;
        let mut first = it.outside.run(to(90));
        let mut second = it.outside.run(to(91));
        let mut own = it.first.run(|| connect(SocketAddr::from((OUTSIDE, 8000))).unwrap().0);
        let client = it.outside.run(|| UdpSocket::bind("0.0.0.0:7777").unwrap());
        client.set_read_timeout(Some(Duration::from_millis(500))).unwrap();
        let answered = || {
            client.send_to(b"x", (HOST, 1053)).unwrap();
            client.recv_from(&mut [0; 100]).is_ok()
        };
        assert!(answered());

        it.firewall.ensure(&rules(&[])).await.unwrap();
        assert!(answered() && echoes(&mut first) && echoes(&mut own), "the kernel remembers");
        assert_eq!(it.net.forget_connections(FIRST).await.unwrap(), 3);
        assert!(!answered());
        assert!(!echoes(&mut first));
        assert!(echoes(&mut second), "another's goes on");
        let left = it.net.forget_connections(FIRST).await.unwrap();
        assert!(left <= 1, "what was tried meanwhile: {left}");
        assert_eq!(it.net.forget_connections(Ipv4Addr::new(172, 18, 9, 9)).await.unwrap(), 0);
    });
}
