//! `cargo xtask`: the project's own verbs, one module each.
//!
//! Nothing here depends on the agent, so that `cargo xtask setup` builds before the tools exist
//! that the agent's build needs. A library, because tests and benchmarks use the lab too.

mod bench;
mod build_verb;
mod check;
mod demo;
mod kernels;
pub mod lab;
mod load;
mod machine;
mod progress;
mod report;
mod setup;
mod soak;
pub mod stand_in;
mod test;
mod tools;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// The project's own verbs. Each brings the tools it needs first; `setup` brings them all.
#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
struct Cli {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// Bring what building, testing and the lab need, and say what was done.
    Setup,
    /// Build the agent and its client, with the eBPF programs embedded.
    Build(build_verb::Args),
    /// Hosts as network namespaces on this machine.
    Lab(lab::Args),
    /// Three hosts, containers, pings and throughput, in one go.
    Demo(demo::Args),
    /// Measure, next to what else does the same.
    Bench(Box<bench::Args>),
    /// Run the tests, by layer.
    Test(test::Args),
    /// Attach, detach, publish and kill at random for half an hour, then compare everything.
    Soak(soak::Args),
    /// What must be clean before a change goes in: formatting, lints, documentation, house rules,
    /// dependencies.
    Check(check::Args),
    /// Servers and clients of measurements.
    #[command(hide = true)]
    Load(load::Args),
}

/// Reads the command line and carries out its verb.
pub fn main() -> ExitCode {
    let done = match Cli::parse().verb {
        Verb::Setup => setup::run(),
        Verb::Build(args) => build_verb::run(&args),
        Verb::Lab(args) => lab::run(args),
        Verb::Demo(args) => demo::run(args),
        Verb::Bench(args) => bench::run(*args),
        Verb::Test(args) => test::run(&args),
        Verb::Soak(args) => soak::run(&args),
        Verb::Check(args) => check::run(&args),
        Verb::Load(args) => load::run(args),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
