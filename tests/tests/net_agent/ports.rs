//! Published ports of sandboxes, asked for from everywhere, under real traffic.

use std::{net::UdpSocket, time::Duration};

use nix::sys::signal::Signal;
use ovnet_tests::{
    cluster::{Cluster, Steps, until},
    lab::Counters,
    ports::{HOST, ask, ask_by_datagram, check, connect, serve, ways},
};
use serde_json::Value;
use xtask::lab::CLIENT;

#[test]
fn published_ports_are_reached_from_everywhere() {
    for xdp in [None, Some("native")] {
        let name = if xdp.is_some() { "ports-xdp" } else { "ports" };
        let Some(cluster) = Cluster::up(name, |options| {
            options.hosts = 2;
            options.xdp = xdp.map(str::to_owned);
        }) else {
            return;
        };
        let steps = Steps::default();
        cluster.sh("docker02", "ovnet network create ov_net1");
        cluster.sandbox("docker01", "t1", "--network ov_net1 -p 90:80 -p 90:80/udp");
        cluster.sandbox("docker01", "t2", "--network ov_net1");
        cluster.sandbox("docker02", "t3", "--network ov_net1");
        serve(&cluster);
        let gateway = cluster.sh("docker01", "ip -4 -o address show dev ovnet_gwbridge");
        let gateway = gateway.split_whitespace().nth(3).unwrap().split('/').next().unwrap();
        for way in ways(gateway.parse().unwrap()) {
            for protocol in ["tcp", "udp"] {
                steps.begin(&format!("{}, {protocol}, XDP {xdp:?}", way.label));
                check(&cluster, &way, protocol, xdp.is_some());
            }
        }
        large_datagrams(&cluster, &steps);
        if xdp.is_none() {
            egress_is_kept_apart(&cluster, &steps);
            wrong_input(&cluster, &steps);
            connections_outlive_the_agent(&cluster, &steps);
            a_port_that_is_removed(&cluster, &steps);
        }
        assert_eq!(cluster.status("docker01")["errors"], Value::Array(Vec::new()));
    }
}

/// Three fragments each way.
fn large_datagrams(cluster: &Cluster, steps: &Steps) {
    steps.begin("fragmented datagrams");
    for from in [CLIENT, "docker02", "docker02/t3", "docker01/t2", "docker01"] {
        let seen = ask_by_datagram(cluster, from, HOST, 4000);
        seen.unwrap_or_else(|error| panic!("from {from}: {error:#}"));
    }
}

fn egress_is_kept_apart(cluster: &Cluster, steps: &Steps) {
    steps.begin("out, but not to the neighbour, and no VXLAN in the host's name");
    let outside = cluster.lab.address(CLIENT).unwrap();
    cluster.wait_ping("docker01/t2", outside);
    let gateway = |name: &str| {
        let local = cluster.json("docker01", "endpoint ls --local");
        let of = |it: &&Value| it["names"][0] == name;
        let endpoint = local.as_array().unwrap().iter().find(of).unwrap();
        endpoint["local"]["gateway"]["address"].as_str().unwrap().to_owned()
    };
    let to = gateway("t1");
    let ping = ["ping", "-c", "1", "-W", "1", to.as_str()];
    let output = cluster.lab.output("docker01/t2", &ping, Duration::from_secs(10)).unwrap();
    assert!(!output.status.success(), "t2 reached {to} across the bridge");
    let socket = cluster.lab.inside("docker01/t2", || Ok(UdpSocket::bind("0.0.0.0:0")?)).unwrap();
    socket.send_to(b"vxlan", "192.168.1.12:4789").unwrap();
    until("the packet to be counted as dropped", || {
        let counters = cluster.json("docker01", "counters");
        let dropped =
            |it: &Value| it["program"] == "from_gwbridge" && it["verdict"] == "vxlan-port";
        counters.as_array()?.iter().any(dropped).then_some(())
    });
}

/// What cannot be published, and one line that says why. Nothing changes.
fn wrong_input(cluster: &Cluster, steps: &Steps) {
    steps.begin("wrong input");
    cluster.sh("docker01", "ip netns add wrong");
    let before = (cluster.footprint("docker01"), cluster.records());
    let mut ports = String::new();
    for (specs, expected) in [
        ("-p 90:80", "in use by endpoint t1"),
        ("-p 8500:80", "in use by consul"),
        ("-p 0:80", "0"),
        ("-p 91:0", "0"),
        ("-p 91:80/sctp", "sctp"),
        ("-p 91:80/icmp", "icmp"),
        ("-p 192.168.1.99:91:80", "192.168.1.99"),
        ("-p 91-93:80-81", "91-93"),
        ("-p 91:80 -p 91:81", "91"),
        ("-p 70000:80", "70000"),
    ] {
        let line = format!("ovnet attach --network ov_net1 --netns wrong --name wrong {specs}");
        let argv: Vec<&str> = line.split(' ').collect();
        let said = cluster.refused("docker01", &argv);
        assert!(said.contains(expected), "{specs}: {said}");
        ports += &said;
    }
    println!("{ports}");
    assert_eq!((cluster.footprint("docker01"), cluster.records()), before);
    cluster.sh("docker01", "ip netns del wrong");
}

fn connections_outlive_the_agent(cluster: &Cluster, steps: &Steps) {
    steps.begin("the agent is killed and started again under an open connection");
    let mut stream = connect(cluster, CLIENT, HOST).unwrap();
    ask(&mut stream).unwrap();
    let counters = Counters::now(&cluster.lab);
    cluster.stop_agent("docker01", Signal::SIGKILL);
    ask(&mut stream).unwrap();
    ask(&mut connect(cluster, CLIENT, HOST).unwrap()).unwrap();
    cluster.start_agent("docker01");
    cluster.wait_connected("docker01");
    ask(&mut stream).unwrap();
    let moved = counters.since();
    assert!(moved.packets("docker01", "from_gwbridge", "return") > 0);
    let no_flow = moved.packets("docker01", "from_uplink", "kernel-no-flow");
    assert_eq!(no_flow, 0, "the connection went on as one that is known");
    let listening = cluster.sh("docker01", "ss -lnt");
    assert!(listening.contains("0.0.0.0:90 "), "{listening}");
}

fn a_port_that_is_removed(cluster: &Cluster, steps: &Steps) {
    steps.begin("a port that is removed ends its connections");
    let shown = cluster.sh("docker01", "ovnet port t1");
    assert_eq!(shown.trim(), "80/tcp -> 0.0.0.0:90\n80/udp -> 0.0.0.0:90");
    let mut stream = connect(cluster, CLIENT, HOST).unwrap();
    ask(&mut stream).unwrap();
    cluster.sh("docker01", "ovnet detach t1");
    // The host says at once that there is nobody: no waiting for a timeout.
    let error = ask(&mut stream).unwrap_err();
    let kind = error.downcast_ref::<std::io::Error>().map(std::io::Error::kind);
    assert_eq!(kind, Some(std::io::ErrorKind::ConnectionReset), "{error:#}");
    let error = connect(cluster, CLIENT, HOST).unwrap_err();
    let kind = error.downcast_ref::<std::io::Error>().map(std::io::Error::kind);
    assert_eq!(kind, Some(std::io::ErrorKind::ConnectionRefused), "{error:#}");
    until("its flows to be forgotten", || {
        let status = cluster.status("docker01");
        (status["flow_entries"] == 0 && status["published_ports"] == 0).then_some(())
    });
    let rules = cluster.sh("docker01", "nft list table ip ovnet");
    assert!(!rules.contains("dnat to"), "{rules}");
}
