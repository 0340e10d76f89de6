//! The contenders: containers with published ports, each with a server for every kind of work.

use std::net::{Ipv4Addr, SocketAddrV4};

use anyhow::{Context as _, Result};
use serde_json::json;

use super::super::report::Section;
use super::work::Work;
use crate::lab::measure::PORT as IPERF3;
use crate::lab::{CLIENT, Lab, Running, docker_config, wait_until};

/// The port of our own servers, TCP and UDP, where they run.
pub(super) const LOAD: u16 = 7000;
/// The network of ovnet.
const NETWORK: &str = "ov_net1";
/// The network of the contenders without ovnet. Its user made it, as ovnet's: into containers of
/// such networks Docker puts rules for its DNS server, and with them the connection tracking of the
/// container's own namespace, which those of the default bridge do without.
const BRIDGE: &str = "bridged";
/// The host of all contenders but docker-proxy.
const HOST: &str = "docker01";
/// The host whose Docker makes no rules.
const PROXY: &str = "docker02";
/// How long a network may take to come to another host, or a container's port to be learned.
const SEEN: std::time::Duration = std::time::Duration::from_secs(10);

/// What is added to a port of a server to have the published one of a contender.
const OVNET: u16 = 100;
const BRIDGED: u16 = 200;
const PROXIED: u16 = 300;
const OWN: u16 = 400;

/// The label of the limit: the client asks the host itself.
pub(super) const HOST_ITSELF: &str = "host (no container)";
/// The label of what most users have.
pub(super) const RULES: &str = "docker iptables";

/// A contender.
pub(super) struct Way {
    /// What a table calls it.
    pub(super) label: &'static str,
    /// Where its servers run, as the lab's methods take it.
    pub(super) place: String,
    /// The address the client asks.
    pub(super) address: Ipv4Addr,
    /// What is added to a server's port to have the published one.
    shift: u16,
    /// The servers that run all the time.
    _servers: Vec<Running>,
}

impl Way {
    /// Where the client finds iperf3.
    pub(super) fn iperf3(&self) -> SocketAddrV4 {
        SocketAddrV4::new(self.address, IPERF3 + self.shift)
    }

    /// Where the client finds our own server.
    pub(super) fn load(&self) -> SocketAddrV4 {
        SocketAddrV4::new(self.address, LOAD + self.shift)
    }
}

/// The contenders, and what else could be one and is not there.
pub(super) struct Ways {
    /// Ours first, then the others in the order of the table.
    pub(super) ways: Vec<Way>,
    /// A line each.
    pub(super) missing: Vec<String>,
}

/// Makes all of them.
pub(super) fn set_up(lab: &Lab) -> Result<Ways> {
    let mut missing = Vec::new();
    // Every port the client may take for itself; it is not to wait for one.
    sysctl(lab, CLIENT, "ip_local_port_range", "1024 65535")?;
    for place in [CLIENT, HOST, PROXY] {
        without_pacing(lab, place)?;
    }
    lab.docker(HOST, &["network", "create", "-d", "ovnet", "--ipam-driver", "ovnet", NETWORK])?;
    run(lab, HOST, "ovnet", NETWORK, OVNET)?;
    wait_for_ports(lab, "ovnet")?;
    lab.docker(HOST, &["network", "create", BRIDGE])?;
    run(lab, HOST, "bridged", BRIDGE, BRIDGED)?;
    without_rules(lab)?;
    lab.docker(PROXY, &["network", "create", BRIDGE])?;
    run(lab, PROXY, "proxied", BRIDGE, PROXIED)?;

    let mut ways = vec![
        way(lab, "ovnet", HOST, Some("ovnet"), OVNET)?,
        way(lab, RULES, HOST, Some("bridged"), BRIDGED)?,
        way(lab, "docker-proxy", PROXY, Some("proxied"), PROXIED)?,
    ];
    if lab.exec(HOST, &["ovnet", "attach", "--help"])?.contains("--publish") {
        let published = published(OWN);
        let mut attach = vec!["--network", NETWORK];
        attach.extend(published.iter().flat_map(|it| ["-p", it]));
        lab.run_sandbox(HOST, "own", &attach)?;
        ways.insert(1, way(lab, "ovnet own sandbox", HOST, Some("own"), OWN)?);
    } else {
        missing.push("`ovnet attach` has no -p: no sandbox of ovnet's own".to_owned());
    }
    ways.push(way(lab, HOST_ITSELF, HOST, None, 0)?);
    Ok(Ways { ways, missing })
}

