//! Docker while Consul is stopped, and while it hangs.

use std::time::{Duration, Instant};

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

fn timed<T>(work: impl FnOnce() -> T) -> (T, Duration) {
    let started = Instant::now();
    let done = work();
    (done, started.elapsed())
}
