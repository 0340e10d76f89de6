//! The agent's command line.

use std::{
    net::{Ipv4Addr, SocketAddrV4},
    path::PathBuf,
    time::Duration,
};

use clap::{Args, Parser, Subcommand, ValueEnum};
use ipnet::Ipv4Net;
use ovnet_common::abi::map;

use crate::{
    consul::Consul,
    datapath::{Abi, DatapathLog},
    docker::daemon::DockerChoice,
};

/// The multi-host container network beside Consul: one agent per host.
///
/// `ovnet-agent --consul 192.168.1.11:8500 --advertise ens33` is all a host needs.
#[derive(Debug, Parser)]
#[command(version, args_conflicts_with_subcommands = true, subcommand_negates_reqs = true)]
pub struct Arguments {
    /// What to do instead of running.
    #[command(subcommand)]
    pub command: Option<Command>,
    /// How to run.
    #[command(flatten)]
    pub run: Option<Config>,
}

/// What the agent does besides running.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Tell what this host has and lacks, in one table; exits non-zero where the agent cannot run
    Check(Config),
    /// Remove everything ovnet of this host: interfaces, programs, maps, state, records in Consul
    Cleanup(Cleanup),
    /// Make Docker's containers ask the agent for names: shows the change to daemon.json
    DockerSetup(DockerSetup),
}

/// When the XDP program is attached to the uplink.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Xdp {
    /// Native, on drivers whose native XDP keeps their offloads; off on all others
    #[default]
    Auto,
    /// In the driver
    Native,
    /// After the driver
    Generic,
    /// Never
    Off,
}

/// Where the names of containers are answered.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Dns {
    /// On the address of docker_gwbridge, while it has one.
    #[default]
    Auto,
    /// On this address, whether or not an interface has it.
    At(Ipv4Addr),
    /// Nowhere.
    Off,
}

impl std::str::FromStr for Dns {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "auto" => Ok(Self::Auto),
            "off" => Ok(Self::Off),
            _ => match text.parse::<Ipv4Addr>() {
                Ok(it) if !it.is_multicast() && !it.is_broadcast() => Ok(Self::At(it)),
                _ => Err("an IPv4 address, 'auto' or 'off'".into()),
            },
        }
    }
}

/// Where the agent's metrics are served.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Metrics {
    /// Nowhere: an agent that was not asked to opens no port, on which somebody may be already.
    #[default]
    Off,
    /// At this address and port.
    At(SocketAddrV4),
}

impl std::str::FromStr for Metrics {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.parse::<SocketAddrV4>() {
            _ if text == "off" => Ok(Self::Off),
            Ok(it) if it.port() != 0 && !it.ip().is_multicast() && !it.ip().is_broadcast() => {
                Ok(Self::At(it))
            }
            _ => Err("an IPv4 address and a port, as 127.0.0.1:9481, or 'off'".into()),
        }
    }
}

/// Whether sandboxes are given a way out.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Egress {
    /// Through ovnet_gwbridge, with this host's address
    #[default]
    On,
    /// None, and no published ports
    Off,
}

/// What carries the connections of published ports.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum PortsPath {
    /// Our programs, and the kernel for what they leave to it
    #[default]
    Bpf,
    /// The kernel alone, by nftables and Docker's rules: rules of the FORWARD chain or DOCKER-USER
    /// apply to them
    Kernel,
}

/// How many entries the table of connections has, two for each connection.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ConntrackMax {
    /// As many as a quarter of a per cent of the memory holds.
    #[default]
    Auto,
    /// So many.
    Entries(u32),
}

impl ConntrackMax {
    /// The number of entries asked for; `None` leaves it to the memory.
    pub fn entries(self) -> Option<u32> {
        match self {
            Self::Auto => None,
            Self::Entries(entries) => Some(entries),
        }
    }
}

impl std::str::FromStr for ConntrackMax {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.parse() {
            _ if text == "auto" => Ok(Self::Auto),
            // One connection needs two.
            Ok(entries) if entries >= 2 => Ok(Self::Entries(entries)),
            _ => Err("a number of entries, at least 2, or 'auto'".into()),
        }
    }
}