/// What a contender publishes, as `-p` takes it.
fn published(shift: u16) -> [String; 3] {
    let (iperf3, load) = (IPERF3 + shift, LOAD + shift);
    [format!("{iperf3}:{IPERF3}"), format!("{load}:{LOAD}"), format!("{load}:{LOAD}/udp")]
}

/// Runs a container that does nothing by itself.
fn run(lab: &Lab, host: &str, name: &str, network: &str, shift: u16) -> Result<()> {
    let published = published(shift);
    let mut arguments = vec!["run", "-itd", "--name", name, "--network", network];
    arguments.extend(published.iter().flat_map(|it| ["-p", it]));
    arguments.push("busybox");
    lab.docker(host, &arguments).map(drop)
}

/// Starts the servers of a contender inside its container, or on the host. They are the machine's
/// programs, not the container's: of a container only its network counts here.
fn way(
    lab: &Lab,
    label: &'static str,
    host: &str,
    container: Option<&str>,
    shift: u16,
) -> Result<Way> {
    let place = container.map_or_else(|| host.to_owned(), |name| format!("{host}/{name}"));
    let (program, iperf3, load) = (program()?, IPERF3.to_string(), LOAD.to_string());
    without_pacing(lab, &place)?;
    let servers = [
        lab.spawn(&place, &["iperf3", "-s", "-p", &iperf3], None),
        lab.spawn(&place, &[&program, "load", "tcp-server", &load], None),
    ];
    let servers = servers.into_iter().collect::<Result<_>>()?;
    lab.wait_for_port(&place, IPERF3)?;
    lab.wait_for_port(&place, LOAD)?;
    Ok(Way { label, place, address: lab.address(host)?, shift, _servers: servers })
}

/// Has TCP wait for nothing but answers: BBR, which some systems have for a default, paces by timers
/// even what fits into one packet. Of the others only this one may be chosen in any namespace.
fn without_pacing(lab: &Lab, place: &str) -> Result<()> {
    sysctl(lab, place, "tcp_congestion_control", "reno")
}

fn sysctl(lab: &Lab, place: &str, key: &str, value: &str) -> Result<()> {
    let set = r#"echo "$2" > "/proc/sys/net/ipv4/$1""#;
    lab.exec(place, &["sh", "-c", set, "sh", key, value]).map(drop)
}

/// This program, which has the hidden verb `load`, as hosts see it: they share the machine's files.
pub(super) fn program() -> Result<String> {
    let program = std::env::current_exe().context("find this program")?;
    Ok(program.to_str().context("this program's path is not UTF-8")?.to_owned())
}

/// Has a Docker make no rules, so that it carries every connection by docker-proxy.
fn without_rules(lab: &Lab) -> Result<()> {
    let mut config = docker_config(&lab.options());
    if let Some(fields) = config.as_object_mut() {
        fields.insert("iptables".to_owned(), json!(false));
    }
    lab.set_docker_config(PROXY, &config)?;
    lab.stop_docker(PROXY, nix::sys::signal::Signal::SIGTERM)?;
    // What the daemon made at its first start is not taken back by its second.
    lab.exec(
        PROXY,
        &["sh", "-c", "iptables -t nat -F && iptables -F && iptables -P FORWARD ACCEPT"],
    )?;
    lab.start_docker(PROXY)
}

