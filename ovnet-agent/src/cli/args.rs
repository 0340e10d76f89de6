//! What `ovnet` takes on its command line. Words and flags are Docker's where Docker has them.

use std::{net::Ipv4Addr, path::PathBuf};

use clap::{Args, Parser, Subcommand};
use ipnet::Ipv4Net;

use crate::publish::spec::PrivatePort;

/// Networks for containers on many hosts.
#[derive(Debug, Parser)]
#[command(name = "ovnet", version, disable_help_subcommand = true)]
pub struct Cli {
    /// Socket of the agent; the variable OVNET_SOCKET changes the default.
    #[arg(long, global = true, default_value_os_t = default_socket(), value_name = "PATH")]
    pub socket: PathBuf,
    /// Print JSON.
    #[arg(long, global = true)]
    pub json: bool,
    /// What to do.
    #[command(subcommand)]
    pub verb: Verb,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Verb {
    /// Manage networks.
    #[command(subcommand)]
    Network(NetworkVerb),
    /// Attach a network namespace to a network; prints its address.
    Attach(AttachArgs),
    /// Detach endpoints of this host.
    Detach(DetachArgs),
    /// List the published ports of an endpoint of this host.
    Port {
        /// Name or id of the endpoint.
        #[arg(value_name = "NAME|ID")]
        endpoint: String,
        /// Only this port of the endpoint, as 80 or 53/udp: prints where it is published.
        #[arg(value_name = "PRIVATE_PORT[/PROTO]")]
        private_port: Option<PrivatePort>,
    },
    /// Look at endpoints.
    #[command(subcommand)]
    Endpoint(EndpointVerb),
    /// Look at hosts.
    #[command(subcommand)]
    Host(HostVerb),
    /// Tell how the agent is.
    Status,
    /// Count what happened to packets.
    Counters {
        /// Show what never happened too.
        #[arg(short, long)]
        all: bool,
    },
    /// Show dropped packets as they are dropped (sampled).
    Monitor,
}

/// What to do with networks.
#[derive(Debug, Subcommand)]
pub enum NetworkVerb {
    /// Create a network; prints its id.
    Create(CreateArgs),
    /// List networks.
    #[command(alias = "list")]
    Ls {
        /// Print ids only.
        #[arg(short, long)]
        quiet: bool,
        /// Do not shorten ids.
        #[arg(long)]
        no_trunc: bool,
    },
    /// Show networks and everyone in them, as JSON.
    Inspect {
        /// Names or ids.
        #[arg(required = true, value_name = "NETWORK")]
        networks: Vec<String>,
    },
    /// Remove networks.
    #[command(alias = "remove")]
    Rm {
        /// Names or ids.
        #[arg(required = true, value_name = "NETWORK")]
        networks: Vec<String>,
    },
}

/// `ovnet network create`.
#[derive(Args, Debug)]
pub struct CreateArgs {
    /// Subnet, as 172.19.0.0/24; the next free one where absent.
    #[arg(long)]
    pub subnet: Option<Ipv4Net>,
    /// Gateway; the first address of the subnet where absent.
    #[arg(long, value_name = "ADDRESS")]
    pub gateway: Option<Ipv4Addr>,
    /// Part of the subnet that addresses are chosen from.
    #[arg(long, value_name = "SUBNET")]
    pub ip_range: Option<Ipv4Net>,
    /// An address no endpoint gets, as router=172.19.0.5.
    #[arg(long, value_name = "NAME=ADDRESS", value_parser = named_address)]
    pub aux_address: Vec<(String, Ipv4Addr)>,
    /// MTU of the endpoints; the uplink's minus 50 where absent.
    #[arg(long)]
    pub mtu: Option<u32>,
    /// No egress and no published ports.
    #[arg(long)]
    pub internal: bool,
    /// A label.
    #[arg(long, value_name = "KEY=VALUE", value_parser = label)]
    pub label: Vec<(String, String)>,
    /// A driver option.
    #[arg(short, long, value_name = "KEY=VALUE", value_parser = label)]
    pub opt: Vec<(String, String)>,
    /// Name of the network.
    pub name: String,
}

/// `ovnet attach`.
#[derive(Args, Debug)]
pub struct AttachArgs {
    /// Name or id of the network.
    #[arg(long)]
    pub network: String,
    /// Path of the network namespace, or its name under /run/netns.
    #[arg(long, value_name = "PATH|NAME")]
    pub netns: String,
    /// Address; the next free one where absent.
    #[arg(long, value_name = "ADDRESS")]
    pub ip: Option<Ipv4Addr>,
    /// Name of the endpoint.
    #[arg(long)]
    pub name: Option<String>,
    /// A further name.
    #[arg(long, value_name = "NAME")]
    pub alias: Vec<String>,
    /// Name of the interface inside; the first free `eth<N>` where absent.
    #[arg(long, value_name = "NAME")]
    pub ifname: Option<String>,
    /// Publish ports, as ADDRESS:HOST_PORT:PORT/udp: all but PORT may be absent, both may be ranges.
    #[arg(short, long, value_name = "SPEC")]
    pub publish: Vec<String>,
    /// Publish every exposed port on a free port of this host.
    #[arg(short = 'P', long)]
    pub publish_all: bool,
    /// A port of the sandbox that -P publishes, as 80/tcp or 8000-8010/udp.
    #[arg(long, value_name = "PORT[/PROTO]")]
    pub expose: Vec<String>,
}

/// `ovnet detach`.
#[derive(Args, Debug)]
pub struct DetachArgs {
    /// Name or id of the endpoint.
    #[arg(value_name = "NAME|ID", required_unless_present_any = ["network", "netns"])]
    pub endpoint: Option<String>,
    /// Only from this network, by name or id.
    #[arg(long)]
    pub network: Option<String>,
    /// Only from this network namespace: its path, or its name under /run/netns.
    #[arg(long, value_name = "PATH|NAME")]
    pub netns: Option<String>,
}

/// What to do with endpoints.
#[derive(Debug, Subcommand)]
pub enum EndpointVerb {
    /// List endpoints of all hosts.
    #[command(alias = "list")]
    Ls {
        /// Only of this network, by name or id.
        #[arg(long)]
        network: Option<String>,
        /// Only of this host, which needs no Consul.
        #[arg(long)]
        local: bool,
        /// Print ids only.
        #[arg(short, long)]
        quiet: bool,
        /// Do not shorten ids.
        #[arg(long)]
        no_trunc: bool,
    },
}

/// What to do with hosts.
#[derive(Debug, Subcommand)]
pub enum HostVerb {
    /// List hosts.
    #[command(alias = "list")]
    Ls,
}

fn default_socket() -> PathBuf {
    let set = std::env::var_os("OVNET_SOCKET").filter(|path| !path.is_empty());
    set.map_or_else(|| PathBuf::from("/run/ovnet/ovnet.sock"), PathBuf::from)
}

fn named_address(text: &str) -> Result<(String, Ipv4Addr), String> {
    let (name, address) = text
        .split_once('=')
        .filter(|(name, _)| !name.is_empty())
        .ok_or("expected NAME=ADDRESS, as router=172.19.0.5")?;
    let address = address.parse().map_err(|_| format!("{address:?} is no IPv4 address"))?;
    Ok((name.to_owned(), address))
}

/// `key=value`; a key alone has an empty value, as with Docker.
fn label(text: &str) -> Result<(String, String), String> {
    let (key, value) = text.split_once('=').unwrap_or((text, ""));
    if key.is_empty() {
        return Err("expected KEY=VALUE".to_owned());
    }
    Ok((key.to_owned(), value.to_owned()))
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

    #[test]
    fn the_command_line_is_sound() {
        Cli::command().debug_assert();
    }

    #[test]
    fn the_examples_of_the_design_are_taken() {
        for line in [
            "ovnet network create --subnet 172.19.0.0/24 --gateway 172.19.0.1 ov_net3",
            "ovnet network create --label a=b --label c -o d=e --aux-address r=172.19.0.5 \
             --subnet 172.19.0.0/24 --mtu 1400 --internal n",
            "ovnet attach --network ov_net1 --netns /run/netns/t1 --name t1 --ip 10.0.0.2 --ifname \
             eth0 --alias web --alias www",
            "ovnet attach --network n --netns t1 -p 80 -p 90:80 --publish 192.168.1.12::53/udp",
            "ovnet attach --network n --netns t1 -P --expose 80/tcp --expose 8000-8010/udp",
            "ovnet port t1",
            "ovnet port t1 80",
            "ovnet port t1 53/udp --json",
            "ovnet detach t1",
            "ovnet detach --netns t1 --network n",
            "ovnet --json network ls",
            "ovnet network ls --json --socket /tmp/s",
            "ovnet endpoint ls --local",
            "ovnet counters --all",
        ] {
            Cli::try_parse_from(line.split(' ')).unwrap();
        }
    }

    #[test]
    fn wrong_command_lines_are_refused() {
        for line in [
            "ovnet detach",
            "ovnet attach --network n",
            "ovnet network create --subnet 10.0.0.0 n",
            "ovnet network create --aux-address 10.0.0.1 n",
            "ovnet network create --label =b n",
            "ovnet network rm",
            "ovnet port",
            "ovnet port t1 0",
            "ovnet port t1 80/sctp",
        ] {
            assert!(Cli::try_parse_from(line.split(' ')).is_err(), "{line}");
        }
    }
}
