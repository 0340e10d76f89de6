//! `cargo xtask soak`: everything that comes and goes, and everything that dies, at random for as
//! long as one likes. The test `faults_soak` does it; this gives it time and a seed.

use std::process::Stdio;
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, Result, bail};

use crate::build_verb;
use crate::tools::{self, Need};

/// Arguments of `cargo xtask soak`.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// How long, in minutes.
    #[arg(long, default_value_t = 30, value_parser = clap::value_parser!(u64).range(1..=240))]
    minutes: u64,
    /// The plan to follow, as an earlier soak printed it; another one each time where absent.
    #[arg(long)]
    seed: Option<u64>,
}

/// Runs the soak, showing what it does as it goes.
///
/// # Errors
/// A tool is missing, or something did not agree or grew; the soak has then said what.
pub(crate) fn run(args: &Args) -> Result<()> {
    tools::ensure(&[tools::TO_BUILD, &[Need::Packages, Need::Consul]].concat())?;
    build_verb::agent(false)?;
    let now = SystemTime::now().duration_since(UNIX_EPOCH).context("the clock is before 1970")?;
    let seed = args.seed.unwrap_or(now.as_secs());
    println!("again: cargo xtask soak --minutes {} --seed {seed}", args.minutes);
    let mut command = tools::cargo();
    command
        .args(["test", "--package", "ovnet-tests", "--test", "faults_soak"])
        .args(["--", "--nocapture", "--test-threads=1"])
        .env("OVNET_SOAK_SECONDS", (args.minutes * 60).to_string())
        .env("OVNET_SOAK_SEED", seed.to_string())
        // A soak that was skipped is no soak.
        .env("OVNET_REQUIRE_ALL", "1")
        .stdin(Stdio::null());
    let status = command.status().context("cannot run cargo")?;
    if !status.success() {
        bail!("the soak failed: see above");
    }
    Ok(())
}
