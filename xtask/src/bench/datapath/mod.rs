//! `cargo xtask bench`: from a container on one host to a container on another, by ovnet and by what
//! else does it.
//!
//! Each contender has hosts of its own, with nothing on them that is not its own: what Docker and the
//! agents put into a host would cost the others something. The labs stand side by side, and every
//! round measures each contender once, in an order that changes from round to round: the machine's
//! speed drifts, and a ratio of two measurements that follow one another drifts less.

mod contenders;
mod labs;
mod work;

use std::io::{IsTerminal as _, Write as _};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, ensure};
use clap::ValueEnum as _;

use self::contenders::{Contender, Kind};
use self::labs::Labs;
use self::work::Work;
use super::report::{Output, Report, Section};
use crate::lab::measure::{self, Pin};
use crate::lab::{self, Wire};
use crate::tools;

/// Arguments of `cargo xtask bench`.
#[derive(clap::Args)]
// Beside those of `bench`, whose type has the same name.
#[group(id = "datapath")]
pub(super) struct Args {
    /// The most important kinds of work in under two minutes.
    #[arg(long, conflicts_with = "full")]
    quick: bool,
    /// Everything, on both wires and with both MTUs, for the record.
    #[arg(long)]
    full: bool,
    /// What the wire carries: packets of up to 64 KiB, or packets of the MTU as a physical one.
    #[arg(long, value_enum, default_value_t, conflicts_with = "full")]
    wire: Wire,
    /// MTU of the wire; the containers' is 50 less.
    #[arg(long, default_value_t = 1500, value_name = "BYTES", conflicts_with = "full",
        value_parser = clap::value_parser!(u32).range(1500..=65_000))]
    mtu: u32,
    /// Only these contenders.
    #[arg(long, value_enum, value_delimiter = ',', value_name = "WHO")]
    contenders: Vec<Kind>,
    /// Only these kinds of work.
    #[arg(long, value_enum, value_delimiter = ',', value_name = "WORK")]
    work: Vec<Work>,
    /// How often everything is measured; the median counts. 5, or 3 with --quick.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u8).range(1..=50))]
    rounds: Option<u8>,
    /// Length of each measurement. 2, or 1 with --quick.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..=30))]
    seconds: Option<u64>,
    /// Which processors sender and receiver run on, for every kind of work. Where nothing is said,
    /// both on one, but for eight flows and both directions.
    #[arg(long, value_enum)]
    pin: Option<Pin>,
    /// Take ovnet-agent and ovnet from here instead of building them.
    #[arg(long, value_name = "FOLDER")]
    bin_dir: Option<PathBuf>,
    /// Further arguments of the agents: `--agent-arg=--ports=kernel`.
    #[arg(long, value_name = "ARGUMENT", allow_hyphen_values = true)]
    agent_arg: Vec<String>,
    #[command(flatten)]
    output: Output,
    /// Which labs, where there are several.
    #[arg(long, hide = true, default_value = "bench")]
    prefix: String,
}

/// One wire, and what is measured on it.
struct Setting {
    wire: Wire,
    mtu: u32,
    work: Vec<Work>,
}

/// How often, how long and where.
#[derive(Clone, Copy)]
pub(super) struct Plan {
    rounds: usize,
    seconds: u64,
    pin: Option<Pin>,
}

/// Carries out `cargo xtask bench`.
pub(super) fn run(args: &Args) -> Result<()> {
    // Before the build, which takes much longer than to find out.
    ensure!(tools::is_root(), "labs are made of network namespaces and need root: use sudo");
    args.output.check()?;
    let kinds = args.kinds();
    let docker = kinds.contains(&Kind::Docker);
    let bin_dir = match &args.bin_dir {
        None if kinds.iter().any(|kind| kind.is_ours()) => Some(lab::build(true, docker)?),
        given => {
            lab::bring(docker)?;
            given.clone()
        }
    };
    measure::require()?;
    let mut report = Report::new()?;
    for setting in args.settings() {
        let section =
            measure(args, &setting, &kinds, bin_dir.as_deref()).with_context(|| setting.name())?;
        report.sections.push(section);
    }
    args.output.write(&report)
}

impl Args {
    fn kinds(&self) -> Vec<Kind> {
        let all = [Kind::Host, Kind::Tc, Kind::Xdp, Kind::Kernel, Kind::Docker];
        let wanted = |kind: &Kind| self.contenders.is_empty() || self.contenders.contains(kind);
        all.into_iter().filter(wanted).collect()
    }

