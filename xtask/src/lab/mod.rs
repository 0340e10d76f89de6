//! `cargo xtask lab`: being written.

use anyhow::{Result, bail};

/// Arguments of `cargo xtask lab`.
#[derive(clap::Args)]
pub(crate) struct Args {}

/// Carries out the verb.
pub(crate) fn run(_args: Args) -> Result<()> {
    bail!("`cargo xtask lab` is being written");
}
