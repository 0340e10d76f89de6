//! Three servers, one on each host, and their leader is killed.

use std::{
    collections::BTreeMap,
    net::{Ipv4Addr, SocketAddr},
    time::Instant,
};

use ovnet_tests::{
    cluster::{Cluster, Steps, until},
    consul::{find_consul, request},
};
use xtask::lab::Running;

use crate::Busy;

/// Each agent asks the server of its own host, a follower or the leader.
const OWN: &str = "127.0.0.1:8500";

#[test]
fn the_leader_of_three_servers_is_killed_and_the_others_go_on() {
    let Some(cluster) = Cluster::up("leader", |options| {
        options.consul_at = Some(OWN.into());
        options.agent_args = ["--repair-interval", "600"].map(str::to_owned).to_vec();
    }) else {
        return;
    };
    let steps = Steps::default();
    cluster.lab.stop_consul().unwrap();
    let nodes = cluster.lab.nodes();
    let mut servers: BTreeMap<String, Running> =
        nodes.iter().map(|node| (node.clone(), server(&cluster, node))).collect();
    nodes.iter().for_each(|node| cluster.wait_connected(node));
    let mut busy = Busy::start(cluster);

    // What looks at records asks the server of docker01, so that one must be left. Its death, where it
    // leads, is one more of the same kind.
    let mut killed = 0;
    loop {
        let leader = leader(&busy.cluster);
        steps.begin(&format!("{leader} leads, and is killed"));
        drop(servers.remove(&leader));
        killed += 1;
        let left: Vec<String> = nodes.iter().filter(|node| **node != leader).cloned().collect();
        let answering = until("the others to have a leader", || {
            takes_writes(&busy.cluster, &left[0]).then(Instant::now)
        });
        if leader != "docker01" {
            busy.must_converge_on(&left, "the leader's death", answering);
        }
        busy.goes_on_for_an_outage();
        steps.begin(&format!("{leader} is started again"));
        servers.insert(leader.clone(), server(&busy.cluster, &leader));
        let answering =
            until("it to answer", || takes_writes(&busy.cluster, &leader).then(Instant::now));
        busy.must_converge("a server's return", answering);
        if leader != "docker01" || killed == 3 {
            break;
        }
    }
    steps.begin("the end");
    busy.must_have_lost_none();
}

/// Starts a server on a host.
fn server(cluster: &Cluster, node: &str) -> Running {
    let consul = find_consul().unwrap().display().to_string();
    let address = cluster.lab.address(node).unwrap().to_string();
    let mut argv = vec![consul.as_str(), "agent", "-server", "-bootstrap-expect", "3"];
    argv.extend(["-bind", &address, "-client", "0.0.0.0", "-node", node]);
    argv.extend(["-data-dir", "/run/consul-of-three", "-log-level", "warn"]);
    argv.extend(["-hcl", "disable_update_check = true"]);
    argv.extend(["-hcl", "performance { raft_multiplier = 1 }"]);
    let others: Vec<String> =
        cluster.lab.nodes().iter().map(|it| cluster.lab.address(it).unwrap().to_string()).collect();
    for other in others.iter().filter(|other| **other != address) {
        argv.extend(["-retry-join", other]);
    }
    argv.extend(["-retry-interval", "1s"]);
    cluster.lab.spawn(node, &argv, Some(&format!("{node}-server.log"))).unwrap()
}

/// The host whose server leads.
fn leader(cluster: &Cluster) -> String {
    let address: Ipv4Addr = until("a leader", || {
        let (_, answer) = ask(cluster, "docker01", "GET", "/v1/status/leader")?;
        answer.trim_matches('"').split(':').next()?.parse().ok()
    });
    let nodes = cluster.lab.nodes();
    nodes.into_iter().find(|node| cluster.lab.address(node).unwrap() == address).unwrap()
}

/// Whether the server of a host carries writes out.
fn takes_writes(cluster: &Cluster, node: &str) -> bool {
    matches!(ask(cluster, node, "PUT", "/v1/kv/ready"), Some((200, _)))
}

fn ask(
    cluster: &Cluster,
    node: &str,
    method: &'static str,
    path: &'static str,
) -> Option<(u16, String)> {
    let at: SocketAddr = OWN.parse().unwrap();
    let answer = cluster.lab.inside(node, move || request(at, method, path, b"")).ok()?;
    Some((answer.0, String::from_utf8_lossy(&answer.1).trim().to_owned()))
}
