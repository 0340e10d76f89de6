//! `cargo xtask demo`: three hosts form a network through Consul, containers on them talk, and a
//! table tells how fast, next to the kernel's own vxlan in the same run. With Docker on the hosts
//! it goes through the tutorial of Docker's own overlay instead.

mod docker;
mod ports;
mod report;
mod session;

use std::io::{IsTerminal as _, Write as _};
use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Context as _, Result, ensure};

use crate::lab::kernel_vxlan::KernelVxlan;
use crate::lab::measure::{self, Pin, Plan, Way};
use crate::lab::{self, Lab, Life, Options, Wire};
use crate::tools;

use self::session::Session;

/// Arguments of `cargo xtask demo`.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Go through Docker's old tutorial instead, with a Docker daemon on each host.
    #[arg(long, conflicts_with = "baseline")]
    docker: bool,
    /// What the wire carries: packets of up to 64 KiB, or packets of the MTU as a physical one.
    #[arg(long, value_enum, default_value_t)]
    wire: Wire,
    /// Leave the lab up afterwards, for `cargo xtask lab`.
    #[arg(long)]
    keep: bool,
    /// Length of each iperf3 run.
    #[arg(long, default_value_t = 2, value_name = "N", value_parser = clap::value_parser!(u64).range(1..=30))]
    seconds: u64,
    /// How often everything is measured; the median counts.
    #[arg(long, default_value_t = 5, value_name = "N", value_parser = clap::value_parser!(u8).range(1..=50))]
    rounds: u8,
    /// Which processors sender and receiver of a measurement run on.
    #[arg(long, value_enum, default_value_t)]
    pin: Pin,
    /// Take ovnet-agent and ovnet from here instead of building them.
    #[arg(long, value_name = "FOLDER")]
    bin_dir: Option<PathBuf>,
    /// Run the development stand-in even where there is a Consul.
    #[arg(long, hide = true)]
    stand_in: bool,
    /// Measure only what is not ours, without agents.
    #[arg(long, hide = true)]
    baseline: bool,
}

/// Carries out `cargo xtask demo`.
///
/// # Errors
/// What failed; the lab is removed all the same, unless it was to be kept.
pub(crate) fn run(args: Args) -> Result<()> {
    // Before the build, which takes much longer than to find out.
    ensure!(tools::is_root(), "the demo makes network namespaces and needs root: run it with sudo");
    let bin_dir = match &args.bin_dir {
        None if !args.baseline => Some(lab::build(true, args.docker)?),
        given => {
            lab::bring(args.docker)?;
            given.clone()
        }
    };
    if !args.docker {
        measure::require()?;
    }
    let started = Instant::now();
    let options = Options {
        // A lab that goes away with this process does not get in the way of one that stays.
        prefix: if args.keep { "lab" } else { "demo" }.to_owned(),
        wire: args.wire,
        agents: !args.baseline,
        bin_dir,
        stand_in: args.stand_in,
        docker: args.docker,
        guard: args.docker,
        life: if args.keep { Life::Stays } else { Life::Bound },
        ..Options::default()
    };
    let lab = Lab::up(options).context("the lab does not come up")?;
    introduce(&lab)?;
    if args.docker {
        docker::show(&lab)?;
    } else {
        show(&lab, &args)?;
    }
    if args.keep {
        println!("\nThe lab is left up: `cargo xtask lab status`, `cargo xtask lab down`.");
    } else {
        lab.down().context("the lab does not go down")?;
        println!("\nAll of it is removed again. {} s.", started.elapsed().as_secs());
    }
    Ok(())
}

/// Says what there is.
fn introduce(lab: &Lab) -> Result<()> {
    let consul = lab.consul_kind().unwrap_or_default();
    println!(
        "\nThree hosts, each a namespace of this machine, and a switch. On docker01 runs Consul\n\
         ({consul}), on each host:\n\n    ovnet-agent --consul {} --advertise {}\n",
        lab.consul()?,
        lab::UPLINK
    );
    Ok(())
}

/// Networks, pings, and throughput next to the kernel's own vxlan.
fn show(lab: &Lab, args: &Args) -> Result<()> {
    let mut ways = vec![Way {
        label: "host to host".to_owned(),
        from: "docker01".to_owned(),
        to: "docker02".to_owned(),
        address: lab.address("docker02")?,
    }];
    if !args.baseline {
        let session = Session::new(lab);
        session.network()?;
        session.everyone_pings()?;
        session.isolation()?;
        ports::show(lab, &session)?;
        ways.push(session.way()?);
    }
    let vxlan = KernelVxlan::up(lab, &["docker01", "docker02"])?;
    if let [from, to] = vxlan.members.as_slice() {
        ways.insert(
            1,
            Way {
                label: "kernel vxlan + bridge".to_owned(),
                from: from.place(),
                to: to.place(),
                address: to.address,
            },
        );
    }
    let (rounds, terminal) = (usize::from(args.rounds), std::io::stderr().is_terminal());
    println!(
        "\nOne TCP flow and pings from docker01 to docker02, {rounds} rounds in turns, {} s each:",
        args.seconds
    );
    let plan = Plan { rounds, seconds: args.seconds, pin: args.pin };
    let samples = measure::in_turns(lab, &ways, plan, |round, way| {
        if terminal {
            eprint!("\r\x1b[2K  round {} of {rounds}: {}", round + 1, way.label);
            // Progress that cannot be drawn is not worth a failure.
            let _ = std::io::stderr().flush();
        }
    })?;
    if terminal {
        eprint!("\r\x1b[2K");
    }
    println!("\n{}", report::table(&ways, &samples, args.wire, lab.options().mtu));
    vxlan.down(lab)
}
