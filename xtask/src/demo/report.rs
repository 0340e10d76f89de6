//! The table at the end of the demo.

use crate::lab::Wire;
use crate::lab::measure::{Sample, Way, median};
use crate::lab::table as align;
use crate::machine;

/// The medians of each way, and what the last way is to the second: ovnet to the kernel's vxlan.
pub(super) fn table(ways: &[Way], samples: &[Vec<Sample>], wire: Wire, mtu: u32) -> String {
    let wire = match wire {
        Wire::Gso => "packets of up to 64 KiB on the wire (--wire gso)",
        Wire::Mtu => "packets of the MTU on the wire, GRO on (--wire mtu)",
    };
    let medians: Vec<(f64, f64, f64)> = samples
        .iter()
        .map(|samples| {
            (
                median(samples.iter().map(|sample| sample.throughput)) / 1e9,
                median(samples.iter().map(|sample| sample.rtt.mean)),
                median(samples.iter().map(|sample| sample.rtt.min)),
            )
        })
        .collect();
    let host = medians.first().copied().unwrap_or_default();
    let mut rows = vec![row(&[
        "median",
        "Gb/s",
        "lowest – highest",
        "of host to host",
        "ping µs",
        "shortest µs",
    ])];
    for ((way, samples), (throughput, rtt, shortest)) in ways.iter().zip(samples).zip(&medians) {
        let all = samples.iter().map(|sample| sample.throughput / 1e9);
        let lowest = all.clone().fold(f64::INFINITY, f64::min);
        let highest = all.fold(0.0, f64::max);
        rows.push(vec![
            way.label.clone(),
            format!("{throughput:.2}"),
            format!("{lowest:.2} – {highest:.2}"),
            format!("{:.0} %", 100.0 * throughput / host.0),
            format!("{rtt:.1}"),
            format!("{shortest:.0}"),
        ]);
    }
    if let [_, vxlan, ovnet] = medians.as_slice() {
        rows.push(vec![
            "ovnet ÷ kernel vxlan".to_owned(),
            format!("{:.2}", ovnet.0 / vxlan.0),
            String::new(),
            String::new(),
            format!("{:.2}", ovnet.1 / vxlan.1),
            format!("{:.2}", ovnet.2 / vxlan.2),
        ]);
    }
    format!("{}\n{wire}, MTU {mtu}; {}\n", align(&rows), machine::describe())
}

fn row(cells: &[&str]) -> Vec<String> {
    cells.iter().map(|cell| (*cell).to_owned()).collect()
}