/// How log lines look.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// For people
    #[default]
    Text,
    /// For machines
    Json,
}

/// Where Consul and the records are.
#[derive(Clone, Debug, Args)]
pub struct ConsulArguments {
    /// Name of this host among the others [default: the host name]
    #[arg(long, value_name = "NAME")]
    pub node: Option<String>,
    /// Where the records are in Consul
    #[arg(long, value_name = "PREFIX", default_value = "ovnet/v1")]
    pub prefix: String,
    /// File with the ACL token for Consul; one that is replaced is read again [default: that of
    /// CONSUL_HTTP_TOKEN_FILE]
    #[arg(long, value_name = "PATH")]
    pub consul_token_file: Option<PathBuf>,
}

/// Where this host keeps its part.
#[derive(Clone, Debug, Args)]
pub struct Folders {
    /// Socket `ovnet` talks to
    #[arg(long, value_name = "PATH", default_value = "/run/ovnet/ovnet.sock")]
    pub socket: PathBuf,
    /// Folder of what this host must remember
    #[arg(long, value_name = "PATH", default_value = "/var/lib/ovnet")]
    pub state_dir: PathBuf,
    /// Folder of pinned maps and programs, on a bpffs
    #[arg(long, value_name = "PATH", default_value = "/sys/fs/bpf/ovnet")]
    pub bpffs: PathBuf,
}

/// How the agent runs.
#[derive(Clone, Debug, Args)]
#[group(id = "Config", multiple = true, args = ["consul", "advertise"])]
pub struct Config {
    /// Consul: host:port, http://…, https://… or consul://host:port[/prefix]
    #[arg(long, value_name = "ADDR", required = true)]
    pub consul: String,
    /// Interface or IPv4 address the other hosts reach this one by
    #[arg(long, value_name = "IFACE|ADDR", required = true)]
    pub advertise: String,
    /// Names in Consul.
    #[command(flatten)]
    pub names: ConsulArguments,
    /// Folders.
    #[command(flatten)]
    pub folders: Folders,
    /// Group whose members may use the socket, besides root
    #[arg(long, value_name = "NAME|GID")]
    pub socket_group: Option<String>,
    /// XDP on the uplink
    #[arg(long, value_enum, default_value_t)]
    pub xdp: Xdp,
    /// UDP port of VXLAN, the same on all hosts
    #[arg(long, value_name = "PORT", default_value_t = 4789, value_parser = clap::value_parser!(u16).range(1..))]
    pub vxlan_port: u16,
    /// Where the subnets of networks without --subnet come from
    #[arg(long, value_name = "SUBNET", default_value = "10.0.0.0/8")]
    pub default_pool: Ipv4Net,
    /// Prefix length of those subnets
    #[arg(long, value_name = "LENGTH", default_value_t = 24, value_parser = clap::value_parser!(u8).range(8..=30))]
    pub default_pool_size: u8,
    /// How long a host whose lease is lost stays reachable, in seconds
    #[arg(long, value_name = "SECONDS", default_value = "60", value_parser = seconds)]
    pub host_grace: Duration,
    /// Docker's daemon: auto is this host's, whenever there is one
    #[arg(long, value_name = "auto|off|ADDR", default_value = "auto")]
    pub docker: DockerChoice,
    /// Address that names of containers are answered on, port 53; auto is docker_gwbridge's
    #[arg(long, value_name = "ADDR|auto|off", default_value = "auto")]
    pub dns: Dns,
    /// Address and port the agent's metrics are served at, for Prometheus, as 127.0.0.1:9481
    #[arg(long, value_name = "ADDR|off", default_value = "off")]
    pub metrics: Metrics,
    /// Give sandboxes attached by `ovnet attach` a way out, which published ports need, too
    #[arg(long, value_enum, default_value_t)]
    pub egress: Egress,
    /// Subnet of ovnet_gwbridge, their way out [default: 172.18.0.0/16, or the next free one up to
    /// 172.31.0.0/16]
    #[arg(long, value_name = "SUBNET")]
    pub gwbridge_subnet: Option<Ipv4Net>,
    /// What carries the connections of published ports
    #[arg(long, value_enum, default_value_t)]
    pub ports: PortsPath,
    /// Entries of the table of connections to published ports, two for each; auto is a quarter of a
    /// per cent of the memory
    #[arg(long, value_name = "N|auto", default_value = "auto")]
    pub conntrack_max: ConntrackMax,
    /// Log of the programs themselves; costs speed
    #[arg(long, value_enum, default_value_t)]
    pub datapath_log: DatapathLog,
    /// Form of the log on standard error; its level is set by RUST_LOG
    #[arg(long, value_enum, default_value_t)]
    pub log_format: LogFormat,
    /// Attach TC programs by clsact even where the kernel has TCX.
    #[arg(long, hide = true)]
    pub force_clsact: bool,
    /// How often everything is compared with what it should be, in seconds.
    #[arg(long, hide = true, default_value = "10", value_parser = seconds)]
    pub repair_interval: Duration,
    /// Pass for an agent of this ABI version, so that an upgrade can be tried.
    #[arg(long, hide = true, value_name = "N")]
    pub abi_version: Option<u32>,
    /// Names of maps whose layout that version changed.
    #[arg(
        long,
        hide = true,
        value_name = "MAP,…|all",
        value_delimiter = ',',
        requires = "abi_version"
    )]
    pub abi_changed: Vec<String>,
}

