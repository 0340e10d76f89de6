//! Containers know each other by name, on every host.

use std::{
    collections::BTreeSet,
    net::{IpAddr, Ipv4Addr},
};

use nix::sys::signal::Signal;
use ovnet_tests::cluster::{Cluster, Steps, until};
use serde_json::json;
use xtask::lab::{CLIENT, GWBRIDGE};

use super::dns::{A, AAAA, Answer, NOERROR, OneAnswer, PTR, REFUSED, ask};

/// What the name server outside the cluster says of every name.
const ELSEWHERE: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 9);

#[test]
fn names_are_heard_on_every_host() {
    let Some(cluster) = Cluster::with_docker("docker-names", |_| {}) else { return };
    let steps = Steps::default();
    let asks = |place: &str, name: &str, kind: u16| -> Answer {
        ask(&cluster, place, IpAddr::V4(GWBRIDGE), name, kind)
    };
    let one = |address: Ipv4Addr| (NOERROR, vec![address.to_string()]);
    let refused = (REFUSED, vec![]);

    steps.begin("Docker of docker01 has the agent and another server to ask");
    let client = cluster.lab.address(CLIENT).unwrap();
    let _elsewhere = OneAnswer::start(&cluster, CLIENT, ELSEWHERE);
    let config = json!({ "dns": [GWBRIDGE, client] });
    cluster.lab.set_docker_config("docker01", &config).unwrap();
    cluster.lab.restart_docker("docker01", Signal::SIGTERM).unwrap();
    cluster.docker_network("docker02", "ov_net1", "");
    cluster.docker_network("docker02", "ov_net2", "");
    let t1 = cluster.container("docker01", "t1", "--network ov_net1");
    let t2 = cluster.container("docker02", "t2", "--network ov_net1 --network-alias db");
    let u3 = cluster.container("docker03", "u3", "--network ov_net2");
    cluster.wait_name("docker01", "t1", "t2");

    steps.begin("names, aliases, short ids, with and without the network");
    let id = cluster.inspect("docker02", "t2")["Id"].as_str().unwrap()[..12].to_owned();
    for name in ["t2", "db", &id, "t2.ov_net1", "db.ov_net1", &format!("{id}.ov_net1"), "T2"] {
        until(&format!("t1 to know {name}"), || {
            (asks("docker01/t1", name, A) == one(t2)).then_some(())
        });
    }
    // A host's own containers, too.
    assert_eq!(asks("docker01/t1", "t1", A), one(t1));
    cluster.inside("docker01", "t1", "ping -c 1 db");
    cluster.inside("docker01", "t1", &format!("ping -c 1 {id}"));
    cluster.inside("docker01", "t1", "ping -c 1 t2.ov_net1");

    steps.begin("other types");
    assert_eq!(asks("docker01/t1", "t2", AAAA), (NOERROR, vec![]));
    let [a, b, c, d] = t2.octets();
    let reverse = format!("{d}.{c}.{b}.{a}.in-addr.arpa");
    let (code, names) = asks("docker01/t1", &reverse, PTR);
    assert_eq!((code, names.len()), (NOERROR, 1), "{names:?}");
    assert!(names[0] == "t2" || names[0] == "t2.ov_net1", "{names:?}");

    steps.begin("a container hears only the names of its networks");
    for (place, name) in [
        ("docker01/t1", "u3"),
        ("docker01/t1", "u3.ov_net2"),
        ("docker01/t1", "t2.ov_net2"),
        ("docker03/u3", "t2"),
        ("docker03/u3", "db.ov_net1"),
        ("docker01/t1", "example.org"),
        ("docker01/t1", "9.113.0.203.in-addr.arpa"),
    ] {
        let kind = if name.ends_with("arpa") { PTR } else { A };
        assert_eq!(asks(place, name, kind), refused, "{place} asks for {name}");
    }
    let found = cluster.inside("docker01", "t1", "nslookup example.org");
    assert!(found.contains(&ELSEWHERE.to_string()), "from the next server: {found}");
    let found = cluster.inside("docker01", "t1", "nslookup u3");
    assert!(!found.contains(&u3.to_string()), "{found}");

    steps.begin("names follow connect and disconnect");
    cluster.docker("docker01", "network connect --alias also ov_net2 t1");
    until("t1 to know u3", || (asks("docker01/t1", "u3", A) == one(u3)).then_some(()));
    let on_net2 = &cluster.inspect("docker01", "t1")["NetworkSettings"]["Networks"]["ov_net2"];
    let on_net2: Ipv4Addr = on_net2["IPAddress"].as_str().unwrap().parse().unwrap();
    for name in ["t1", "also"] {
        until(&format!("u3 to know {name}"), || {
            (asks("docker03/u3", name, A) == one(on_net2)).then_some(())
        });
    }
    cluster.docker("docker01", "network disconnect ov_net2 t1");
    until("u3 to forget t1", || (asks("docker03/u3", "t1", A) == refused).then_some(()));
    assert_eq!(asks("docker01/t1", "u3", A), refused);

    steps.begin("one name on two hosts: both addresses, in turns");
    let mut both = BTreeSet::new();
    for host in ["docker02", "docker03"] {
        let address = cluster.container(host, "web", "--network ov_net1");
        both.insert(address.to_string());
    }
    until("t1 to know both", || {
        let (code, found) = asks("docker01/t1", "web", A);
        (code == NOERROR && found.iter().cloned().collect::<BTreeSet<_>>() == both).then_some(())
    });
    let firsts: BTreeSet<_> =
        (0..16).map(|_| asks("docker01/t1", "web", A).1.swap_remove(0)).collect();
    assert_eq!(firsts, both, "each comes first once in a while");
    cluster.remove("docker03", "web");
    until("t1 to know the one that is left", || {
        (asks("docker01/t1", "web", A).1.len() == 1).then_some(())
    });
    cluster.docker("docker02", "rename t2 t2new");
    until("t1 to know the new name", || (asks("docker01/t1", "t2new", A) == one(t2)).then_some(()));

    steps.begin("the agent comes back with the names");
    cluster.stop_agent("docker01", Signal::SIGKILL);
    cluster.start_agent("docker01");
    cluster.wait_name("docker01", "t1", "t2new");
    cluster.wait_nothing_leaks();
}
