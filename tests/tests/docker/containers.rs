//! What `docker run`, `connect`, `restart` and their like do to a container's networks.

use std::{net::Ipv4Addr, time::Duration};

use ovnet_tests::cluster::{Cluster, Steps, until};
use xtask::lab::{CLIENT, GWBRIDGE};

#[test]
fn containers_are_on_their_networks_as_docker_was_told() {
    let Some(cluster) = Cluster::with_docker("docker-containers", |_| {}) else { return };
    let steps = Steps::default();
    cluster.docker_network("docker02", "ov_net1", "");
    cluster.docker_network("docker01", "ov_fix", "--subnet 172.19.0.0/24 --gateway 172.19.0.1");
    layout(&cluster, &steps);
    chosen_addresses(&cluster, &steps);
    published_ports(&cluster, &steps);
    connect_and_disconnect(&cluster, &steps);
    shared_stack(&cluster, &steps);
    life_of_a_container(&cluster, &steps);
}

/// eth0 is the overlay, eth1 the way out.
fn layout(cluster: &Cluster, steps: &Steps) {
    steps.begin("eth0 on the overlay, eth1 on docker_gwbridge with the default route");
    let t1 = cluster.container("docker01", "t1", "--network ov_net1");
    let t2 = cluster.container("docker02", "t2", "--network ov_net1");
    cluster.wait_ping("docker01/t1", t2);
    let [a, b, c, d] = t1.octets();
    let mac = format!("02:42:{a:02x}:{b:02x}:{c:02x}:{d:02x}");
    let eth0 = cluster.inside("docker01", "t1", "ip address show eth0");
    assert!(eth0.contains(&format!("inet {t1}/24")) && eth0.contains(&mac), "{eth0}");
    let network = &cluster.inspect("docker01", "t1")["NetworkSettings"]["Networks"]["ov_net1"];
    assert_eq!((&network["MacAddress"], &network["Gateway"]), (&mac.into(), &"".into()));
    let route = cluster.inside("docker01", "t1", "ip route show default");
    assert!(route.contains(&format!("default via {GWBRIDGE} dev eth1")), "{route}");
    let client = cluster.lab.address(CLIENT).unwrap();
    cluster.wait_ping("docker01/t1", client);
    assert_eq!(cluster.inside("docker01", "t1", "ls /sys/class/net"), "eth0\neth1\nlo");
    let beside = cluster.container("docker01", "beside", "--network ov_net1");
    cluster.wait_ping("docker01/t1", beside);
    cluster.remove("docker01", "beside");
    cluster.wait_nothing_leaks();
}

fn chosen_addresses(cluster: &Cluster, steps: &Steps) {
    steps.begin("--ip, --mac-address, --ip6");
    let chosen = Ipv4Addr::new(172, 19, 0, 10);
    let options = format!("--network ov_fix --ip {chosen} --mac-address 02:00:00:00:00:77");
    assert_eq!(cluster.container("docker01", "f1", &options), chosen);
    let f2 = cluster.container("docker02", "f2", "--network ov_fix");
    cluster.wait_ping("docker02/f2", chosen);
    let link = cluster.inside("docker01", "f1", "ip link show eth0");
    assert!(link.contains("02:00:00:00:00:77"), "{link}");
    for (host, options) in [
        ("docker03", format!("--ip {chosen}")),
        ("docker01", format!("--ip {chosen}")),
        ("docker03", "--ip 172.19.0.1".to_owned()),
        ("docker03", "--ip 172.19.1.5".to_owned()),
        ("docker03", "--ip6 fd00::5".to_owned()),
    ] {
        let run = format!("run -itd --name bad --network ov_fix {options} busybox");
        cluster.docker_refused(host, &run);
        cluster.remove(host, "bad");
        cluster.wait_ping("docker02/f2", chosen);
    }
    cluster.wait_nothing_leaks();
    // Its address is its own again when it starts again, and nobody's while it is stopped.
    cluster.docker("docker01", "stop f1");
    cluster.wait_nothing_leaks();
    cluster.docker("docker01", "start f1");
    assert_eq!(cluster.address("docker01", "f1"), chosen);
    cluster.wait_ping("docker01/f1", f2);
    cluster.remove("docker01", "f1");
    cluster.remove("docker02", "f2");
    cluster.wait_nothing_leaks();
}