impl Config {
    /// The version of the maps.
    pub fn abi(&self) -> Abi {
        let Some(version) = self.abi_version else { return Abi::default() };
        let is_changed = |name: &&str| {
            self.abi_changed.iter().any(|changed| changed == "all" || changed == name)
        };
        let changed: Vec<&str> = map::ALL.into_iter().filter(is_changed).collect();
        Abi::pretend(version, &changed)
    }
}

/// What to clean up.
#[derive(Clone, Debug, Args)]
pub struct Cleanup {
    /// Consul, to remove this host's records too
    #[arg(long, value_name = "ADDR")]
    pub consul: Option<String>,
    /// Names in Consul.
    #[command(flatten)]
    pub names: ConsulArguments,
    /// Folders.
    #[command(flatten)]
    pub folders: Folders,
}

/// How to set Docker up.
#[derive(Clone, Debug, Args)]
pub struct DockerSetup {
    /// Docker's configuration
    #[arg(long, value_name = "PATH", default_value = crate::docker::setup::DAEMON_JSON)]
    pub daemon_json: PathBuf,
    /// Address the agent answers on [default: that of docker_gwbridge]
    #[arg(long, value_name = "ADDR")]
    pub dns: Option<Ipv4Addr>,
    /// Have Docker ask the agent before it removes a network: `docker network rm` then fails where
    /// other hosts use it. Docker's API needs a running agent from then on
    #[arg(long)]
    pub guard: bool,
    /// Write the change instead of showing it
    #[arg(long)]
    pub write: bool,
}

impl ConsulArguments {
    /// The client for a Consul at this address.
    pub fn connect(&self, address: &str) -> anyhow::Result<Consul> {
        let file = self.consul_token_file.as_deref();
        Consul::with_token_file(address, &self.prefix, &self.node()?, file)
    }

    /// `--node`, or the host's name.
    pub fn node(&self) -> anyhow::Result<String> {
        use anyhow::Context as _;
        if let Some(node) = &self.node {
            anyhow::ensure!(
                !node.is_empty() && !node.contains('/'),
                "--node '{node}' cannot be a name in Consul: it is empty or has a slash"
            );
            return Ok(node.clone());
        }
        let name = nix::unistd::gethostname().context("read the host name; give --node")?;
        name.into_string().ok().context("the host name is not UTF-8; give --node")
    }
}

