//! Every way an agent can end and another come, one after the other, in one lab.

use std::{
    collections::{BTreeMap, BTreeSet},
    env, fs,
    net::{Ipv4Addr, SocketAddr},
    path::{Path, PathBuf},
};

use aya::programs::links::{FdLink, PinnedLink};
use nix::sys::signal::Signal;
use ovnet_common::abi::ABI_VERSION;
use ovnet_tests::{
    cluster::{Cluster, Ping, ProgramWatch, Steps, Stream, until},
    ports::{HOST, PORT},
};
use serde_json::Value;
use xtask::lab::CLIENT;

use super::{
    connections::{Connections, begun_again},
    start, succeeded, versions, watch,
};

/// Answers to wait for to say that traffic goes on.
const A_WHILE: usize = 200;
const NEXT: Option<u32> = Some(ABI_VERSION + 1);
const AFTER: Option<u32> = Some(ABI_VERSION + 2);

/// Everything that flows.
struct Traffic {
    pings: Vec<Ping>,
    streams: Vec<Stream>,
    connections: Connections,
}

impl Traffic {
    /// Between sandboxes both ways, and from outside to a published port both ways.
    fn start(cluster: &Cluster, t1: Ipv4Addr, t2: Ipv4Addr) -> Self {
        let lab = &cluster.lab;
        let published = SocketAddr::from((HOST, PORT));
        let listen = SocketAddr::from((Ipv4Addr::UNSPECIFIED, 80));
        Self {
            pings: vec![Ping::start(lab, "docker01/t1", t2), Ping::start(lab, "docker02/t2", t1)],
            streams: vec![
                Stream::start(lab, "docker01/t1", "docker02/t2", t2),
                Stream::start_published(lab, CLIENT, "docker01/t1", listen, published),
                Stream::start_answers(lab, CLIENT, "docker01/t1", listen, published),
            ],
            connections: Connections::start(cluster),
        }
    }

    fn goes_on(&self) {
        for ping in &self.pings {
            ping.goes_on(A_WHILE);
            assert!(ping.lost().is_empty(), "lost: {:?}", ping.lost());
            assert_eq!(ping.duplicates(), 0);
        }
        self.streams.iter().for_each(Stream::goes_on);
        self.connections.goes_on();
    }
}

#[test]
fn an_agent_ends_and_another_comes() {
    let Some(cluster) = Cluster::up("upgrade", |options| {
        options.hosts = 2;
        options.durable_consul = true;
        options.agent_args = ["--repair-interval", "1"].map(str::to_owned).to_vec();
    }) else {
        return;
    };
    let steps = Steps::default();
    cluster.sh("docker02", "ovnet network create ov_net1");
    let t1 = cluster.sandbox("docker01", "t1", "--network ov_net1 -p 90:80 -p 91:81");
    let t2 = cluster.sandbox("docker02", "t2", "--network ov_net1");
    cluster.wait_ping("docker01/t1", t2);
    let hosts = ["docker01", "docker02"];
    let watches = hosts.map(|host| watch(&cluster, host));
    let traffic = Traffic::start(&cluster, t1, t2);
    let entries = hosts.map(|host| cluster.footprint(host).entries);
    traffic.goes_on();

    let replace = |step: &str, signal, version, changed, keeps: bool| {
        for (host, entries) in hosts.iter().zip(&entries) {
            steps.begin(&format!("{step}, on {host}"));
            let before = programs(&cluster, host);
            let counted = counters(&cluster, host);
            let begun = begun_again(&cluster, CLIENT);
            cluster.stop_agent(host, signal);
            traffic.goes_on();
            start(&cluster, host, version, changed, &[]);
            cluster.wait_connected(host);
            succeeded(&cluster, host, version);
            traffic.goes_on();
            let begun = begun_again(&cluster, CLIENT) - begun;
            println!("         {begun} connections were begun twice");
            assert!(!keeps || begun == 0, "an answer to a first packet was lost");
            let after = programs(&cluster, host);
            assert_eq!(before.keys().collect::<Vec<_>>(), after.keys().collect::<Vec<_>>());
            for (hook, program) in &before {
                assert_ne!(after[hook], *program, "{hook} has the program of before");
            }
            assert_eq!(cluster.footprint(host).entries, *entries, "{host}");
            if keeps {
                // Counters and connections are in the same maps as before.
                let now = counters(&cluster, host);
                assert!(now.0 > counted.0 + 100, "counters: {counted:?} before, {now:?} after");
                assert_eq!(now.1, counted.1, "{host}: packets were dropped");
            }
            assert_eq!(cluster.status(host)["errors"], Value::Array(Vec::new()));
        }
    };
    replace("killed", Signal::SIGKILL, None, "", true);
    replace("stopped", Signal::SIGTERM, None, "", true);
    replace("upgraded, all maps alike", Signal::SIGTERM, NEXT, "", true);
    replace("upgraded, all maps changed", Signal::SIGTERM, AFTER, "all", false);
    replace("downgraded, all maps changed", Signal::SIGKILL, NEXT, "", false);
    replace(
        "upgraded, the tables of ports changed",
        Signal::SIGKILL,
        AFTER,
        "PUBLISHED,PORTS",
        true,
    );
    replace("downgraded to this build", Signal::SIGTERM, None, "", true);

    if let Some(folder) = env::var_os("OVNET_OTHER_BUILD") {
        another_build(&cluster, &traffic, &steps, &PathBuf::from(folder));
    }
    all_at_once(&cluster, &traffic, &steps);
    without_consul(&cluster, &traffic, &steps);

    steps.begin("the end");
    traffic.goes_on();
    watches.into_iter().for_each(ProgramWatch::must_have_seen_nothing_else);
    for (ping, way) in traffic.pings.into_iter().zip(["from t1", "from t2"]) {
        println!("{way}: {} pings answered", ping.answered());
        ping.must_have_lost_none(way);
    }
    println!("{} connections opened", traffic.connections.opened());
    traffic.streams.into_iter().for_each(Stream::must_be_whole);
    cleanup_with_a_former_folder(&cluster, &steps);
}

