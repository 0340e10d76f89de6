//! How long a network takes to be everywhere, and what it costs a container's start. The figures
//! are printed; what is asserted leaves room for busy machines. A binary of its own, so that no
//! other test runs beside it.

#![allow(
    clippy::unwrap_used,
    reason = "a test panics with what it found; the lint knows #[test] functions, not helpers"
)]

use std::time::{Duration, Instant};

use ovnet_tests::cluster::{Cluster, Steps, within};

/// Networks, and containers of each kind, that are measured.
const TIMES: usize = 20;
/// How soon a network must be usable on another host, at worst.
const USABLE: Duration = Duration::from_secs(4);
/// What a container's start may cost more, in the middle.
const COSTS: Duration = Duration::from_millis(300);

#[test]
fn networks_and_containers_do_not_keep_people_waiting() {
    let Some(cluster) = Cluster::with_docker("docker-latency", |_| {}) else { return };
    let steps = Steps::default();

    steps.begin("from docker network create to its being there on another host");
    let (mut took, mut alone): (Vec<Duration>, Vec<Duration>) = (0..TIMES)
        .map(|number| {
            let create = format!("network create -d ovnet --ipam-driver ovnet ov_time{number}");
            let started = Instant::now();
            cluster.docker("docker02", &create);
            let made = started.elapsed();
            within(USABLE, "the network to be on docker03", || {
                let path = format!("/networks/ov_time{number}");
                (cluster.ask_docker("docker03", "GET", &path).0 == 200).then_some(())
            });
            (started.elapsed(), made)
        })
        .unzip();
    took.sort();
    alone.sort();
    print_times("docker network create by itself", &alone);
    print_times("until it is there on another host", &took);
    cluster.container("docker03", "usable", &format!("--network ov_time{}", TIMES - 1));

    steps.begin("docker run on a local bridge and on ovnet, in turns");
    cluster.docker("docker01", "network create local");
    let [mut local, mut ovnet] = [Vec::new(), Vec::new()];
    for number in 0..TIMES {
        for (network, times) in [("local", &mut local), ("ov_time0", &mut ovnet)] {
            let name = format!("{network}-{number}");
            let run = format!("run -d --name {name} --network {network} busybox sleep 1000");
            let started = Instant::now();
            cluster.docker("docker01", &run);
            times.push(started.elapsed());
            // The next one is to find what this one found.
            cluster.remove("docker01", &name);
        }
    }
    local.sort();
    ovnet.sort();
    print_times("docker run, local bridge", &local);
    print_times("docker run, ovnet", &ovnet);
    let more = ovnet[TIMES / 2].saturating_sub(local[TIMES / 2]);
    println!("        ovnet costs {} ms more", more.as_millis());
    assert!(more < COSTS, "ovnet costs {more:?}");
    cluster.wait_nothing_leaks();
}

/// Prints the middle and the ends of sorted times.
fn print_times(what: &str, times: &[Duration]) {
    let [first, middle, last] =
        [times[0], times[times.len() / 2], times[times.len() - 1]].map(|it| it.as_millis());
    println!("        {what}: median {middle} ms, {first} to {last} ms, {} times", times.len());
}
