//! Two networks: apart from each other, but for a sandbox that is in both and forwards.

use std::net::{Ipv4Addr, SocketAddrV4};

use ovnet_tests::lab::{Counters, ping, ping_all, script, wait_for_ping};
use xtask::lab::Lab;

use crate::delivery::{Mesh, NETWORK, Network, run};
use crate::traffic::{self, Place};

/// The second network, and who is in it.
pub(crate) struct Second {
    /// On the first host, beside `t1`.
    beside: Place,
    /// On the third host.
    far: Place,
    /// On the second host and in both networks: its name, and its address in each.
    router: String,
    inner: Ipv4Addr,
    outer: Ipv4Addr,
}

impl Second {
    pub(crate) fn up(lab: &Lab) -> Self {
        const NAME: &str = "ov_net2";
        Network::create(lab, "docker03", NAME);
        let beside = run(lab, "docker01", "u1", NAME);
        let far = run(lab, "docker03", "u3", NAME);
        let router = run(lab, "docker02", "both", NETWORK);
        let attach = ["ovnet", "attach", "--network", NAME, "--netns", "both"];
        lab.exec("docker02", &attach).unwrap();
        let address = lab.exec(&router.name, &["ip", "-4", "-o", "addr", "show", "eth1"]).unwrap();
        let outer = address.split_whitespace().nth(3).unwrap().split('/').next().unwrap();
        let outer = outer.parse().unwrap();
        wait_for_ping(lab, &beside.name, far.address);
        wait_for_ping(lab, &far.name, outer);
        Self { beside, far, router: router.name, inner: router.address, outer }
    }
}

/// Who is in one network does not reach who is in the other, on the same host or another.
pub(crate) fn isolated(lab: &Lab, mesh: &Mesh, second: &Second) {
    let [one, _, three] = mesh.three();
    for (from, to) in [(one, &second.beside), (one, &second.far), (&second.far, three)] {
        // A route into the other network is what a sandbox can give itself.
        let subnet = format!("{}/32", to.address);
        script(lab, &from.name, "ip route replace $1 dev eth0", &[&subnet]);
        let counters = Counters::now(lab);
        assert!(!traffic::reaches(lab, &from.name, to), "{} reaches {}", from.name, to.name);
        let host = from.name.split('/').next().unwrap();
        counters
            .since()
            .at_least(host, "from_container", "arp-unanswered", 1)
            .none(host, "from_container", "deliver")
            .none(host, "from_container", "encapsulate");
        // Nor with a neighbour entry, which spares the question.
        let neighbour = "ip neigh replace $1 lladdr 02:42:00:00:00:01 dev eth0";
        script(lab, &from.name, neighbour, &[&to.address.to_string()]);
        assert!(!traffic::reaches(lab, &from.name, to), "{} reaches {}", from.name, to.name);
        counters.since().at_least(host, "from_container", "no-endpoint", 2).none(
            host,
            "from_container",
            "encapsulate",
        );
        script(lab, &from.name, "ip route del $1 dev eth0", &[&subnet]);
    }
}

/// Its endpoints work apart from each other.
pub(crate) fn two_endpoints(lab: &Lab, mesh: &Mesh, second: &Second) {
    let counters = Counters::now(lab);
    for place in mesh.three() {
        ping_all(lab, &place.name, second.inner, &[]);
        ping_all(lab, &second.router, place.address, &[]);
    }
    for place in [&second.beside, &second.far] {
        ping_all(lab, &place.name, second.outer, &[]);
        ping_all(lab, &second.router, place.address, &[]);
        let outer = Place { name: second.router.clone(), address: second.outer };
        traffic::tcp(lab, &place.name, &outer, 1 << 20);
    }
    counters.since().only_fast();
}

/// It forwards from one network into the other: what was decapsulated leaves encapsulated again,
/// which released kernels refuse programs and not the vxlan device.
pub(crate) fn forwarded(lab: &Lab, mesh: &Mesh, second: &Second) {
    let [one, ..] = mesh.three();
    // As a container that publishes another's service does. The source check asks for masquerading.
    let rules = r#"
        echo 1 > /proc/sys/net/ipv4/ip_forward
        nft -f - <<END
        table ip forward {
            chain in { type nat hook prerouting priority dstnat; iif eth0 dnat to $1; }
            chain out { type nat hook postrouting priority srcnat; oif eth1 masquerade; }
        }
END
    "#;
    script(lab, &second.router, rules, &[&second.far.address.to_string()]);
    let counters = Counters::now(lab);
    ping_all(lab, &one.name, second.inner, &["-c", "10"]);
    counters
        .since()
        .no_drops()
        .at_least("docker02", "from_uplink", "deliver", 20)
        .at_least("docker02", "from_container", "slow-already-encapsulated", 20)
        .at_least("docker03", "from_uplink", "deliver", 10)
        .at_least("docker01", "from_uplink", "deliver", 10);

    let counters = Counters::now(lab);
    let (listener, own) = traffic::listen(lab, &second.far);
    let translated = SocketAddrV4::new(second.inner, own.port());
    traffic::tcp_to(lab, &one.name, listener, translated, 8 << 20);
    let counted = counters.since();
    counted.no_drops().at_least("docker02", "from_container", "slow-already-encapsulated", 10);
    println!("    TCP: {counted:?}");
    ping_all(lab, &one.name, second.inner, &["-s", "4000"]);
    script(lab, &second.router, "nft delete table ip forward", &[]);
}

/// Detached from one network, it is still in the other.
pub(crate) fn detached(lab: &Lab, mesh: &Mesh, second: &Second) {
    let [one, ..] = mesh.three();
    let detach = ["ovnet", "detach", "--netns", "both", "--network", "ov_net2"];
    lab.exec("docker02", &detach).unwrap();
    ping_all(lab, &one.name, second.inner, &[]);
    let links = lab.exec(&second.router, &["ip", "-br", "link"]).unwrap();
    assert!(!links.contains("eth1"), "{links}");
    let from = &second.far;
    let (_, received) = ping(lab, &from.name, second.outer, &["-c", "1", "-W", "1"]);
    assert_eq!(received, 0, "a detached address answers");
}
