//! Throughput and round trip, measured so that ways can be compared: in turns, in one lab.
//!
//! The machine is shared and its speed drifts within seconds. So every round measures every way
//! once, rounds begin with a different way each, and what counts is the median over the rounds.

use std::net::{Ipv4Addr, SocketAddrV4};
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use clap::ValueEnum;
use serde_json::Value;

use super::{Lab, Running, prepare};

/// The port of iperf3.
pub(crate) const PORT: u16 = 5201;
/// Echo requests per round. They take some milliseconds: each is sent when the last is answered.
const PINGS: &str = "1000";

/// A way from one place of the lab to another.
#[derive(Clone, Debug)]
pub struct Way {
    /// What a table calls it.
    pub label: String,
    /// Host or sandbox that sends.
    pub from: String,
    /// Host or sandbox that receives.
    pub to: String,
    /// Address of the receiver.
    pub address: Ipv4Addr,
}

/// What one round measured of one way.
#[derive(Clone, Copy, Debug)]
pub struct Sample {
    /// One TCP flow, in bits per second as received.
    pub throughput: f64,
    /// Round trip of ping.
    pub rtt: Rtt,
}

/// Round-trip times in microseconds.
#[derive(Clone, Copy, Debug)]
pub struct Rtt {
    /// The shortest.
    pub min: f64,
    /// The arithmetic mean.
    pub mean: f64,
}

/// How to measure.
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    /// How often each way is measured.
    pub rounds: usize,
    /// Length of an iperf3 run.
    pub seconds: u64,
    /// Where sender and receiver run.
    pub pin: Pin,
}

/// Which processors sender and receiver run on. Beside other work, one processor each gives much
/// lower figures than the other two, because sender and receiver then wait for both; how they
/// compare on an idle machine has been measured from host to host only, where they hardly differ.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Pin {
    /// Where the scheduler puts them.
    #[default]
    None,
    /// Both on the same: what is measured is the work of all of it together.
    Same,
    /// One each.
    Split,
}

impl Pin {
    pub(crate) fn sender(self) -> Option<&'static str> {
        match self {
            Self::None => None,
            Self::Same => Some("1"),
            Self::Split => Some("0"),
        }
    }

    pub(crate) fn receiver(self) -> Option<&'static str> {
        (self != Self::None).then_some("1")
    }
}

/// Measures all ways in turns; gives the samples of each, in the order of `ways`. `progress` is
/// told before each measurement what is measured.
///
/// # Errors
/// Something does not arrive, or a tool fails.
pub fn in_turns(
    lab: &Lab,
    ways: &[Way],
    plan: Plan,
    mut progress: impl FnMut(usize, &Way),
) -> Result<Vec<Vec<Sample>>> {
    let Plan { rounds, seconds, pin } = plan;
    let _servers = ways.iter().map(|way| serve(lab, way, pin)).collect::<Result<Vec<_>>>()?;
    for way in ways {
        // The first packets fill caches and neighbour tables.
        throughput(lab, way, 1, pin).with_context(|| way.label.clone())?;
    }
    let mut samples = vec![Vec::new(); ways.len()];
    for round in 0..rounds {
        for turn in 0..ways.len() {
            let index = (round + turn) % ways.len();
            let (Some(way), Some(samples)) = (ways.get(index), samples.get_mut(index)) else {
                continue;
            };
            progress(round, way);
            let throughput =
                throughput(lab, way, seconds, pin).with_context(|| way.label.clone())?;
            let rtt = ping(lab, way, pin).with_context(|| way.label.clone())?;
            samples.push(Sample { throughput, rtt });
        }
    }
    Ok(samples)
}

/// Checks that the commands that measure are there.
///
/// # Errors
/// One is not installed, with what to do about it.
pub fn require() -> Result<()> {
    let tools = [("iperf3", "iperf3"), ("ping", "iputils-ping"), ("taskset", "util-linux")];
    tools.into_iter().try_for_each(|(tool, package)| prepare::tool_path(tool, package).map(drop))
}

/// Starts the receiver of a way; it ends when the result is dropped.
///
/// # Errors
/// It does not come to listen.
pub fn serve(lab: &Lab, way: &Way, pin: Pin) -> Result<Running> {
    let port = PORT.to_string();
    let server =
        lab.spawn(&way.to, &pinned(pin.receiver(), &["iperf3", "-s", "-p", &port]), None)?;
    lab.wait_for_port(&way.to, PORT)?;
    Ok(server)
}

/// Sends one TCP flow; gives the bits per second that arrived.
///
/// # Errors
/// iperf3 fails: nobody listens (see [`serve`]), or nothing arrives.
pub fn throughput(lab: &Lab, way: &Way, seconds: u64, pin: Pin) -> Result<f64> {
    flow(lab, &way.from, SocketAddrV4::new(way.address, PORT), seconds, pin)
}

/// Sends one TCP flow to an iperf3 that may be behind another port; gives the bits per second
/// that arrived.
///
/// # Errors
/// iperf3 fails: nobody listens, or nothing arrives.
pub fn flow(lab: &Lab, from: &str, server: SocketAddrV4, seconds: u64, pin: Pin) -> Result<f64> {
    flows(lab, from, server, &[], seconds, pin)
}

