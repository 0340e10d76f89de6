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
mod table;

use std::fs;
use std::io::{IsTerminal as _, Write as _};
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use serde_json::json;

use self::contenders::Contender;
use self::live::Sample;
use self::table::Measured;
use crate::lab::{self, Lab, Options};
use crate::{machine, tools};

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
    /// Write every measurement to this file, too.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Take ovnet-agent and ovnet from here instead of building them.
    #[arg(long, value_name = "FOLDER")]
    bin_dir: Option<PathBuf>,
    /// Which lab, where there are several.
    #[arg(long, hide = true, default_value = "bench-frames")]
    prefix: String,
}

/// Carries out `cargo xtask bench frames`.
pub(super) fn run(args: Args) -> Result<()> {
    // Before the build, which takes much longer than to find out.
    ensure!(tools::is_root(), "a lab is made of network namespaces and needs root: use sudo");
    let bin_dir = match &args.bin_dir {
        None => lab::build(true, false)?,
        Some(given) => {
            lab::bring(false)?;
            given.clone()
        }
    };
    let lab = Lab::up(Options {
        prefix: args.prefix.clone(),
        hosts: 2,
        xdp: Some("native".to_owned()),
        agent_args: ["--egress", "off"].map(str::to_owned).to_vec(),
        bin_dir: Some(bin_dir),
        ..Options::default()
    })
    .context("the lab does not come up")?;
    let contenders = contenders::set_up(&lab, args.payload)?;
    let time = Duration::from_millis(args.milliseconds);
    let samples = in_turns(&lab, &contenders, usize::from(args.rounds), time)?;
    let measured = contenders
        .iter()
        .zip(samples)
        .map(|(contender, samples)| {
            let Contender { label, kind, .. } = *contender;
            Ok(Measured { label, kind, samples, shares: live::shares(&lab, contender)? })
        })
        .collect::<Result<Vec<_>>>()?;
    let setting = setting(&args);
    println!("{}\n{setting}", table::render(&measured));
    if let Some(file) = &args.json {
        let all = measured.iter().map(|Measured { label, kind, samples, shares }| {
            json!({ "work": kind.name(), "contender": label, "samples": samples, "programs": shares })
        });
        let report = json!({ "setting": setting, "frames": all.collect::<Vec<_>>() });
        fs::write(file, serde_json::to_string_pretty(&report)?)
            .with_context(|| format!("cannot write {}", file.display()))?;
    }
    lab.down().context("the lab does not go down")
}

/// Measures all contenders in turns, so many rounds; the samples of each in the order of rounds.
fn in_turns(
    lab: &Lab,
    contenders: &[Contender],
    rounds: usize,
    time: Duration,
) -> Result<Vec<Vec<Sample>>> {
    let terminal = std::io::stderr().is_terminal();
    let mut samples = vec![Vec::new(); contenders.len()];
    for round in 0..rounds {
        for turn in 0..contenders.len() {
            let index = (round + turn) % contenders.len();
            let (Some(contender), Some(samples)) = (contenders.get(index), samples.get_mut(index))
            else {
                continue;
            };
            if terminal {
                eprint!("\r\x1b[2K  round {}: {}", round + 1, contender.label);
                // Progress that cannot be drawn is not worth a failure.
                let _ = std::io::stderr().flush();
            }
            samples.push(live::measure(lab, contender, time)?);
        }
    }
    if terminal {
        eprint!("\r\x1b[2K");
    }
    Ok(samples)
}

/// Where and how it was measured: figures without it say nothing.
fn setting(args: &Args) -> String {
    let Args { rounds, milliseconds, payload, .. } = args;
    let machine = machine::describe();
    format!(
        "one processor does it all, from making a frame to the container's end; {payload} bytes in \
         UDP in VXLAN, frames of {} bytes; {rounds} rounds of {milliseconds} ms each\n\
         counted where they arrive, at the container's eth0 by a rule that drops them there; drops \
         by ovnet's counters, and by UDP's where nobody listens; the kernel's own statistics are about all of \
         what a run of `always`, which does nothing, takes\n{machine}",
        92 + payload
    )
}
