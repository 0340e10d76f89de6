//! What happens to hosts, uplinks and sandboxes is followed, here and everywhere.

use std::{net::Ipv4Addr, time::Duration};

use nix::sys::signal::Signal;
use ovnet_tests::cluster::{Cluster, Ping, Steps, text, until, within};
use serde_json::Value;

/// How long traffic may take to be back after an uplink changed.
const RESUME: Duration = Duration::from_secs(10);
/// A session of 15 s may last twice as long, as Consul says; then comes the grace.
const LEASE: Duration = Duration::from_secs(45);

#[test]
fn changes_of_hosts_uplinks_and_sandboxes_are_followed() {
    let Some(cluster) = Cluster::up("hosts", |options| {
        options.durable_consul = true;
        let arguments = ["--repair-interval", "1", "--host-grace", "2"];
        options.agent_args = arguments.map(str::to_owned).to_vec();
    }) else {
        return;
    };
    let steps = Steps::default();
    cluster.sh("docker02", "ovnet network create ov_net1");
    let t1 = cluster.sandbox("docker01", "t1", "--network ov_net1");
    let t2 = cluster.sandbox("docker02", "t2", "--network ov_net1");
    let t3 = cluster.sandbox("docker03", "t3", "--network ov_net1");
    cluster.wait_ping("docker01/t1", t2);
    cluster.wait_ping("docker01/t1", t3);
    // Its lease takes half a minute to run out, in which the other steps are taken.
    cluster.stop_agent("docker03", Signal::SIGKILL);
    let forwarding = Ping::start(&cluster.lab, "docker01/t1", t3);

    steps.begin("sandboxes follow the MTU of the uplink");
    for mtu in [1400, 9000, 1500] {
        set_mtu(&cluster, mtu);
        let inner = mtu - 50;
        until(&format!("both ends of the endpoints to have MTU {inner}"), || {
            [("docker01", "t1"), ("docker02", "t2")]
                .iter()
                .all(|(host, name)| mtus(&cluster, host, name) == [inner, inner])
                .then_some(())
        });
        let size = (inner - 28).to_string();
        let ping = ["ping", "-c1", "-W5", "-Mdo", "-s", &size, &t2.to_string()];
        cluster.run("docker01/t1", &ping);
        until("the records to follow", || {
            let record = cluster.record("hosts/docker02")?;
            record.contains(&format!("\"mtu\":{mtu}")).then_some(())
        });
        let larger = (inner - 27).to_string();
        let ping = ["ping", "-c1", "-W1", "-Mdo", "-s", &larger, &t2.to_string()];
        assert!(cluster.lab.exec("docker01/t1", &ping).is_err(), "larger than the MTU");
    }
    forwarding.goes_on(10);
    assert!(forwarding.lost().is_empty(), "changes of the MTU lost pings to a host without agent");

    steps.begin("the address of an uplink changes");
    let ping = Ping::start(&cluster.lab, "docker01/t1", t2);
    cluster.sh("docker02", "ip address del 192.168.1.12/24 dev ens33");
    cluster.sh("docker02", "ip address add 192.168.1.52/24 broadcast + dev ens33");
    resumes(&ping);
    let record = until("the record to follow", || {
        cluster.record("hosts/docker02").filter(|it| it.contains("192.168.1.52"))
    });
    assert!(!record.contains("192.168.1.12"));
    assert_eq!(cluster.status("docker02")["vtep"], "192.168.1.52");
    until("docker01 to forget the old VTEP", || {
        let vteps = cluster.vteps_of("docker01");
        (!vteps.contains(&ip("192.168.1.12")) && vteps.contains(&ip("192.168.1.52"))).then_some(())
    });
    // One map is written after the other.
    until("docker01 to have docker02's endpoint there", || {
        (cluster.endpoints_of("docker01").get(&t2) == Some(&ip("192.168.1.52"))).then_some(())
    });
    cluster.wait_connected("docker02");

    steps.begin("the uplink goes down and comes up");
    cluster.sh("docker02", "ip link set ens33 down");
    until("docker02 to say so", || {
        let status = cluster.status("docker02");
        let told = status["errors"].as_array()?.iter().any(|it| {
            it == "cannot advertise 'ens33': interface ens33 is down: bring it up with `ip link \
                   set ens33 up`"
        });
        (told && status["local_endpoints"] == 1).then_some(())
    });
    cluster.sh("docker02", "ip link set ens33 up");
    resumes(&ping);
    cluster.wait_connected("docker02");
    drop(ping);

    steps.begin("a sandbox is deleted without a word");
    let t4 = cluster.sandbox("docker02", "t4", "--network ov_net1");
    until("docker01 to know it", || cluster.endpoints_of("docker01").get(&t4).copied());
    cluster.lab.remove_sandbox("docker02", "t4").unwrap();
    withdrawn(&cluster, t4);

    steps.begin("a host-side veth is deleted by hand: it is made again; then its sandbox goes");
    let t5 = cluster.sandbox("docker02", "t5", "--network ov_net1 --ifname mine0");
    let endpoints = cluster.json("docker02", "endpoint ls --local");
    let of_t5 = endpoints.as_array().unwrap().iter().find(|it| it["address"] == t5.to_string());
    let veth = text(&of_t5.unwrap()["local"], "host_ifname").unwrap().to_owned();
    cluster.sh("docker02", &format!("ip link del {veth}"));
    cluster.wait_ping("docker01/t1", t5);
    let inner = cluster.sh("docker02/t5", "ip -o -4 address show dev mine0");
    assert!(inner.contains(&format!("inet {t5}/24")), "{inner}");
    cluster.lab.remove_sandbox("docker02", "t5").unwrap();
    withdrawn(&cluster, t5);
    // The record goes first, while the pass that withdraws the sandbox goes on.
    until(
        "ovnet-vx, the bridge and two links of t2 to be all there is, with its pin and file",
        || {
            let footprint = cluster.footprint("docker02");
            let states = footprint.state.iter().filter(|it| it.ends_with(".json")).count();
            let pins = footprint.pins.iter().filter(|it| it.contains("from_container")).count();
            ((footprint.links.len(), states, pins) == (4, 1, 1)).then_some(())
        },
    );
    cluster.wait_ping("docker02/t2", t1);

    steps.begin("a host without an agent is kept while its programs answer, its lease or not");
    within(LEASE, "the lease to run out", || {
        // In this order: what is still locked now was so when the map was looked at.
        let known = cluster.endpoints_of("docker01").contains_key(&t3);
        let locked = cluster.is_locked("hosts/docker03");
        assert!(known || !locked, "its endpoint is gone although its lease stands");
        (!locked).then_some(())
    });
    // Twice the grace, and more.
    forwarding.goes_on(3000);
    assert!(cluster.endpoints_of("docker01").contains_key(&t3), "it still answers");
    assert!(forwarding.lost().is_empty(), "lost without an agent: {:?}", forwarding.lost());

    steps.begin("a host is lost: its wire is cut");
    cluster.sh("switch", "ip link set docker03 down");
    within(LEASE, "its endpoint and VTEP to be gone", || {
        ["docker01", "docker02"]
            .iter()
            .all(|host| {
                !cluster.endpoints_of(host).contains_key(&t3)
                    && !cluster.vteps_of(host).contains(&ip("192.168.1.13"))
            })
            .then_some(())
    });
    let dropped = || counter(&cluster, "docker01", "no-endpoint");
    let before = dropped();
    until("packets to it to be counted as dropped", || (dropped() > before).then_some(()));
    let hosts = cluster.json("docker01", "host ls");
    let lost = hosts.as_array().unwrap().iter().find(|it| it["node"] == "docker03").unwrap();
    assert_eq!(lost["state"], "lost");
    cluster.sh("switch", "ip link set docker03 up");
    cluster.start_agent("docker03");
    resumes(&forwarding);
    cluster.wait_ping("docker03/t3", t2);
}