/// There and back again with an agent that is really built from something else.
fn another_build(cluster: &Cluster, traffic: &Traffic, steps: &Steps, folder: &Path) {
    for (step, signal, folder) in
        [("upgraded to", Signal::SIGTERM, Some(folder)), ("back from", Signal::SIGKILL, None)]
    {
        for host in ["docker01", "docker02"] {
            steps.begin(&format!("{step} another build, on {host}"));
            let before = (versions(cluster, host), programs(cluster, host));
            cluster.stop_agent(host, signal);
            cluster.lab.use_binaries(folder.map(Path::to_path_buf)).unwrap();
            start(cluster, host, None, "", &[]);
            until("the former folder to be gone", || {
                let now = versions(cluster, host);
                (now.len() == 1 && now != before.0).then_some(())
            });
            cluster.wait_connected(host);
            traffic.goes_on();
            let after = programs(cluster, host);
            assert!(before.1.iter().all(|(hook, program)| after[hook] != *program), "{after:?}");
        }
    }
}

/// All agents stop, their records go, and others start: the first one finds no host but itself.
fn all_at_once(cluster: &Cluster, traffic: &Traffic, steps: &Steps) {
    steps.begin("all agents are stopped, and upgraded one after the other");
    for host in ["docker01", "docker02"] {
        cluster.stop_agent(host, Signal::SIGTERM);
    }
    assert_eq!(cluster.record("hosts/docker02"), None);
    start(cluster, "docker01", NEXT, "all", &[]);
    until("Consul to be read", || {
        (cluster.status("docker01")["consul_state"] == "connected").then_some(())
    });
    traffic.goes_on();
    let waits = cluster.status("docker01")["errors"].to_string();
    assert!(waits.contains("the agent before"), "{waits}");
    assert_eq!(versions(cluster, "docker01").len(), 2);
    start(cluster, "docker02", NEXT, "all", &[]);
    for host in ["docker01", "docker02"] {
        succeeded(cluster, host, NEXT);
        cluster.wait_connected(host);
    }
    traffic.goes_on();
}

