//! Helpers for tests in a lab: hosts as namespaces, an agent on each, real traffic.

#![allow(
    clippy::panic,
    clippy::unwrap_used,
    reason = "this is test code, and a panic names the line that failed"
)]

use std::{
    any::Any,
    collections::BTreeMap,
    io::{Read as _, Write as _},
    net::{Ipv4Addr, TcpStream},
    panic::{AssertUnwindSafe, catch_unwind},
    path::Path,
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use ovnet_common::verdict::DropReason;
use serde_json::Value;
use xtask::lab::{self, Lab, Options, wait_until};

/// How long anything that happens by itself may take: a record that spreads, a line in a log.
pub const SOON: Duration = Duration::from_secs(15);

/// Labs are used one after the other: two cores shared by several labs make times of one depend on
/// what another does.
static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

/// A lab for a test; it is gone when this is dropped.
pub struct TestLab {
    lab: Lab,
    _turn: MutexGuard<'static, ()>,
}

impl std::ops::Deref for TestLab {
    type Target = Lab;

    fn deref(&self) -> &Lab {
        &self.lab
    }
}

/// Makes a lab. Where the test cannot run this prints `SKIP name: why` and gives none; with
/// `OVNET_REQUIRE_ALL=1` it then panics.
pub fn start(name: &str, change: impl FnOnce(&mut Options)) -> Option<TestLab> {
    let turn = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(why) = missing() {
        println!("SKIP {name}: {why}");
        assert!(std::env::var_os("OVNET_REQUIRE_ALL").is_none_or(|it| it != "1"), "{name}: {why}");
        return None;
    }
    // The test that waits longest for a repair is the one that undoes what the agent set, and it
    // must see that state for as long as it looks at it.
    let mut options = Options {
        agent_args: vec!["--repair-interval".into(), "600".into()],
        ..Options::test(name)
    };
    // These tests are about the overlay alone: whatever else is in a sandbox they put there.
    options.agent_args.extend(["--egress", "off"].map(str::to_owned));
    change(&mut options);
    let lab = Lab::up(options).unwrap_or_else(|error| panic!("{name}: {error:#}"));
    Some(TestLab { lab, _turn: turn })
}

/// What this machine lacks for a lab with agents and traffic.
fn missing() -> Option<String> {
    if !nix::unistd::geteuid().is_root() {
        return Some("it needs root".into());
    }
    if let Err(error) = lab::default_bin_dir() {
        return Some(format!("{error:#}"));
    }
    let tools = ["ip", "bridge", "ping", "nft", "tc", "ethtool", "nsenter"];
    let path = std::env::var("PATH").unwrap_or_default() + ":/usr/local/sbin:/usr/sbin:/sbin";
    let found = |tool: &str| path.split(':').any(|folder| Path::new(folder).join(tool).is_file());
    tools.iter().find(|tool| !found(tool)).map(|tool| format!("`{tool}` is not installed"))
}

/// Steps of a test that share a lab: one that fails does not keep the others from running.
#[derive(Default)]
pub struct Steps(Vec<String>);

impl Steps {
    /// Runs a step. What it panics with is told at the end, too.
    pub fn step(&mut self, name: &str, step: impl FnOnce()) {
        let only = std::env::var("OVNET_STEP").unwrap_or_default();
        if !name.contains(&only) {
            return;
        }
        let started = Instant::now();
        match catch_unwind(AssertUnwindSafe(step)) {
            Ok(()) => println!("  ok {name}, {:.1} s", started.elapsed().as_secs_f32()),
            Err(panic) => {
                println!("  FAILED {name}");
                self.0.push(format!("{name}: {}", message(&*panic)));
            }
        }
    }

    /// Panics with all that failed.
    pub fn finish(self) {
        assert!(self.0.is_empty(), "{} steps failed:\n{}", self.0.len(), self.0.join("\n"));
    }
}

fn message(panic: &(dyn Any + Send)) -> &str {
    match (panic.downcast_ref::<String>(), panic.downcast_ref::<&str>()) {
        (Some(text), _) => text,
        (_, Some(text)) => text,
        _ => "a panic without words",
    }
}

/// Counters of some hosts at one moment, to be compared with a later one.
pub struct Counters<'a> {
    lab: &'a Lab,
    hosts: Vec<String>,
    before: BTreeMap<Key, u64>,
}

