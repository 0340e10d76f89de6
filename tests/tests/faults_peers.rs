//! Hosts that die, are cut off and come back, under traffic between the others: what is removed and
//! when, and who says what of whom.
//!
//! One lab goes through all of it. What a test prints tells the step that failed.

#![allow(
    clippy::panic,
    clippy::unwrap_used,
    reason = "a test panics with what it found; the lint knows #[test] functions, not helpers"
)]

use std::{
    io::{Read as _, Write as _},
    net::{Ipv4Addr, TcpStream, UdpSocket},
    time::{Duration, Instant},
};

use ovnet_tests::cluster::{Cluster, Ping, Steps, Stream, until, within};
use serde_json::Value;

/// The grace of the agents here.
const GRACE: Duration = Duration::from_secs(4);
/// A session of 15 s may last twice as long, as Consul says.
const LEASE: Duration = Duration::from_secs(45);
/// How long it may take until a peer that is cut off is called so.
const NOTICED: Duration = Duration::from_secs(15);
/// Where names are answered: the address of the agents' own bridge.
const NAMES: Ipv4Addr = Ipv4Addr::new(172, 18, 0, 1);
/// Where metrics are.
const METRICS: u16 = 9481;

#[test]
fn hosts_that_die_are_cut_off_and_come_back() {
    let Some(cluster) = Cluster::up("peers", |options| {
        let grace = GRACE.as_secs().to_string();
        let arguments = ["--host-grace", &grace, "--repair-interval", "1", "--dns", "172.18.0.1"];
        options.agent_args = arguments.map(str::to_owned).to_vec();
        options.agent_args.extend(["--metrics".into(), format!("127.0.0.1:{METRICS}")]);
    }) else {
        return;
    };
    let steps = Steps::default();
    cluster.sh("docker02", "ovnet network create ov_net1");
    let t1 = cluster.sandbox("docker01", "t1", "--network ov_net1");
    let t2 = cluster.sandbox("docker02", "t2", "--network ov_net1");
    let t3 = cluster.sandbox("docker03", "t3", "--network ov_net1");
    for to in [t2, t3] {
        cluster.wait_ping("docker01/t1", to);
    }
    let (ping, stream) = (
        Ping::start(&cluster.lab, "docker01/t1", t2),
        Stream::start(&cluster.lab, "docker01/t1", "docker02/t2", t2),
    );
    let goes_on = || {
        ping.goes_on(100);
        stream.goes_on();
        assert!(ping.lost().is_empty(), "lost: {:?}", ping.lost());
    };

    steps.begin("everybody reaches everybody");
    for host in ["docker01", "docker02", "docker03"] {
        for peer in ["docker01", "docker02", "docker03"].iter().filter(|it| **it != host) {
            wait_path(&cluster, host, peer, "reachable");
        }
        assert_eq!(cluster.status(host)["warnings"], Value::Array(vec![]));
        let listed = cluster.sh(host, "ovnet host ls");
        assert_eq!(listed.matches("reachable in ").count(), 2, "{listed}");
        wait_metric(&cluster, host, "ovnet_peers{path=\"reachable\"}", 2.0);
    }
    everything_is_counted(&cluster);

    steps.begin("a host is cut off from its peers only: both sides say so, nothing is removed");
    let logs = ["docker01", "docker03"].map(|host| (host, cluster.lab.agent_output(host).len()));
    let forwarding = Ping::start(&cluster.lab, "docker01/t1", t3);
    // At the switch: what the host itself drops after its program had it is no cut.
    let cut =
        "udp dport 4789 ip saddr 192.168.1.13 drop; udp dport 4789 ip daddr 192.168.1.13 drop";
    rules(&cluster, cut);
    let begun = Instant::now();
    for (host, peer) in [
        ("docker01", "docker03"),
        ("docker02", "docker03"),
        ("docker03", "docker01"),
        ("docker03", "docker02"),
    ] {
        within(NOTICED.saturating_sub(begun.elapsed()), &format!("{host} to miss {peer}"), || {
            (path(&cluster, host, peer)? == "unreachable").then_some(())
        });
        wait_reached(&cluster, host, peer, 0.0);
        let status = cluster.sh(host, "ovnet status");
        let line = format!(
            " host {peer} (192.168.1.{}) does not answer probes",
            &peer[7..].parse::<u8>().unwrap() + 10
        );
        assert!(status.contains(&line), "{status}");
    }
    assert_eq!(path(&cluster, "docker01", "docker02").as_deref(), Some("reachable"));
    wait_metric(&cluster, "docker03", "ovnet_peers{path=\"unreachable\"}", 2.0);
    // Its lease stands: no time without probes removes it.
    holds(GRACE + Duration::from_secs(2), "its endpoint is known although it is cut off", || {
        cluster.endpoints_of("docker01").contains_key(&t3)
            && cluster.endpoints_of("docker03").contains_key(&t1)
    });
    goes_on();
    rules(&cluster, "");
    for (host, peer) in
        [("docker01", "docker03"), ("docker03", "docker01"), ("docker03", "docker02")]
    {
        wait_path(&cluster, host, peer, "reachable");
        wait_reached(&cluster, host, peer, 1.0);
    }
    let answered = forwarding.answered();
    until("traffic to it to be back", || (forwarding.answered() > answered + 20).then_some(()));
    drop(forwarding);
    for (host, before) in logs {
        let said = cluster.lab.agent_output(host).split_off(before);
        let peer = if host == "docker01" { "docker03" } else { "docker01" };
        for line in ["does not answer probes", "answers probes of all sizes again"] {
            let told = said.lines().filter(|it| it.contains(line) && it.contains(peer)).count();
            assert_eq!(told, 1, "{host} must say once that {peer} {line}: {said}");
        }
    }

    steps.begin("a path that takes no packets of full size is told apart");
    rules(
        &cluster,
        "meta l4proto udp ip saddr 192.168.1.11 ip daddr 192.168.1.13 ip length > 1400 drop",
    );
    for (host, peer) in [("docker01", "docker03"), ("docker03", "docker01")] {
        wait_path(&cluster, host, peer, "narrow");
        wait_reached(&cluster, host, peer, 1.0);
    }
    let status = cluster.sh("docker01", "ovnet status");
    assert!(status.contains("answers short probes and none of 1500 bytes"), "{status}");
    rules(&cluster, "");
    wait_path(&cluster, "docker01", "docker03", "reachable");
    goes_on();

    steps.begin(
        "one host is cut off from Consul only, one dies: what answers stays, what does not goes",
    );
    assert_eq!(lookup(&cluster, "docker01/t1", "t3"), Some(vec![t3]));
    cluster.run("docker02", &["nft", NO_CONSUL]);
    cluster.lab.kill_host("docker03").unwrap();
    let knows = |host: &str, address| cluster.endpoints_of(host).contains_key(&address);
    let lost = within(LEASE, "the lease of docker03 to run out", || {
        // In this order: what is still locked now was so when the others were looked at.
        let known = knows("docker01", t3);
        let named = lookup(&cluster, "docker01/t1", "t3") == Some(vec![t3]);
        let locked = cluster.is_locked("hosts/docker03");
        assert!((known && named) || !locked, "gone although its lease stands: {known} {named}");
        (!locked).then(Instant::now)
    });
    // Whoever looks sees it a moment late.
    let early = GRACE.saturating_sub(Duration::from_millis(500));
    within(GRACE + Duration::from_secs(8), "the dead one's endpoint to leave the maps", || {
        let gone = !knows("docker01", t3);
        assert!(!gone || lost.elapsed() >= early, "gone after {:?} already", lost.elapsed());
        gone.then_some(())
    });
    until("its name to be refused", || {
        lookup(&cluster, "docker01/t1", "t3").is_none().then_some(())
    });
    assert_eq!(path(&cluster, "docker01", "docker03").as_deref(), Some("unreachable"));
    within(LEASE, "the lease of docker02 to run out", || {
        (!cluster.is_locked("hosts/docker02")).then_some(())
    });
    holds(GRACE * 2, "who answers is kept without a lease, and who is gone stays gone", || {
        // Who has no Consul has read nothing of what happened.
        knows("docker01", t2) && !knows("docker01", t3) && knows("docker02", t3)
    });
    assert_eq!(lookup(&cluster, "docker01/t1", "t2"), Some(vec![t2]), "its name is answered");
    assert_eq!(host_view(&cluster, "docker01", "docker02")["state"], "lost");
    for (host, peer) in [("docker01", "docker02"), ("docker02", "docker01")] {
        assert_eq!(path(&cluster, host, peer).as_deref(), Some("reachable"));
    }
    wait_metric(&cluster, "docker02", "ovnet_consul_connected", 0.0);
    let failures = metric(&cluster, "docker02", "ovnet_consul_request_failures_total");
    assert!(failures.unwrap() > 0.0);
    goes_on();

    steps.begin("Consul is there again for the host that was cut off");
    cluster.sh("docker02", "nft delete table inet cut");
    within(LEASE, "docker02 to have its lease again", || {
        cluster.is_locked("hosts/docker02").then_some(())
    });
    cluster.wait_connected("docker02");
    until("docker02 to forget the dead one, too", || (!knows("docker02", t3)).then_some(()));
    goes_on();

    let same = Ipv4Addr::new(192, 168, 1, 13);
    for address in [same, Ipv4Addr::new(192, 168, 1, 53)] {
        steps.begin(&format!("it comes back as {address}"));
        cluster.lab.replace_host("docker03", address).unwrap();
        cluster.start_agent("docker03");
        let back = cluster.sandbox("docker03", "t3", "--network ov_net1");
        // At another address it might be another machine of that name: it waits for the lease.
        let limit = if address == same { Duration::from_secs(10) } else { LEASE };
        within(limit, "traffic to it", || {
            cluster.lab.exec("docker01/t1", &["ping", "-c1", "-W1", &back.to_string()]).ok()
        });
        until("its name", || (lookup(&cluster, "docker01/t1", "t3")? == [back]).then_some(()));
        for (host, peer) in [("docker01", "docker03"), ("docker03", "docker01")] {
            wait_path(&cluster, host, peer, "reachable");
        }
        assert_eq!(cluster.endpoints_of("docker02")[&back], address);
        assert_eq!(host_view(&cluster, "docker01", "docker03")["state"], "up");
        if address == same {
            cluster.lab.kill_host("docker03").unwrap();
        }
        goes_on();
    }

    steps.begin("the end");
    goes_on();
    ping.must_have_lost_none("of the whole time");
    stream.must_be_whole();
}

