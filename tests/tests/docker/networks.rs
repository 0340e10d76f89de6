//! A network made on one host is on all of them, and gone from all of them.

use std::{fs, net::Ipv4Addr};

use nix::sys::signal::Signal;
use ovnet_tests::cluster::{Cluster, Steps, until};
use serde_json::json;
use xtask::lab::docker_config;

use super::{HOSTS, together};

/// Rounds of two hosts creating one name at once.
const RACES: usize = 3;

#[test]
fn networks_are_the_same_on_every_docker() {
    let Some(cluster) = Cluster::with_docker("docker-networks", |_| {}) else { return };
    let steps = Steps::default();
    every_option_is_everywhere(&cluster, &steps);
    both_sides_create_and_remove(&cluster, &steps);
    what_cannot_be_is_refused(&cluster, &steps);
    a_network_in_use_stays(&cluster, &steps);
    what_was_missed_is_made_up_for(&cluster, &steps);
    of_two_at_once_one_is_made(&cluster, &steps);
}

fn every_option_is_everywhere(cluster: &Cluster, steps: &Steps) {
    steps.begin("a network with all options");
    cluster.docker_network(
        "docker02",
        "ov_all",
        "--subnet 172.19.0.0/24 --gateway 172.19.0.254 --ip-range 172.19.0.64/26 \
         --aux-address router=172.19.0.64 --internal --label team=net \
         -o com.docker.network.driver.mtu=1300 -o com.example.colour=green",
    );
    let ipam = json!([{
        "Subnet": "172.19.0.0/24",
        "Gateway": "172.19.0.254",
        "IPRange": "172.19.0.64/26",
        "AuxiliaryAddresses": { "router": "172.19.0.64" },
    }]);
    for (number, host) in HOSTS.into_iter().enumerate() {
        let network = cluster.inspect(host, "ov_all");
        assert_eq!(network["IPAM"]["Config"], ipam, "{host}");
        assert_eq!(network["IPAM"]["Driver"], "ovnet", "{host}");
        assert_eq!(network["Internal"], true, "{host}");
        assert_eq!(network["Labels"]["team"], "net", "{host}");
        assert_eq!(network["Options"]["com.docker.network.driver.mtu"], "1300", "{host}");
        assert_eq!(network["Options"]["com.example.colour"], "green", "{host}");
        let address = cluster.container(host, "a1", "--network ov_all");
        let expected = Ipv4Addr::new(172, 19, 0, 65 + u8::try_from(number).unwrap());
        assert_eq!(address, expected, "from the range, without the aux address");
        let links = cluster.inside(host, "a1", "ip -o link");
        assert!(links.contains("mtu 1300"), "{links}");
        assert!(!links.contains("eth1"), "an internal network has no way out: {links}");
    }
    cluster.wait_ping("docker01/a1", Ipv4Addr::new(172, 19, 0, 67));
    let record = &cluster.json("docker03", "network inspect ov_all")[0];
    assert_eq!((&record["mtu"], &record["internal"]), (&1300.into(), &true.into()));
    assert_eq!(
        (&record["labels"]["team"], &record["created_by"]),
        (&json!("net"), &json!("docker02"))
    );
    cluster.wait_nothing_leaks();
    HOSTS.iter().for_each(|host| cluster.remove(host, "a1"));
    cluster.docker("docker03", "network rm ov_all");
    cluster.wait_docker_network_gone("ov_all");
    cluster.wait_nothing_leaks();
}

fn both_sides_create_and_remove(cluster: &Cluster, steps: &Steps) {
    steps.begin("ovnet network create and rm are Docker's, too");
    cluster.sh("docker03", "ovnet network create ov_client");
    cluster.wait_docker_network("ov_client");
    cluster.container("docker01", "a1", "--network ov_client");
    cluster.remove("docker01", "a1");
    cluster.sh("docker02", "ovnet network rm ov_client");
    cluster.wait_docker_network_gone("ov_client");
    cluster.docker_network("docker01", "ov_docker", "");
    cluster.sh("docker02", "ovnet network rm ov_docker");
    cluster.wait_docker_network_gone("ov_docker");
    cluster.wait_nothing_leaks();
}

fn what_cannot_be_is_refused(cluster: &Cluster, steps: &Steps) {
    steps.begin("networks that cannot be");
    let said = cluster.docker_refused("docker01", "network create -d ovnet ov_bad");
    assert!(said.contains("docker network create -d ovnet --ipam-driver ovnet"), "{said}");
    cluster.docker_network("docker01", "ov_fix", "--subnet 172.20.0.0/24");
    for (host, name, options) in [
        ("docker03", "ov_bad", "--subnet 172.20.0.0/25"),
        ("docker01", "ov_bad", "--subnet 172.20.0.0/24"),
        ("docker02", "ov_bad", "--subnet 192.168.1.0/25"),
        ("docker02", "ov_bad", "--subnet 172.21.0.0/24 --gateway 172.21.1.1"),
        ("docker02", "ov_bad", "--subnet 172.21.0.0/24 -o com.docker.network.driver.mtu=many"),
        ("docker02", "ov_bad", "--ipv6 --subnet fd00:1::/64"),
        ("docker02", "ov_fix", ""),
    ] {
        cluster.docker_network_refused(host, name, options);
    }
    cluster.wait_nothing_leaks();
    cluster.docker("docker02", "network rm ov_fix");
    cluster.wait_docker_network_gone("ov_fix");
}