fn published_ports(cluster: &Cluster, steps: &Steps) {
    steps.begin("-p is Docker's own");
    cluster.docker(
        "docker01",
        "run -itd --name web1 --network ov_net1 -p 90:80 busybox httpd -f -h /etc",
    );
    let address = cluster.lab.address("docker01").unwrap();
    let fetch = format!("busybox wget -q -O - http://{address}:90/hostname");
    until("the client to fetch a page", || {
        let argv: Vec<_> = fetch.split(' ').collect();
        let output = cluster.lab.output(CLIENT, &argv, Duration::from_secs(5)).unwrap();
        output.status.success().then_some(())
    });
    let listed = cluster.docker("docker01", "ps --filter name=web1 --format {{.Ports}}");
    assert!(listed.contains(":90->80/tcp"), "{listed}");
    cluster.remove("docker01", "web1");
}

fn connect_and_disconnect(cluster: &Cluster, steps: &Steps) {
    steps.begin("two overlays in one container");
    let of_net1 = cluster.address("docker01", "t1");
    let fixed = Ipv4Addr::new(172, 19, 0, 20);
    cluster.docker("docker01", &format!("network connect --ip {fixed} ov_fix t1"));
    let f2 = cluster.container("docker02", "f2", "--network ov_fix");
    let t2 = cluster.address("docker02", "t2");
    cluster.wait_ping("docker01/t1", f2);
    cluster.wait_ping("docker01/t1", t2);
    cluster.wait_ping("docker02/f2", fixed);
    cluster.wait_nothing_leaks();
    for _ in 0..3 {
        cluster.docker("docker01", "network disconnect ov_net1 t1");
        cluster.wait_nothing_leaks();
        cluster.wait_ping("docker02/f2", fixed);
        cluster.docker("docker01", "network connect ov_net1 t1");
    }
    cluster.wait_ping("docker01/t1", t2);
    let again = cluster.inspect("docker01", "t1")["NetworkSettings"]["Networks"]["ov_net1"].take();
    assert_eq!(again["IPAddress"], of_net1.to_string(), "the lowest one that is free");
    cluster.docker("docker01", "network disconnect ov_fix t1");
    cluster.remove("docker02", "f2");
    cluster.wait_nothing_leaks();
}

fn shared_stack(cluster: &Cluster, steps: &Steps) {
    steps.begin("--network container:web5 has one address and one loopback");
    let web5 = cluster.container("docker02", "web5", "--network ov_net1");
    cluster.docker("docker02", "run -itd --name web6 --network container:web5 busybox");
    cluster.wait_nothing_leaks();
    let write = ["docker", "exec", "web6", "sh", "-c", "echo shared > /tmp/index.html"];
    cluster.run("docker02", &write);
    cluster.inside("docker02", "web6", "httpd -h /tmp/");
    assert_eq!(cluster.inside("docker02", "web5", "wget -O - -q 127.0.0.1"), "shared");
    let from_t1 = format!("wget -O - -q {web5}");
    assert_eq!(cluster.inside("docker01", "t1", &from_t1), "shared");
    cluster.remove("docker02", "web6");
    cluster.wait_ping("docker01/t1", web5);
    cluster.remove("docker02", "web5");
    cluster.wait_nothing_leaks();
}

fn life_of_a_container(cluster: &Cluster, steps: &Steps) {
    steps.begin("restart, pause, kill, --rm");
    let reaches_t1 = || cluster.wait_ping("docker02/t2", cluster.address("docker01", "t1"));
    reaches_t1();
    cluster.docker("docker01", "restart t1");
    reaches_t1();
    cluster.docker("docker01", "pause t1");
    cluster.wait_nothing_leaks();
    cluster.docker("docker01", "unpause t1");
    reaches_t1();
    cluster.docker("docker01", "kill t1");
    cluster.wait_nothing_leaks();
    cluster.docker("docker01", "start t1");
    reaches_t1();
    // It ends by itself, and Docker starts it again and again.
    cluster.docker("docker01", "run -d --name r1 --restart always --network ov_net1 busybox true");
    until("Docker to start r1 again", || {
        (cluster.inspect("docker01", "r1")["RestartCount"].as_u64()? >= 3).then_some(())
    });
    cluster.remove("docker01", "r1");
    cluster.docker("docker01", "run --rm --network ov_net1 busybox true");
    // One that cannot start has had its network already.
    cluster.docker_refused("docker01", "run --name no --network ov_net1 busybox /no/such/file");
    cluster.remove("docker01", "no");
    cluster.wait_nothing_leaks();
}
