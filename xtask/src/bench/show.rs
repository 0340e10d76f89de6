//! `cargo xtask bench show`: reports that were written before, as tables, plots and Markdown again;
//! several as one.

use std::path::PathBuf;

use anyhow::{Context as _, Result};

use super::report::{Output, Report};

/// Arguments of `cargo xtask bench show`.
#[derive(clap::Args)]
pub(super) struct Args {
    /// Reports, as `--json` wrote them. Of several the sections are put one after the other, under
    /// the setting of the first.
    #[arg(required = true)]
    reports: Vec<PathBuf>,
    #[command(flatten)]
    output: Output,
}

/// Shows them.
///
/// # Errors
/// A report cannot be read, or a file cannot be written.
pub(super) fn run(args: &Args) -> Result<()> {
    args.output.check()?;
    let reports = args.reports.iter().map(|file| Report::read(file)).collect::<Result<Vec<_>>>()?;
    let mut reports = reports.into_iter();
    let mut whole = reports.next().context("no report")?;
    whole.sections.extend(reports.flat_map(|report| report.sections));
    args.output.write(&whole)
}
