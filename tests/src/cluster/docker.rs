//! Docker on the hosts of a lab: networks and containers, and whether what ovnet holds is what
//! Docker's running containers have.

use std::{
    collections::{BTreeMap, BTreeSet},
    io::{self, Read as _, Write as _},
    net::Ipv4Addr,
    os::unix::net::UnixStream,
    path::PathBuf,
    process::Output,
    time::Duration,
};

use serde_json::Value;
use xtask::lab::{Options, wait_until};

use super::{Cluster, LIMIT, until, within};

/// How soon a network is to be there on all hosts.
const EVERYWHERE: Duration = Duration::from_secs(2);
/// How long a command of Docker may take.
const COMMAND: Duration = Duration::from_secs(60);
/// How long what Docker forgot may stay: as long as a Docker that starts may need to remember, and
/// as an address may be reserved without coming to be used.
const LEFTOVERS: Duration = Duration::from_secs(90);
/// Docker's socket, in its host.
const DOCKER_SOCKET: &str = "run/docker.sock";
/// What follows `docker network create`, but for options and name.
const CREATE: &str = "network create -d ovnet --ipam-driver ovnet";

/// A container's endpoint, as Docker has it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct DockerEndpoint {
    /// The host it is on.
    pub host: String,
    /// The container's name.
    pub container: String,
    /// The network's name.
    pub network: String,
    /// Docker's id of the endpoint.
    pub id: String,
    /// Its address.
    pub address: Ipv4Addr,
    /// Its MAC address.
    pub mac: String,
}

impl Cluster {
    /// A lab with a Docker daemon and an agent on each host; else as [`Cluster::up`]. Agents look
    /// every two seconds whether all is as it must be.
    pub fn with_docker(name: &str, change: impl FnOnce(&mut Options)) -> Option<Self> {
        Self::up(name, |options| {
            options.docker = true;
            options.agent_args = ["--repair-interval", "2"].map(str::to_owned).to_vec();
            change(options);
        })
    }

    /// Runs `docker …`, given as words with spaces between, that must succeed.
    pub fn docker(&self, host: &str, line: &str) -> String {
        self.sh(host, &format!("docker {line}"))
    }

    /// Runs `docker …`, whether it fails or not.
    pub fn try_docker(&self, host: &str, line: &str) -> Output {
        let argv: Vec<_> = ["docker"].into_iter().chain(line.split_whitespace()).collect();
        self.lab.output(host, &argv, COMMAND).unwrap()
    }

