//! Where the project's tools are, and the part of `setup` that a verb needs.

use std::env;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::LazyLock;

use anyhow::{Context as _, Result, bail};
use nix::unistd::geteuid;

use crate::setup;

/// Something a verb cannot do without.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Need {
    /// What crates with C in them are compiled with.
    Compilers,
    /// The source of `core`, which is compiled for the BPF target.
    RustSrc,
    /// bpf-linker of the version that fits the compiler's LLVM.
    BpfLinker,
    /// cargo-deny, which looks at the dependencies.
    CargoDeny,
    /// The commands that the lab and the tests run: ip, iperf3, tcpdump and others.
    Packages,
    /// A Docker daemon and its client, and what the lab's image is made from.
    Docker,
    /// A real Consul.
    Consul,
    /// What boots other kernels: qemu, and what makes their first file system.
    Emulator,
}

/// What building the agent needs.
pub(crate) const TO_BUILD: &[Need] = &[Need::Compilers, Need::RustSrc, Need::BpfLinker];

/// Brings those of `needs` that are missing; prints nothing when all are there.
///
/// # Errors
/// The first thing that is missing and cannot be brought, with what to do about it.
pub(crate) fn ensure(needs: &[Need]) -> Result<()> {
    for need in needs {
        if setup::present(*need).is_none() {
            setup::install(*need).with_context(|| format!("{} is missing", setup::name(*need)))?;
        }
    }
    Ok(())
}

/// The root of the workspace.
pub(crate) fn workspace() -> &'static Path {
    static ROOT: LazyLock<PathBuf> = LazyLock::new(|| {
        let xtask = Path::new(env!("CARGO_MANIFEST_DIR"));
        xtask.parent().unwrap_or(xtask).to_owned()
    });
    &ROOT
}

/// Cargo's target folder, absolute: `CARGO_TARGET_DIR` or `target` in the workspace.
pub(crate) fn target() -> &'static Path {
    static TARGET: LazyLock<PathBuf> = LazyLock::new(|| match env::var_os("CARGO_TARGET_DIR") {
        // Cargo takes a relative one from the current folder, and so does `join`.
        Some(folder) if !folder.is_empty() => {
            env::current_dir().unwrap_or_else(|_| workspace().to_owned()).join(folder)
        }
        _ => workspace().join("target"),
    });
    &TARGET
}

/// The folder that `setup` keeps its tools in. `ovnet-agent/build.rs` looks there too.
pub(crate) fn tools() -> PathBuf {
    target().join("tools")
}

/// `PATH` with the project's own tools first, for a command that is to find them.
pub(crate) fn path() -> OsString {
    let own = tools().join("bin");
    let inherited = env::var_os("PATH").unwrap_or_default();
    let parts = std::iter::once(own).chain(env::split_paths(&inherited));
    env::join_paths(parts).unwrap_or(inherited)
}

/// Finds a command among the project's tools, then on `PATH`, then where root's commands are,
/// which a user's `PATH` often lacks.
pub(crate) fn find(command: &str) -> Option<PathBuf> {
    let mut folders: Vec<PathBuf> = env::split_paths(&path()).collect();
    folders.extend(["/usr/local/sbin", "/usr/sbin", "/sbin"].map(PathBuf::from));
    let folders = env::join_paths(folders).ok()?;
    which::which_in(command, Some(folders), workspace()).ok()
}

/// The Consul to run.
///
/// # Errors
/// There is none, with what to do about it.
pub(crate) fn consul() -> Result<PathBuf> {
    ensure(&[Need::Consul])?;
    find("consul").context("consul is not there after its installation")
}

/// Whether this process is root's.
pub(crate) fn is_root() -> bool {
    geteuid().is_root()
}

/// A cargo command in the workspace, free of what the cargo that started this process left in
/// the environment and what would make the inner one build again.
pub(crate) fn cargo() -> Command {
    let mut command = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    for (name, _) in env::vars_os() {
        let name_text = name.to_string_lossy();
        if name_text.starts_with("CARGO_PKG_") || name_text.starts_with("CARGO_MANIFEST_") {
            command.env_remove(&name);
        }
    }
    command.current_dir(workspace()).env("CARGO_TARGET_DIR", target()).env("PATH", path());
    command
}

/// Runs a command that ends at once and gives its standard output, trimmed.
///
/// # Errors
/// The command cannot be started or fails; what it wrote to standard error is told.
pub(crate) fn output(command: &mut Command) -> Result<String> {
    let shown = show(command);
    let output =
        command.stdin(Stdio::null()).output().with_context(|| format!("cannot run `{shown}`"))?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        bail!("`{shown}` failed ({}): {}", output.status, said.trim().replace('\n', "; "));
    }
    Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

/// A command as one would type it.
pub(crate) fn show(command: &Command) -> String {
    let mut shown = Path::new(command.get_program())
        .file_name()
        .unwrap_or_default()
        .to_string_lossy()
        .into_owned();
    for argument in command.get_args() {
        shown.push(' ');
        shown.push_str(&argument.to_string_lossy());
    }
    shown
}

/// The toolchain that rust-toolchain.toml pins.
pub(crate) fn toolchain() -> &'static str {
    include_str!("../../rust-toolchain.toml")
        .lines()
        .find_map(|line| line.strip_prefix("channel = \"")?.strip_suffix('"'))
        .unwrap_or("stable")
}
