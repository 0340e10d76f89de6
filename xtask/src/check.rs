//! `cargo xtask check`: what must be clean before a change goes in. CI runs the same.

mod rules;

use std::process::Command;
use std::time::Instant;

use anyhow::{Result, bail};

use crate::tools::Need;
use crate::{progress, tools};

/// Arguments of `cargo xtask check`.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Also whether an advisory is known of a dependency, which fetches the database of them.
    #[arg(long)]
    advisories: bool,
}

/// What a check found; empty when all is well.
#[derive(Default)]
struct Findings {
    /// These fail the check.
    errors: Vec<String>,
    /// These are only shown.
    warnings: Vec<String>,
}

/// One line of the list: its name and how to run it.
type Check = (&'static str, fn() -> Result<Findings>);

const CHECKS: &[Check] = &[
    ("formatting", formatting),
    ("lint settings in every crate", rules::lint_settings),
    ("file lengths", rules::file_lengths),
    ("one folder per interface", rules::boundaries),
    ("clippy, host", clippy_host),
    ("clippy, BPF target", clippy_bpf),
    ("documentation", documentation),
    ("dependencies", dependencies),
];

/// Only where asked for: its answer depends on the day, and on a server that is not ours.
const ADVISORIES: Check = ("advisories of dependencies", advisories);

/// Runs all checks, also after one that failed, and lists them with what they found.
///
/// # Errors
/// A check failed, or a tool is missing.
pub(crate) fn run(args: &Args) -> Result<()> {
    tools::ensure(tools::TO_BUILD)?;
    tools::ensure(&[Need::CargoDeny])?;
    let mut failed = Vec::new();
    for (name, check) in CHECKS.iter().chain(args.advisories.then_some(&ADVISORIES)) {
        let started = Instant::now();
        let Findings { errors, warnings } = check()?;
        let verdict = if errors.is_empty() { "ok" } else { "FAILED" };
        println!("{verdict:<6}  {name:<30}  {}", progress::duration(started.elapsed()));
        for line in &warnings {
            println!("        warning: {line}");
        }
        for line in &errors {
            println!("        {line}");
        }
        if !errors.is_empty() {
            failed.push(*name);
        }
    }
    if !failed.is_empty() {
        bail!("not clean: {}", failed.join("; "));
    }
    Ok(())
}

fn formatting() -> Result<Findings> {
    let mut command = tools::cargo();
    command.args(["fmt", "--all", "--", "--check", "--color", "never"]);
    cargo("formatting", command)
}

fn clippy_host() -> Result<Findings> {
    let mut command = tools::cargo();
    command.args(["clippy", "--workspace", "--all-targets", "--keep-going"]);
    clippy("clippy, host", command)
}

/// The host's clippy sees only the stub that the programs are there.
fn clippy_bpf() -> Result<Findings> {
    let mut command = tools::cargo();
    let arch = std::env::consts::ARCH;
    command
        .args(["clippy", "--package", "ovnet-ebpf", "--release", "-Z", "build-std=core"])
        .args([
            "--target",
            if cfg!(target_endian = "big") { "bpfeb-unknown-none" } else { "bpfel-unknown-none" },
        ])
        .env("RUSTC_BOOTSTRAP", "1")
        .env("CARGO_ENCODED_RUSTFLAGS", format!("--cfg=bpf_target_arch=\"{arch}\""))
        // The variable above makes everything build anew; apart, it leaves the rest alone.
        .env("CARGO_TARGET_DIR", tools::target().join("bpf-clippy"));
    clippy("clippy, BPF target", command)
}

fn documentation() -> Result<Findings> {
    let mut command = tools::cargo();
    command.args(["doc", "--no-deps", "--workspace", "--document-private-items"]);
    command.env("RUSTDOCFLAGS", "-D warnings");
    cargo("documentation", command)
}

/// Licences, versions and origins of the dependencies, by what deny.toml says.
fn dependencies() -> Result<Findings> {
    deny("dependencies", &["licenses", "bans", "sources"])
}

fn advisories() -> Result<Findings> {
    deny("advisories", &["advisories"])
}

fn deny(label: &str, what: &[&str]) -> Result<Findings> {
    let mut command = tools::cargo();
    command.args(["deny", "--locked", "--color", "never", "check", "--hide-inclusion-graph"]);
    command.args(what);
    cargo(label, command)
}

/// Runs clippy, for which a warning is a finding too. `-D warnings` would stop at the first crate
/// that has one, and hide those of the crates that depend on it.
fn clippy(label: &str, mut command: Command) -> Result<Findings> {
    let outcome = progress::watch(label, &mut command)?;
    let warns = |line: &String| {
        // About a dependency, and nothing that a change here could mend.
        line.starts_with("warning: ") && !line.contains("a future version of Rust")
    };
    if outcome.status.success() && !outcome.lines.iter().any(warns) {
        return Ok(Findings::default());
    }
    Ok(findings(&command, outcome.lines))
}

/// Runs cargo; what it printed is the finding when it fails.
fn cargo(label: &str, mut command: Command) -> Result<Findings> {
    let outcome = progress::watch(label, &mut command)?;
    if outcome.status.success() {
        return Ok(Findings::default());
    }
    Ok(findings(&command, outcome.lines))
}

fn findings(command: &Command, lines: Vec<String>) -> Findings {
    let mut errors = vec![format!("`{}`:", tools::show(command))];
    errors.extend(lines.into_iter().filter(|line| {
        let progress = ["Compiling ", "Checking ", "Documenting ", "Finished ", "Blocking "];
        !progress.iter().any(|word| line.trim_start().starts_with(word))
    }));
    Findings { errors, warnings: Vec::new() }
}
