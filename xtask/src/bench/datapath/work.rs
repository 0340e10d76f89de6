//! The kinds of work, and one measurement of one contender.

use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use clap::ValueEnum;
use serde::de::DeserializeOwned;

use super::super::cpu;
use super::super::report::Better;
use super::Plan;
use super::contenders::Contender;
use crate::lab::measure::{self, PORT as IPERF3, Pin, pinned};
use crate::load::{Count, RoundTrips};

/// The port of our own servers of connections and datagrams.
pub(super) const LOAD: u16 = 7000;
/// The port of the server of round trips.
pub(super) const ROUND_TRIPS: u16 = 7001;
/// How much longer the sender of datagrams goes on than they are counted.
const LONGER: Duration = Duration::from_millis(300);
/// How long our own tools may take beside what they were told to.
const SPARE: Duration = Duration::from_secs(12);
/// Of so many connections or requests one may fail.
const FAILURES: u64 = 1000;

/// What is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum Work {
    /// One TCP flow.
    Tcp1,
    /// Eight TCP flows at once.
    Tcp8,
    /// One TCP flow in each direction, at once.
    Bidir,
    /// Datagrams of 64 bytes, as fast as they can be sent.
    Udp64,
    /// Datagrams of 1400 bytes, as fast as they can be sent.
    Udp1400,
    /// Request and response by TCP, one at a time.
    TcpRr,
    /// Request and response by UDP, one at a time.
    UdpRr,
    /// New connection, one request, one response, close.
    Crr,
}

/// One thing that a measurement found.
pub(super) struct Figure {
    /// What a table calls it.
    pub(super) work: String,
    /// What is counted.
    pub(super) unit: &'static str,
    /// Which figures are the good ones.
    pub(super) better: Better,
    /// The figure.
    pub(super) value: f64,
}

impl Work {
    /// All, in the order of the tables.
    pub(super) const ALL: &[Self] = &[
        Self::Tcp1,
        Self::Tcp8,
        Self::Bidir,
        Self::Udp64,
        Self::Udp1400,
        Self::TcpRr,
        Self::UdpRr,
        Self::Crr,
    ];
    /// What most changes show in.
    pub(super) const QUICK: &[Self] = &[Self::Tcp1, Self::Udp1400, Self::TcpRr, Self::UdpRr];
    /// What the MTU matters to.
    pub(super) const FLOWS: &[Self] = &[Self::Tcp1, Self::Tcp8, Self::Bidir];

