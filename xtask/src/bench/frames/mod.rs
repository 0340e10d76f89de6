//! `cargo xtask bench frames`: how many frames a processor takes in, and what each program takes of
//! its time.
//!
//! Frames are given to an XDP program as a driver would (`BPF_PROG_TEST_RUN` over live frames), on
//! the uplink of a host of the lab, all on one processor: making them, the program, the stack and
//! the container's end. A program that always passes stands for a host without XDP: its frames enter
//! the stack as an skb, and TC or the kernel's vxlan device has them. The contenders take turns, for
//! the machine's speed drifts.
//!
//! What that leaves out favours those without XDP: their frames enter the stack in lists and without
//! GRO, which a driver's would go through first, and the host of the kernel's vxlan device has neither
//! connection tracking nor netfilter on its bridge.

mod bpf;
mod contenders;
mod live;
mod packet;

use std::io::{IsTerminal as _, Write as _};
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};

use self::contenders::{Contender, KERNEL, NOTHING, TC};
use super::report::{Better, Output, Report, Section};
use crate::lab::{self, Lab, Options};
use crate::tools;

/// Rounds in which the programs' shares are read; they differ little.
const PROGRAM_ROUNDS: usize = 3;

/// Arguments of `cargo xtask bench frames`.
#[derive(clap::Args)]
pub(super) struct Args {
    /// How often everything is measured; the median counts.
    #[arg(long, default_value_t = 9, value_name = "N", value_parser = clap::value_parser!(u8).range(1..=50))]
    rounds: u8,
    /// Length of each measurement.
    #[arg(long, default_value_t = 500, value_name = "N", value_parser = clap::value_parser!(u64).range(10..=10_000))]
    milliseconds: u64,
    /// Bytes of UDP payload in each frame; 18 make an inner frame of 60 bytes, the shortest there is.
    #[arg(long, default_value_t = 18, value_name = "N", value_parser = clap::value_parser!(u16).range(0..=1400))]
    payload: u16,
    /// Only the contenders whose name begins so: to profile one.
    #[arg(long, value_name = "NAME")]
    only: Option<String>,
    #[command(flatten)]
    output: Output,
    /// Take ovnet-agent and ovnet from here instead of building them.
    #[arg(long, value_name = "FOLDER")]
    bin_dir: Option<PathBuf>,
    /// Which lab, where there are several.
    #[arg(long, hide = true, default_value = "bench-frames")]
    prefix: String,
}

/// Carries out `cargo xtask bench frames`.
pub(super) fn run(args: Args) -> Result<()> {
    args.output.check()?;
    // Before the build, which takes much longer than to find out.
    ensure!(tools::is_root(), "a lab is made of network namespaces and needs root: use sudo");
    let bin_dir = match &args.bin_dir {
        None => lab::build(true, false)?,
        Some(given) => {
            lab::bring(false)?;
            given.clone()
        }
    };
    let mut report = Report::new()?;
    let lab = Lab::up(Options {
        prefix: args.prefix.clone(),
        hosts: 2,
        xdp: Some("native".to_owned()),
        agent_args: ["--egress", "off"].map(str::to_owned).to_vec(),
        bin_dir: Some(bin_dir),
        ..Options::default()
    })
    .context("the lab does not come up")?;
    let mut contenders = contenders::set_up(&lab, args.payload)?;
    if let Some(only) = &args.only {
        contenders.retain(|it| it.label.starts_with(only.as_str()));
        ensure!(!contenders.is_empty(), "no contender's name begins with {only:?}");
    }
    let time = Duration::from_millis(args.milliseconds);
    let frames = in_turns(&lab, &contenders, &args, time)?;
    let programs = in_programs(&lab, &contenders, usize::from(args.rounds).min(PROGRAM_ROUNDS))?;
    lab.down().context("the lab does not go down")?;
    report.sections.extend([frames, programs]);
    args.output.write(&report)
}

/// Measures all contenders in turns.
fn in_turns(lab: &Lab, contenders: &[Contender], args: &Args, time: Duration) -> Result<Section> {
    let terminal = std::io::stderr().is_terminal();
    let mut section = Section {
        name: "Frames, one processor".to_owned(),
        notes: notes(args),
        references: [KERNEL, TC, NOTHING].map(str::to_owned).to_vec(),
        series: Vec::new(),
    };
    for round in 0..usize::from(args.rounds) {
        for turn in 0..contenders.len() {
            let Some(contender) = contenders.get((round + turn) % contenders.len()) else {
                continue;
            };
            let Contender { label, kind, .. } = contender;
            if terminal {
                eprint!("\r\x1b[2K  round {}: {}, {label}", round + 1, kind.name());
                // Progress that cannot be drawn is not worth a failure.
                let _ = std::io::stderr().flush();
            }
            let millions = live::measure(lab, contender, time)? / 1e6;
            section.add(label, (kind.name(), "million/s", Better::Higher), millions);
        }
    }
    if terminal {
        eprint!("\r\x1b[2K");
    }
    Ok(section)
}

/// What of it each program takes, by the kernel's statistics.
fn in_programs(lab: &Lab, contenders: &[Contender], rounds: usize) -> Result<Section> {
    let notes = [
        "The kernel's run time statistics; a run of `always`, which does nothing, is what they take \
         themselves.",
    ];
    let mut section = Section {
        name: "Programs, as they ran over these frames".to_owned(),
        notes: notes.map(str::to_owned).to_vec(),
        ..Section::default()
    };
    for _ in 0..rounds {
        for contender in contenders {
            let Contender { label, kind, .. } = contender;
            let work = format!("{}: {label}", kind.name());
            for share in live::shares(lab, contender)? {
                let what = (work.as_str(), "ns a run", Better::Lower);
                section.add(&share.program, what, share.nanoseconds);
            }
        }
    }
    Ok(section)
}

/// What one must know to read the figures.
fn notes(args: &Args) -> Vec<String> {
    let Args { milliseconds, payload, .. } = args;
    vec![
        format!(
            "Frames of {} bytes, {payload} of them in UDP in VXLAN; each round gives a contender as \
             many as take about {milliseconds} ms. One processor does it all, from making a frame to \
             the container's end; the time is the kernel's own of the test run.",
            92 + payload
        ),
        "Counted where they arrive, at the container's eth0, by a rule that drops them there; drops \
         are counted by ovnet, and by UDP where nobody listens."
            .to_owned(),
        "Without XDP frames enter the stack in lists and without GRO, which a driver's would go \
         through first; the kernel's vxlan has neither connection tracking nor netfilter on its \
         bridge, and lets in what an unknown VTEP sends."
            .to_owned(),
    ]
}
