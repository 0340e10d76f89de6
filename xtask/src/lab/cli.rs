//! `cargo xtask lab`: the verbs.

use std::net::SocketAddr;
use std::os::unix::process::CommandExt as _;
use std::path::PathBuf;

use anyhow::{Context as _, Result};
use clap::Subcommand;

use super::{Lab, Life, Options, Wire, bring, build, confine, status};

/// Arguments of `cargo xtask lab`.
#[derive(clap::Args)]
pub struct Args {
    #[command(subcommand)]
    verb: Verb,
    /// Which lab, where there are several.
    #[arg(long, global = true, hide = true, default_value = "lab")]
    prefix: String,
}

#[derive(Subcommand)]
enum Verb {
    /// Make the lab.
    Up(Up),
    /// Remove the lab and everything in it.
    Down,
    /// Hosts, agents, networks and endpoints.
    Status,
    /// Make a sandbox on a host and attach it to a network.
    Run(Run),
    /// Run a command in a host, or in a sandbox of it.
    Exec(Exec),
    /// Detach a sandbox and remove it.
    Stop {
        /// Host and sandbox: docker01/t1.
        #[arg(value_name = "HOST/NAME")]
        sandbox: String,
    },
    /// Serve the calls of Consul that the agent uses, where there is no Consul.
    #[command(hide = true)]
    StandIn {
        /// Address to listen on.
        listen: SocketAddr,
    },
    /// Run a command with what a systemd unit takes from it.
    #[command(hide = true)]
    Confined {
        /// The unit's file.
        unit: PathBuf,
        /// The command.
        #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true)]
        command: Vec<String>,
    },
}

#[derive(clap::Args)]
struct Up {
    /// Hosts in the cluster.
    #[arg(long, default_value_t = 3, value_name = "N")]
    hosts: u8,
    /// MTU of the wire in bytes.
    #[arg(long, default_value_t = 1500, value_name = "N")]
    mtu: u32,
    /// What the wire carries: packets of up to 64 KiB, or packets of the MTU as a physical one.
    #[arg(long, value_enum, default_value_t)]
    wire: Wire,
    /// How the agents use XDP.
    #[arg(long, value_name = "MODE", value_parser = ["auto", "native", "generic", "off"])]
    xdp: Option<String>,
    /// Start no agents: `cargo xtask lab exec docker01 -- ovnet-agent --consul …` does it by hand.
    #[arg(long)]
    no_agents: bool,
    /// Build and run the agents with optimisations.
    #[arg(long)]
    release: bool,
    /// Take ovnet-agent and ovnet from here instead of building them.
    #[arg(long, value_name = "FOLDER")]
    bin_dir: Option<PathBuf>,
    /// Run the development stand-in even where there is a Consul.
    #[arg(long, hide = true)]
    stand_in: bool,
    /// Start a Docker daemon on each host, with an image `busybox`.
    #[arg(long)]
    docker: bool,
    /// Containers go on while their Docker daemon is stopped.
    #[arg(long, requires = "docker")]
    live_restore: bool,
    /// Another argument for every agent.
    #[arg(long = "agent-arg", value_name = "ARG", allow_hyphen_values = true)]
    agent_args: Vec<String>,
}

#[derive(clap::Args)]
struct Run {
    /// Host to run on.
    host: String,
    /// Name of the sandbox.
    name: String,
    /// What `ovnet attach` takes: --network NET [--ip ADDRESS] [--alias NAME]…
    #[arg(
        value_name = "ATTACH FLAGS",
        required = true,
        trailing_var_arg = true,
        allow_hyphen_values = true
    )]
    attach: Vec<String>,
}

#[derive(clap::Args)]
struct Exec {
    /// Host, or host and sandbox: docker01, docker01/t1.
    #[arg(value_name = "HOST[/NAME]")]
    place: String,
    /// Taken for the habit of it; the command has your terminal anyway.
    #[arg(short, hide = true)]
    interactive: bool,
    /// Taken for the habit of it; the command has your terminal anyway.
    #[arg(short, hide = true)]
    tty: bool,
    /// The command.
    #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true)]
    command: Vec<String>,
}