    /// What a table calls it.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Tcp1 => "TCP, one flow",
            Self::Tcp8 => "TCP, eight flows",
            Self::Bidir => "TCP, both directions",
            Self::Udp64 => "UDP, 64 bytes",
            Self::Udp1400 => "UDP, 1400 bytes",
            Self::TcpRr => "TCP request-response",
            Self::UdpRr => "UDP request-response",
            Self::Crr => "TCP connect-request-close",
        }
    }

    /// The port of the server that runs all the time, where there is one.
    pub(super) fn port(self) -> Option<u16> {
        match self {
            Self::Tcp1 | Self::Tcp8 | Self::Bidir => Some(IPERF3),
            Self::Udp64 | Self::Udp1400 => None,
            Self::TcpRr | Self::UdpRr => Some(ROUND_TRIPS),
            Self::Crr => Some(LOAD),
        }
    }

    /// Measures a contender once.
    pub(super) fn measure(self, contender: &Contender<'_>, plan: Plan) -> Result<Vec<Figure>> {
        match self {
            Self::Tcp1 => self.flows(contender, &[], plan),
            Self::Tcp8 => self.flows(contender, &["-P", "8"], plan),
            Self::Bidir => self.flows(contender, &["--bidir"], plan),
            Self::Udp64 => self.datagrams(contender, "64", plan),
            Self::Udp1400 => self.datagrams(contender, "1400", plan),
            Self::TcpRr => self.round_trips(contender, &[], plan),
            Self::UdpRr => self.round_trips(contender, &["--udp"], plan),
            Self::Crr => self.connections(contender, plan),
        }
    }

    fn flows(self, on: &Contender<'_>, arguments: &[&str], plan: Plan) -> Result<Vec<Figure>> {
        let Plan { seconds, .. } = plan;
        let (server, pin) = (on.server(IPERF3), plan.pin_of(self));
        let (bits, busy) =
            cpu(|| measure::flows(on.lab, &on.from, server, arguments, seconds, pin))?;
        let gigabytes = bits / 8e9 * plan.time().as_secs_f64();
        Ok(vec![
            self.figure("", "Gb/s", Better::Higher, bits / 1e9),
            self.figure(", CPU", "s/GB", Better::Lower, busy / gigabytes),
        ])
    }

    fn datagrams(self, on: &Contender<'_>, size: &str, plan: Plan) -> Result<Vec<Figure>> {
        let pin = plan.pin_of(self);
        let (port, server) = (LOAD.to_string(), on.server(LOAD).to_string());
        let ((sent, received), busy) = cpu(|| {
            thread::scope(|scope| {
                let argv = ["udp-server", &port];
                let receiver = scope.spawn(move || -> Result<Count> {
                    load(on, &on.to, pin.receiver(), &argv, plan.time())
                });
                on.lab.wait_for_udp_port(&on.to, LOAD)?;
                let argv = ["udp-client", &server, "--size", size];
                let sent: Count = load(on, &on.from, pin.sender(), &argv, plan.time() + LONGER)?;
                let received = receiver.join().map_err(|_| anyhow!("a panic"))??;
                Ok((sent, received))
            })
        })?;
        let (sent, received) = (sent.rate(), received.rate());
        ensure!(sent > 0.0 && received > 0.0, "nothing arrived");
        let millions = received / 1e6 * (plan.time() + LONGER).as_secs_f64();
        let lost = (100.0 * (1.0 - received / sent)).max(0.0);
        Ok(vec![
            self.figure(" delivered", "1000/s", Better::Higher, received / 1e3),
            self.figure(" lost", "%", Better::Lower, lost),
            self.figure(", CPU", "s/million", Better::Lower, busy / millions),
        ])
    }

    fn round_trips(self, on: &Contender<'_>, further: &[&str], plan: Plan) -> Result<Vec<Figure>> {
        let server = on.server(ROUND_TRIPS).to_string();
        let argv = [&["round-trip-client", &server], further].concat();
        let pin = plan.pin_of(self).sender();
        let found: RoundTrips = load(on, &on.from, pin, &argv, plan.time())?;
        let RoundTrips { done, failed, rate, p50, p99 } = found;
        ensure!(failed * FAILURES <= done, "{failed} requests were lost, {done} were not");
        Ok(vec![
            self.figure("", "1000/s", Better::Higher, rate / 1e3),
            self.figure(", p50", "µs", Better::Lower, p50),
            self.figure(", p99", "µs", Better::Lower, p99),
        ])
    }

    fn connections(self, on: &Contender<'_>, plan: Plan) -> Result<Vec<Figure>> {
        let server = on.server(LOAD).to_string();
        let (pin, argv) = (plan.pin_of(self).sender(), ["tcp-client", &server]);
        let (count, busy): (Count, f64) = cpu(|| load(on, &on.from, pin, &argv, plan.time()))?;
        let Count { done, failed, .. } = count;
        ensure!(failed * FAILURES <= done, "{failed} connections failed, {done} did not");
        ensure!(done > 0, "no connection was made");
        let thousands = count.rate() / 1e3;
        Ok(vec![
            self.figure("", "1000/s", Better::Higher, thousands),
            self.figure(
                ", CPU",
                "ms/1000",
                Better::Lower,
                busy * 1e3 / (thousands * count.seconds),
            ),
        ])
    }

    fn figure(self, what: &str, unit: &'static str, better: Better, value: f64) -> Figure {
        Figure { work: format!("{}{what}", self.name()), unit, better, value }
    }
}

impl Plan {
    fn time(self) -> Duration {
        Duration::from_secs(self.seconds)
    }

    /// Where sender and receiver of a kind of work run.
    pub(super) fn pin_of(self, work: Work) -> Pin {
        self.pin.unwrap_or(match work {
            // What several flows are for.
            Work::Tcp8 | Work::Bidir => Pin::None,
            // Left to the scheduler, sender and receiver meet on one processor in one measurement and not
            // in the next, which makes more of a difference than whom they go through. On one, what
            // is measured is the work of the whole way; and of round trips, nothing of how long an
            // idle processor takes to wake up.
            _ => Pin::Same,
        })
    }
}

/// This program, which has the hidden verb `load`, as hosts see it: they share the machine's files.
pub(super) fn program() -> Result<String> {
    let program = std::env::current_exe().context("find this program")?;
    Ok(program.to_str().context("this program's path is not UTF-8")?.to_owned())
}

/// What something gave, and the processor time in seconds that the machine spent meanwhile.
fn cpu<T>(call: impl FnOnce() -> Result<T>) -> Result<(T, f64)> {
    let before = cpu::busy()?;
    let given = call()?;
    Ok((given, cpu::busy()?.saturating_sub(before).as_secs_f64()))
}

/// Runs one of our own tools for a time and gives what it counted.
fn load<T: DeserializeOwned>(
    on: &Contender<'_>,
    place: &str,
    processor: Option<&str>,
    arguments: &[&str],
    time: Duration,
) -> Result<T> {
    let (program, milliseconds) = (program()?, time.as_millis().to_string());
    let mut argv = vec![program.as_str(), "load"];
    argv.extend(arguments);
    argv.extend(["--milliseconds", &milliseconds]);
    let output = on.lab.output(place, &pinned(processor, &argv), time + SPARE)?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
        bail!("{} in {place}: {} {said}", arguments.join(" "), output.status);
    }
    serde_json::from_slice(&output.stdout).with_context(|| format!("what {place} counted"))
}
