//! A host: a process that holds a network, mount, PID and host name namespace.
//!
//! The holder is the host's process 1. When it dies, the kernel ends everything that runs in the
//! host, and with the last process go the mounts, the BPF pins, the sandboxes and the links. So
//! there is one thing to record and one thing to kill, however the lab came to its end.

use std::fs::{self, File};
use std::net::Ipv4Addr;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{ChildStdin, Command, Stdio};
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use nix::sys::signal::Signal;
use serde::{Deserialize, Serialize};

use super::process::{Process, wait_until};

/// How long a host may take to set up its mounts, and to end.
const LIMIT: Duration = Duration::from_secs(20);

/// A host of the lab, as it is recorded.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Host {
    /// Its name, which is its host name too.
    pub name: String,
    /// Address of its `ens33`; none for the switch.
    pub address: Option<Ipv4Addr>,
    /// Process 1 of the host.
    pub holder: Process,
}

impl Host {
    /// `/proc/PID/root` of the holder: the host's file system, seen from outside.
    pub fn root(&self) -> PathBuf {
        PathBuf::from(format!("/proc/{}/root", self.holder.pid))
    }

    /// The host's network namespace, seen from outside.
    pub fn netns(&self) -> PathBuf {
        PathBuf::from(format!("/proc/{}/ns/net", self.holder.pid))
    }

    /// A command inside the host.
    pub fn command(&self, program: &str) -> Command {
        let mut command = Command::new("nsenter");
        command.args(["--target", &self.holder.pid.to_string()]);
        command.args(["--mount", "--net", "--uts", "--pid", "--", program]);
        command
    }
}

/// What holds a host: `unshare`, whose child is the host's process 1.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Starting {
    name: String,
    address: Option<Ipv4Addr>,
    parent: Process,
    log: PathBuf,
}

impl Starting {
    /// Starts a host. `folder` is the host's own, for its log. A host that is `bound` ends when
    /// the pipe that is returned is closed, by whatever way its owner ends.
    pub(super) fn new(
        name: &str,
        address: Option<Ipv4Addr>,
        folder: &Path,
        bound: bool,
    ) -> Result<(Self, Option<ChildStdin>)> {
        let named = || format!("start host {name}");
        fs::create_dir_all(folder).with_context(named)?;
        let log = folder.join("host.log");
        let output = File::create(&log).with_context(named)?;
        let mut command = Command::new("unshare");
        command
            .args(["--net", "--mount", "--uts", "--pid", "--fork", "--kill-child"])
            .args(["--propagation", "private", "--", "sh", "-e", "-c", SETUP, "host", name])
            .arg(folder)
            .arg(if bound { "bound" } else { "stays" })
            .current_dir("/")
            .stdin(if bound { Stdio::piped() } else { Stdio::null() })
            .stdout(output.try_clone().with_context(named)?)
            .stderr(output)
            // Ctrl-C is for the command in front, not for the hosts.
            .process_group(0);
        let mut child = command.spawn().with_context(named)?;
        let lifeline = child.stdin.take();
        let parent = Process::of(i32::try_from(child.id()).context("process number")?)?;
        // Nobody else would collect it when it ends.
        thread::spawn(move || child.wait());
        Ok((Self { name: name.to_owned(), address, parent, log }, lifeline))
    }

    /// Waits until the host can be entered.
    pub(super) fn ready(&self) -> Result<Host> {
        let said = || fs::read_to_string(&self.log).unwrap_or_default();
        let what = || format!("host {} to be ready; it said: {}", self.name, said().trim());
        let holder = wait_until(LIMIT, what, || {
            if said().lines().any(|line| line == "ready") {
                return Ok(self.parent.child());
            }
            if !self.is_alive() {
                bail!("host {} did not start: {}", self.name, said().trim());
            }
            Ok(None)
        })?;
        Ok(Host { name: self.name.clone(), address: self.address, holder })
    }

    /// Whether it is the host of this name.
    pub(super) fn is_of(&self, name: &str) -> bool {
        self.name == name
    }

    pub(super) fn is_alive(&self) -> bool {
        self.parent.is_alive()
    }

    /// Kills the host and everything in it.
    pub(super) fn kill(&self) -> Result<()> {
        // `unshare` ends with its child, and after everything in the host has ended.
        let target = self.parent.child().unwrap_or(self.parent);
        target.signal(Signal::SIGKILL).with_context(|| format!("kill host {}", self.name))
    }

    /// Waits until a killed host has ended.
    pub(super) fn ended(&self) -> Result<()> {
        let what = || format!("host {} to end", self.name);
        wait_until(LIMIT, what, || Ok((!self.is_alive()).then_some(())))
    }
}

/// What process 1 of a host does. Arguments: name, the host's folder outside, `bound` or `stays`.
///
/// `/run`, `/var/lib/ovnet` and `/sys/fs/bpf` are the host's own, so that the agent's default
/// paths serve on every host, and so is all that Docker writes to. `/var/lib` is laid out anew
/// because `/var/lib/ovnet` cannot be made in the machine's own without leaving it there, `/opt`
/// because Docker's containerd makes a folder in it. `/sys` is mounted again because it shows the
/// devices of the network namespace it was mounted in. IPv6 is off so that nothing is on the wire
/// that nobody sent.
const SETUP: &str = r#"
name=$1 folder=$2 life=$3
mount -t proc proc /proc
mkdir -p "$folder/cgroup"
if [ -d /sys/fs/cgroup ]; then mount --rbind /sys/fs/cgroup "$folder/cgroup"; fi
mount -t sysfs sysfs /sys
if [ -d /sys/fs/cgroup ]; then mount --rbind "$folder/cgroup" /sys/fs/cgroup; fi
mount -t bpf bpf /sys/fs/bpf
lay_out() {
    place=$1 new=$folder/$2; shift 2
    mkdir -p "$new"
    mount -t tmpfs -o mode=755 ovnet-lab "$new"
    for own in "$@"; do mkdir "$new/$own"; done
    for entry in "$place"/*/; do
        entry=${entry%/}
        if [ -e "$entry" ] && mkdir "$new/${entry##*/}" 2>/dev/null; then
            mount --rbind "$entry" "$new/${entry##*/}"
        fi
    done
    mount --rbind "$new" "$place"
}
lay_out /var/lib lib ovnet docker
if [ -d /opt ]; then lay_out /opt opt containerd; fi
if [ -d /etc/docker ]; then mount -t tmpfs -o mode=755 ovnet-lab /etc/docker; fi
mount -t tmpfs -o mode=755 ovnet-lab /run
if [ ! -L /var/run ]; then mount --rbind /run /var/run; fi
mkdir /run/netns /run/lock
echo "$name" > /proc/sys/kernel/hostname
for scope in all default; do
    if [ -d /proc/sys/net/ipv6 ]; then echo 1 > "/proc/sys/net/ipv6/conf/$scope/disable_ipv6"; fi
done
# A switch has no netfilter; where br_netfilter is there, a bridge would take every frame through it.
if [ "$name" = switch ]; then
    for key in iptables ip6tables arptables; do
        file=/proc/sys/net/bridge/bridge-nf-call-$key
        if [ -e "$file" ]; then echo 0 > "$file"; fi
    done
fi
ip link set lo up
echo ready
exec >/dev/null 2>&1
if [ "$life" = bound ]; then cat; else sleep infinity & wait; fi
"#;
