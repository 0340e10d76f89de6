//! Consul and the agents.

use std::fs;
use std::net::SocketAddr;
use std::os::unix::process::CommandExt as _;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use nix::sys::signal::{Signal, killpg};
use nix::unistd::{Pid, getpgid};
use serde::{Deserialize, Serialize};

use super::{Lab, Process, READY, UPLINK, http, wait_until};
use crate::tools;

/// The host that Consul runs on.
const CONSUL_HOST: &str = "docker01";
/// Its HTTP port.
const CONSUL_PORT: u16 = 8500;
/// Where a durable one keeps its data: in the host, and gone with it.
pub const CONSUL_DATA: &str = "/run/consul";
/// Setting that makes a single server leader sooner after a start.
const RAFT: &str = "performance { raft_multiplier = 1 }";
/// How long an agent may take to withdraw and end.
const STOP: Duration = Duration::from_secs(15);

/// The Consul of a lab.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Consul {
    /// What it is, in words.
    pub(super) kind: String,
    process: Process,
}

impl Lab {
    /// Address of the lab's Consul: `192.168.1.11:8500`.
    ///
    /// # Errors
    /// The lab has no `docker01`.
    pub fn consul(&self) -> Result<String> {
        Ok(format!("{}:{CONSUL_PORT}", self.address(CONSUL_HOST)?))
    }

    /// What serves as Consul, in words; `None` while it is stopped.
    pub fn consul_kind(&self) -> Option<String> {
        let state = self.state();
        state.consul.as_ref().filter(|consul| consul.process.is_alive()).map(|c| c.kind.clone())
    }

    /// The process of Consul, while it runs.
    pub fn consul_process(&self) -> Option<Process> {
        self.state().consul.as_ref().map(|consul| consul.process).filter(Process::is_alive)
    }

    /// Starts Consul on `docker01` and waits until it answers. It keeps its data in memory, or in
    /// [`CONSUL_DATA`] with [`Options::durable_consul`](super::Options::durable_consul).
    ///
    /// # Errors
    /// There is none to be had, or it does not answer.
    pub fn start_consul(&self) -> Result<()> {
        let address = self.address(CONSUL_HOST)?;
        let at = address.to_string();
        let (kind, argv) = match consul_binary().filter(|_| !self.options().stand_in) {
            Some(binary) => {
                let binary = binary.display().to_string();
                let mode: &[&str] = if self.options().durable_consul {
                    &["-server", "-bootstrap-expect", "1", "-data-dir", CONSUL_DATA]
                } else {
                    &["-dev"]
                };
                let arguments = ["agent", "-client", "0.0.0.0", "-bind", &at, "-node", "consul"];
                // With one server nobody else can have a newer term: it need not wait to lead.
                let quick = ["-hcl", "disable_update_check = true", "-hcl", RAFT];
                let all = arguments.iter().chain(mode).chain(&quick);
                let all = all.map(|text| (*text).to_owned()).chain(self.options().consul_args);
                (consul_version(&binary), [binary].into_iter().chain(all).collect::<Vec<_>>())
            }
            None => {
                let own = own_binary()?.display().to_string();
                let listen = format!("{at}:{CONSUL_PORT}");
                let argv = [own, "lab".into(), "stand-in".into(), listen];
                ("no Consul but the development stand-in".to_owned(), argv.to_vec())
            }
        };
        let argv: Vec<&str> = argv.iter().map(String::as_str).collect();
        let process = self.service(CONSUL_HOST, &argv, "consul.log")?;
        self.state().consul = Some(Consul { kind, process });
        self.record()?;
        let log = self.log_of("consul.log");
        let what = move || format!("Consul to answer; it said: {}", tail(&log));
        let server = SocketAddr::from((address, CONSUL_PORT));
        self.inside(CONSUL_HOST, move || {
            wait_until(READY, &what, || {
                if !process.is_alive() {
                    bail!("Consul ended; waited for {}", what());
                }
                Ok(takes_sessions(server).then_some(()))
            })
        })
    }

