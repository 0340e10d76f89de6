//! Forwarding needs nobody: not the agent, not Consul (invariants 1 and 7).

use nix::sys::signal::Signal;
use ovnet_tests::cluster::{Cluster, Ping, ProgramWatch, Steps, Stream, text, until};
use serde_json::Value;
use xtask::lab::CONSUL_DATA;

/// Answers to wait for to say that traffic goes on.
const A_WHILE: usize = 100;

#[test]
fn traffic_survives_the_agent_and_consul() {
    let Some(cluster) = Cluster::up("survives", |options| {
        options.hosts = 2;
        options.durable_consul = true;
        options.agent_args = ["--repair-interval", "1"].map(str::to_owned).to_vec();
    }) else {
        return;
    };
    let steps = Steps::default();
    cluster.sh("docker02", "ovnet network create ov_net1");
    cluster.sandbox("docker01", "t1", "--network ov_net1");
    let t2 = cluster.sandbox("docker02", "t2", "--network ov_net1");
    cluster.wait_ping("docker01/t1", t2);
    cluster.sandbox("docker01", "gone", "--network ov_net1");
    let veths = ["docker01", "docker02"].map(|host| host_side(&cluster, host));
    let ping = Ping::start(&cluster.lab, "docker01/t1", t2);
    let stream = Stream::start(&cluster.lab, "docker01/t1", "docker02/t2", t2);
    let programs: Vec<_> = [("docker01", &veths[0]), ("docker02", &veths[1])]
        .into_iter()
        .map(|(host, veth)| {
            let expected = [("ens33", "from_uplink"), (veth.as_str(), "from_container")];
            ProgramWatch::start(&cluster, host, &expected)
        })
        .collect();
    let goes_on = || {
        ping.goes_on(A_WHILE);
        stream.goes_on();
        assert!(ping.lost().is_empty(), "lost: {:?}", ping.lost());
    };

    for host in ["docker02", "docker01"] {
        steps.begin(&format!("the agent of {host} is killed and started again"));
        let before = counters(&cluster, host);
        let pins = cluster.footprint(host);
        cluster.stop_agent(host, Signal::SIGKILL);
        goes_on();
        assert_eq!(cluster.footprint(host).pins, pins.pins);
        assert_eq!(cluster.footprint(host).entries, pins.entries);
        cluster.start_agent(host);
        cluster.wait_connected(host);
        goes_on();
        let after = counters(&cluster, host);
        assert!(after.0 > before.0 + 100, "of programs: {} before, {} after", before.0, after.0);
        assert!(
            after.1 > before.1 + 100,
            "of the endpoint: {} before, {} after",
            before.1,
            after.1
        );
        assert_eq!(cluster.footprint(host).entries, pins.entries);
        let status = cluster.status(host);
        assert_eq!(
            status["repairs"],
            serde_json::json!({}),
            "a start finds all as it was: {status}"
        );
    }

    steps.begin("a clean stop withdraws the host, and forwarding goes on");
    let record = cluster.record("hosts/docker02").unwrap();
    cluster.stop_agent("docker02", Signal::SIGTERM);
    assert_eq!(cluster.record("hosts/docker02"), None);
    until("docker01 to see one host only", || {
        (cluster.json("docker01", "host ls").as_array()?.len() == 1).then_some(())
    });
    goes_on();
    cluster.start_agent("docker02");
    cluster.wait_connected("docker02");
    assert_eq!(cluster.record("hosts/docker02").unwrap(), record);
    assert!(cluster.is_locked("hosts/docker02"));
    goes_on();

    steps.begin("Consul hangs");
    let halted = cluster.lab.halt_consul().unwrap();
    ping.goes_on(10 * A_WHILE);
    goes_on();
    drop(halted);
    cluster.wait_connected("docker01");
    cluster.wait_connected("docker02");
    goes_on();

    steps.begin("Consul is killed, an agent is killed and starts without it");
    cluster.lab.stop_consul().unwrap();
    until("docker01 to notice", || {
        (cluster.status("docker01")["consul_state"] != "connected").then_some(())
    });
    cluster.stop_agent("docker02", Signal::SIGKILL);
    let said_before = cluster.lab.agent_output("docker02").len();
    cluster.start_agent("docker02");
    goes_on();
    let status = cluster.status("docker02");
    let state = text(&status, "consul_state").unwrap();
    assert!(state.contains("192.168.1.11:8500"), "where it looks for Consul: {state}");
    assert_eq!(status["local_endpoints"], 1);
    let local = cluster.json("docker02", "endpoint ls --local");
    assert_eq!(local[0]["address"], t2.to_string());
    let refused = cluster.refused("docker02", &["ovnet", "network", "create", "ov_net2"]);
    assert!(refused.contains("192.168.1.11:8500"), "{refused}");
    let said = || cluster.lab.agent_output("docker02").split_off(said_before);
    until("docker02 to say that it goes on trying", || {
        said().contains("this host is not announced").then_some(())
    });
    // The record of a sandbox that goes now must not stay when Consul is back.
    cluster.lab.remove_sandbox("docker01", "gone").unwrap();
    until("docker01 to withdraw it", || {
        (cluster.status("docker01")["local_endpoints"] == 1).then_some(())
    });
    goes_on();

    steps.begin("Consul comes back with its data");
    cluster.lab.start_consul().unwrap();
    cluster.wait_connected("docker01");
    cluster.wait_connected("docker02");
    until("the record of the sandbox that went meanwhile to be gone", || {
        cluster.records().values().all(|record| !record.contains("\"gone\"")).then_some(())
    });
    let t3 = cluster.sandbox("docker01", "t3", "--network ov_net1");
    cluster.wait_ping("docker02/t2", t3);
    goes_on();

    steps.begin("Consul comes back without its data: each host puts back what is its own");
    let mut before = cluster.records();
    cluster.lab.stop_consul().unwrap();
    cluster.sh("docker01", &format!("rm -r {CONSUL_DATA}"));
    cluster.lab.start_consul().unwrap();
    until("all records to be back", || (cluster.records() == before).then_some(()));
    cluster.wait_connected("docker01");
    cluster.wait_connected("docker02");
    cluster.sh("docker02", "ovnet network create ov_net2");
    goes_on();

    steps.begin("records that cannot be read");
    let network = cluster.json("docker01", "network inspect ov_net1")[0]["id"].clone();
    let network = network.as_str().unwrap();
    before = cluster.records();
    let bad = [
        ("hosts/garbage".to_owned(), "\u{1}\u{2} garbage"),
        ("hosts/docker02".to_owned(), "{\"v\":1,\"node\":\"dock"),
        ("networks/half".to_owned(), "{\"v\":1,\"id\":\"11111111-"),
        ("networks/newer".to_owned(), "{\"v\":2,\"everything\":\"else\"}"),
        (format!("endpoints/{network}/10.0.0.77"), "{\"v\":1}"),
        (format!("endpoints/{network}/somewhere"), "[]"),
    ];
    let log = cluster.lab.agent_output("docker01").len();
    // Its agent would mend its own at once; this is about those that read it.
    cluster.stop_agent("docker02", Signal::SIGTERM);
    for (key, value) in &bad {
        cluster.put_record(key, value);
    }
    until("docker01 to count them", || {
        (cluster.status("docker01")["unreadable_records"] == bad.len()).then_some(())
    });
    goes_on();
    let t4 = cluster.sandbox("docker01", "t4", "--network ov_net1");
    cluster.start_agent("docker02");
    cluster.wait_ping("docker02/t2", t4);
    until("docker02 to mend its own record", || {
        (cluster.record("hosts/docker02").as_ref() == before.get("hosts/docker02")).then_some(())
    });
    for (key, _) in &bad {
        if key != "hosts/docker02" {
            cluster.delete_record(key);
        }
    }
    until("docker01 to count them as gone", || {
        (cluster.status("docker01")["unreadable_records"] == 0).then_some(())
    });
    let said = cluster.lab.agent_output("docker01").split_off(log);
    for (key, _) in &bad {
        let lines = said.lines().filter(|line| line.contains(key.as_str())).count();
        assert_eq!(lines, 1, "{key} must be told of once: {said}");
    }
    for host in ["docker01", "docker02"] {
        let output = cluster.lab.agent_output(host);
        assert!(!output.contains('\u{1b}'), "no colours in a file");
        assert!(!output.contains("ERROR"), "{output}");
    }

    steps.begin("the end");
    goes_on();
    ping.must_have_lost_none("of the whole time");
    stream.must_be_whole();
    programs.into_iter().for_each(ProgramWatch::must_have_seen_nothing_else);
}

/// The host-side veth of the first endpoint of a host, by address.
fn host_side(cluster: &Cluster, host: &str) -> String {
    let endpoints = cluster.json(host, "endpoint ls --local");
    text(&endpoints[0]["local"], "host_ifname").unwrap().to_owned()
}

/// Packets that the programs of a host counted, and those of its first endpoint.
fn counters(cluster: &Cluster, host: &str) -> (u64, u64) {
    let packets = |it: &Value| it["packets"].as_u64().unwrap();
    let counters = cluster.json(host, "counters");
    let endpoint = &cluster.json(host, "endpoint ls --local")[0]["local"];
    let of_endpoint = endpoint["rx_packets"].as_u64().unwrap();
    (counters.as_array().unwrap().iter().map(packets).sum(), of_endpoint)
}
