//! What runs inside an emulated machine: its process 1, and the programs it has.

use std::path::PathBuf;

use anyhow::{Context as _, Result};

use super::archive::Archive;
use super::modules::Module;
use crate::tools;

/// What process 1, the lab and the tests run. The shell and the commands are this machine's own, as
/// the lab's scripts know them.
const PROGRAMS: [&str; 27] = [
    "sh",
    "ip",
    "tc",
    "bridge",
    "ss",
    "nft",
    "ethtool",
    "ping",
    "nsenter",
    "unshare",
    "mount",
    "umount",
    "timeout",
    "setpriv",
    "stdbuf",
    "cat",
    "sleep",
    "mkdir",
    "rm",
    "ls",
    "sort",
    "uname",
    "grep",
    "ln",
    "tail",
    "busybox",
    "systemd-analyze",
];
/// Where cargo's folder is in the guest; the tests look there for what they run.
pub(super) const TARGET: &str = "/target";
/// Says on the last line that the guest came to its end.
pub(super) const ENDED: &str = "the guest has ended";
/// By how much a test may be slower here: the tests multiply what they wait at most by it.
const PATIENCE: u32 = 10;
/// How many frames of a storm each program is given here, in place of a million.
const FRAMES: u32 = 10_000;

/// Process 1. What the tests print goes to the second serial line: the kernel's own messages on the
/// first would come in the middle of theirs.
const INIT: &str = r#"#!/bin/sh
export PATH=/usr/bin:/usr/sbin HOME=/root
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs dev /dev
ln -s /proc/self/fd /dev/fd
for name in stdin:0 stdout:1 stderr:2; do ln -s "/proc/self/fd/${name#*:}" "/dev/${name%:*}"; done
mount -t tmpfs -o mode=755 run /run
mount -t tmpfs tmp /tmp
mount -t bpf bpf /sys/fs/bpf
exec </dev/null >/dev/ttyS1 2>&1
for module in /modules/*; do
    busybox insmod "$module" || echo "cannot load $module"
done
ip link set lo up
echo guest > /proc/sys/kernel/hostname
. /tests
"#;

/// A test binary and what it is called with.
pub(super) struct Run {
    /// Its name in the guest.
    pub(super) name: String,
    /// Its arguments.
    pub(super) arguments: Vec<String>,
}

/// The part of the guest's files that is the same for all kernels. `built` are programs of ours, by
/// their path below [`TARGET`].
///
/// # Errors
/// A program is not there, or cannot be read.
pub(super) fn files(built: &[(String, PathBuf)]) -> Result<Vec<u8>> {
    let mut archive = Archive::default();
    archive.merged_usr();
    for folder in ["/proc", "/sys", "/dev", "/run", "/tmp", "/var/lib", "/etc", "/root"] {
        archive.folder(folder);
    }
    archive.link("/var/run", "/run");
    archive.file("/init", INIT.as_bytes());
    for name in PROGRAMS {
        let program = tools::find(name).with_context(|| format!("{name} is not installed"))?;
        archive.program(&format!("/usr/bin/{name}"), &program)?;
    }
    for (path, source) in built {
        archive.stripped(&format!("{TARGET}/{path}"), source)?;
    }
    // What a lab takes from its agents.
    let unit = tools::workspace().join("ovnet-agent/package/ovnet-agent.service");
    let read = std::fs::read(&unit).with_context(|| format!("read {}", unit.display()))?;
    archive.file(&unit.display().to_string(), &read);
    // Packets that were wrong once.
    let regressions = tools::workspace().join("tests/regressions");
    let read = || format!("read {}", regressions.display());
    for entry in std::fs::read_dir(&regressions).with_context(read)? {
        let path = entry.with_context(read)?.path();
        let packet = std::fs::read(&path).with_context(|| format!("read {}", path.display()))?;
        archive.file(&path.display().to_string(), &packet);
    }
    // `stdbuf` puts it in front of what it runs.
    let preloaded = PathBuf::from("/usr/libexec/coreutils/libstdbuf.so");
    if preloaded.is_file() {
        archive.program(&preloaded.display().to_string(), &preloaded)?;
    }
    Ok(archive.finish())
}

/// The part that differs: the kernel's modules, and what is to be run with which variables.
pub(super) fn tests(modules: &[Module], variables: &[(&str, &str)], runs: &[Run]) -> Vec<u8> {
    let mut archive = Archive::default();
    for (number, (name, content)) in modules.iter().enumerate() {
        archive.file(&format!("/modules/{number:03}-{name}.ko"), content);
    }
    archive.file("/tests", script(variables, runs).as_bytes());
    archive.finish()
}

fn script(variables: &[(&str, &str)], runs: &[Run]) -> String {
    // Nothing may be skipped here: what the guest lacks is a mistake of this module.
    let mut script = format!(
        "export CARGO_TARGET_DIR={TARGET} OVNET_REQUIRE_ALL=1 OVNET_PATIENCE={PATIENCE} \
         OVNET_FRAMES={FRAMES}\n"
    );
    for (name, value) in variables {
        script += &format!("export {name}={value}\n");
    }
    for Run { name, arguments } in runs {
        let arguments = arguments.join(" ");
        script += &format!("{TARGET}/debug/deps/{name} --show-output {arguments}\n");
    }
    script + &format!("echo '{ENDED}'\nbusybox poweroff -f\n")
}

#[cfg(test)]
mod tests_of_guest {
    use super::*;

    #[test]
    fn the_script_runs_all_and_then_says_so() {
        let runs = ["bpf", "kernels"].map(|name| Run {
            name: name.to_owned(),
            arguments: vec!["--skip".to_owned(), "refused".to_owned()],
        });
        let script = script(&[("A", "b")], &runs);
        let lines: Vec<&str> = script.lines().collect();
        assert_eq!(lines[1], "export A=b");
        assert_eq!(lines[2], "/target/debug/deps/bpf --show-output --skip refused");
        assert_eq!(lines[4..], ["echo 'the guest has ended'", "busybox poweroff -f"]);
    }
}
