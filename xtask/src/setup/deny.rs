//! cargo-deny, which `cargo xtask check` asks about the dependencies.

use std::fs;
use std::process::Command;

use anyhow::{Context as _, Result};

use crate::{progress, tools};

/// The newest that builds with the pinned toolchain.
const VERSION: &str = "0.20.2";

/// Path and version of the cargo-deny that is there, when it is the right one.
pub(super) fn present() -> Option<String> {
    let deny = tools::find("cargo-deny")?;
    let version = tools::output(Command::new(&deny).arg("--version")).ok()?;
    (version.split_whitespace().nth(1) == Some(VERSION))
        .then(|| format!("{}, {VERSION}", deny.display()))
}

/// Compiles it into the project's own folder, without optimisation: that takes half as long, and a
/// check is a matter of seconds either way.
pub(super) fn install() -> Result<String> {
    let tools = tools::tools();
    let build = tools.join("build");
    let mut command = tools::cargo();
    command
        .args(["install", "cargo-deny", "--version", VERSION, "--locked", "--force", "--debug"])
        .arg("--root")
        .arg(&tools)
        .env("CARGO_PROFILE_DEV_DEBUG", "0")
        .env("CARGO_TARGET_DIR", &build);
    let log = tools.join("log/cargo-deny");
    progress::run(&format!("compiling cargo-deny {VERSION}"), &mut command, &log)?;
    fs::remove_dir_all(&build).with_context(|| format!("removing {}", build.display()))?;
    Ok(format!("cargo-deny {VERSION} compiled"))
}