    /// Kills Consul. What it knew is lost, as with a new server, unless its data is durable.
    ///
    /// # Errors
    /// It does not end.
    pub fn stop_consul(&self) -> Result<()> {
        let consul = self.state().consul.take();
        self.record()?;
        consul.map_or(Ok(()), |consul| consul.process.end(Signal::SIGKILL, STOP))
    }

    /// Halts Consul, as a machine in trouble does, until the result is dropped.
    ///
    /// # Errors
    /// It does not run.
    pub fn halt_consul(&self) -> Result<Halted> {
        let consul = self.state().consul.as_ref().map(|consul| consul.process);
        let consul = consul.filter(Process::is_alive).context("Consul does not run")?;
        // The nsenter in front of it halts with it, and could not collect it when it ends.
        let group = getpgid(Some(Pid::from_raw(consul.pid))).context("Consul's process group")?;
        consul.signal(Signal::SIGSTOP)?;
        Ok(Halted(group))
    }

    /// Starts the agent of every host and waits until all answer.
    pub(super) fn start_agents(&self) -> Result<()> {
        let nodes = self.nodes();
        for node in &nodes {
            self.spawn_agent(node, &[])?;
        }
        nodes.iter().try_for_each(|node| self.wait_agent(node))
    }

    /// Runs `ovnet-agent` and `ovnet` from this folder from now on, as a host that was upgraded does;
    /// from where they were looked for at first where absent.
    ///
    /// # Errors
    /// The lab's record cannot be written.
    pub fn use_binaries(&self, folder: Option<PathBuf>) -> Result<()> {
        self.state().options.bin_dir = folder;
        self.record()
    }

    /// Starts the agent of a host and waits until it answers. `arguments` come after the lab's.
    ///
    /// # Errors
    /// It runs already, or does not answer.
    pub fn start_agent(&self, node: &str, arguments: &[&str]) -> Result<()> {
        self.spawn_agent(node, arguments)?;
        self.wait_agent(node)
    }

    /// Starts the agent of a host without waiting for it.
    ///
    /// # Errors
    /// It runs already, or cannot be started.
    pub fn spawn_agent(&self, node: &str, arguments: &[&str]) -> Result<()> {
        if let Some(process) = self.agent(node) {
            bail!("the agent of {node} runs already as process {}", process.pid);
        }
        let options = self.options();
        let consul = options.consul_at.clone().map_or_else(|| self.consul(), Ok)?;
        // As its unit has it run, so that every test shows that the unit takes nothing it needs.
        let own = own_binary()?.display().to_string();
        let unit = tools::workspace().join("ovnet-agent/package/ovnet-agent.service");
        let unit = unit.display().to_string();
        let mut argv = vec![own.as_str(), "lab", "confined", &unit, "--", "ovnet-agent"];
        argv.extend(["--consul", &consul, "--advertise", UPLINK]);
        argv.extend(["--node", node]);
        argv.extend(options.xdp.as_deref().into_iter().flat_map(|mode| ["--xdp", mode]));
        argv.extend(options.agent_args.iter().map(String::as_str));
        argv.extend(arguments);
        let process = self.service(node, &argv, &agent_log(node))?;
        self.state().agents.insert(node.to_owned(), process);
        self.record()
    }

    /// Waits until the agent of a host answers.
    ///
    /// # Errors
    /// It ended, or does not answer.
    pub fn wait_agent(&self, node: &str) -> Result<()> {
        let said = || tail(&self.log_of(&agent_log(node)));
        let what = || format!("the agent of {node} to answer; it said: {}", said());
        wait_until(READY, what, || {
            if self.agent(node).is_none() {
                bail!("the agent of {node} ended; it said: {}", said());
            }
            let argv = ["ovnet", "status", "--json"];
            let output = self.output(node, &argv, Duration::from_secs(5))?;
            Ok(output.status.success().then_some(()))
        })
    }

    /// The agent that the lab started on a host, while it runs.
    pub fn agent(&self, node: &str) -> Option<Process> {
        self.state().agents.get(node).copied().filter(Process::is_alive)
    }

    /// Sends a signal to the agent of a host and waits until it ended: SIGTERM for a clean stop,
    /// SIGKILL for a crash.
    ///
    /// # Errors
    /// It does not end.
    pub fn stop_agent(&self, node: &str, signal: Signal) -> Result<()> {
        let agent = self.state().agents.remove(node);
        self.record()?;
        agent.map_or(Ok(()), |agent| agent.end(signal, STOP))
    }

