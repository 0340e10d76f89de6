//! `cargo xtask build`: the agent and its client, with the eBPF programs embedded.

use std::path::PathBuf;

use anyhow::{Context as _, Result, bail};

use crate::tools;

/// Arguments of `cargo xtask build`.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Optimised, as for an installation or a measurement.
    #[arg(long)]
    release: bool,
}

/// Builds, and says where the binaries are.
///
/// # Errors
/// A tool is missing, or the build fails; cargo has then said why.
pub(crate) fn run(args: &Args) -> Result<()> {
    let folder = agent(args.release)?;
    println!("built: {0}/ovnet-agent and {0}/ovnet", folder.display());
    Ok(())
}

/// Builds `ovnet-agent` and `ovnet`, with what that needs, and gives the folder they are in.
/// Cargo's own messages are shown; there are none but one line when all is up to date.
///
/// # Errors
/// A tool is missing, or the build fails; cargo has then said why.
pub(crate) fn agent(release: bool) -> Result<PathBuf> {
    tools::ensure(tools::TO_BUILD)?;
    let mut command = tools::cargo();
    command.args(["build", "--package", "ovnet-agent", "--bins"]);
    if release {
        command.arg("--release");
    }
    let status = command.status().context("cannot run cargo")?;
    if !status.success() {
        bail!("the build failed: cargo has said why");
    }
    Ok(tools::target().join(if release { "release" } else { "debug" }))
}
