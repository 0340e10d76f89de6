//! What a lab needs of the machine before anything is made.

use std::env;
use std::ffi::OsString;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, ensure};

use super::{MAX_HOSTS, Options, Wire, services};
use crate::build_verb;
use crate::tools::{self, Need};

/// Commands that the lab runs, and the Debian package of each.
const TOOLS: &[(&str, &str)] = &[
    ("ip", "iproute2"),
    ("nsenter", "util-linux"),
    ("unshare", "util-linux"),
    ("mount", "mount"),
    ("timeout", "coreutils"),
];

/// What Docker on the hosts takes in addition.
const DOCKER_TOOLS: &[(&str, &str)] = &[
    ("dockerd", "docker.io"),
    ("docker", "docker.io"),
    ("iptables", "iptables"),
    ("busybox", "busybox-static"),
    ("iperf3", "iperf3"),
    ("ldd", "libc-bin"),
    ("tar", "tar"),
    ("sha256sum", "coreutils"),
];

/// Checks options, privileges and tools.
///
/// # Errors
/// A lab of these options cannot be had here, and why.
pub fn require(options: &Options) -> Result<()> {
    let Options { prefix, hosts, mtu, .. } = options;
    ensure!(
        !prefix.is_empty() && prefix.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-'),
        "a lab's prefix is made of letters, digits and dashes, not {prefix:?}"
    );
    ensure!((1..=MAX_HOSTS).contains(hosts), "a lab has 1 to {MAX_HOSTS} hosts, not {hosts}");
    ensure!((576..=65_535).contains(mtu), "an MTU is 576 to 65535 bytes, not {mtu}");
    ensure!(tools::is_root(), "the lab makes network namespaces and needs root: run it with sudo");
    let ethtool = (options.wire == Wire::Mtu).then_some(&("ethtool", "ethtool"));
    let docker = if options.docker { DOCKER_TOOLS } else { &[] };
    for (tool, package) in TOOLS.iter().chain(ethtool).chain(docker) {
        tool_path(tool, package)?;
    }
    if options.docker {
        // Each host gets one of its own in its place.
        let folder = Path::new("/etc/docker");
        ensure!(folder.is_dir(), "{0} is not there: mkdir {0}", folder.display());
        let groups = Path::new("/sys/fs/cgroup");
        ensure!(
            groups.join("cgroup.controllers").exists() || groups.join("devices").is_dir(),
            "no control groups are mounted on {}, and Docker needs them: install the package \
             cgroupfs-mount",
            groups.display()
        );
    }
    if options.agents {
        let folder = bin_dir(options)?;
        for binary in ["ovnet-agent", "ovnet"] {
            let path = folder.join(binary);
            ensure!(
                path.is_file(),
                "{} is not there: `cargo xtask build` makes it",
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
    tools::find(tool).with_context(|| {
        format!("{tool} is not installed: `cargo xtask setup` brings it (package {package})")
    })
}

/// The folder of the Docker client that came with the daemon: one of another version, which may be
/// on `PATH` before it, refuses what the daemon could do.
pub(super) fn docker_client_dir() -> Option<PathBuf> {
    let daemon = tools::find("dockerd")?;
    let beside = daemon.parent()?;
    let folders = [beside.with_file_name("bin"), beside.to_owned()];
    folders.into_iter().find(|folder| folder.join("docker").is_file())
}

/// `PATH` with these folders first, then the project's tools, and at the end those of root's
/// commands, which a user's often lacks.
pub(super) fn path(first: impl IntoIterator<Item = PathBuf>) -> OsString {
    let inherited = tools::path();
    let mut folders: Vec<PathBuf> = first.into_iter().collect();
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
    folders.extend(["release", "debug"].map(|profile| tools::target().join(profile)));
    folders
        .into_iter()
        .find(|folder| folder.join("ovnet-agent").is_file())
        .context("ovnet-agent is not built: `cargo xtask build` does it")
}

/// Brings what a lab with agents needs, and builds them; gives the folder they are in. Where no
/// Consul can be had it says so: the lab then runs the development stand-in.
///
/// # Errors
/// A tool is missing and cannot be brought, or the build fails.
pub(crate) fn build(release: bool, docker: bool) -> Result<PathBuf> {
    bring(docker)?;
    build_verb::agent(release)
}

/// Brings what a lab without agents needs, with or without Docker on its hosts.
///
/// # Errors
/// A tool is missing and cannot be brought.
pub(crate) fn bring(docker: bool) -> Result<()> {
    tools::ensure(&[Need::Packages])?;
    if docker {
        tools::ensure(&[Need::Docker])?;
    }
    if services::consul_binary().is_none()
        && let Err(error) = tools::consul()
    {
        eprintln!("warning: no Consul can be had, the development stand-in serves: {error:#}");
    }
    Ok(())
}
