//! dockerd, the agent and Consul are restarted and killed; what runs goes on.

use std::{
    net::Ipv4Addr,
    thread,
    time::{Duration, Instant},
};

use nix::sys::signal::Signal::{SIGKILL, SIGTERM};
use ovnet_tests::cluster::{Cluster, Ping, Steps, Stream, until};
use serde_json::{Value, json};
use xtask::lab::GWBRIDGE;

/// How long iperf3 runs: as long as what is restarted under it takes.
const FLOW: &str = "15";
/// Moments, in milliseconds after a command's start, at which the agent is killed: the calls of a
/// start and of a removal lie between them.
const MOMENTS: [u64; 6] = [30, 80, 120, 160, 220, 300];
/// The same for dockerd; what it forgets is waited for once.
const DOCKER_MOMENTS: [u64; 5] = [60, 120, 160, 200, 260];

#[test]
fn what_runs_goes_on_through_restarts() {
    let Some(cluster) = Cluster::with_docker("docker-restarts", |options| {
        options.hosts = 2;
        options.live_restore = true;
        options.durable_consul = true;
    }) else {
        return;
    };
    let steps = Steps::default();
    cluster.docker_network("docker02", "ov_net1", "");
    cluster.container("docker01", "t1", "--network ov_net1");
    let t2 = cluster.container("docker02", "t2", "--network ov_net1");
    let server = iperf3(&cluster, t2);
    let ping = Ping::start(&cluster.lab, "docker01/t1", t2);
    // iperf3 has its port.
    let stream = Stream::start_at(&cluster.lab, "docker01/t1", "docker02/t2", (t2, 5202).into());
    let goes_on = || {
        stream.goes_on();
        ping.goes_on(50);
        assert!(ping.lost().is_empty(), "lost: {:?}", ping.lost());
    };
    let flow = Instant::now();
    let running = |host: &str, name: &str| cluster.inspect(host, name)["State"]["Pid"].clone();
    let pids = (running("docker01", "t1"), running("docker02", "t2"));
    for (host, signal) in [("docker01", SIGTERM), ("docker02", SIGTERM), ("docker02", SIGKILL)] {
        steps.begin(&format!("dockerd of {host} is restarted by {signal}"));
        cluster.lab.restart_docker(host, signal).unwrap();
        goes_on();
    }
    for (host, signal) in [("docker01", SIGTERM), ("docker02", SIGKILL)] {
        steps.begin(&format!("the agent of {host} is restarted by {signal}"));
        cluster.stop_agent(host, signal);
        goes_on();
        cluster.start_agent(host);
        cluster.wait_connected(host);
        goes_on();
    }
    steps.begin("both at once, dockerd first and the agent first");
    for agent_first in [true, false] {
        cluster.lab.stop_docker("docker01", SIGTERM).unwrap();
        cluster.stop_agent("docker01", SIGTERM);
        if agent_first {
            cluster.start_agent("docker01");
            cluster.lab.start_docker("docker01").unwrap();
        } else {
            // It waits for the plugin, which must not wait for it.
            cluster.lab.spawn_docker("docker01").unwrap();
            cluster.start_agent("docker01");
            cluster.lab.wait_docker("docker01").unwrap();
        }
        goes_on();
    }
    steps.begin("Consul is killed and started");
    cluster.lab.stop_consul().unwrap();
    goes_on();
    cluster.lab.start_consul().unwrap();
    cluster.wait_connected("docker01");
    cluster.wait_connected("docker02");
    goes_on();
    println!("{:6.2} s of iperf3 are over", flow.elapsed().as_secs_f32());

    steps.begin("nothing was lost");
    assert_eq!(pids, (running("docker01", "t1"), running("docker02", "t2")));
    ping.must_have_lost_none("of the whole time");
    stream.must_be_whole();
    let report: Value = until("iperf3 to end", || {
        let output = cluster.try_docker("docker01", "exec flow cat /tmp/report");
        serde_json::from_slice(&output.stdout).ok()
    });
    assert!(report["error"].is_null(), "{report}");
    let speed = report["end"]["sum_received"]["bits_per_second"].as_f64().unwrap();
    println!("iperf3: {:.2} Gb/s", speed / 1e9);
    cluster.wait_nothing_leaks();
    let t3 = cluster.container("docker02", "t3", "--network ov_net1");
    cluster.wait_ping("docker01/t1", t3);
    drop(server);
    for (host, names) in [("docker01", "t1 flow"), ("docker02", "t2 t3")] {
        cluster.remove(host, names);
    }
    cluster.wait_nothing_leaks();
}

/// A long TCP flow: a server in t2, and a container of its own that is the client.
fn iperf3(cluster: &Cluster, t2: Ipv4Addr) -> impl Drop {
    let server = cluster.lab.spawn("docker02/t2", &["iperf3", "-s"], None).unwrap();
    cluster.lab.wait_for_port("docker02/t2", 5201).unwrap();
    // Less than all of the machine: the daemons are to get somewhere, too.
    // Its report is a file: what a container prints while there is no dockerd may be lost.
    let client = format!("iperf3 -c {t2} -t {FLOW} -b 1G -J --logfile /tmp/report; sleep 1000");
    let run = ["docker", "run", "-d", "--name", "flow", "--network", "ov_net1", "busybox"];
    cluster.run("docker01", &[run.as_slice(), &["sh", "-c", &client]].concat());
    server
}

