//! The same where programs are filters of a clsact qdisc, of which no pin tells: kernels before 6.6.

use std::collections::BTreeSet;

use nix::sys::signal::Signal;
use ovnet_common::abi::ABI_VERSION;
use ovnet_tests::cluster::{Cluster, Ping, Steps, text, until};

use super::{start, succeeded, versions};

const CLSACT: [&str; 1] = ["--force-clsact"];

#[test]
fn filters_are_replaced_in_place_by_those_of_another_version() {
    let Some(cluster) = Cluster::up("upgrade-clsact", |options| {
        options.hosts = 2;
        options.agents = false;
    }) else {
        return;
    };
    let steps = Steps::default();
    let hosts = ["docker01", "docker02"];
    for host in hosts {
        start(&cluster, host, None, "", &CLSACT);
        assert_eq!(cluster.status(host)["tc"], "clsact");
    }
    cluster.sh("docker02", "ovnet network create ov_net1");
    cluster.sandbox("docker01", "t1", "--network ov_net1");
    let t2 = cluster.sandbox("docker02", "t2", "--network ov_net1");
    cluster.wait_ping("docker01/t1", t2);
    let ping = Ping::start(&cluster.lab, "docker01/t1", t2);
    let one_filter_each = |host: &str| {
        let local = cluster.json(host, "endpoint ls --local")[0]["local"].clone();
        let veth = text(&local, "host_ifname").unwrap().to_owned();
        for interface in ["ens33", "ovnet-vx", veth.as_str()] {
            let filters = cluster.sh(host, &format!("tc filter show dev {interface} ingress"));
            let programs: BTreeSet<&str> =
                filters.lines().filter_map(|line| line.split(" id ").nth(1)).collect();
            assert_eq!(programs.len(), 1, "{interface} of {host}: {filters}");
        }
    };
    let next = ABI_VERSION + 1;
    for (step, version, changed) in [
        ("upgraded, all maps alike", Some(next), ""),
        ("upgraded, all maps changed", Some(next + 1), "all"),
        ("downgraded", None, ""),
    ] {
        for host in hosts {
            steps.begin(&format!("{step}, on {host}"));
            cluster.stop_agent(host, Signal::SIGKILL);
            start(&cluster, host, version, changed, &CLSACT);
            succeeded(&cluster, host, version);
            cluster.wait_connected(host);
            one_filter_each(host);
            ping.goes_on(200);
            assert!(ping.lost().is_empty(), "lost: {:?}", ping.lost());
        }
    }

    steps.begin("Consul is stopped, and all maps change: the filters of before go on");
    cluster.lab.stop_consul().unwrap();
    cluster.stop_agent("docker01", Signal::SIGKILL);
    start(&cluster, "docker01", Some(next), "all", &CLSACT);
    let waits = || cluster.status("docker01")["errors"].to_string().contains("the agent before");
    until("the agent to say that it waits", || waits().then_some(()));
    ping.goes_on(200);
    one_filter_each("docker01");
    assert_eq!(versions(&cluster, "docker01").len(), 2);
    ping.must_have_lost_none("of the whole time");
}
