//! The distribution's packages: what the agent is compiled with, what lab and tests run.

use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Result, bail};

use super::apt::Apt;
use crate::tools;

/// What building the agent takes besides Rust: a C compiler for crates with C in them, and OpenSSL,
/// which a dependency of consulrs links although we speak TLS by rustls.
const TO_BUILD: &[(&str, &str)] =
    &[("gcc", "cc"), ("make", "make"), ("pkg-config", "pkg-config"), (OPENSSL, "")];
/// Package whose presence pkg-config tells: it brings no command.
const OPENSSL: &str = "libssl-dev";

/// What lab and tests run: Debian package and the command that it brings.
const TO_TEST: &[(&str, &str)] = &[
    ("iproute2", "ip"),
    ("iperf3", "iperf3"),
    ("tcpdump", "tcpdump"),
    ("ethtool", "ethtool"),
    ("nftables", "nft"),
    ("iptables", "iptables"),
    ("iputils-ping", "ping"),
    ("bpftool", "bpftool"),
    ("tshark", "tshark"),
    ("systemd", "systemd-analyze"),
];

/// What a lab with Docker runs. Some releases of Debian have the client in a package of its own.
const DOCKER: &[(&str, &str)] =
    &[("docker.io", "dockerd"), (DOCKER_CLIENT, "docker"), ("busybox-static", "busybox")];
/// Package of the client, where it is not in that of the daemon.
const DOCKER_CLIENT: &str = "docker-cli";

/// What boots other kernels: the emulator, a shell for their process 1, and what their modules and
/// our binaries are made smaller or larger with.
const TO_EMULATE: &[(&str, &str)] = &[
    ("qemu-system-x86", "qemu-system-x86_64"),
    ("busybox-static", "busybox"),
    ("binutils", "strip"),
    ("xz-utils", "xz"),
    ("zstd", "zstd"),
];

/// What is wanted of the packages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Purpose {
    /// Compiling.
    Build,
    /// Running lab and tests.
    Test,
    /// Running them with Docker.
    Docker,
    /// Running them on other kernels.
    Emulate,
}

/// The packages or commands, when all of them are there, whoever installed them.
pub(super) fn present(purpose: Purpose) -> Option<String> {
    missing(purpose).is_empty().then(|| {
        let names = list(purpose).iter();
        let names: Vec<_> = names
            .map(|(package, command)| if command.is_empty() { *package } else { *command })
            .collect();
        names.join(" ")
    })
}

/// Installs the packages that are missing.
pub(super) fn install(purpose: Purpose) -> Result<String> {
    let missing = missing(purpose);
    let packages = missing.join(" ");
    if tools::find("apt-get").is_none() {
        bail!("install with your distribution's package manager what brings: {packages}");
    }
    if !tools::is_root() {
        bail!("run as root: apt-get install --no-install-recommends {packages}");
    }
    // The lab runs daemons of its own, in its hosts; the machine gets none because of it.
    let _quiet = missing.contains(&"docker.io").then(Masked::new);
    Apt::machine().install(&missing)?;
    // A client in a package of its own is known of only once apt has its lists.
    let others = self::missing(purpose);
    if !others.is_empty() {
        Apt::machine().install(&others)?;
    }
    Ok(format!("apt-get install {packages}"))
}

/// Keeps systemd from starting what a package brings, until this is dropped.
struct Masked;

impl Masked {
    const UNITS: [&str; 3] = ["docker.service", "docker.socket", "containerd.service"];

    fn new() -> Self {
        Self::tell("mask");
        Self
    }

    fn tell(verb: &str) {
        if Path::new("/run/systemd/system").exists() {
            let mut systemctl = Command::new("systemctl");
            systemctl.args(["--runtime", "--quiet", verb]).args(Self::UNITS);
            // Where it fails the daemon is started, as the package has it.
            let _ = systemctl.stdout(Stdio::null()).stderr(Stdio::null()).status();
        }
    }
}

impl Drop for Masked {
    fn drop(&mut self) {
        Self::tell("unmask");
    }
}

fn list(purpose: Purpose) -> &'static [(&'static str, &'static str)] {
    match purpose {
        Purpose::Build => TO_BUILD,
        Purpose::Test => TO_TEST,
        Purpose::Docker => DOCKER,
        Purpose::Emulate => TO_EMULATE,
    }
}

fn missing(purpose: Purpose) -> Vec<&'static str> {
    let absent = |package: &str, command: &str| match package {
        OPENSSL => !has_openssl(),
        // The daemon's package brings it, or there is this one.
        DOCKER_CLIENT => tools::find(command).is_none() && Apt::machine().knows(&[DOCKER_CLIENT]),
        _ => tools::find(command).is_none(),
    };
    let packages = list(purpose).iter();
    packages.filter(|(package, command)| absent(package, command)).map(|it| it.0).collect()
}

fn has_openssl() -> bool {
    let mut ask = Command::new("pkg-config");
    ask.args(["--exists", "openssl"]).stdout(Stdio::null()).stderr(Stdio::null());
    ask.status().is_ok_and(|status| status.success())
}
