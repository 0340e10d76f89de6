//! One measurement of one contender.

use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow, bail, ensure};

use super::super::cpu;
use super::ways::{LOAD, Way, program};
use crate::lab::measure::{self, Pin};
use crate::lab::{CLIENT, Lab};
use crate::load::Count;

/// How much longer the sender of datagrams goes on than they are counted.
const LONGER: Duration = Duration::from_millis(300);
/// How long our own tools may take beside what they were told to.
const SPARE: Duration = Duration::from_secs(12);
/// Of so many connections one may fail.
const FAILURES: u64 = 1000;

/// What is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Work {
    /// One TCP flow, bits.
    Throughput,
    /// New connection, one request, one answer, close.
    Connections,
    /// Datagrams of 64 bytes that arrive.
    Packets,
}

impl Work {
    /// All, in the order of the table.
    pub(super) const ALL: [Self; 3] = [Self::Throughput, Self::Connections, Self::Packets];

    /// What a table calls it.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Throughput => "TCP, one flow",
            Self::Connections => "TCP connections",
            Self::Packets => "UDP packets",
        }
    }

    /// The unit of its rate in a table, and how many of what is counted that is.
    pub(super) fn unit(self) -> (&'static str, f64) {
        match self {
            Self::Throughput => ("Gb/s", 1e9),
            Self::Connections => ("1000/s", 1e3),
            Self::Packets => ("1000/s", 1e3),
        }
    }

    /// What processor time is told of, and how many of what is counted that is.
    pub(super) fn piece(self) -> (&'static str, f64) {
        match self {
            Self::Throughput => ("MB", 8e6),
            Self::Connections => ("connection", 1.0),
            Self::Packets => ("packet", 1.0),
        }
    }
}

/// What one round measured.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Sample {
    /// Bits, connections or packets in a second.
    pub(super) rate: f64,
    /// Processor time of all the machine for one of them, in seconds.
    pub(super) cpu: f64,
}

/// Measures a contender once.
pub(super) fn measure(lab: &Lab, way: &Way, work: Work, seconds: u64) -> Result<Sample> {
    let time = Duration::from_secs(seconds);
    let before = cpu::busy()?;
    let (rate, took) = match work {
        Work::Throughput => (measure::flow(lab, CLIENT, way.iperf3(), seconds, Pin::None)?, time),
        Work::Connections => (connections(lab, way, time)?.rate(), time),
        Work::Packets => (packets(lab, way, time)?.rate(), time + LONGER),
    };
    let busy = cpu::busy()?.saturating_sub(before);
    ensure!(rate > 0.0, "nothing arrived");
    Ok(Sample { rate, cpu: busy.as_secs_f64() / (rate * took.as_secs_f64()) })
}

fn connections(lab: &Lab, way: &Way, time: Duration) -> Result<Count> {
    let count = load(lab, CLIENT, &["tcp-client", &way.load().to_string()], time)?;
    let Count { done, failed, .. } = count;
    ensure!(failed * FAILURES <= done, "{failed} connections failed, {done} did not");
    Ok(count)
}

fn packets(lab: &Lab, way: &Way, time: Duration) -> Result<Count> {
    thread::scope(|scope| {
        let received =
            scope.spawn(|| load(lab, &way.place, &["udp-server", &LOAD.to_string()], time));
        lab.wait_for_udp_port(&way.place, LOAD)?;
        load(lab, CLIENT, &["udp-client", &way.load().to_string()], time + LONGER)?;
        received.join().map_err(|_| anyhow!("a panic"))?
    })
}

/// Runs one of our own tools for a time and gives what it counted.
fn load(lab: &Lab, place: &str, arguments: &[&str], time: Duration) -> Result<Count> {
    let (program, milliseconds) = (program()?, time.as_millis().to_string());
    let mut argv = vec![program.as_str(), "load"];
    argv.extend(arguments);
    argv.extend(["--milliseconds", &milliseconds]);
    let output = lab.output(place, &argv, time + SPARE)?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
        bail!("{} in {place}: {} {said}", arguments.join(" "), output.status);
    }
    serde_json::from_slice(&output.stdout).with_context(|| format!("what {place} counted"))
}
