//! Several next hops to one host: the kernel's FIB decides, flow by flow.

use std::net::UdpSocket;

use ovnet_tests::lab::{Counters, PutBack, SOON, ping_all, script};
use xtask::lab::{CLIENT, Lab, wait_until};

use crate::delivery::Mesh;
use crate::traffic;

/// Makes a router of a host, which sends nobody elsewhere, and counts what it forwards.
const ROUTER: &str = r#"
    for scope in all ens33; do echo 0 > /proc/sys/net/ipv4/conf/$scope/send_redirects; done
    echo 1 > /proc/sys/net/ipv4/ip_forward
    nft -f - <<END
    table ip several_ways {
        chain forward {
            type filter hook forward priority 0;
            ip saddr $1 ip daddr $2 udp dport 4789 counter
        }
    }
END
"#;
const NO_ROUTER: &str = "nft delete table ip several_ways; echo 0 > /proc/sys/net/ipv4/ip_forward";

/// Packets that a router forwarded.
fn forwarded(lab: &Lab, router: &str) -> u64 {
    let text = script(lab, router, "nft list table ip several_ways", &[]);
    let mut words = text.split_whitespace().skip_while(|word| *word != "packets");
    words.nth(1).unwrap().parse().unwrap()
}

/// Everything to `docker02` goes by one router; then by two, and flows are spread over both.
pub(crate) fn routed(lab: &Lab, mesh: &Mesh) {
    let [one, two, _] = mesh.three();
    let (from, to) = (lab.address("docker01").unwrap(), lab.address("docker02").unwrap());
    let (from, to) = (from.to_string(), to.to_string());
    let routers = [CLIENT, "docker03"];
    let _put_back = routers.map(|place| {
        script(lab, place, ROUTER, &[&from, &to]);
        PutBack { lab, place, script: NO_ROUTER }
    });
    let _routes = PutBack {
        lab,
        place: "docker01",
        script: "ip route del 192.168.1.12/32; echo 0 > /proc/sys/net/ipv4/fib_multipath_hash_policy",
    };

    let one_way = "ip route replace 192.168.1.12/32 via 192.168.1.100 dev ens33";
    script(lab, "docker01", one_way, &[]);
    // The first packet finds no neighbour; its answer says that it is known.
    ping_all(lab, &one.name, two.address, &[]);
    let counters = Counters::now(lab);
    ping_all(lab, &one.name, two.address, &[]);
    traffic::tcp(lab, &one.name, two, 1 << 20);
    counters.since().only_fast().at_least("docker01", "from_container", "encapsulate", 10);
    assert!(forwarded(lab, CLIENT) >= 10, "the router forwarded {}", forwarded(lab, CLIENT));
    assert_eq!(forwarded(lab, "docker03"), 0);

    let two_ways = "echo 1 > /proc/sys/net/ipv4/fib_multipath_hash_policy
        ip route replace 192.168.1.12/32 nexthop via 192.168.1.100 dev ens33 \
            nexthop via 192.168.1.13 dev ens33";
    script(lab, "docker01", two_ways, &[]);
    // Both next hops resolved: nothing goes the slow way any more.
    script(lab, "docker01", "ping -q -c 1 -W 2 192.168.1.100; ping -q -c 1 -W 2 192.168.1.13", &[]);
    let before = routers.map(|router| forwarded(lab, router));
    let counters = Counters::now(lab);
    for _ in 0..64 {
        traffic::udp(lab, &one.name, two, &[100]);
    }
    counters.since().no_drops().at_least("docker01", "from_container", "encapsulate", 64);
    for (router, before) in routers.into_iter().zip(before) {
        let flows = forwarded(lab, router) - before;
        assert!((8..=64).contains(&flows), "{router} forwarded {flows} of 64 flows");
    }
    // A flow keeps to its way.
    let before = routers.map(|router| forwarded(lab, router));
    let (server, client): (UdpSocket, UdpSocket) = traffic::udp_pair(lab, &one.name, two);
    for _ in 0..20 {
        client.send_to(b"one flow", server.local_addr().unwrap()).unwrap();
        server.recv_from(&mut [0; 16]).unwrap();
    }
    let moved = || {
        let now = routers.map(|router| forwarded(lab, router));
        now.into_iter().zip(before).map(|(now, before)| now - before).collect::<Vec<_>>()
    };
    wait_until(
        SOON,
        || "20 packets to be forwarded".into(),
        || Ok((moved().iter().sum::<u64>() >= 20).then_some(())),
    )
    .unwrap();
    assert!(moved().contains(&20), "one flow took both ways: {:?}", moved());
    traffic::tcp(lab, &one.name, two, 4 << 20);
}
