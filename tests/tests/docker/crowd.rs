//! Many containers at once.

use std::{collections::BTreeSet, time::Instant};

use ovnet_tests::cluster::{Cluster, Steps};

use super::{HOSTS, together};

/// Containers on each host.
const EACH: usize = 20;
/// Starts at the same time on each host: Docker's client is a heavy program.
const AT_ONCE: usize = 5;
/// How often all are started and killed.
const ROUNDS: usize = 3;

#[test]
fn sixty_containers_started_and_killed_together_leave_nothing() {
    let Some(cluster) = Cluster::with_docker("docker-crowd", |_| {}) else { return };
    let steps = Steps::default();
    cluster.docker_network("docker02", "ov_net1", "");
    let names: Vec<String> = (1..=EACH).map(|number| format!("c{number}")).collect();
    let create = "docker create --name $1 --network ov_net1 busybox sleep 1000 > /dev/null";
    on_all(&cluster, &names, create);
    for round in 1..=ROUNDS {
        steps.begin(&format!("round {round}: start"));
        let started = Instant::now();
        on_all(&cluster, &names, "docker start $1 > /dev/null");
        println!("{:6.2} s for all", started.elapsed().as_secs_f32());
        let endpoints = cluster.docker_endpoints();
        assert_eq!(endpoints.len(), HOSTS.len() * EACH, "all run");
        let addresses: BTreeSet<_> = endpoints.iter().map(|it| it.address).collect();
        assert_eq!(addresses.len(), endpoints.len(), "an address is given out twice");
        cluster.wait_nothing_leaks();
        let last = endpoints.last().unwrap();
        for host in HOSTS {
            cluster.wait_ping(&format!("{host}/c1"), last.address);
        }
        steps.begin(&format!("round {round}: kill"));
        together(HOSTS, |host| cluster.docker(host, &format!("kill {}", names.join(" "))));
        cluster.wait_nothing_leaks();
        let left = cluster.records().into_keys().filter(|key| key.starts_with("endpoints/"));
        assert_eq!(left.collect::<Vec<_>>(), [] as [String; 0]);
    }
    steps.begin("the network goes");
    together(HOSTS, |host| cluster.remove(host, &names.join(" ")));
    cluster.docker("docker01", "network rm ov_net1");
    cluster.wait_docker_network_gone("ov_net1");
    cluster.wait_nothing_leaks();
}

/// Runs a script with each of the names as its argument, several at once, on all hosts together.
fn on_all(cluster: &Cluster, names: &[String], script: &str) {
    let lines = names.join("\n");
    let each = format!("echo '{lines}' | xargs -P {AT_ONCE} -n 1 sh -c '{script}' sh");
    together(HOSTS, |host| cluster.run(host, &["sh", "-c", &each]));
}
