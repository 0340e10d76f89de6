//! A lab with agents, as the tests of the agent use it: what it holds, what flows through it.

#![allow(
    clippy::panic,
    clippy::unwrap_used,
    reason = "this is test code, and a panic names the line that failed"
)]

mod docker;
mod flows;
mod footprint;
mod programs;

use std::{
    collections::BTreeMap,
    env,
    net::{Ipv4Addr, SocketAddr},
    path::PathBuf,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use nix::sys::signal::Signal;
use serde_json::Value;
use xtask::lab::{Lab, Options, default_bin_dir, require, wait_until};

pub use self::{
    docker::DockerEndpoint,
    flows::{Ping, Stream},
    footprint::Footprint,
    programs::ProgramWatch,
};
use crate::consul::{find_consul, request, skip};

/// How long anything may take that has no limit of its own: long, because machines that run tests
/// are busy, and a test that passes never waits for it.
pub const LIMIT: Duration = Duration::from_secs(30);
/// How long one command may take.
const COMMAND: Duration = Duration::from_secs(60);
/// Where the records are in Consul.
const PREFIX: &str = "ovnet/v1/";
/// Commands these tests run beside those of the lab.
const TOOLS: [&str; 7] = ["ip", "nsenter", "unshare", "ping", "stdbuf", "setpriv", "timeout"];

/// A lab with real agents and a real Consul, gone with this value or this process.
pub struct Cluster {
    /// The lab.
    pub lab: Lab,
}

impl Cluster {
    /// Makes one. Where a privilege or a tool is missing this prints `SKIP test: why` and returns
    /// `None`, and panics where `OVNET_REQUIRE_ALL=1` is set.
    pub fn up(name: &str, change: impl FnOnce(&mut Options)) -> Option<Self> {
        let mut options = Options::test(name);
        change(&mut options);
        if let Some(why) = missing(&options) {
            skip(&why);
            return None;
        }
        if let Err(why) = require(&options) {
            skip(&format!("{why:#}"));
            return None;
        }
        Some(Self { lab: Lab::up(options).unwrap_or_else(|error| panic!("{error:#}")) })
    }

    /// Runs a command that must succeed; gives what it printed.
    pub fn run(&self, place: &str, argv: &[&str]) -> String {
        self.lab.exec(place, argv).unwrap_or_else(|error| panic!("{error:#}"))
    }

    /// Runs a command, given as words with spaces between, that must succeed.
    pub fn sh(&self, place: &str, line: &str) -> String {
        self.run(place, &line.split_whitespace().collect::<Vec<_>>())
    }

    /// Runs `ovnet … --json`, which must succeed and print JSON.
    pub fn json(&self, host: &str, arguments: &str) -> Value {
        let arguments: Vec<_> = arguments.split_whitespace().collect();
        self.lab.ovnet_json(host, &arguments).unwrap_or_else(|error| panic!("{error:#}"))
    }

    /// Makes a sandbox and attaches it: `attach` is what follows `ovnet attach`.
    pub fn sandbox(&self, host: &str, name: &str, attach: &str) -> Ipv4Addr {
        let attach: Vec<_> = attach.split_whitespace().collect();
        let printed = self.lab.run_sandbox(host, name, &attach);
        printed.unwrap_or_else(|error| panic!("{error:#}")).trim().parse().unwrap()
    }

    /// Runs a command that must be refused with exactly one line on standard error, nothing on
    /// standard output and exit code 1; gives the line.
    pub fn refused(&self, place: &str, argv: &[&str]) -> String {
        let output = self.lab.output(place, argv, COMMAND).unwrap();
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim_end().to_owned();
        let (said, printed) = (text(&output.stderr), text(&output.stdout));
        let shown = argv.join(" ");
        assert_eq!(output.status.code(), Some(1), "`{shown}` printed {printed:?}, said {said:?}");
        assert_eq!(said.lines().count(), 1, "`{shown}` must say one line, and said: {said}");
        assert_eq!(printed, "", "`{shown}` fails and prints something");
        said
    }

    /// What the agent of a host says of itself.
    pub fn status(&self, host: &str) -> Value {
        self.json(host, "status")
    }

    /// Stops the agent of a host by this signal and waits until it ended.
    pub fn stop_agent(&self, host: &str, signal: Signal) {
        self.lab.stop_agent(host, signal).unwrap();
    }

    /// Starts the agent of a host and waits until it answers.
    pub fn start_agent(&self, host: &str) {
        self.lab.start_agent(host, &[]).unwrap_or_else(|error| panic!("{error:#}"));
    }

    /// The value of a record; the key without the prefix.
    pub fn record(&self, key: &str) -> Option<String> {
        let (status, body) = self.kv("GET", &format!("{key}?raw"), "");
        (status == 200).then(|| String::from_utf8(body).unwrap())
    }

    /// Writes a record by hand.
    pub fn put_record(&self, key: &str, value: &str) {
        let (status, _) = self.kv("PUT", key, value);
        assert_eq!(status, 200, "write {key}");
    }

    /// Deletes a record by hand.
    pub fn delete_record(&self, key: &str) {
        let (status, _) = self.kv("DELETE", key, "");
        assert_eq!(status, 200, "delete {key}");
    }

    /// Whether a session holds a record.
    pub fn is_locked(&self, key: &str) -> bool {
        let (status, body) = self.kv("GET", key, "");
        status == 200 && String::from_utf8_lossy(&body).contains("\"Session\"")
    }

    /// All records by key, without the sentinels, which come and go.
    pub fn records(&self) -> BTreeMap<String, String> {
        let (status, body) = self.kv("GET", "?keys", "");
        let keys: Vec<String> = match status {
            200 => serde_json::from_slice(&body).unwrap(),
            _ => Vec::new(),
        };
        keys.iter()
            .filter_map(|key| key.strip_prefix(PREFIX))
            .filter(|key| !key.ends_with(".keep"))
            .filter_map(|key| Some((key.to_owned(), self.record(key)?)))
            .collect()
    }

    /// One request about records to the lab's Consul.
    fn kv(&self, method: &'static str, path: &str, body: &str) -> (u16, Vec<u8>) {
        let consul: SocketAddr = self.lab.consul().unwrap().parse().unwrap();
        let (path, body) = (format!("/v1/kv/{PREFIX}{path}"), body.to_owned());
        // Consul has no leader for a moment after a start.
        until(&format!("an answer to {method} {path}"), || {
            let (path, body) = (path.clone(), body.clone());
            let answer = self
                .lab
                .inside("docker01", move || request(consul, method, &path, body.as_bytes()))
                .ok()?;
            (answer.0 < 500).then_some(answer)
        })
    }

    /// Waits until a host's agent says that it is connected to Consul and announced.
    pub fn wait_connected(&self, host: &str) {
        until(&format!("{host} to be connected"), || self.is_connected(host).then_some(()));
    }

    /// Whether a host's agent says that it is connected to Consul and announced.
    pub fn is_connected(&self, host: &str) -> bool {
        let status = self.status(host);
        status["consul_state"] == "connected"
            && status["errors"].as_array().is_some_and(Vec::is_empty)
    }

    /// Pings until an answer comes.
    pub fn wait_ping(&self, place: &str, address: Ipv4Addr) {
        until(&format!("{address} to answer {place}"), || {
            self.lab.exec(place, &["ping", "-c1", "-W1", &address.to_string()]).ok()
        });
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        // The lab takes the logs with it.
        if std::thread::panicking() {
            for node in self.lab.nodes() {
                println!("--- the agent of {node} said:\n{}", self.lab.agent_output(&node));
                if self.lab.options().docker {
                    let said = self.lab.docker_output(&node);
                    let worth =
                        |line: &&str| line.contains("level=error") || line.contains("driver error");
                    let said: Vec<_> = said.lines().filter(worth).collect();
                    println!("--- the Docker of {node} said:\n{}", said.join("\n"));
                }
            }
        }
    }
}

/// Why a lab with agents cannot be had here.
fn missing(options: &Options) -> Option<String> {
    if !nix::unistd::geteuid().is_root() {
        return Some("it needs root".into());
    }
    if let Err(error) = default_bin_dir() {
        return Some(format!("{error:#}"));
    }
    if !options.stand_in && find_consul().is_none() {
        return Some("no Consul found: put one on PATH, or run `cargo xtask setup`".into());
    }
    let folders: Vec<PathBuf> = env::split_paths(&env::var_os("PATH").unwrap_or_default())
        .chain(["/usr/sbin", "/sbin"].map(PathBuf::from))
        .collect();
    let absent = |tool: &&str| !folders.iter().any(|folder| folder.join(tool).is_file());
    TOOLS.iter().find(|tool| absent(tool)).map(|tool| format!("`{tool}` is not installed"))
}

/// Looks again until there is something; panics after [`LIMIT`]. `what` completes "waited for …".
pub fn until<T>(what: &str, look: impl FnMut() -> Option<T>) -> T {
    within(LIMIT, what, look)
}

/// [`until`] with a limit of its own.
pub fn within<T>(limit: Duration, what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    wait_until(limit, || what.to_owned(), || Ok(look())).unwrap_or_else(|error| panic!("{error:#}"))
}

/// Says how long the steps of a long test took, for whoever wonders where the time goes.
pub struct Steps(Instant);

impl Default for Steps {
    fn default() -> Self {
        Self(Instant::now())
    }
}

impl Steps {
    /// Marks the beginning of a step. A test that fails has named the last one it began.
    pub fn begin(&self, step: &str) {
        println!("{:6.2} s  {step}", self.0.elapsed().as_secs_f64());
    }
}

/// The string in a JSON object.
pub fn text<'a>(value: &'a Value, field: &str) -> Result<&'a str> {
    value[field].as_str().with_context(|| format!("no {field} in {value}"))
}
