//! The demo with Docker: what people typed when Docker's own overlay stood on Consul, on three
//! hosts with a Docker daemon each. The driver's name is all that is new.

use std::time::Instant;

use anyhow::{Context as _, Result};

use super::session::{SEEN, Session, TESTS};
use crate::lab::{CLIENT, Lab, wait_until};

/// Goes through the tutorial.
pub(super) fn show(lab: &Lab) -> Result<()> {
    let session = Session::new(lab);
    session.wait_for_hosts()?;
    let tour = Tour { lab, session };
    tour.network()?;
    tour.containers()?;
    tour.fixed_addresses()?;
    tour.shared_stack()?;
    tour.published_ports()?;
    tour.throughput()?;
    tour.removal()
}

struct Tour<'a> {
    lab: &'a Lab,
    session: Session<'a>,
}

impl Tour<'_> {
    /// The hosts are in Consul, and a network made on one of them is on all.
    fn network(&self) -> Result<()> {
        println!("The hosts, as Consul has them:\n");
        let consul = self.lab.consul()?;
        let keys = format!("busybox wget -q -O - 'http://{consul}/v1/kv/ovnet/v1/hosts/?keys'");
        self.types("docker01", &keys)?;

        println!("\nA network made on docker02 is on the others too:\n");
        self.types("docker02", "docker network create -d ovnet --ipam-driver ovnet ov_net1")?;
        let made = Instant::now();
        self.wait_for_network("docker03", "ov_net1")?;
        let there = made.elapsed().as_millis();
        self.types("docker03", "docker network ls")?;
        println!("(on docker03 after {there} ms)");
        self.wait_for_network("docker01", "ov_net1")?;
        self.types("docker01", "docker network ls")
    }

    /// A container on each host; they reach each other by address and by name.
    fn containers(&self) -> Result<()> {
        println!("\nA container on each host:\n");
        for (host, name) in TESTS {
            self.run(host, name, "--network ov_net1 busybox")?;
        }
        self.types("docker01", "docker exec t1 ip a")?;
        let t2 = self.lab.sandbox_address("docker02/t2")?;
        self.types("docker01", &format!("docker exec t1 ping -c 3 {t2}"))?;
        self.types("docker01", "docker exec t1 ping -c 3 t2")?;
        for (host, name) in TESTS {
            let others = TESTS.iter().filter(|(_, other)| *other != name);
            for (_, other) in others {
                self.wait_for_name(host, name, other)?;
                self.types(host, &format!("docker exec {name} ping -c 1 -q {other}"))?;
            }
        }
        println!("\nAnd the world outside, by docker_gwbridge:\n");
        let client = self.lab.address(CLIENT)?;
        self.types("docker01", &format!("docker exec t1 ping -c 1 {client}"))
    }

    /// A network with a subnet of its own, and containers at chosen addresses of it.
    fn fixed_addresses(&self) -> Result<()> {
        println!("\nA subnet and addresses of one's own:\n");
        self.types(
            "docker01",
            "docker network create -d ovnet --ipam-driver ovnet ov_net3 \
             --subnet 172.19.0.0/24 --gateway 172.19.0.1",
        )?;
        for (host, name, address) in
            [("docker02", "t4", "172.19.0.10"), ("docker03", "t5", "172.19.0.11")]
        {
            self.wait_for_network(host, "ov_net3")?;
            self.run(host, name, &format!("--network ov_net3 --ip {address} busybox"))?;
        }
        self.types("docker02", "docker exec t4 ping -c 3 172.19.0.11")
    }

    /// Two containers that share one network stack.
    fn shared_stack(&self) -> Result<()> {
        println!("\nA container in another's network stack:\n");
        self.run("docker02", "web5", "--network ov_net1 busybox")?;
        self.run("docker02", "web6", "--network container:web5 busybox")?;
        self.page("docker02", "web6")?;
        self.types("docker02", "docker exec web6 httpd -h /tmp/")?;
        self.types("docker02", "docker exec web5 wget -O - -q 127.0.0.1")
    }

    /// Ports of a host that lead to a container: a chosen one, a random one, all exposed ones.
    fn published_ports(&self) -> Result<()> {
        println!("\nPublished ports, seen from a machine outside the cluster:\n");
        let address = self.lab.address("docker01")?;
        for (name, ports) in [("web1", "-p 90:80"), ("web2", "-p 80"), ("web3", "--expose 80 -P")] {
            let serve = "busybox httpd -f -h /tmp";
            self.run("docker01", name, &format!("--network ov_net1 {ports} {serve}"))?;
            self.page("docker01", name)?;
            self.types("docker01", &format!("docker port {name}"))?;
            let said = self.lab.docker("docker01", &["port", name, "80"])?;
            let port = said.lines().next().and_then(|line| line.rsplit(':').next());
            let port = port.with_context(|| format!("no port of {name}: {said}"))?;
            self.types(CLIENT, &format!("busybox wget -q -O - http://{address}:{port}/"))?;
        }
        self.types("docker01", "ss -lnt")
    }

    /// How fast one TCP flow between containers of two hosts is.
    fn throughput(&self) -> Result<()> {
        println!("\nOne TCP flow between hosts:\n");
        self.types("docker03", "docker exec -d t3 iperf3 -s")?;
        self.lab.wait_for_port("docker03/t3", 5201)?;
        self.types("docker01", "docker exec t1 iperf3 -c t3 -t 3 -i 0")
    }

    /// A network in use stays; one that is not goes from all hosts.
    fn removal(&self) -> Result<()> {
        println!("\nA network in use anywhere stays; else it goes from everywhere:\n");
        self.session.types_in_vain("docker01", "docker network rm ov_net3")?;
        self.types("docker02", "docker rm -f t4")?;
        self.types("docker03", "docker rm -f t5")?;
        self.types("docker01", "docker network rm ov_net3")?;
        let what = || "ov_net3 to be gone from docker02".to_owned();
        wait_until(SEEN, what, || {
            Ok((!self.networks("docker02")?.contains("ov_net3")).then_some(()))
        })?;
        self.types("docker02", "docker network ls")
    }

    fn types(&self, host: &str, line: &str) -> Result<()> {
        self.session.types(host, line)
    }

    fn run(&self, host: &str, name: &str, rest: &str) -> Result<()> {
        self.types(host, &format!("docker run -itd --name {name} {rest}"))
    }

    /// Gives a container something to serve.
    fn page(&self, host: &str, name: &str) -> Result<()> {
        let write = format!("echo this is {name} > /tmp/index.html");
        self.types(host, &format!("docker exec {name} sh -c '{write}'"))
    }

    fn wait_for_network(&self, host: &str, network: &str) -> Result<()> {
        let what = || format!("Docker of {host} to have {network}");
        wait_until(SEEN, what, || {
            let networks = self.networks(host)?;
            Ok(networks.lines().any(|name| name == network).then_some(()))
        })
    }

    fn networks(&self, host: &str) -> Result<String> {
        self.lab.docker(host, &["network", "ls", "--format", "{{.Name}}"])
    }

    /// Waits until a container knows another's name: that is learned after its start.
    fn wait_for_name(&self, host: &str, container: &str, name: &str) -> Result<()> {
        let what = || format!("{container} on {host} to reach {name} by name");
        wait_until(SEEN, what, || {
            let ping = ["exec", container, "ping", "-c", "1", "-W", "1", name];
            Ok(self.lab.docker(host, &ping).ok().map(drop))
        })
    }
}
