//! `cargo xtask bench ports`: a client outside the cluster asks a container by a published port.
//!
//! The contenders stand side by side in one lab, and every round measures each of them once, in an
//! order that changes from round to round: the machine's speed drifts, and a ratio of two
//! measurements that follow one another drifts less.

mod table;
mod ways;
mod work;

use std::fs;
use std::io::{IsTerminal as _, Write as _};
use std::path::PathBuf;

use anyhow::{Context as _, Result, ensure};
use serde_json::json;

use self::ways::{Way, Ways};
use self::work::{Sample, Work};
use crate::lab::{self, Lab, Options, Wire, measure};
use crate::{machine, tools};

/// Arguments of `cargo xtask bench ports`.
#[derive(clap::Args)]
pub(super) struct Args {
    /// How often everything is measured; the median counts.
    #[arg(long, default_value_t = 5, value_name = "N", value_parser = clap::value_parser!(u8).range(1..=50))]
    rounds: u8,
    /// Length of each measurement.
    #[arg(long, default_value_t = 2, value_name = "N", value_parser = clap::value_parser!(u64).range(1..=30))]
    seconds: u64,
    /// What the wire carries: packets of up to 64 KiB, or packets of the MTU as a physical one.
    #[arg(long, value_enum, default_value_t)]
    wire: Wire,
    /// How the agents use XDP.
    #[arg(long, default_value = "off", value_name = "MODE", value_parser = ["off", "native"])]
    xdp: String,
    /// Write every measurement to this file, too.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Take ovnet-agent and ovnet from here instead of building them.
    #[arg(long, value_name = "FOLDER")]
    bin_dir: Option<PathBuf>,
    /// Which lab, where there are several.
    #[arg(long, hide = true, default_value = "bench")]
    prefix: String,
}

/// What was measured of one way: by kind of work, the samples in the order of rounds.
type Samples = Vec<Vec<Sample>>;

/// Carries out `cargo xtask bench ports`.
pub(super) fn run(args: Args) -> Result<()> {
    // Before the build, which takes much longer than to find out.
    ensure!(tools::is_root(), "a lab is made of network namespaces and needs root: use sudo");
    let bin_dir = match &args.bin_dir {
        None => lab::build(true, true)?,
        Some(given) => {
            lab::bring(true)?;
            given.clone()
        }
    };
    measure::require()?;
    let lab = Lab::up(Options {
        prefix: args.prefix.clone(),
        hosts: 2,
        wire: args.wire,
        xdp: Some(args.xdp.clone()),
        docker: true,
        bin_dir: Some(bin_dir),
        ..Options::default()
    })
    .context("the lab does not come up")?;
    let Ways { ways, missing } = ways::set_up(&lab)?;
    for why in missing {
        println!("{why}");
    }
    // Fills caches and neighbour tables, and is not counted.
    in_turns(&lab, &ways, 0..1, 1)?;
    let before = ways::by_rules(&lab)?;
    let samples = in_turns(&lab, &ways, 1..=usize::from(args.rounds), args.seconds)?;
    let after = ways::by_rules(&lab)?;
    let setting = setting(&args, &lab);
    let rules = ways::rules_line(&ways, &samples, args.seconds, (&before, &after));
    println!("{}\n{setting}\n{rules}", table::render(&labels(&ways), &samples));
    if let Some(file) = &args.json {
        let report = json!({
            "setting": setting,
            "by_docker_rules": rules,
            "ways": labels(&ways),
            "work": Work::ALL,
            "samples": samples,
        });
        fs::write(file, serde_json::to_string_pretty(&report)?)
            .with_context(|| format!("cannot write {}", file.display()))?;
    }
    lab.down().context("the lab does not go down")
}

/// Measures all ways in turns, so many rounds.
fn in_turns(
    lab: &Lab,
    ways: &[Way],
    rounds: impl Iterator<Item = usize>,
    seconds: u64,
) -> Result<Vec<Samples>> {
    let terminal = std::io::stderr().is_terminal();
    let mut samples = vec![vec![Vec::new(); Work::ALL.len()]; ways.len()];
    for round in rounds {
        for (kind, work) in Work::ALL.into_iter().enumerate() {
            for turn in 0..ways.len() {
                let index = (round + turn) % ways.len();
                let Some(way) = ways.get(index) else { continue };
                if terminal {
                    let label = way.label;
                    eprint!("\r\x1b[2K  round {round}: {}, {label}", work.name());
                    // Progress that cannot be drawn is not worth a failure.
                    let _ = std::io::stderr().flush();
                }
                let sample = work::measure(lab, way, work, seconds)
                    .with_context(|| format!("{} of {}", work.name(), way.label))?;
                if let Some(samples) = samples.get_mut(index).and_then(|it| it.get_mut(kind)) {
                    samples.push(sample);
                }
            }
        }
    }
    if terminal {
        eprint!("\r\x1b[2K");
    }
    Ok(samples)
}

fn labels(ways: &[Way]) -> Vec<&'static str> {
    ways.iter().map(|way| way.label).collect()
}

/// Where and how it was measured: figures without it say nothing.
fn setting(args: &Args, lab: &Lab) -> String {
    let wire = match args.wire {
        Wire::Gso => "packets of up to 64 KiB on the wire (--wire gso)",
        Wire::Mtu => "packets of the MTU on the wire, GRO on (--wire mtu)",
    };
    let (mtu, Args { xdp, rounds, seconds, .. }) = (lab.options().mtu, args);
    let machine = machine::describe();
    format!("{wire}, MTU {mtu}, XDP {xdp}; {rounds} rounds of {seconds} s each; {machine}")
}
