//! The distribution's packages that the lab and the tests run.

use anyhow::{Result, bail};

use super::apt::Apt;
use crate::tools;

/// Debian package and the command that it brings.
const PACKAGES: &[(&str, &str)] = &[
    ("iproute2", "ip"),
    ("iperf3", "iperf3"),
    ("tcpdump", "tcpdump"),
    ("ethtool", "ethtool"),
    ("nftables", "nft"),
    ("iputils-ping", "ping"),
    ("bpftool", "bpftool"),
    ("tshark", "tshark"),
];

/// The commands, when all of them are there, whoever installed them.
pub(super) fn present() -> Option<String> {
    missing().is_empty().then(|| {
        let commands: Vec<_> = PACKAGES.iter().map(|(_, command)| *command).collect();
        commands.join(" ")
    })
}

/// Installs the packages whose command is missing.
pub(super) fn install() -> Result<String> {
    let missing = missing();
    let packages = missing.join(" ");
    if tools::find("apt-get").is_none() {
        bail!("install with your distribution's package manager what brings: {packages}");
    }
    if !tools::is_root() {
        bail!("run as root: apt-get install --no-install-recommends {packages}");
    }
    Apt::machine().install(&missing)?;
    Ok(format!("apt-get install {packages}"))
}

fn missing() -> Vec<&'static str> {
    PACKAGES
        .iter()
        .filter(|(_, command)| tools::find(command).is_none())
        .map(|(package, _)| *package)
        .collect()
}
