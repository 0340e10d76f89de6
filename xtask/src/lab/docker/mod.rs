//! A Docker daemon on each host, with everything of its own: data and run folders, socket,
//! settings, containers, control groups. It lives in the host's namespaces, so all of it but the
//! control groups ends with the host.

mod image;

use std::fs;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow, bail};
use nix::sys::signal::Signal;
use serde_json::{Value, json};

use super::{Lab, Options, Process, cgroups, http, wait_until};
use super::{prepare, services::tail};

/// Where a daemon reads its settings, in its host.
pub const DOCKER_CONFIG: &str = "etc/docker/daemon.json";
/// Address of `docker_gwbridge` where a daemon has made no other bridge network before: `docker0`
/// has the first subnet of Docker's range for local networks, this is in the second.
pub const GWBRIDGE: Ipv4Addr = Ipv4Addr::new(172, 18, 0, 1);
/// Where the daemon answers, in its host and for the client that is to find no other one.
const SOCKET: &str = "run/docker.sock";
/// How long a daemon may take to answer: it waits 15 s for each network whose plugin is missing.
const READY: Duration = Duration::from_secs(90);
/// How long a daemon may take to end its containers and itself.
const STOP: Duration = Duration::from_secs(40);

impl Lab {
    /// Starts the Docker daemon of every host and waits until all can run containers.
    pub(super) fn start_dockers(&self) -> Result<()> {
        let nodes = self.nodes();
        let config = docker_config(&self.options());
        for node in &nodes {
            self.set_docker_config(node, &config)?;
            self.spawn_docker(node)?;
        }
        // Each takes the image in, which is work for it and not for us.
        thread::scope(|scope| {
            let waits: Vec<_> =
                nodes.iter().map(|node| scope.spawn(|| self.wait_docker(node))).collect();
            let done = waits.into_iter().map(|it| it.join().map_err(|_| anyhow!("a panic"))?);
            done.collect()
        })
    }

    /// Starts the Docker daemon of a host and waits until it can run containers.
    ///
    /// # Errors
    /// It runs already, or does not answer.
    pub fn start_docker(&self, node: &str) -> Result<()> {
        self.spawn_docker(node)?;
        self.wait_docker(node)
    }

    /// Starts the Docker daemon of a host without waiting for it.
    ///
    /// # Errors
    /// It runs already, or cannot be started.
    pub fn spawn_docker(&self, node: &str) -> Result<()> {
        if let Some(process) = self.docker_process(node) {
            bail!("the Docker of {node} runs already as process {}", process.pid);
        }
        let group = cgroups::parent(&self.options().prefix, node);
        // Not in the settings, which a test may write anew and Docker wants in one place only.
        let argv =
            ["dockerd", "--exec-opt", "native.cgroupdriver=cgroupfs", "--cgroup-parent", &group];
        let process = self.service(node, &argv, &docker_log(node))?;
        self.state().dockers.insert(node.to_owned(), process);
        self.record()
    }

    /// Waits until the Docker daemon of a host answers, and gives it the image.
    ///
    /// # Errors
    /// It ended, or does not answer.
    pub fn wait_docker(&self, node: &str) -> Result<()> {
        let socket = self.host(node)?.root().join(SOCKET);
        let said = || tail(&self.log_of(&docker_log(node)));
        let what = || format!("the Docker of {node} to answer; it said: {}", said());
        wait_until(READY, what, || {
            if self.docker_process(node).is_none() {
                bail!("the Docker of {node} ended; it said: {}", said());
            }
            let answer = http::ask_socket(&socket, "GET", "/_ping");
            Ok(matches!(answer, Ok((200, _))).then_some(()))
        })?;
        let asked = format!("/images/{}/json", image::NAME);
        if matches!(http::ask_socket(&socket, "GET", &asked), Ok((200, _))) {
            return Ok(());
        }
        let archive = image::archive().context("the image for the lab's containers")?;
        let archive = archive.to_str().context("the target folder's path is not UTF-8")?;
        self.docker(node, &["load", "--quiet", "--input", archive]).map(drop)
    }

    /// The Docker daemon that the lab started on a host, while it runs.
    pub fn docker_process(&self, node: &str) -> Option<Process> {
        self.state().dockers.get(node).copied().filter(Process::is_alive)
    }