/// Programs that share their tables with those of before need no Consul; others wait for it.
fn without_consul(cluster: &Cluster, traffic: &Traffic, steps: &Steps) {
    let again = |version, changed| {
        cluster.stop_agent("docker01", Signal::SIGKILL);
        start(cluster, "docker01", version, changed, &[]);
    };
    again(None, "");
    succeeded(cluster, "docker01", None);
    steps.begin("Consul is stopped, and the agent upgraded, hosts and endpoints alike");
    cluster.lab.stop_consul().unwrap();
    again(NEXT, "PORTS,NETWORKS,CONFIG");
    succeeded(cluster, "docker01", NEXT);
    traffic.goes_on();

    steps.begin("and again, hosts and endpoints changed: the programs of before go on");
    let before = programs(cluster, "docker01");
    again(AFTER, "HOSTS,ENDPOINTS");
    let waits = || cluster.status("docker01")["errors"].to_string().contains("the agent before");
    until("the agent to say that it waits", || waits().then_some(()));
    traffic.goes_on();
    assert_eq!(programs(cluster, "docker01"), before);
    assert_eq!(versions(cluster, "docker01").len(), 2);
    // Whatever ends it meanwhile.
    again(AFTER, "HOSTS,ENDPOINTS");
    traffic.goes_on();
    assert_eq!(programs(cluster, "docker01"), before);
    cluster.lab.start_consul().unwrap();
    succeeded(cluster, "docker01", AFTER);
    cluster.wait_connected("docker01");
    traffic.goes_on();
    assert!(!waits());
    let after = programs(cluster, "docker01");
    assert!(before.iter().all(|(hook, program)| after[hook] != *program), "{after:?}");
}

/// What is left of an upgrade that was broken off, too.
fn cleanup_with_a_former_folder(cluster: &Cluster, steps: &Steps) {
    steps.begin("cleanup, in the middle of an upgrade");
    cluster.lab.stop_consul().unwrap();
    cluster.stop_agent("docker01", Signal::SIGTERM);
    start(cluster, "docker01", NEXT, "all", &[]);
    assert_eq!(versions(cluster, "docker01").len(), 2);
    cluster.stop_agent("docker01", Signal::SIGKILL);
    cluster.lab.start_consul().unwrap();
    let consul = cluster.lab.consul().unwrap();
    let line = format!("ovnet-agent cleanup --node docker01 --consul {consul}");
    cluster.sh("docker01", &line);
    let left = cluster.footprint("docker01");
    let none = BTreeSet::new();
    assert_eq!((&left.pins, &left.links, &left.state), (&none, &none, &none));
    assert!(cluster.records().iter().all(|(_, record)| !record.contains("docker01")));
    let again = cluster.sh("docker01", "ovnet-agent cleanup --node docker01");
    assert_eq!(again.trim().lines().last().unwrap_or_default(), "nothing of ovnet is on this host");
}

/// The program behind each pinned link of a host, by the pin's name, in whatever folder.
fn programs(cluster: &Cluster, host: &str) -> BTreeMap<String, u32> {
    let bpffs = cluster.lab.host(host).unwrap().root().join("sys/fs/bpf/ovnet");
    let mut programs = BTreeMap::new();
    for version in versions(cluster, host) {
        for entry in fs::read_dir(bpffs.join(format!("v{version}/links"))).unwrap() {
            let entry = entry.unwrap();
            let name = entry.file_name().into_string().unwrap();
            let link = FdLink::from(PinnedLink::from_pin(entry.path()).unwrap());
            let before = programs.insert(name.clone(), link.info().unwrap().program_id());
            assert_eq!(before, None, "{name} is pinned twice");
        }
    }
    assert_eq!(programs.len(), 4, "{programs:?}");
    programs
}

/// Packets that the programs of a host counted, and those they dropped for want of knowledge.
fn counters(cluster: &Cluster, host: &str) -> (u64, u64) {
    const DROPS: [&str; 7] = [
        "unknown-port",
        "no-endpoint",
        "not-configured",
        "unknown-vtep",
        "unknown-vni",
        "forged-source",
        "not-local",
    ];
    let counters = cluster.json(host, "counters");
    let of = |it: &Value| (it["packets"].as_u64().unwrap(), it["verdict"].as_str().unwrap().into());
    let counters: Vec<(u64, String)> = counters.as_array().unwrap().iter().map(of).collect();
    let dropped = counters.iter().filter(|(_, verdict)| DROPS.contains(&verdict.as_str()));
    let sum = |packets: u64, (more, _): &(u64, String)| packets + more;
    (counters.iter().fold(0, sum), dropped.fold(0, sum))
}
