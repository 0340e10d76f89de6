//! `cargo xtask bench`: what the project claims about its speed, measured next to what else does
//! the same, in one lab and in turns.

mod compare;
mod control;
mod cpu;
mod datapath;
mod frames;
mod ports;
mod report;
mod show;

use anyhow::Result;
use clap::Subcommand;

/// Arguments of `cargo xtask bench`.
#[derive(clap::Args)]
#[command(args_conflicts_with_subcommands = true)]
pub(crate) struct Args {
    #[command(subcommand)]
    what: Option<What>,
    #[command(flatten)]
    datapath: datapath::Args,
}

#[derive(Subcommand)]
enum What {
    /// What agents and Consul have to do in clusters of several sizes, and how long news take.
    Control(control::Args),
    /// From outside to a container's published port: ovnet, Docker's rules, docker-proxy.
    Ports(ports::Args),
    /// Frames a processor takes in and drops, and what each program takes of its time.
    Frames(frames::Args),
    /// What got slower or faster from one report to another, beyond the noise.
    Compare(compare::Args),
    /// Reports that were written before, as tables, plots and Markdown again; several as one.
    Show(show::Args),
}

/// Carries out a verb of `cargo xtask bench`.
///
/// # Errors
/// What failed; the lab is removed all the same.
pub(crate) fn run(args: Args) -> Result<()> {
    let Some(what) = args.what else { return datapath::run(&args.datapath) };
    match what {
        What::Control(args) => control::run(args),
        What::Ports(args) => ports::run(args),
        What::Frames(args) => frames::run(args),
        What::Compare(args) => compare::run(&args),
        What::Show(args) => show::run(&args),
    }
}
