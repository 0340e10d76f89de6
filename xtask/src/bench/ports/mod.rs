//! `cargo xtask bench ports`: a client outside the cluster asks a container by a published port.
//!
//! The contenders stand side by side in one lab, and every round measures each of them once, in an
//! order that changes from round to round: the machine's speed drifts, and a ratio of two
//! measurements that follow one another drifts less.

mod ways;
mod work;

use std::io::{IsTerminal as _, Write as _};
use std::path::PathBuf;

use anyhow::{Context as _, Result, ensure};

use self::ways::{Way, Ways};
use self::work::Work;
use super::report::{Better, Output, Report, Section};
use crate::lab::{self, Lab, Options, Wire, measure};
use crate::tools;

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
    /// Take ovnet-agent and ovnet from here instead of building them.
    #[arg(long, value_name = "FOLDER")]
    bin_dir: Option<PathBuf>,
    #[command(flatten)]
    output: Output,
    /// Which lab, where there are several.
    #[arg(long, hide = true, default_value = "bench")]
    prefix: String,
}

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
    let mut report = Report::new()?;
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
    let mut section = section(&args, &lab);
    section.notes.extend(missing);
    // Fills caches and neighbour tables, and is not counted.
    in_turns(&mut Section::default(), &lab, &ways, 0..1, 1)?;
    let before = ways::by_rules(&lab)?;
    in_turns(&mut section, &lab, &ways, 0..usize::from(args.rounds), args.seconds)?;
    let after = ways::by_rules(&lab)?;
    let rules = ways::rules_line(&ways, &section, args.seconds, (&before, &after));
    section.notes.push(rules);
    report.sections.push(section);
    args.output.write(&report)?;
    lab.down().context("the lab does not go down")
}

/// Measures all ways in turns, so many rounds.
fn in_turns(
    section: &mut Section,
    lab: &Lab,
    ways: &[Way],
    rounds: impl Iterator<Item = usize>,
    seconds: u64,
) -> Result<()> {
    let terminal = std::io::stderr().is_terminal();
    for round in rounds {
        for work in Work::ALL {
            for turn in 0..ways.len() {
                let index = (round + turn) % ways.len();
                let Some(way) = ways.get(index) else { continue };
                if terminal {
                    let label = way.label;
                    eprint!("\r\x1b[2K  round {}: {}, {label}", round + 1, work.name());
                    // Progress that cannot be drawn is not worth a failure.
                    let _ = std::io::stderr().flush();
                }
                let sample = work::measure(lab, way, work, seconds)
                    .with_context(|| format!("{} of {}", work.name(), way.label))?;
                let ((unit, in_unit), (piece, in_piece)) = (work.unit(), work.piece());
                let rate = (work.name(), unit, Better::Higher);
                section.add(way.label, rate, sample.rate / in_unit);
                let (name, unit) = (format!("{}, CPU", work.name()), format!("µs per {piece}"));
                let cpu = (name.as_str(), unit.as_str(), Better::Lower);
                section.add(way.label, cpu, sample.cpu * in_piece * 1e6);
            }
        }
    }
    if terminal {
        eprint!("\r\x1b[2K");
    }
    Ok(())
}

/// The section of these measurements, with nothing measured yet.
fn section(args: &Args, lab: &Lab) -> Section {
    let wire = match args.wire {
        Wire::Gso => "packets of up to 64 KiB on the wire (--wire gso)",
        Wire::Mtu => "packets of the MTU on the wire, GRO on (--wire mtu)",
    };
    let (mtu, Args { xdp, rounds, seconds, .. }) = (lab.options().mtu, args);
    let how = format!("{wire}, MTU {mtu}, XDP {xdp}; {rounds} rounds in turns, {seconds} s each.");
    Section {
        name: "Published ports, from a client outside".to_owned(),
        notes: vec![how],
        references: [ways::HOST_ITSELF, ways::RULES].map(str::to_owned).to_vec(),
        ..Section::default()
    }
}
