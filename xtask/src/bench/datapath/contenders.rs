//! The contenders, each between two hosts of a lab of its own.

use std::net::{Ipv4Addr, SocketAddrV4};
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use clap::ValueEnum;
use serde_json::Value;

use super::work::{ROUND_TRIPS, Work, program};
use super::{Args, Plan, Setting};
use crate::lab::kernel_vxlan::KernelVxlan;
use crate::lab::measure::{PORT as IPERF3, pinned};
use crate::lab::{Lab, Options, Running, wait_until};

/// The hosts that send and receive.
const HOSTS: [&str; 2] = ["docker01", "docker02"];
/// A network of ovnet or of Docker.
const NETWORK: &str = "net1";
/// Bytes that VXLAN over IPv4 adds to a frame, and takes from the MTU.
const OVERHEAD: u32 = 50;
/// How long a network may take to come to another host, or a packet to come through.
const SEEN: Duration = Duration::from_secs(20);

/// Who takes part.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum Kind {
    /// From host to host, without containers: the limit.
    Host,
    /// ovnet with its programs at TC, which is the default.
    Tc,
    /// ovnet with native XDP.
    Xdp,
    /// A vxlan device of the kernel and a bridge on each host.
    Kernel,
    /// Docker's own overlay, in Swarm mode.
    Docker,
}

impl Kind {
    /// What tables call it.
    pub(super) fn label(self) -> &'static str {
        match self {
            Self::Host => "host to host",
            Self::Tc => "ovnet, TC",
            Self::Xdp => "ovnet, native XDP",
            Self::Kernel => "kernel vxlan + bridge",
            Self::Docker => "Docker's overlay",
        }
    }

    /// Whether it needs the agent.
    pub(super) fn is_ours(self) -> bool {
        matches!(self, Self::Tc | Self::Xdp)
    }

    /// The lab it needs.
    pub(super) fn options(self, args: &Args, setting: &Setting, bin_dir: Option<&Path>) -> Options {
        let name = match self {
            Self::Host => "host",
            Self::Tc => "tc",
            Self::Xdp => "xdp",
            Self::Kernel => "kernel",
            Self::Docker => "docker",
        };
        Options {
            prefix: format!("{}-{name}", args.prefix),
            // A Swarm of three, of which the third only belongs to it.
            hosts: if self == Self::Docker { 3 } else { 2 },
            mtu: setting.mtu,
            wire: setting.wire,
            xdp: match self {
                Self::Tc => Some("off".to_owned()),
                Self::Xdp => Some("native".to_owned()),
                _ => None,
            },
            agents: self.is_ours(),
            agent_args: args.agent_arg.clone(),
            docker: self == Self::Docker,
            bin_dir: bin_dir.map(Path::to_owned),
            ..Options::default()
        }
    }
}

/// A contender that is ready to be measured.
pub(super) struct Contender<'a> {
    /// Which it is.
    pub(super) kind: Kind,
    /// Its lab.
    pub(super) lab: &'a Lab,
    /// Where the load comes from, as the lab's methods take it.
    pub(super) from: String,
    /// Where the servers run.
    pub(super) to: String,
    /// The servers' address.
    address: Ipv4Addr,
    /// The servers, which run all the time.
    _servers: Vec<Running>,
}

impl<'a> Contender<'a> {
    /// Makes its network and containers, and starts its servers.
    pub(super) fn set_up(kind: Kind, lab: &'a Lab, work: &[Work], plan: Plan) -> Result<Self> {
        let (from, to, address) = match kind {
            Kind::Host => {
                let [from, to] = HOSTS.map(str::to_owned);
                let address = lab.address(&to)?;
                (from, to, address)
            }
            Kind::Tc | Kind::Xdp => ovnet(lab)?,
            Kind::Kernel => kernel(lab)?,
            Kind::Docker => docker(lab)?,
        };
        let (silent, at) = (["ping", "-n", "-c", "1", "-W", "1"], address.to_string());
        let ping = silent.into_iter().chain([at.as_str()]).collect::<Vec<_>>();
        wait_until(
            SEEN,
            || format!("{from} to reach {address}"),
            || Ok(lab.output(&from, &ping, SEEN)?.status.success().then_some(())),
        )?;
        for place in [&from, &to] {
            check_mtu(kind, lab, place, address)?;
            without_pacing(lab, place)?;
        }
        let servers = serve(lab, &to, work, plan)?;
        Ok(Self { kind, lab, from, to, address, _servers: servers })
    }

    /// One of its servers.
    pub(super) fn server(&self, port: u16) -> SocketAddrV4 {
        SocketAddrV4::new(self.address, port)
    }
}

/// Starts the servers of these kinds of work. They are the machine's programs, not the container's:
/// of a container only its network counts here.
fn serve(lab: &Lab, place: &str, work: &[Work], plan: Plan) -> Result<Vec<Running>> {
    let program = program()?;
    let mut servers = Vec::new();
    let mut ports: Vec<u16> = Vec::new();
    for work in work {
        let Some(port) = work.port() else { continue };
        let at = port.to_string();
        let argv = match port {
            IPERF3 => vec!["iperf3", "-s", "-p", &at],
            ROUND_TRIPS => vec![program.as_str(), "load", "round-trip-server", &at],
            _ => vec![program.as_str(), "load", "tcp-server", &at],
        };
        if !ports.contains(&port) {
            let argv = pinned(plan.pin_of(*work).receiver(), &argv);
            servers.push(lab.spawn(place, &argv, None)?);
            lab.wait_for_port(place, port)?;
            ports.push(port);
        }
    }
    Ok(servers)
}