    /// Sends a signal to the Docker daemon of a host and waits until it ended: SIGTERM for a clean
    /// stop, SIGKILL for a crash. Containers end with a clean stop, unless `live-restore` is set.
    ///
    /// # Errors
    /// It does not end.
    pub fn stop_docker(&self, node: &str, signal: Signal) -> Result<()> {
        let docker = self.state().dockers.remove(node);
        self.record()?;
        docker.map_or(Ok(()), |docker| docker.end(signal, STOP))
    }

    /// Stops the Docker daemon of a host by this signal and starts it again.
    ///
    /// # Errors
    /// It does not end, or does not answer.
    pub fn restart_docker(&self, node: &str, signal: Signal) -> Result<()> {
        self.stop_docker(node, signal)?;
        self.start_docker(node)
    }

    /// Runs `docker …` on a host and gives what it printed.
    ///
    /// # Errors
    /// It fails; what it said is told.
    pub fn docker(&self, node: &str, arguments: &[&str]) -> Result<String> {
        let argv: Vec<&str> = ["docker"].iter().chain(arguments).copied().collect();
        self.exec(node, &argv)
    }

    /// Writes `daemon.json` of a host, which its daemon reads at its next start.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn set_docker_config(&self, node: &str, config: &Value) -> Result<()> {
        let file = self.host(node)?.root().join(DOCKER_CONFIG);
        let text = serde_json::to_string_pretty(config).context("daemon.json")?;
        fs::write(&file, text).with_context(|| format!("cannot write {DOCKER_CONFIG} of {node}"))
    }

    /// What the Docker daemon of a host wrote.
    pub fn docker_output(&self, node: &str) -> String {
        fs::read_to_string(self.log_of(&docker_log(node))).unwrap_or_default()
    }

    /// The network namespace of a container, as a path in its host; `None` where none of this
    /// name runs.
    pub(super) fn container_netns(&self, node: &str, name: &str) -> Option<PathBuf> {
        let format = "{{.NetworkSettings.SandboxKey}}";
        let key = self.docker(node, &["container", "inspect", "--format", format, name]).ok()?;
        // `/var/run` is an absolute link, which would lead out of the host when seen from outside.
        key.starts_with('/').then(|| PathBuf::from(key.strip_prefix("/var").unwrap_or(&key)))
    }
}

/// The settings that a lab's daemons start with.
pub fn docker_config(options: &Options) -> Value {
    let mut config = json!({ "dns": [GWBRIDGE], "live-restore": options.live_restore });
    if options.guard
        && let Some(fields) = config.as_object_mut()
    {
        fields.insert("authorization-plugins".to_owned(), json!(["ovnet"]));
    }
    config
}

/// Loads the kernel module that Docker would load. Before there are hosts, because it changes
/// what bridges do in all network namespaces there are: the lab's switch sets that back, and here
/// the machine's own bridges, which are none of the lab's business, get it set back.
pub(super) fn load_modules() {
    let calls = ["iptables", "ip6tables", "arptables"]
        .map(|table| format!("/proc/sys/net/bridge/bridge-nf-call-{table}"));
    let was_there = Path::new(&calls[0]).exists();
    let mut modprobe = Command::new("modprobe");
    modprobe.args(["--quiet", "br_netfilter"]).stdout(Stdio::null()).stderr(Stdio::null());
    // It may be built in, or be there already where nobody may load any.
    let _ = modprobe.env("PATH", prepare::path(None)).status();
    if !was_there {
        for file in calls.iter().filter(|file| Path::new(file).exists()) {
            if let Err(error) = fs::write(file, "0") {
                eprintln!("warning: {file} stays 1: {error}");
            }
        }
    }
}

/// Sets the client apart from what the user's own environment points it at.
pub(super) fn own_client(command: &mut Command) {
    command.env("DOCKER_HOST", format!("unix:///{SOCKET}")).env_remove("DOCKER_CONTEXT");
    command.env_remove("DOCKER_TLS_VERIFY").env_remove("DOCKER_API_VERSION");
}

fn docker_log(node: &str) -> String {
    format!("{node}-docker.log")
}