    /// Runs `docker …` that must be refused; gives the one line that tells why.
    pub fn docker_refused(&self, host: &str, line: &str) -> String {
        let output = self.try_docker(host, line);
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success(), "`docker {line}` on {host} is not refused: {said}");
        // The client has a word of its own to add, which one depends on the command.
        let own = ["Run 'docker", "See 'docker", "exit status", "time="];
        let tells = |it: &&str| !it.trim().is_empty() && !own.iter().any(|own| it.starts_with(own));
        let lines: Vec<_> = said.lines().filter(tells).collect();
        assert_eq!(lines.len(), 1, "`docker {line}` on {host} said: {said}");
        lines[0].to_owned()
    }

    /// Runs a command in a container that must succeed.
    pub fn inside(&self, host: &str, container: &str, line: &str) -> String {
        self.docker(host, &format!("exec {container} {line}"))
    }

    /// Makes a network by Docker and waits until every host's Docker has it.
    pub fn docker_network(&self, host: &str, name: &str, options: &str) {
        self.docker(host, &format!("{CREATE} {options} {name}"));
        self.wait_docker_network(name);
    }

    /// Makes a network by Docker, or not: two hosts may be at it.
    pub fn try_docker_network(&self, host: &str, name: &str) -> Output {
        self.try_docker(host, &format!("{CREATE} {name}"))
    }

    /// The error of a network that is refused.
    pub fn docker_network_refused(&self, host: &str, name: &str, options: &str) -> String {
        self.docker_refused(host, &format!("{CREATE} {options} {name}"))
    }

    /// The names of the networks of ovnet that a host's Docker has, as often as it has them.
    pub fn docker_networks(&self, host: &str) -> Vec<String> {
        let names = self.docker(host, "network ls --filter driver=ovnet --format {{.Name}}");
        names.lines().map(str::to_owned).collect()
    }

    /// Waits, not long, until every host's Docker has a network.
    pub fn wait_docker_network(&self, name: &str) {
        within(EVERYWHERE, &format!("every Docker to have {name}"), || {
            let has = |host: &String| self.docker_networks(host).iter().any(|it| it == name);
            self.lab.nodes().iter().all(has).then_some(())
        });
    }

    /// Waits until no host's Docker has a network.
    pub fn wait_docker_network_gone(&self, name: &str) {
        until(&format!("no Docker to have {name}"), || {
            let has = |host: &String| self.docker_networks(host).iter().any(|it| it == name);
            (!self.lab.nodes().iter().any(has)).then_some(())
        });
    }

    /// `docker run -itd --name NAME OPTIONS busybox`; gives its address in its first network.
    pub fn container(&self, host: &str, name: &str, options: &str) -> Ipv4Addr {
        self.docker(host, &format!("run -itd --name {name} {options} busybox"));
        self.address(host, name)
    }

    /// The address of a running container's first interface.
    pub fn address(&self, host: &str, container: &str) -> Ipv4Addr {
        self.lab.sandbox_address(&format!("{host}/{container}")).unwrap()
    }

    /// What `docker inspect` says of one thing.
    pub fn inspect(&self, host: &str, name: &str) -> Value {
        let text = self.docker(host, &format!("inspect {name}"));
        serde_json::from_str::<Value>(&text).unwrap()[0].take()
    }

    /// Removes containers that may run.
    pub fn remove(&self, host: &str, containers: &str) {
        self.docker(host, &format!("rm -f {containers}"));
    }

    /// Waits until a container reaches another by name, as people do.
    pub fn wait_name(&self, host: &str, container: &str, name: &str) {
        until(&format!("{container} on {host} to reach {name} by name"), || {
            let ping = format!("exec {container} ping -c 1 -W 1 {name}");
            self.try_docker(host, &ping).status.success().then_some(())
        });
    }

    /// One request to a host's Docker; gives the status and the body.
    pub fn ask_docker(&self, host: &str, method: &str, path: &str) -> (u16, String) {
        self.ask_socket(host, DOCKER_SOCKET, method, path, b"").unwrap()
    }

    /// One request to a socket in a host; gives the status and the body.
    pub fn ask_socket(
        &self,
        host: &str,
        socket: &str,
        method: &str,
        path: &str,
        body: &[u8],
    ) -> io::Result<(u16, String)> {
        let mut stream = UnixStream::connect(self.path(host, socket))?;
        stream.set_read_timeout(Some(LIMIT))?;
        // HTTP 1.0: the answer ends with the connection, and is not in chunks.
        let length = body.len();
        let head = format!("{method} {path} HTTP/1.0\r\nContent-Length: {length}\r\n\r\n");
        stream.write_all(head.as_bytes())?;
        stream.write_all(body)?;
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer)?;
        let answer = String::from_utf8_lossy(&answer).into_owned();
        let (head, body) = answer.split_once("\r\n\r\n").unwrap_or_default();
        let status = head.split(' ').nth(1).and_then(|code| code.parse().ok()).unwrap_or_default();
        Ok((status, body.to_owned()))
    }

    /// A path in a host, as seen from outside.
    pub fn path(&self, host: &str, path: &str) -> PathBuf {
        self.lab.host(host).unwrap().root().join(path)
    }

    /// The endpoints of all running containers in networks of ovnet, by what Docker says.
    pub fn docker_endpoints(&self) -> BTreeSet<DockerEndpoint> {
        self.lab.nodes().iter().flat_map(|host| self.docker_endpoints_of(host)).collect()
    }

    fn docker_endpoints_of(&self, host: &str) -> Vec<DockerEndpoint> {
        let ours: BTreeSet<String> = self.docker_networks(host).into_iter().collect();
        let ids = self.docker(host, "ps --quiet --no-trunc").replace('\n', " ");
        if ids.is_empty() {
            return Vec::new();
        }
        // One may have ended since; the others are told all the same.
        let output = self.try_docker(host, &format!("inspect {ids}"));
        let containers: Vec<Value> = serde_json::from_slice(&output.stdout).unwrap_or_default();
        let of = |container: &Value| -> Vec<DockerEndpoint> {
            let text = |it: &Value| it.as_str().unwrap_or_default().to_owned();
            let name = text(&container["Name"]).trim_start_matches('/').to_owned();
            let networks = container["NetworkSettings"]["Networks"].as_object().cloned();
            let networks = networks.unwrap_or_default().into_iter();
            networks
                .filter(|(network, _)| ours.contains(network))
                .filter_map(|(network, it)| {
                    Some(DockerEndpoint {
                        host: host.to_owned(),
                        container: name.clone(),
                        network,
                        id: text(&it["EndpointID"]),
                        address: text(&it["IPAddress"]).parse().ok()?,
                        mac: text(&it["MacAddress"]),
                    })
                })
                .collect()
        };
        containers.iter().flat_map(of).collect()
    }

    /// Waits until ovnet holds exactly what Docker's running containers have, on every host and in
    /// Consul: records, veths, addresses in the maps, state files.
    pub fn wait_nothing_leaks(&self) {
        let mut last = (BTreeSet::new(), BTreeSet::new());
        let same = wait_until(LEFTOVERS, String::new, || {
            last = (self.due(), self.held());
            Ok((last.0 == last.1).then_some(()))
        });
        if same.is_err() {
            let missing: Vec<_> = last.0.difference(&last.1).collect();
            let left: Vec<_> = last.1.difference(&last.0).collect();
            panic!("missing for running containers: {missing:#?}, left of others: {left:#?}");
        }
    }

    /// What ovnet is to hold for the containers that run, a line for each thing.
    fn due(&self) -> BTreeSet<String> {
        let ids: BTreeMap<String, String> = self.network_ids();
        let mut due: BTreeSet<String> = ids
            .values()
            .flat_map(|id| [format!("subnet of {id}"), format!("VNI of {id}")])
            .collect();
        for node in self.lab.nodes() {
            due.extend(ids.keys().map(|name| format!("{node} network {name}")));
        }
        for DockerEndpoint { host, network, id, address, mac, .. } in self.docker_endpoints() {
            let network = ids.get(&network).cloned().unwrap_or(network);
            due.insert(format!("record {network}/{address} of {host}: {id} {mac} up"));
            due.insert(format!("{host} veth ovnet{}", &id[..8]));
            due.insert(format!("{host} state file {id}"));
            due.insert(format!("{host} address {address}"));
        }
        due
    }

    /// What ovnet holds.
    fn held(&self) -> BTreeSet<String> {
        let mut held = BTreeSet::new();
        for (key, value) in self.records() {
            match key.split_once('/') {
                Some(("subnets", _)) => held.insert(format!("subnet of {value}")),
                Some(("vnis", _)) => held.insert(format!("VNI of {value}")),
                Some(("hosts" | "networks", _)) => false,
                Some(("endpoints", at)) => {
                    let record: Value = serde_json::from_str(&value).unwrap_or_default();
                    let text = |field: &str| record[field].as_str().unwrap_or_default().to_owned();
                    let [host, id, mac, state] = ["host", "id", "mac", "state"].map(text);
                    held.insert(format!("record {at} of {host}: {id} {mac} {state}"))
                }
                _ => held.insert(format!("record {key}")),
            };
        }
        for node in self.lab.nodes() {
            let networks = self.docker_networks(&node).into_iter();
            held.extend(networks.map(|name| format!("{node} network {name}")));
            let footprint = self.footprint(&node);
            // The vxlan device stays as long as the agent does.
            let veths = footprint.links.iter().filter(|link| !link.contains('-'));
            held.extend(veths.map(|link| format!("{node} veth {link}")));
            let files = footprint.state.iter().filter_map(|it| it.strip_prefix("endpoints/"));
            let files = files.filter(|file| !file.is_empty());
            held.extend(files.map(|file| {
                format!("{node} state file {}", file.strip_suffix(".json").unwrap_or(file))
            }));
            let local = self.endpoints_of(&node).into_iter().filter(|(_, at)| at.is_unspecified());
            held.extend(local.map(|(address, _)| format!("{node} address {address}")));
        }
        held
    }

    /// The ids of the networks in Consul, by name.
    pub fn network_ids(&self) -> BTreeMap<String, String> {
        let records = self.records().into_iter();
        records
            .filter_map(|(key, value)| {
                let name = key.strip_prefix("networks/")?.to_owned();
                let record: Value = serde_json::from_str(&value).ok()?;
                Some((name, record["id"].as_str()?.to_owned()))
            })
            .collect()
    }
}