fn a_network_in_use_stays(cluster: &Cluster, steps: &Steps) {
    steps.begin("rm refuses while a container of any host uses the network");
    cluster.docker_network("docker02", "ov_net1", "");
    let t1 = cluster.container("docker01", "t1", "--network ov_net1");
    until("the name of t1 to be known", || {
        let listed = cluster.json("docker02", "endpoint ls --network ov_net1").to_string();
        listed.contains("\"t1\"").then_some(())
    });
    let said = cluster.refused("docker02", &["ovnet", "network", "rm", "ov_net1"]);
    assert!(said.contains("docker01") && said.contains("t1"), "{said}");
    let said = cluster.docker_refused("docker01", "network rm ov_net1");
    assert!(said.contains("active endpoints"), "{said}");
    // Docker lets nobody but itself refuse: it writes the driver's refusal to its log, and the
    // network is made again.
    cluster.docker("docker02", "network rm ov_net1");
    assert!(cluster.record("networks/ov_net1").is_some(), "it stays on the others");
    until("the Docker of docker02 to have told why", || {
        let said = cluster.lab.docker_output("docker02");
        said.contains("in use: host docker01 has endpoint t1").then_some(())
    });
    until("ov_net1 to be back", || cluster.docker_networks("docker02").pop());
    // Unless it is to ask before it does.
    let mut options = cluster.lab.options();
    options.guard = true;
    cluster.lab.set_docker_config("docker02", &docker_config(&options)).unwrap();
    cluster.lab.restart_docker("docker02", Signal::SIGTERM).unwrap();
    let said = cluster.docker_refused("docker02", "network rm ov_net1");
    assert!(said.contains("in use: host docker01 has t1 ("), "{said}");
    cluster.container("docker02", "t2", "--network ov_net1");
    cluster.wait_ping("docker02/t2", t1);
    cluster.wait_nothing_leaks();
    cluster.remove("docker01", "t1");
    cluster.remove("docker02", "t2");
    cluster.docker("docker02", "network rm ov_net1");
    cluster.wait_docker_network_gone("ov_net1");
    cluster.wait_nothing_leaks();
}

fn what_was_missed_is_made_up_for(cluster: &Cluster, steps: &Steps) {
    steps.begin("a Docker that was down has missed nothing");
    cluster.docker_network("docker01", "ov_stays", "");
    cluster.docker_network("docker01", "ov_goes", "");
    cluster.lab.stop_docker("docker03", Signal::SIGTERM).unwrap();
    cluster.docker("docker02", "network rm ov_goes");
    cluster.docker("docker02", "network create -d ovnet --ipam-driver ovnet ov_late");
    cluster.lab.start_docker("docker03").unwrap();
    until("docker03 to have what there is now", || {
        let mut names = cluster.docker_networks("docker03");
        names.sort();
        (names == ["ov_late", "ov_stays"]).then_some(())
    });

    steps.begin("a Docker that lost all it knew, with a container that ran");
    cluster.container("docker03", "forgotten", "--network ov_stays");
    let pid = cluster.inspect("docker03", "forgotten")["State"]["Pid"].to_string();
    cluster.lab.stop_docker("docker03", Signal::SIGKILL).unwrap();
    cluster.run("docker03", &["kill", "-9", &pid]);
    for folder in ["network", "containers"] {
        fs::remove_dir_all(cluster.path("docker03", "var/lib/docker").join(folder)).unwrap();
    }
    cluster.lab.start_docker("docker03").unwrap();

    steps.begin("an agent that was down has missed nothing");
    let t1 = cluster.container("docker01", "t1", "--network ov_stays");
    cluster.stop_agent("docker02", Signal::SIGKILL);
    cluster.docker("docker01", "network create -d ovnet --ipam-driver ovnet ov_later");
    cluster.docker("docker01", "network rm ov_late");
    cluster.start_agent("docker02");
    until("all to have what there is now", || {
        let has_all = |host: &&str| {
            let mut names = cluster.docker_networks(host);
            names.sort();
            names == ["ov_later", "ov_stays"]
        };
        HOSTS.iter().all(has_all).then_some(())
    });
    cluster.container("docker03", "t3", "--network ov_stays");
    cluster.wait_ping("docker03/t3", t1);
    cluster.wait_nothing_leaks();
    cluster.remove("docker01", "t1");
    cluster.remove("docker03", "t3");
    for name in ["ov_stays", "ov_later"] {
        cluster.docker("docker02", &format!("network rm {name}"));
        cluster.wait_docker_network_gone(name);
    }
    cluster.wait_nothing_leaks();
}

fn of_two_at_once_one_is_made(cluster: &Cluster, steps: &Steps) {
    steps.begin("two hosts create one name at once");
    for round in 0..RACES {
        let name = format!("ov_race{round}");
        let made = together(&HOSTS[..2], |host| cluster.try_docker_network(host, &name));
        assert!(made.iter().any(|it| it.status.success()), "one of them must succeed");
        until(&format!("all to have the one {name}"), || {
            let network = cluster.record(&format!("networks/{name}"))?;
            let network: serde_json::Value = serde_json::from_str(&network).ok()?;
            let same = |host: &&str| {
                let output = cluster.try_docker(host, &format!("network inspect {name}"));
                let found: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
                // One of the name, with the subnet of the record.
                found.as_array().is_some_and(|it| it.len() == 1)
                    && found[0]["IPAM"]["Config"][0]["Subnet"] == network["subnet"]
            };
            HOSTS.iter().all(same).then_some(())
        });
        let first = cluster.container("docker01", "t1", &format!("--network {name}"));
        cluster.container("docker02", "t2", &format!("--network {name}"));
        cluster.wait_ping("docker02/t2", first);
        cluster.wait_nothing_leaks();
        cluster.remove("docker01", "t1");
        cluster.remove("docker02", "t2");
        cluster.docker("docker03", &format!("network rm {name}"));
        cluster.wait_docker_network_gone(&name);
    }
    cluster.wait_nothing_leaks();
}