/// Waits until the agent knows the ports of a container: it learns them after Docker's start of it.
fn wait_for_ports(lab: &Lab, name: &str) -> Result<()> {
    let folder = lab.host(HOST)?.root().join("var/lib/ovnet/endpoints");
    let what = || format!("the agent of {HOST} to know the ports of {name}");
    let has_ports = |text: String| {
        let endpoint: serde_json::Value = serde_json::from_str(&text).unwrap_or_default();
        endpoint.get("ports").and_then(|ports| ports.as_array()).is_some_and(|it| it.len() == 3)
    };
    wait_until(SEEN, what, || {
        let files = std::fs::read_dir(&folder).context("read the agent's state")?;
        let mut texts = files.filter_map(|file| std::fs::read_to_string(file.ok()?.path()).ok());
        Ok(texts.any(has_ports).then_some(()))
    })
}

/// Docker's rules of `docker01`, with their counters.
pub(super) fn by_rules(lab: &Lab) -> Result<String> {
    lab.exec(HOST, &["iptables", "-t", "nat", "-nvxL", "DOCKER"])
}

/// New connections that Docker's rule for a host port of TCP has taken.
fn taken(rules: &str, port: u16) -> u64 {
    // Columns: packets, bytes, target, protocol, …; the table is asked for a flow's first packet only.
    let wanted = format!("dpt:{port}");
    let packets = rules.lines().filter_map(|line| {
        let mut columns = line.split_whitespace();
        let packets: u64 = columns.next()?.parse().ok()?;
        let is_wanted = columns.clone().any(|it| it == "tcp") && columns.any(|it| it == wanted);
        is_wanted.then_some(packets)
    });
    packets.sum()
}

/// How many of the connections went by Docker's rules, of the contenders that have them: a fast
/// path is one only if it leaves nothing to them.
pub(super) fn rules_line(
    ways: &[Way],
    section: &Section,
    seconds: u64,
    (before, after): (&str, &str),
) -> String {
    #[allow(clippy::cast_precision_loss, reason = "a few seconds")]
    let seconds = seconds as f64;
    let (_, in_unit) = Work::Connections.unit();
    let lines = ways.iter().filter(|way| [OVNET, BRIDGED].contains(&way.shift));
    let lines = lines.map(|way| {
        let port = way.load().port();
        let by_rules = taken(after, port).saturating_sub(taken(before, port));
        let series = section.of(Work::Connections.name(), way.label);
        let rates = series.into_iter().flat_map(|it| &it.samples);
        let all: f64 = rates.map(|rate| rate * in_unit * seconds).sum();
        format!("{} {by_rules} of about {all:.0}", way.label)
    });
    format!("New connections by Docker's rules: {}.", lines.collect::<Vec<_>>().join(", "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn connections_by_rules_are_counted_by_host_port() {
        let rules = "\
Chain DOCKER (2 references)
    pkts      bytes target     prot opt in     out     source               destination
       0        0 RETURN     all  --  docker0 *       0.0.0.0/0            0.0.0.0/0
      12      720 DNAT       tcp  --  !docker0 *       0.0.0.0/0            0.0.0.0/0            tcp dpt:7200 to:172.17.0.2:7000
       5      460 DNAT       udp  --  !docker0 *       0.0.0.0/0            0.0.0.0/0            udp dpt:7200 to:172.17.0.2:7000
       3      180 DNAT       tcp  --  !docker0 *       0.0.0.0/0            0.0.0.0/0            tcp dpt:720 to:172.17.0.2:7000
";
        assert_eq!(taken(rules, 7200), 12);
        assert_eq!(taken(rules, 7100), 0);
    }

    #[test]
    fn every_server_is_published() {
        assert_eq!(published(100), ["5301:5201", "7100:7000", "7100:7000/udp"]);
    }
}