fn seconds(text: &str) -> Result<Duration, String> {
    match text.parse::<u64>() {
        Ok(seconds) if seconds > 0 => Ok(Duration::from_secs(seconds)),
        _ => Err("a whole number of seconds, at least 1".into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory as _;

    #[test]
    fn the_definition_is_consistent() {
        Arguments::command().debug_assert();
    }

    #[test]
    fn two_options_are_enough_to_run_and_both_are_needed() {
        let both = ["ovnet-agent", "--consul", "192.168.1.11:8500", "--advertise", "ens33"];
        let arguments = Arguments::try_parse_from(both).unwrap();
        assert!(arguments.command.is_none());
        assert_eq!(arguments.run.unwrap().vxlan_port, 4789);
        assert!(Arguments::try_parse_from(&both[..3]).is_err());
        assert!(Arguments::try_parse_from(["ovnet-agent"]).is_err());
    }

    #[test]
    fn published_ports_and_egress_have_defaults_and_can_be_changed() {
        let run = |more: &[&str]| {
            let both = ["ovnet-agent", "--consul", "192.168.1.11:8500", "--advertise", "ens33"];
            let line = both.iter().chain(more);
            Arguments::try_parse_from(line).map(|it| it.run.unwrap())
        };
        let config = run(&[]).unwrap();
        assert_eq!((config.egress, config.gwbridge_subnet), (Egress::On, None));
        assert_eq!((config.ports, config.conntrack_max.entries()), (PortsPath::Bpf, None));
        let changed = ["--egress=off", "--gwbridge-subnet=10.9.0.0/24", "--ports=kernel"];
        let config = run(&changed).unwrap();
        assert_eq!(config.egress, Egress::Off);
        assert_eq!(config.gwbridge_subnet, Some("10.9.0.0/24".parse().unwrap()));
        assert_eq!(config.ports, PortsPath::Kernel);
        let config = run(&["--conntrack-max", "65536"]).unwrap();
        assert_eq!(config.conntrack_max.entries(), Some(65536));
        assert_eq!(run(&["--conntrack-max", "auto"]).unwrap().conntrack_max, ConntrackMax::Auto);
        for wrong in [
            "--egress=maybe",
            "--gwbridge-subnet=172.18.0.0",
            "--ports=iptables",
            "--conntrack-max=0",
            "--conntrack-max=1",
            "--conntrack-max=-2",
            "--conntrack-max=4294967296",
        ] {
            run(&[wrong]).unwrap_err();
        }
    }

    #[test]
    fn an_agent_passes_for_one_of_another_abi_only_where_asked_to() {
        let run = |more: &[&str]| {
            let both = ["ovnet-agent", "--consul", "192.168.1.11:8500", "--advertise", "ens33"];
            Arguments::try_parse_from(both.iter().chain(more)).map(|it| it.run.unwrap().abi())
        };
        assert_eq!(run(&[]).unwrap(), Abi::default());
        let changed = run(&["--abi-version=9", "--abi-changed=HOSTS,PORTS"]).unwrap();
        assert_eq!(changed, Abi::pretend(9, &[map::HOSTS, map::PORTS]));
        let all = run(&["--abi-version=9", "--abi-changed=all"]).unwrap();
        assert_eq!(all, Abi::pretend(9, &map::ALL));
        run(&["--abi-changed=all"]).unwrap_err();
    }

    #[test]
    fn names_are_answered_on_docker_gwbridge_on_an_address_or_not_at_all() {
        assert_eq!("auto".parse(), Ok(Dns::default()));
        assert_eq!("off".parse(), Ok(Dns::Off));
        assert_eq!("10.1.2.3".parse(), Ok(Dns::At([10, 1, 2, 3].into())));
        for wrong in ["", "on", "10.1.2.3:53", "::1", "224.0.0.1", "255.255.255.255"] {
            wrong.parse::<Dns>().unwrap_err();
        }
    }

    #[test]
    fn metrics_are_off_or_at_an_address_and_a_port() {
        assert_eq!("off".parse(), Ok(Metrics::default()));
        let address = "127.0.0.1:9481".parse().unwrap();
        assert_eq!("127.0.0.1:9481".parse(), Ok(Metrics::At(address)));
        for wrong in ["", "on", "9481", ":9481", "127.0.0.1", "127.0.0.1:0", "[::1]:9481"] {
            wrong.parse::<Metrics>().unwrap_err();
        }
    }

    #[test]
    fn cleanup_needs_no_consul() {
        let arguments = Arguments::try_parse_from(["ovnet-agent", "cleanup"]).unwrap();
        assert!(matches!(arguments.command, Some(Command::Cleanup(_))));
    }
}
