//! `cargo xtask demo`: being written.

use anyhow::{Result, bail};

/// Arguments of `cargo xtask demo`.
#[derive(clap::Args)]
pub(crate) struct Args {}

/// Carries out the verb.
pub(crate) fn run(_args: Args) -> Result<()> {
    bail!("`cargo xtask demo` is being written");
}