/// What docker02 is cut off from Consul by.
const NO_CONSUL: &str = "add table inet cut; \
    add chain inet cut out { type filter hook output priority 0; }; \
    add chain inet cut in { type filter hook input priority 0; }; \
    add rule inet cut out tcp dport 8500 drop; add rule inet cut in tcp sport 8500 drop";

/// Has the switch drop what comes from the hosts and matches these rules, in place of those before.
fn rules(cluster: &Cluster, rules: &str) {
    let mut script = "add table netdev cut; delete table netdev cut; ".to_owned();
    if !rules.is_empty() {
        script.push_str("add table netdev cut; ");
        for node in cluster.lab.nodes() {
            let chain = format!(
                "add chain netdev cut {node} {{ type filter hook ingress device {node} priority 0; }}; "
            );
            script.push_str(&chain);
            for rule in rules.split("; ") {
                script.push_str(&format!("add rule netdev cut {node} {rule}; "));
            }
        }
    }
    cluster.run("switch", &["nft", &script]);
}

/// What a host says of another one.
fn host_view(cluster: &Cluster, host: &str, of: &str) -> Value {
    let hosts = cluster.json(host, "host ls");
    let found = hosts.as_array().unwrap().iter().find(|it| it["node"] == of);
    found.cloned().unwrap_or(Value::Null)
}