/// Carries out a verb of `cargo xtask lab`.
///
/// # Errors
/// What failed, why, and what to do.
pub fn run(args: Args) -> Result<()> {
    let prefix = args.prefix;
    match args.verb {
        Verb::Up(up) => bring_up(up, prefix),
        Verb::Down => {
            if !Lab::remove_prefix(&prefix)? {
                println!("the lab is not up");
            }
            Ok(())
        }
        Verb::Status => {
            print!("{}", Lab::open(&prefix)?.picture()?);
            Ok(())
        }
        Verb::Run(Run { host, name, attach }) => {
            let attach: Vec<&str> = attach.iter().map(String::as_str).collect();
            println!("{}", Lab::open(&prefix)?.run_sandbox(&host, &name, &attach)?);
            Ok(())
        }
        Verb::Confined { unit, command } => confine::run(&unit, &command),
        Verb::Exec(Exec { place, command, .. }) => {
            let argv: Vec<&str> = command.iter().map(String::as_str).collect();
            // Replaces this process: the terminal, signals and the exit status are the command's.
            let error = Lab::open(&prefix)?.command(&place, &argv)?.exec();
            Err(error).context("cannot run nsenter")
        }
        Verb::Stop { sandbox } => {
            let (host, name) =
                sandbox.split_once('/').context("which sandbox? HOST/NAME, as docker01/t1")?;
            Lab::open(&prefix)?.stop_sandbox(host, name)
        }
        Verb::StandIn { listen } => stand_in(listen),
    }
}

/// What to do with a lab.
const HINTS: &[[&str; 2]] = &[
    ["cargo xtask lab exec docker02 -- ovnet network create ov_net1", "make a network"],
    ["cargo xtask lab run docker01 t1 --network ov_net1", "a sandbox in it"],
    [
        "cargo xtask lab run docker02 t2 --network ov_net1",
        "one on another host; prints its address",
    ],
    ["cargo xtask lab exec docker01/t1 -- ping 10.0.0.3", "a command in a sandbox"],
    ["cargo xtask lab exec docker01 -it -- bash", "a shell on a host"],
    ["cargo xtask lab down", "remove it all"],
];

/// What to do with one that has Docker.
const DOCKER_HINTS: &[[&str; 2]] = &[
    ["cargo xtask lab exec docker02 -it -- bash", "a shell on a host; there:"],
    ["docker network create -d ovnet --ipam-driver ovnet ov_net1", "make a network, for all hosts"],
    ["docker run -itd --name t1 --network ov_net1 busybox", "a container in it"],
    ["docker exec -it t1 ping t2", "a command in a container"],
    ["cargo xtask lab exec docker02/t1 -- tcpdump -ni eth0", "one of the host's in its network"],
    ["cargo xtask lab down", "remove it all"],
];

fn bring_up(up: Up, prefix: String) -> Result<()> {
    let bin_dir = match up.bin_dir {
        None if !up.no_agents => Some(build(up.release, up.docker)?),
        given => {
            bring(up.docker)?;
            given
        }
    };
    let lab = Lab::up(Options {
        prefix,
        hosts: up.hosts,
        mtu: up.mtu,
        wire: up.wire,
        xdp: up.xdp,
        agents: !up.no_agents,
        consul_at: None,
        agent_args: up.agent_args,
        bin_dir,
        stand_in: up.stand_in,
        durable_consul: false,
        consul_args: Vec::new(),
        docker: up.docker,
        live_restore: up.live_restore,
        guard: up.docker && !up.no_agents,
        life: Life::Stays,
    })?;
    print!("{}", lab.picture()?);
    let hints = if up.docker { DOCKER_HINTS } else { HINTS };
    let rows: Vec<Vec<String>> =
        hints.iter().map(|hint| hint.iter().map(|text| (*text).to_owned()).collect()).collect();
    print!("\n{}", status::table(&rows));
    Ok(())
}

fn stand_in(listen: SocketAddr) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .context("start the runtime")?;
    runtime.block_on(async {
        let listener = tokio::net::TcpListener::bind(listen)
            .await
            .with_context(|| format!("cannot listen on {listen}"))?;
        crate::stand_in::serve(listener).await
    })
}