/// Host, program, verdict.
type Key = (String, String, String);

impl<'a> Counters<'a> {
    /// The counters of all hosts now.
    pub fn now(lab: &'a Lab) -> Self {
        let hosts = lab.nodes();
        let before = read(lab, &hosts);
        Self { lab, hosts, before }
    }

    /// What was counted since.
    pub fn since(&self) -> Counted {
        let mut counted = read(self.lab, &self.hosts);
        for (key, packets) in &mut counted {
            *packets -= self.before.get(key).copied().unwrap_or_default();
        }
        counted.retain(|_, packets| *packets > 0);
        Counted(counted)
    }

    /// Waits until a verdict was counted at least this often since.
    pub fn wait(&self, host: &str, program: &str, verdict: &str, packets: u64) -> Counted {
        let what =
            || format!("{packets} {program} {verdict} on {host}; counted: {:?}", self.since());
        wait_until(SOON, what, || {
            let counted = self.since();
            Ok((counted.packets(host, program, verdict) >= packets).then_some(counted))
        })
        .unwrap()
    }
}

/// What was counted between two moments.
pub struct Counted(BTreeMap<Key, u64>);

impl Counted {
    /// Packets of one program's verdict.
    pub fn packets(&self, host: &str, program: &str, verdict: &str) -> u64 {
        let key = (host.to_owned(), program.to_owned(), verdict.to_owned());
        self.0.get(&key).copied().unwrap_or_default()
    }

    /// Asserts that a verdict was counted at least so often.
    #[track_caller]
    pub fn at_least(&self, host: &str, program: &str, verdict: &str, packets: u64) -> &Self {
        let found = self.packets(host, program, verdict);
        assert!(
            found >= packets,
            "{host}: {program} {verdict} is {found} and not {packets} or more: {self:?}"
        );
        self
    }

    /// Asserts that a verdict was not counted.
    #[track_caller]
    pub fn none(&self, host: &str, program: &str, verdict: &str) -> &Self {
        let found = self.packets(host, program, verdict);
        assert!(found == 0, "{host}: {program} {verdict} is {found} and not 0: {self:?}");
        self
    }

    /// Asserts that nothing was dropped on any host, and nothing went the slow way.
    #[track_caller]
    pub fn only_fast(&self) -> &Self {
        let slow = self.0.keys().any(|(_, _, verdict)| verdict.starts_with("slow-"));
        assert!(!slow, "something went the slow way: {self:?}");
        self.no_drops()
    }

    /// Asserts that nothing was dropped on any host.
    #[track_caller]
    pub fn no_drops(&self) -> &Self {
        let dropped = |verdict: &str| DropReason::ALL.iter().any(|it| it.label() == verdict);
        let any = self.0.keys().any(|(_, _, verdict)| dropped(verdict));
        assert!(!any, "something was dropped: {self:?}");
        self
    }
}

impl std::fmt::Debug for Counted {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let lines = self.0.iter().filter(|((_, _, verdict), _)| verdict != "pass");
        let lines: Vec<String> = lines
            .map(|((host, program, verdict), packets)| {
                format!("{host} {program} {verdict} {packets}")
            })
            .collect();
        write!(f, "[{}]", lines.join(", "))
    }
}

fn read(lab: &Lab, hosts: &[String]) -> BTreeMap<Key, u64> {
    let mut counters = BTreeMap::new();
    for host in hosts {
        let lines = lab.ovnet_json(host, &["counters", "--all"]).unwrap();
        for line in lines.as_array().unwrap() {
            let text = |field: &str| line[field].as_str().unwrap().to_owned();
            let key = (host.clone(), text("program"), text("verdict"));
            counters.insert(key, line["packets"].as_u64().unwrap());
        }
    }
    counters
}