/// What a host says of the way to a peer. From its status, which needs no Consul.
fn path(cluster: &Cluster, host: &str, peer: &str) -> Option<String> {
    let status = cluster.status(host);
    let peers = status["peers"].as_array()?;
    let found = peers.iter().find(|it| it["node"] == peer)?;
    Some(found["path"].as_str()?.to_owned())
}

fn wait_path(cluster: &Cluster, host: &str, peer: &str, wanted: &str) {
    let what = format!("{host} to call {peer} {wanted}");
    within(NOTICED, &what, || (path(cluster, host, peer)? == wanted).then_some(()));
}

/// Looks again and again, all this time, whether something is so.
fn holds(time: Duration, what: &str, so: impl Fn() -> bool) {
    let end = Instant::now() + time;
    while Instant::now() < end {
        assert!(so(), "{what}: not after all");
        std::thread::sleep(Duration::from_millis(100));
    }
}

/// The metrics of a host.
fn metrics(cluster: &Cluster, host: &str) -> String {
    let page = cluster.lab.inside(host, || {
        let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, METRICS))?;
        stream.set_read_timeout(Some(Duration::from_secs(5)))?;
        stream.write_all(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")?;
        let mut page = String::new();
        stream.read_to_string(&mut page)?;
        Ok(page)
    });
    page.unwrap_or_else(|error| panic!("the metrics of {host}: {error:#}"))
}

/// One value of the metrics, by its name with its labels.
fn metric(cluster: &Cluster, host: &str, name: &str) -> Option<f64> {
    let page = metrics(cluster, host);
    page.lines().find_map(|line| line.strip_prefix(name)?.trim().parse().ok())
}

/// Waits until a metric has a value. The page may be a second old.
fn wait_metric(cluster: &Cluster, host: &str, name: &str, wanted: f64) {
    within(Duration::from_secs(3), &format!("{name} of {host} to be {wanted}"), || {
        (metric(cluster, host, name)? == wanted).then_some(())
    });
}

