//! An upgrade under as much TCP as goes through.

use std::{env, thread, time::Duration};

use nix::sys::signal::Signal;
use ovnet_common::abi::ABI_VERSION;
use ovnet_tests::cluster::{Cluster, Ping, ProgramWatch, Steps};
use serde_json::Value;

use super::{start, succeeded, watch};

/// Pings to wait for before a step, and after the last one.
const A_WHILE: usize = 500;

fn number(variable: &str, default: u32) -> u32 {
    env::var(variable).map_or(default, |text| text.parse().unwrap())
}

#[test]
fn an_upgrade_under_load() {
    let (runs, seconds) = (number("OVNET_RUNS", 1), number("OVNET_SECONDS", 15));
    let Some(cluster) = Cluster::up("upgrade-load", |options| options.hosts = 2) else { return };
    let steps = Steps::default();
    cluster.sh("docker02", "ovnet network create ov_net1");
    cluster.sandbox("docker01", "t1", "--network ov_net1");
    let t2 = cluster.sandbox("docker02", "t2", "--network ov_net1");
    cluster.wait_ping("docker01/t1", t2);
    let _server = cluster.lab.spawn("docker02/t2", &["iperf3", "-s"], None).unwrap();
    cluster.lab.wait_for_port("docker02/t2", 5201).unwrap();
    let (address, time) = (t2.to_string(), seconds.to_string());
    let hosts = ["docker01", "docker02"];
    for run in 0..runs {
        steps.begin(&format!("run {} of {runs}, {seconds} s", run + 1));
        let watches = hosts.map(|host| watch(&cluster, host));
        let ping = Ping::start(&cluster.lab, "docker01/t1", t2);
        let report = thread::scope(|scope| {
            let load = scope.spawn(|| {
                let command = ["iperf3", "-J", "-C", "cubic", "-c", &address, "-t", &time];
                let limit = Duration::from_secs(u64::from(seconds) + 30);
                let output = cluster.lab.output("docker01/t1", &command, limit).unwrap();
                serde_json::from_slice::<Value>(&output.stdout).unwrap()
            });
            ping.goes_on(A_WHILE);
            // There and back again, the maps changed on one host and alike on the other, by turns.
            let version = ABI_VERSION + 1 + run % 2;
            for (turn, host) in (0..).zip(hosts) {
                let changed = if (turn + run) % 2 == 0 { "all" } else { "" };
                let signal = if run % 2 == 0 { Signal::SIGTERM } else { Signal::SIGKILL };
                cluster.stop_agent(host, signal);
                ping.goes_on(A_WHILE);
                start(&cluster, host, Some(version), changed, &[]);
                cluster.wait_connected(host);
                succeeded(&cluster, host, Some(version));
                ping.goes_on(A_WHILE);
            }
            assert!(!load.is_finished(), "the load ended before the last upgrade: a longer one");
            load.join().unwrap()
        });
        ping.goes_on(A_WHILE);
        assert_eq!(report.get("error"), None, "iperf3");
        let (sent, received) = (&report["end"]["sum_sent"], &report["end"]["sum_received"]);
        println!(
            "run {}: {} pings answered, {} lost, {} twice; iperf3 {} bytes in {} s, {} sent again",
            run + 1,
            ping.answered(),
            ping.lost().len(),
            ping.duplicates(),
            received["bytes"],
            received["seconds"],
            sent["retransmits"]
        );
        let unbroken = |it: &Value| it["sum"]["bytes"].as_f64().unwrap() > 0.0;
        assert!(report["intervals"].as_array().unwrap().iter().all(unbroken), "it stood still");
        ping.must_have_lost_none(&format!("run {}", run + 1));
        watches.into_iter().for_each(ProgramWatch::must_have_seen_nothing_else);
    }
}