/// Sends TCP flows as further arguments of iperf3 have it: so many at a time, or in both directions;
/// gives the bits per second that arrived, all together.
///
/// # Errors
/// iperf3 fails: nobody listens, or nothing arrives.
pub(crate) fn flows(
    lab: &Lab,
    from: &str,
    server: SocketAddrV4,
    arguments: &[&str],
    seconds: u64,
    pin: Pin,
) -> Result<f64> {
    let (address, port) = (server.ip().to_string(), server.port().to_string());
    let time = seconds.to_string();
    // The kernel's default congestion control, whatever this machine has: BBR paces, and so
    // measures its own timers more than the path.
    let mut command = vec!["iperf3", "-J", "-C", "cubic", "-c", &address, "-p", &port, "-t", &time];
    command.extend(arguments);
    let limit = Duration::from_secs(seconds + 10);
    let output = lab.output(from, &pinned(pin.sender(), &command), limit)?;
    received(&output.stdout, arguments.contains(&"--bidir")).with_context(|| {
        let said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
        format!("iperf3 from {from} to {server}: {} {said}", output.status)
    })
}

/// Bits per second that arrived, by what iperf3 says, there and, where it sent both ways, here.
fn received(said: &[u8], both_ways: bool) -> Result<f64> {
    let report: Value = serde_json::from_slice(said).context("what it says is no JSON")?;
    if let Some(error) = report.get("error").and_then(Value::as_str) {
        bail!("{error}");
    }
    let bits = |name| report.pointer(&format!("/end/{name}/bits_per_second"))?.as_f64();
    let there = bits("sum_received").filter(|bits| *bits > 0.0).context("nothing arrived")?;
    if !both_ways {
        return Ok(there);
    }
    let back = bits("sum_received_bidir_reverse").filter(|bits| *bits > 0.0);
    Ok(there + back.context("nothing came back")?)
}

/// Measures the round trip without pauses between packets: with pauses, what one measures is how
/// long an idle processor takes to wake up.
///
/// # Errors
/// An answer is missing.
pub fn ping(lab: &Lab, way: &Way, pin: Pin) -> Result<Rtt> {
    let address = way.address.to_string();
    let command = ["ping", "-n", "-i", "0", "-c", PINGS, "-W", "2", &address];
    let text = lab.exec(&way.from, &pinned(pin.sender(), &command))?;
    // The summary is cut to whole microseconds; the mean of the single times is not.
    let times: Vec<f64> = text
        .lines()
        .filter_map(|line| line.split_once("time=")?.1.strip_suffix(" ms")?.parse::<f64>().ok())
        .map(|milliseconds| milliseconds * 1000.0)
        .collect();
    ensure!(!times.is_empty(), "ping from {} to {address}: no answer", way.from);
    let count = u32::try_from(times.len()).context("count of answers")?;
    Ok(Rtt {
        min: times.iter().copied().fold(f64::INFINITY, f64::min),
        mean: times.iter().sum::<f64>() / f64::from(count),
    })
}

/// The median; the mean of the middle two where the number is even, 0 where there is none.
pub fn median(values: impl IntoIterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.into_iter().collect();
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    match values.get(middle) {
        None => 0.0,
        Some(upper) if values.len() % 2 == 1 => *upper,
        Some(upper) => values.get(middle - 1).map_or(*upper, |lower| f64::midpoint(*lower, *upper)),
    }
}

/// A command bound to a processor, where there is more than one.
pub(crate) fn pinned<'a>(processor: Option<&'a str>, command: &[&'a str]) -> Vec<&'a str> {
    let several = std::thread::available_parallelism().is_ok_and(|count| count.get() > 1);
    match processor.filter(|_| several) {
        Some(processor) => [&["taskset", "--cpu-list", processor], command].concat(),
        None => command.to_vec(),
    }
}

#[cfg(test)]
mod tests {
    use super::{median, received};

    #[test]
    fn median_is_the_middle_or_between_the_middle_two() {
        assert!((median([3.0, 1.0, 2.0]) - 2.0).abs() < 1e-9);
        assert!((median([4.0, 1.0, 2.0, 3.0]) - 2.5).abs() < 1e-9);
        assert!(median([]).abs() < 1e-9);
    }

    #[test]
    fn both_directions_are_what_arrived_together() {
        let both = br#"{"end": {"sum_sent": {"bits_per_second": 9e9},
            "sum_received": {"bits_per_second": 2e9},
            "sum_received_bidir_reverse": {"bits_per_second": 3e9}}}"#;
        assert!((received(both, false).unwrap() - 2e9).abs() < 1.0);
        assert!((received(both, true).unwrap() - 5e9).abs() < 1.0);
    }

    #[test]
    fn what_did_not_arrive_is_an_error() {
        let refused = br#"{"end": {}, "error": "unable to connect to server"}"#;
        assert!(received(refused, false).unwrap_err().to_string().contains("unable to connect"));
        let one_way = br#"{"end": {"sum_received": {"bits_per_second": 2e9}}}"#;
        let error = received(one_way, true).unwrap_err();
        assert!(error.to_string().contains("nothing came back"));
        let nothing = br#"{"end": {"sum_received": {"bits_per_second": 0.0}}}"#;
        assert!(received(nothing, false).is_err());
        assert!(received(b"iperf3: no such option", false).is_err());
    }
}
