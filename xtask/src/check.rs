//! `cargo xtask check`.

use anyhow::Result;

/// Runs all checks.
pub(crate) fn run() -> Result<()> {
    Ok(())
}