/// Sends echo requests, 50 a second, and gives how many were sent and answered.
pub fn ping(lab: &Lab, from: &str, to: Ipv4Addr, options: &[&str]) -> (u32, u32) {
    let to = to.to_string();
    let count: &[&str] = if options.contains(&"-c") { &[] } else { &["-c", "5"] };
    let argv = [&["ping", "-n", "-q", "-i", "0.02", "-W", "2"], count, options, &[&to]].concat();
    let output = lab.output(from, &argv, Duration::from_secs(60)).unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    counts(&text).unwrap_or_else(|| {
        panic!("{from}: {}: {text} {}", argv.join(" "), String::from_utf8_lossy(&output.stderr))
    })
}

/// Asserts that every echo request is answered.
#[track_caller]
pub fn ping_all(lab: &Lab, from: &str, to: Ipv4Addr, options: &[&str]) {
    let (sent, received) = ping(lab, from, to, options);
    assert!(
        sent > 0 && sent == received,
        "{from} > {to} {options:?}: {received} of {sent} answered"
    );
}

/// Waits until an echo request is answered: the record of the endpoint has arrived.
#[track_caller]
pub fn wait_for_ping(lab: &Lab, from: &str, to: Ipv4Addr) {
    let what = || format!("{to} to answer {from}");
    wait_until(SOON, what, || {
        Ok((ping(lab, from, to, &["-c", "1", "-W", "1"]).1 == 1).then_some(()))
    })
    .unwrap();
}

/// The two numbers in ping's summary.
fn counts(text: &str) -> Option<(u32, u32)> {
    let line = text.lines().find(|line| line.contains("packets transmitted"))?;
    let mut parts = line.split(", ");
    let sent = parts.next()?.split(' ').next()?.parse().ok()?;
    let received = parts.next()?.split(' ').next()?.parse().ok()?;
    Some((sent, received))
}

/// Writes a record to the lab's Consul by hand, as `consul kv put ovnet/v1/KEY VALUE` does.
pub fn kv_put(lab: &Lab, key: &str, value: &Value) {
    kv(lab, "PUT", key, &value.to_string());
}

/// Deletes a record.
pub fn kv_delete(lab: &Lab, key: &str) {
    kv(lab, "DELETE", key, "");
}

fn kv(lab: &Lab, method: &str, key: &str, body: &str) {
    let consul = lab.consul().unwrap();
    let request = format!(
        "{method} /v1/kv/ovnet/v1/{key} HTTP/1.1\r\nHost: consul\r\nConnection: close\r\n\
         Content-Length: {}\r\n\r\n{body}",
        body.len()
    );
    let answer = lab.inside("docker01", move || {
        let mut stream = TcpStream::connect(consul)?;
        stream.write_all(request.as_bytes())?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        Ok(answer)
    });
    let answer = answer.unwrap();
    assert!(answer.starts_with("HTTP/1.1 200"), "{method} {key}: {answer}");
}

/// Runs a shell script in a place of the lab; `$1`, `$2`, … are the arguments.
#[track_caller]
pub fn script(lab: &Lab, place: &str, script: &str, arguments: &[&str]) -> String {
    let argv = [&["sh", "-e", "-c", script, "sh"], arguments].concat();
    lab.exec(place, &argv).unwrap_or_else(|error| panic!("{error:#}"))
}

/// Runs a script when dropped, so that what a step changed is put back also when it fails.
pub struct PutBack<'a> {
    /// The lab.
    pub lab: &'a Lab,
    /// Host or sandbox.
    pub place: &'a str,
    /// What to run.
    pub script: &'a str,
}

impl Drop for PutBack<'_> {
    fn drop(&mut self) {
        let argv = ["sh", "-c", self.script];
        if let Err(error) = self.lab.exec(self.place, &argv) {
            eprintln!("warning: {error:#}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_summary_of_ping_is_read_with_and_without_errors() {
        let text = "5 packets transmitted, 4 received, 20% packet loss, time 80ms";
        assert_eq!(counts(text), Some((5, 4)));
        let text = "3 packets transmitted, 0 received, +3 errors, 100% packet loss, time 40ms";
        assert_eq!(counts(text), Some((3, 0)));
        assert_eq!(counts("ping: nobody: unknown host"), None);
    }
}