    fn settings(&self) -> Vec<Setting> {
        let of = |wire, mtu, all: &[Work]| {
            let wanted = |work: &Work| self.work.is_empty() || self.work.contains(work);
            let work = all.iter().copied().filter(wanted).collect();
            Setting { wire, mtu, work }
        };
        if !self.full {
            let all = if self.quick && self.work.is_empty() { Work::QUICK } else { Work::ALL };
            return vec![of(self.wire, self.mtu, all)];
        }
        // What fits into a packet of 1500 bytes says nothing new with 9000.
        let all = [
            of(Wire::Gso, 1500, Work::ALL),
            of(Wire::Mtu, 1500, Work::ALL),
            of(Wire::Gso, 9000, Work::FLOWS),
            of(Wire::Mtu, 9000, Work::FLOWS),
        ];
        all.into_iter().filter(|setting| !setting.work.is_empty()).collect()
    }

    fn plan(&self) -> Plan {
        let (rounds, seconds) = if self.quick { (3, 1) } else { (5, 2) };
        Plan {
            rounds: usize::from(self.rounds.unwrap_or(rounds)),
            seconds: self.seconds.unwrap_or(seconds),
            pin: self.pin,
        }
    }
}

impl Setting {
    fn name(&self) -> String {
        let wire = match self.wire {
            Wire::Gso => "gso",
            Wire::Mtu => "mtu",
        };
        format!("--wire {wire}, MTU {}", self.mtu)
    }
}

/// Makes the labs of a setting, measures all in turns, and removes the labs.
fn measure(
    args: &Args,
    setting: &Setting,
    kinds: &[Kind],
    bin_dir: Option<&Path>,
) -> Result<Section> {
    let plan = args.plan();
    let labs = Labs::up(kinds, |kind| kind.options(args, setting, bin_dir))?;
    let contenders = labs
        .all()
        .map(|(kind, lab)| {
            Contender::set_up(kind, lab, &setting.work, plan)
                .with_context(|| kind.label().to_owned())
        })
        .collect::<Result<Vec<_>>>()?;
    let mut section = Section {
        name: setting.name(),
        notes: notes(setting, plan, kinds),
        references: [Kind::Host, Kind::Docker].map(|kind| kind.label().to_owned()).to_vec(),
        ..Section::default()
    };
    // Fills caches and neighbour tables, and is not counted.
    let warm_up = Plan { rounds: 1, seconds: 1, ..plan };
    let first: Vec<Work> = setting.work.first().copied().into_iter().collect();
    in_turns(&mut Section::default(), &contenders, &first, warm_up)?;
    in_turns(&mut section, &contenders, &setting.work, plan)?;
    drop(contenders);
    labs.down()?;
    Ok(section)
}

fn notes(setting: &Setting, plan: Plan, kinds: &[Kind]) -> Vec<String> {
    let wire = match setting.wire {
        Wire::Gso => {
            "The wire carries packets of up to 64 KiB, which nobody segments or checksums."
        }
        Wire::Mtu => {
            "The wire carries packets of the MTU with finished checksums, merged again by the receiver \
             (GRO)."
        }
    };
    let Plan { rounds, seconds, .. } = plan;
    let mut notes = vec![
        wire.to_owned(),
        format!("{rounds} rounds in turns, {seconds} s each."),
        match plan.pin {
            None => "Sender and receiver are pinned to one processor, the same for all, but for eight flows \
                 and both directions, which have all of them."
                .to_owned(),
            Some(pin) => {
                let pin = pin.to_possible_value();
                let name = pin.as_ref().map(|it| it.get_name()).unwrap_or_default();
                format!("Sender and receiver run where --pin {name} puts them.")
            },
        },
        "Both hosts, the wire between them and the load share the machine's processors: CPU is the work \
         of all of them together, sender and receiver."
            .to_owned(),
    ];
    if kinds.contains(&Kind::Xdp) {
        notes.push(
            "Native XDP on a veth has its peer send packets of the MTU, and here with finished \
             checksums, since it sees what a physical wire would carry."
                .to_owned(),
        );
    }
    notes
}

/// Measures all contenders in turns.
fn in_turns(
    section: &mut Section,
    contenders: &[Contender<'_>],
    work: &[Work],
    plan: Plan,
) -> Result<()> {
    let terminal = std::io::stderr().is_terminal();
    for round in 0..plan.rounds {
        for work in work {
            for turn in 0..contenders.len() {
                let Some(contender) = contenders.get((round + turn) % contenders.len()) else {
                    continue;
                };
                let label = contender.kind.label();
                if terminal {
                    let name = work.name();
                    eprint!("\r\x1b[2K  round {} of {}: {name}, {label}", round + 1, plan.rounds);
                    // Progress that cannot be drawn is not worth a failure.
                    let _ = std::io::stderr().flush();
                }
                let figures = work
                    .measure(contender, plan)
                    .with_context(|| format!("{} of {label}", work.name()))?;
                for figure in figures {
                    section.add(label, (&figure.work, figure.unit, figure.better), figure.value);
                }
            }
        }
    }
    if terminal {
        eprint!("\r\x1b[2K");
    }
    Ok(())
}