#[test]
fn restart_policies_hold_with_and_without_live_restore() {
    let Some(cluster) = Cluster::with_docker("docker-policies", |options| options.hosts = 2) else {
        return;
    };
    let steps = Steps::default();
    cluster.docker_network("docker02", "ov_net1", "");
    let watcher = cluster.container("docker02", "watcher", "--network ov_net1");
    cluster.container("docker01", "stays", "--network ov_net1 --restart always");
    cluster.container("docker01", "ends", "--network ov_net1");
    let state = |name: &str| cluster.inspect("docker01", name)["State"]["Running"] == true;
    let reaches = |name: &str| {
        cluster.wait_ping("docker02/watcher", cluster.address("docker01", name));
        cluster.wait_ping(&format!("docker01/{name}"), watcher);
    };
    reaches("stays");
    for signal in [SIGTERM, SIGKILL] {
        steps.begin(&format!("without live-restore, {signal}"));
        cluster.lab.restart_docker("docker01", signal).unwrap();
        until("the container that is to stay to run", || state("stays").then_some(()));
        assert!(!state("ends"), "it has no restart policy");
        reaches("stays");
        cluster.wait_nothing_leaks();
        cluster.docker("docker01", "start ends");
        reaches("ends");
    }
    steps.begin("with live-restore");
    let config = json!({ "dns": [GWBRIDGE], "live-restore": true });
    cluster.lab.set_docker_config("docker01", &config).unwrap();
    cluster.lab.restart_docker("docker01", SIGTERM).unwrap();
    cluster.docker("docker01", "start ends");
    let pid = |name: &str| cluster.inspect("docker01", name)["State"]["Pid"].clone();
    let before = (pid("stays"), pid("ends"));
    for signal in [SIGTERM, SIGKILL] {
        cluster.lab.restart_docker("docker01", signal).unwrap();
        assert_eq!(before, (pid("stays"), pid("ends")), "{signal}");
        reaches("ends");
        cluster.wait_nothing_leaks();
    }
    steps.begin("a container that ends while there is no dockerd");
    cluster.lab.stop_docker("docker01", SIGTERM).unwrap();
    let pid = before.1.to_string();
    cluster.run("docker01", &["kill", "-9", &pid]);
    cluster.lab.start_docker("docker01").unwrap();
    until("Docker to see that it ended", || (!state("ends")).then_some(()));
    cluster.wait_nothing_leaks();
    reaches("stays");
}

#[test]
fn an_agent_killed_in_the_middle_leaves_nothing() {
    let Some(cluster) = Cluster::with_docker("docker-killed", |options| options.hosts = 2) else {
        return;
    };
    let steps = Steps::default();
    cluster.docker_network("docker02", "ov_net1", "");
    let t2 = cluster.container("docker02", "t2", "--network ov_net1");
    let killed_during = |line: &str, after: u64| {
        thread::scope(|scope| {
            let command = scope.spawn(|| cluster.try_docker("docker01", line));
            // What is looked for lies at no moment one could wait for.
            thread::sleep(Duration::from_millis(after));
            cluster.stop_agent("docker01", SIGKILL);
            cluster.start_agent("docker01");
            command.join().unwrap()
        })
    };
    for after in MOMENTS {
        steps.begin(&format!("killed {after} ms after docker run"));
        let run = killed_during("run -itd --name t1 --network ov_net1 busybox", after);
        cluster.wait_nothing_leaks();
        if run.status.success() {
            cluster.wait_ping("docker02/t2", cluster.address("docker01", "t1"));
            steps.begin(&format!("killed {after} ms after docker rm"));
            killed_during("rm -f t1", after / 2);
        }
        // Docker gives up on what it could not end, and it is for people to do it again.
        until("t1 to be gone", || {
            cluster.try_docker("docker01", "rm -f t1").status.success().then_some(())
        });
        cluster.wait_nothing_leaks();
        steps.begin(&format!("killed {after} ms after docker network create"));
        let create = "network create -d ovnet --ipam-driver ovnet ov_new";
        let made = killed_during(create, after / 2);
        if made.status.success() {
            cluster.wait_docker_network("ov_new");
            cluster.docker("docker02", "network rm ov_new");
        }
        cluster.wait_docker_network_gone("ov_new");
    }
    steps.begin("dockerd is killed in the middle");
    for (number, after) in DOCKER_MOMENTS.into_iter().enumerate() {
        let run = format!("run -itd --name d{number} --network ov_net1 busybox");
        thread::scope(|scope| {
            let command = scope.spawn(|| cluster.try_docker("docker01", &run));
            thread::sleep(Duration::from_millis(after));
            cluster.lab.restart_docker("docker01", SIGKILL).unwrap();
            command.join().unwrap()
        });
    }
    cluster.wait_nothing_leaks();
    cluster.wait_ping("docker02/t2", t2);
    cluster.wait_nothing_leaks();
}
