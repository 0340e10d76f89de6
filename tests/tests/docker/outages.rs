//! Docker while Consul is stopped, and while it hangs.

use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use ovnet_tests::cluster::{Cluster, Ping, Steps, until};

/// How long `docker run` may take to fail.
const FAILS_WITHIN: Duration = Duration::from_secs(5);

#[test]
fn containers_talk_and_stop_without_consul() {
    let Some(cluster) = Cluster::with_docker("docker-outages", |options| {
        options.hosts = 2;
        options.durable_consul = true;
    }) else {
        return;
    };
    let steps = Steps::default();
    cluster.docker_network("docker02", "ov_net1", "");
    cluster.container("docker01", "t1", "--network ov_net1");
    let t2 = cluster.container("docker02", "t2", "--network ov_net1");
    let ping = Ping::start(&cluster.lab, "docker01/t1", t2);
    for (round, hangs) in [false, true].into_iter().enumerate() {
        steps.begin(if hangs { "Consul hangs" } else { "Consul is stopped" });
        for name in ["stops", "killed"] {
            cluster.container("docker01", &format!("{name}{round}"), "--network ov_net1");
        }
        let halted = hangs.then(|| cluster.lab.halt_consul().unwrap());
        if !hangs {
            cluster.lab.stop_consul().unwrap();
        }
        ping.goes_on(100);

        let run = "run -itd --name fails --network ov_net1 busybox";
        let create = "network create -d ovnet --ipam-driver ovnet ov_new";
        for line in [run, create] {
            let (said, took) = timed(|| cluster.docker_refused("docker01", line));
            println!("        {:.2} s: {said}", took.as_secs_f32());
            assert!(took < FAILS_WITHIN, "`docker {line}` took {took:?}");
            assert!(said.contains("Consul") && said.contains("192.168.1.11:8500"), "{said}");
        }
        for line in [
            "rm fails".to_owned(),
            format!("stop stops{round}"),
            format!("rm stops{round}"),
            format!("rm -f killed{round}"),
        ] {
            let (_, took) = timed(|| cluster.docker("docker01", &line));
            println!("        {:.2} s: docker {line}", took.as_secs_f32());
            assert!(took < 2 * FAILS_WITHIN, "`docker {line}` took {took:?}");
        }
        ping.goes_on(100);
        assert!(ping.lost().is_empty(), "lost: {:?}", ping.lost());

        steps.begin("Consul is back");
        drop(halted);
        if !hangs {
            cluster.lab.start_consul().unwrap();
        }
        cluster.wait_connected("docker01");
        cluster.wait_connected("docker02");
        cluster.wait_nothing_leaks();
        let t3 = cluster.container("docker01", "t3", "--network ov_net1");
        cluster.wait_ping("docker02/t2", t3);
        cluster.remove("docker01", "t3");
        until("the network to be as before", || {
            let names = cluster.docker_networks("docker01");
            (names == ["ov_net1"]).then_some(())
        });
    }
    ping.must_have_lost_none("of the whole time");
    cluster.wait_nothing_leaks();
}

#[test]
fn a_consul_that_was_wiped_removes_no_network() {
    let Some(cluster) = Cluster::with_docker("docker-wiped", |options| options.hosts = 2) else {
        return;
    };
    let steps = Steps::default();
    for name in ["ov_idle", "ov_net1"] {
        cluster.docker_network("docker01", name, "");
    }
    let t1 = cluster.container("docker01", "t1", "--network ov_net1");
    let t2 = cluster.container("docker02", "t2", "--network ov_net1");
    let id = |name: &str| cluster.inspect("docker02", name)["Id"].clone();
    let before = [id("ov_idle"), id("ov_net1")];
    let wipe = || {
        cluster.lab.stop_consul().unwrap();
        cluster.lab.start_consul().unwrap();
    };
    let all_is_back = || {
        for host in ["docker01", "docker02"] {
            cluster.wait_connected(host);
        }
        for name in ["ov_idle", "ov_net1"] {
            until("the networks to be back in Consul", || {
                cluster.record(&format!("networks/{name}"))
            });
        }
        cluster.wait_nothing_leaks();
        assert_eq!([id("ov_idle"), id("ov_net1")], before);
    };

    steps.begin("while the agents run");
    wipe();
    all_is_back();

    steps.begin("while no agent runs");
    for host in ["docker01", "docker02"] {
        cluster.stop_agent(host, Signal::SIGKILL);
    }
    wipe();
    for host in ["docker01", "docker02"] {
        cluster.start_agent(host);
    }
    all_is_back();
    cluster.wait_ping("docker01/t1", t2);
    let t3 = cluster.container("docker02", "t3", "--network ov_net1");
    assert!(t3 != t1 && t3 != t2, "{t3} is given twice");

    steps.begin("a network that is removed while no agent runs is removed");
    cluster.stop_agent("docker02", Signal::SIGTERM);
    cluster.sh("docker01", "ovnet network rm ov_idle");
    cluster.start_agent("docker02");
    cluster.wait_docker_network_gone("ov_idle");
}

fn timed<T>(work: impl FnOnce() -> T) -> (T, Duration) {
    let started = Instant::now();
    let done = work();
    (done, started.elapsed())
}
