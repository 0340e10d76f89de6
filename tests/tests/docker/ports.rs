//! Ports that Docker publishes, asked for from everywhere: the programs carry what comes by the wire,
//! Docker's own rules and docker-proxy the rest.

use ovnet_tests::{
    cluster::{Cluster, Steps, until},
    ports::{check, serve, ways},
};
use xtask::lab::GWBRIDGE;

#[test]
fn ports_of_containers_are_reached_from_everywhere() {
    for xdp in [None, Some("native")] {
        let name = if xdp.is_some() { "docker-ports-xdp" } else { "docker-ports" };
        let Some(cluster) = Cluster::with_docker(name, |options| {
            options.hosts = 2;
            options.xdp = xdp.map(str::to_owned);
        }) else {
            return;
        };
        let steps = Steps::default();
        cluster.docker_network("docker01", "ov_net1", "");
        cluster.wait_docker_network("ov_net1");
        let options = "--network ov_net1 -p 90:80 -p 90:80/udp -p 80";
        cluster.container("docker01", "t1", options);
        cluster.container("docker01", "t2", "--network ov_net1");
        cluster.container("docker02", "t3", "--network ov_net1");
        serve(&cluster);
        steps.begin("what Docker published is learned, random ports too");
        until("the container's ports and its way out to be known", || {
            let ready = cluster.status("docker01")["published_ports"] == 3;
            let pins = format!("{:?}", cluster.footprint("docker01").pins);
            (ready && pins.contains("from_gwbridge")).then_some(())
        });
        let shown = cluster.sh("docker01", "ovnet port t1");
        for line in cluster.docker("docker01", "port t1 80/tcp").lines() {
            let port = line.rsplit(':').next().unwrap_or_default();
            assert!(shown.contains(&format!("80/tcp -> 0.0.0.0:{port}")), "{line}: {shown}");
        }
        for way in ways(GWBRIDGE) {
            for protocol in ["tcp", "udp"] {
                // docker-proxy answers datagrams of the host's own containers from the bridge's
                // address, whatever address was asked: Docker's way, with ovnet or without.
                let by_proxy = ["container here", "itself"].contains(&way.label);
                if by_proxy && protocol == "udp" {
                    continue;
                }
                steps.begin(&format!("{}, {protocol}, XDP {xdp:?}", way.label));
                check(&cluster, &way, protocol, xdp.is_some());
            }
        }
        steps.begin("a container that is stopped publishes nothing");
        cluster.docker("docker01", "stop -t 0 t1");
        until("its ports to go", || {
            let status = cluster.status("docker01");
            (status["published_ports"] == 0 && status["flow_entries"] == 0).then_some(())
        });
    }
}