    /// What the agent of a host wrote.
    pub fn agent_output(&self, node: &str) -> String {
        fs::read_to_string(self.log_of(&agent_log(node))).unwrap_or_default()
    }

    pub(super) fn log_of(&self, name: &str) -> PathBuf {
        self.folder().join(name)
    }

    /// Starts a command that goes on after this process; its output is added to a log.
    pub(super) fn service(&self, host: &str, argv: &[&str], log: &str) -> Result<Process> {
        let failed = || format!("start {} on {host}", argv.first().unwrap_or(&""));
        let output = fs::File::options()
            .create(true)
            .append(true)
            .open(self.log_of(log))
            .with_context(failed)?;
        let mut child = self
            .command(host, argv)?
            .stdin(Stdio::null())
            .stdout(output.try_clone().with_context(failed)?)
            .stderr(output)
            .process_group(0)
            .spawn()
            .with_context(failed)?;
        let enter = Process::of(i32::try_from(child.id()).context("process number")?)?;
        // Nobody else would collect it when it ends.
        thread::spawn(move || child.wait());
        let said = || tail(&self.log_of(log));
        wait_until(
            READY,
            || format!("{} to start; it said: {}", argv.join(" "), said()),
            || {
                // nsenter forks once to be in the host's PID namespace.
                let child = enter.child();
                if child.is_none() && !enter.is_alive() {
                    bail!("{}: it ended at once: {}", failed(), said());
                }
                Ok(child)
            },
        )
    }
}

/// A Consul that is halted until this is dropped.
pub struct Halted(Pid);

impl Drop for Halted {
    fn drop(&mut self) {
        // It may have been killed meanwhile.
        let _ = killpg(self.0, Signal::SIGCONT);
    }
}

fn agent_log(node: &str) -> String {
    format!("{node}-agent.log")
}

/// The last lines of a log, on one line.
pub(super) fn tail(log: &std::path::Path) -> String {
    let text = fs::read_to_string(log).unwrap_or_default();
    let lines: Vec<&str> = text.lines().collect();
    let last = lines.get(lines.len().saturating_sub(5)..).unwrap_or_default();
    format!("{} ({})", last.join("; "), log.display())
}

/// The Consul to run: `OVNET_CONSUL`, what `cargo xtask setup` brought, or what is on `PATH`.
pub(super) fn consul_binary() -> Option<PathBuf> {
    let set = std::env::var_os("OVNET_CONSUL").map(PathBuf::from);
    set.filter(|path| path.is_file()).or_else(|| tools::find("consul"))
}

fn consul_version(binary: &str) -> String {
    let output = Command::new(binary).arg("version").output();
    let text = output.map(|o| String::from_utf8_lossy(&o.stdout).into_owned()).unwrap_or_default();
    text.lines().next().unwrap_or("Consul").to_owned()
}

/// The program that has the hidden verbs of `lab`: this one, or the one beside the agent.
fn own_binary() -> Result<PathBuf> {
    let own = std::env::current_exe().context("find this program")?;
    let beside = ["debug", "release"].map(|profile| tools::target().join(profile).join("xtask"));
    [own]
        .into_iter()
        .chain(beside)
        .find(|path| path.is_file() && path.file_name().is_some_and(|name| name == "xtask"))
        .context("xtask is not there: `cargo build -p xtask` makes it")
}

/// Whether Consul is ready for agents: it has a leader, and is in its own catalog, which it enters
/// some time after it leads. Before, it answers 500 to whoever creates a session.
fn takes_sessions(consul: SocketAddr) -> bool {
    let Ok((200, answer)) = http::ask(consul, "PUT", "/v1/session/create") else { return false };
    let session: Option<serde_json::Value> = serde_json::from_str(&answer).ok();
    let id = session.as_ref().and_then(|it| it.get("ID")?.as_str()).unwrap_or_default();
    let destroy = format!("/v1/session/destroy/{id}");
    matches!(http::ask(consul, "PUT", &destroy), Ok((200, _)))
}