/// Waits until answers come again: more than were on their way when something broke.
fn resumes(ping: &Ping) {
    let wanted = ping.answered() + 50;
    within(RESUME, "traffic to resume", || (ping.answered() >= wanted).then_some(()));
}

/// Waits until nobody knows the address any more: not its host, not Consul, not another host.
fn withdrawn(cluster: &Cluster, address: Ipv4Addr) {
    until(&format!("{address} to be withdrawn"), || {
        let local = cluster.json("docker02", "endpoint ls --local");
        let here = local.as_array()?.iter().any(|it| it["address"] == address.to_string());
        let announced = cluster.records().keys().any(|it| it.ends_with(&format!("/{address}")));
        let elsewhere = cluster.endpoints_of("docker01").contains_key(&address);
        (!here && !announced && !elsewhere).then_some(())
    });
}

/// Changes the MTU of the whole wire; of the larger things first where it grows.
fn set_mtu(cluster: &Cluster, mtu: u32) {
    let script = format!(
        "for port in /sys/class/net/*/brport; do \
                              port=${{port%/brport}}; ip link set ${{port##*/}} mtu {mtu}; \
                          done; ip link set br0 mtu {mtu}"
    );
    cluster.run("switch", &["sh", "-ec", &script]);
    for node in cluster.lab.nodes() {
        cluster.sh(&node, &format!("ip link set ens33 mtu {mtu}"));
    }
}

/// MTUs of an endpoint: the sandbox's end and the host's.
fn mtus(cluster: &Cluster, host: &str, name: &str) -> [u32; 2] {
    let endpoints = cluster.json(host, "endpoint ls --local");
    let veth = text(&endpoints[0]["local"], "host_ifname").unwrap();
    let of = |place: &str, link: &str| -> u32 {
        let text = cluster.run(place, &["cat", &format!("/sys/class/net/{link}/mtu")]);
        text.trim().parse().unwrap()
    };
    let inner = cluster.sh(&format!("{host}/{name}"), "ip -o link show eth0");
    let inner = inner.split(" mtu ").nth(1).and_then(|it| it.split(' ').next()).unwrap();
    [inner.parse().unwrap(), of(host, veth)]
}

/// Packets of a verdict, of all programs.
fn counter(cluster: &Cluster, host: &str, verdict: &str) -> u64 {
    let counters = cluster.json(host, "counters --all");
    let counters = counters.as_array().unwrap();
    let of: Vec<_> = counters.iter().filter(|it| it["verdict"] == verdict).collect();
    assert!(!of.is_empty(), "no counter {verdict}");
    of.iter().map(|it: &&Value| it["packets"].as_u64().unwrap()).sum()
}

fn ip(text: &str) -> Ipv4Addr {
    text.parse().unwrap()
}