/// A network of ovnet with a sandbox on each of two hosts.
fn ovnet(lab: &Lab) -> Result<(String, String, Ipv4Addr)> {
    lab.exec(HOSTS[0], &["ovnet", "network", "create", NETWORK])?;
    let seen = |list: &Value| {
        let mut names = list.as_array().into_iter().flatten().map(|it| it.get("name"));
        names.any(|name| name.and_then(Value::as_str) == Some(NETWORK))
    };
    wait_until(
        SEEN,
        || format!("{} to see {NETWORK}", HOSTS[1]),
        || Ok(seen(&lab.ovnet_json(HOSTS[1], &["network", "ls"])?).then_some(())),
    )?;
    for host in HOSTS {
        lab.run_sandbox(host, "c1", &["--network", NETWORK, "--name", host])?;
    }
    let [from, to] = HOSTS.map(|host| format!("{host}/c1"));
    let list = lab.exec(&to, &["ip", "-4", "-oneline", "address", "show", "dev", "eth0"])?;
    let address = list.split_whitespace().skip_while(|word| *word != "inet").nth(1);
    let address = address.and_then(|it| it.split('/').next()?.parse().ok());
    Ok((from, to, address.with_context(|| format!("no address on eth0: {list}"))?))
}

/// The kernel's own, set up as Docker's, without Docker.
fn kernel(lab: &Lab) -> Result<(String, String, Ipv4Addr)> {
    // Where the module is there, a bridge would take every frame through netfilter. Docker's overlay
    // may, if that is how Docker leaves it; this is the kernel at its best.
    let off = r#"for file in /proc/sys/net/bridge/bridge-nf-call-*; do
                     if [ -e "$file" ]; then echo 0 > "$file"; fi; done"#;
    for host in HOSTS {
        lab.exec(host, &["sh", "-c", off])?;
    }
    let network = KernelVxlan::up(lab, &HOSTS)?;
    let [from, to] = network.members.as_slice() else {
        anyhow::bail!("a kernel vxlan of {} members", network.members.len());
    };
    Ok((from.place(), to.place(), to.address))
}

/// A Swarm, and a container on each of two of its hosts.
fn docker(lab: &Lab) -> Result<(String, String, Ipv4Addr)> {
    let manager = lab.address(HOSTS[0])?.to_string();
    lab.docker(HOSTS[0], &["swarm", "init", "--advertise-addr", &manager])?;
    let token = lab.docker(HOSTS[0], &["swarm", "join-token", "--quiet", "worker"])?;
    let at = format!("{manager}:2377");
    for node in lab.nodes().iter().filter(|node| *node != HOSTS[0]) {
        let own = lab.address(node)?.to_string();
        lab.docker(node, &["swarm", "join", "--advertise-addr", &own, "--token", &token, &at])?;
    }
    // The hosts' MTU: Docker does not look at it by itself, but takes its own bytes off what it is told.
    let mtu = format!("com.docker.network.driver.mtu={}", lab.options().mtu);
    let create = ["network", "create", "-d", "overlay", "--attachable", "--opt", &mtu, NETWORK];
    lab.docker(HOSTS[0], &create)?;
    for host in HOSTS {
        let run = ["run", "-itd", "--name", host, "--network", NETWORK, "busybox"];
        // A worker learns of the network by the time it is to use it.
        lab.docker(host, &run)?;
    }
    let format = format!("{{{{.NetworkSettings.Networks.{NETWORK}.IPAddress}}}}");
    let address = lab.docker(HOSTS[1], &["inspect", "--format", &format, HOSTS[1]])?;
    let [from, to] = HOSTS.map(|host| format!("{host}/{host}"));
    Ok((from, to, address.parse().with_context(|| format!("the address {address:?}"))?))
}

/// Makes sure that nobody is measured with smaller packets than the others.
fn check_mtu(kind: Kind, lab: &Lab, place: &str, address: Ipv4Addr) -> Result<()> {
    let wire = lab.options().mtu;
    let due = if kind == Kind::Host { wire } else { wire - OVERHEAD };
    // Whichever interface has the network: the route to an own address would be the loopback.
    let network = format!("{}/24", Ipv4Addr::from(u32::from(address) & 0xffff_ff00));
    let route = lab.exec(place, &["ip", "-4", "-oneline", "route", "show", &network])?;
    let device = route.split_whitespace().skip_while(|word| *word != "dev").nth(1);
    let device = device.with_context(|| format!("{place} has no route to {network}"))?;
    let link = lab.exec(place, &["ip", "-oneline", "link", "show", "dev", device])?;
    let mtu = link.split_whitespace().skip_while(|word| *word != "mtu").nth(1);
    ensure!(mtu == Some(&due.to_string()), "{device} of {place} has MTU {mtu:?}, not {due}");
    Ok(())
}

/// Has TCP wait for nothing but answers: BBR, which some systems have for a default, paces by timers
/// even what fits into one packet. Flows choose for themselves.
fn without_pacing(lab: &Lab, place: &str) -> Result<()> {
    let set = "echo reno > /proc/sys/net/ipv4/tcp_congestion_control";
    lab.exec(place, &["sh", "-c", set]).map(drop)
}
