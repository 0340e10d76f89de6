//! What a lab needs of the machine before anything is made.

use std::env;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, bail, ensure};

use super::{MAX_HOSTS, Options, Wire};

/// Commands that the lab runs, and the Debian package of each.
const TOOLS: &[(&str, &str)] = &[
    ("ip", "iproute2"),
    ("nsenter", "util-linux"),
    ("unshare", "util-linux"),
    ("mount", "mount"),
    ("timeout", "coreutils"),
];

/// Checks options, privileges and tools.
pub(super) fn require(options: &Options) -> Result<()> {
    let Options { prefix, hosts, mtu, .. } = options;
    ensure!(
        !prefix.is_empty() && prefix.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-'),
        "a lab's prefix is made of letters, digits and dashes, not {prefix:?}"
    );
    ensure!((1..=MAX_HOSTS).contains(hosts), "a lab has 1 to {MAX_HOSTS} hosts, not {hosts}");
    ensure!((576..=65_535).contains(mtu), "an MTU is 576 to 65535 bytes, not {mtu}");
    ensure!(
        nix::unistd::geteuid().is_root(),
        "the lab makes network namespaces and needs root: run it with sudo"
    );
    let ethtool = (options.wire == Wire::Mtu).then_some(&("ethtool", "ethtool"));
    for (tool, package) in TOOLS.iter().chain(ethtool) {
        tool_path(tool, package)?;
    }
    if options.agents {
        let folder = bin_dir(options)?;
        for binary in ["ovnet-agent", "ovnet"] {
            let path = folder.join(binary);
            ensure!(
                path.is_file(),
                "{} is not there: `cargo build -p ovnet-agent` makes it",
                path.display()
            );
        }
    }
    Ok(())
}

/// Finds a command of another package.
///
/// # Errors
/// It is not installed.
pub(super) fn tool_path(tool: &str, package: &str) -> Result<PathBuf> {
    which::which_in(tool, Some(path(&[])), "/").with_context(|| {
        format!("{tool} is not installed: `cargo xtask setup` brings it (package {package})")
    })
}

/// `PATH` with these folders first, and those of root's commands, which a user's often lacks.
pub(super) fn path(first: &[PathBuf]) -> OsString {
    let inherited = env::var_os("PATH").unwrap_or_default();
    let mut folders = first.to_vec();
    folders.extend(env::split_paths(&inherited));
    folders.extend(["/usr/local/sbin", "/usr/sbin", "/sbin"].map(PathBuf::from));
    env::join_paths(folders).unwrap_or(inherited)
}

/// Where the agent's binaries of these options are.
pub(super) fn bin_dir(options: &Options) -> Result<PathBuf> {
    match &options.bin_dir {
        Some(folder) => std::path::absolute(folder).context("--bin-dir"),
        None => default_bin_dir(),
    }
}

/// The folder with the agent's binaries: the one this program was built into if they are there,
/// which is the case in tests, else `target/release`, else `target/debug`.
///
/// # Errors
/// They are nowhere.
pub fn default_bin_dir() -> Result<PathBuf> {
    let own = env::current_exe().unwrap_or_default();
    let mut folders: Vec<PathBuf> =
        own.ancestors().skip(1).take(2).map(Path::to_path_buf).collect();
    folders.extend(["release", "debug"].map(|profile| target().join(profile)));
    folders
        .into_iter()
        .find(|folder| folder.join("ovnet-agent").is_file())
        .context("ovnet-agent is not built: `cargo build -p ovnet-agent` does it")
}

/// The workspace's folder.
pub(super) fn workspace() -> &'static Path {
    let xtask = Path::new(env!("CARGO_MANIFEST_DIR"));
    xtask.parent().unwrap_or(xtask)
}

/// Cargo's target folder.
pub(super) fn target() -> PathBuf {
    let set = env::var_os("CARGO_TARGET_DIR").filter(|folder| !folder.is_empty());
    set.map_or_else(
        || workspace().join("target"),
        |folder| env::current_dir().unwrap_or_default().join(folder),
    )
}

/// Builds the agent and its client; gives the folder they are in.
///
/// # Errors
/// The build fails.
pub fn agent(release: bool) -> Result<PathBuf> {
    // CALL SITE for the setup part that building needs: crate::tools::ensure(TO_BUILD)?.
    let mut command = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(workspace()).args(["build", "--quiet", "--package", "ovnet-agent"]);
    if release {
        command.arg("--release");
    }
    let status = command.status().context("cannot run cargo")?;
    if !status.success() {
        bail!("building ovnet-agent failed");
    }
    Ok(target().join(if release { "release" } else { "debug" }))
}