/// Waits until the metrics of a host say this of a peer.
fn wait_reached(cluster: &Cluster, host: &str, peer: &str, wanted: f64) {
    let number: u8 = peer[7..].parse().unwrap();
    let labels = format!("{{peer=\"{peer}\",vtep=\"192.168.1.{}\"}}", number + 10);
    wait_metric(cluster, host, &format!("ovnet_peer_reachable{labels}"), wanted);
}

/// The numbers that anything can be told of are there, and are what they must be.
fn everything_is_counted(cluster: &Cluster) {
    let page = metrics(cluster, "docker01");
    assert!(page.contains("text/plain; version=0.0.4"), "{page}");
    let value = |name: &str| -> f64 {
        let found = page.lines().find_map(|line| line.strip_prefix(name)?.trim().parse().ok());
        found.unwrap_or_else(|| panic!("no {name} in:\n{page}"))
    };
    assert_eq!(value("ovnet_hosts"), 3.0);
    assert_eq!(value("ovnet_networks"), 1.0);
    assert_eq!(value("ovnet_local_endpoints"), 1.0);
    assert_eq!(value("ovnet_consul_connected"), 1.0);
    assert_eq!(value("ovnet_unreadable_records"), 0.0);
    assert_eq!(value("ovnet_errors"), 0.0);
    assert_eq!(value("ovnet_map_entries{map=\"HOSTS\"}"), 2.0);
    assert_eq!(value("ovnet_map_entries{map=\"ENDPOINTS\"}"), 3.0);
    assert_eq!(value("ovnet_map_capacity{map=\"ENDPOINTS\"}"), 131_072.0);
    assert!(value("ovnet_map_capacity{map=\"CONNTRACK\"}") > 1000.0);
    assert_eq!(value("ovnet_dropped_packets_total{reason=\"unknown-vni\"}"), 0.0);
    for (name, least) in [
        ("ovnet_program_packets_total{program=\"from_container\",verdict=\"encapsulate\"}", 10.0),
        ("ovnet_program_bytes_total{program=\"from_uplink\",verdict=\"deliver\"}", 1000.0),
        ("ovnet_program_packets_total{program=\"from_uplink\",verdict=\"answer-probe\"}", 2.0),
        ("ovnet_probes_sent_total", 2.0),
        ("ovnet_probes_answered_total", 2.0),
        ("ovnet_reconcile_passes_total{result=\"done\"}", 2.0),
        ("ovnet_consul_requests_total", 2.0),
        ("process_resident_memory_bytes", 1e6),
        ("process_open_fds", 10.0),
    ] {
        assert!(value(name) >= least, "{name} {}", value(name));
    }
    let trip = "ovnet_peer_round_trip_seconds{peer=\"docker02\",vtep=\"192.168.1.12\"}";
    assert!((1e-6..1.0).contains(&value(trip)), "{}", value(trip));
}

/// The addresses a name has for a sandbox; `None` where it is refused.
fn lookup(cluster: &Cluster, place: &str, name: &str) -> Option<Vec<Ipv4Addr>> {
    let mut query = vec![0, 7, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0];
    query.push(u8::try_from(name.len()).unwrap());
    query.extend(name.as_bytes());
    query.extend([0, 0, 1, 0, 1]);
    let length = query.len();
    let answer = until(&format!("an answer for {name} in {place}"), || {
        let query = query.clone();
        let asked = cluster.lab.inside(place, move || {
            let socket = UdpSocket::bind(("0.0.0.0", 0))?;
            socket.set_read_timeout(Some(Duration::from_secs(1)))?;
            socket.connect((NAMES, 53))?;
            socket.send(&query)?;
            let mut answer = [0; 512];
            let length = socket.recv(&mut answer)?;
            Ok(answer[..length].to_vec())
        });
        asked.ok()
    });
    let code = answer[3] & 15;
    // Refused is 5 (RFC 1035, section 4.1.1).
    assert!(code == 0 || code == 5, "{answer:?}");
    let mut rest = &answer[length..];
    let mut addresses = Vec::new();
    for _ in 0..u16::from_be_bytes([answer[6], answer[7]]) {
        // The name, or a pointer to it; 10 bytes; the address.
        let named = if rest[0] >= 0xc0 { 2 } else { name.len() + 2 };
        let record = &rest[named + 10..named + 14];
        addresses.push(Ipv4Addr::new(record[0], record[1], record[2], record[3]));
        rest = &rest[named + 14..];
    }
    (code == 0).then_some(addresses)
}
