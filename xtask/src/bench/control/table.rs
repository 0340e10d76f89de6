//! The tables at the end.

use super::cluster::Shape;
use super::point::{Phase, Point};
use crate::lab::table as align;

/// A shape in words.
pub(super) fn describe(shape: Shape) -> &'static str {
    match shape {
        Shape::One => "all endpoints in one network",
        Shape::Spread => "endpoints in 100 networks, the host is on 3",
    }
}

/// The smallest value that so many per cent of all do not exceed.
pub(super) fn percentile(values: &[f64], per_cent: usize) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let rank = (sorted.len() * per_cent).div_ceil(100);
    sorted.get(rank.saturating_sub(1)).copied().unwrap_or(f64::NAN)
}

/// A row for each point, first of the times, then of what it costs.
pub(super) fn render(shape: Shape, points: &[Point]) -> String {
    let row = |cells: &[&str]| cells.iter().map(|it| (*it).to_owned()).collect::<Vec<String>>();
    let mut times = vec![
        row(&[
            "p50 / p99, ms",
            "",
            "",
            "at rest",
            "",
            "",
            "under churn",
            "",
            "",
            "all known, s",
            "",
        ]),
        row(&[
            "hosts",
            "endpoints",
            "known",
            "attach",
            "answer",
            "record",
            "attach",
            "answer",
            "record",
            "attach",
            "start",
        ]),
    ];
    let mut costs = vec![
        row(&[
            "per second",
            "",
            "at rest",
            "",
            "",
            "",
            "under churn",
            "",
            "",
            "",
            "",
            "memory",
            "",
        ]),
        row(&[
            "hosts",
            "endpoints",
            "agent",
            "Consul",
            "requests",
            "kB",
            "changes",
            "agent",
            "Consul",
            "requests",
            "kB",
            "MB",
            "peak",
        ]),
    ];
    for point in points {
        let (hosts, endpoints) = (point.hosts.to_string(), point.endpoints.to_string());
        let known = point.known.to_string();
        let mut time = vec![hosts.clone(), endpoints.clone(), known];
        for Phase { attach, answered, record, .. } in [&point.rest, &point.churn] {
            time.extend([attach, answered, record].map(|values| {
                format!("{:.0} / {:.0}", percentile(values, 50), percentile(values, 99))
            }));
        }
        time.extend([point.first_sync, point.start_sync].map(|it| format!("{:.2}", it / 1e3)));
        times.push(time);
        let load = |Phase { load, .. }: &Phase| {
            [
                format!("{:.1} %", load.agent * 100.0),
                format!("{:.1} %", load.consul * 100.0),
                format!("{:.1}", load.requests),
                format!("{:.1}", (load.sent + load.received) / 1e3),
            ]
        };
        let mut cost = vec![hosts, endpoints];
        cost.extend(load(&point.rest));
        cost.push(format!("{:.1}", point.churn.changes));
        cost.extend(load(&point.churn));
        let (now, peak) = point.memory;
        cost.extend([now, peak].map(|bytes| format!("{}", bytes / 1_000_000)));
        costs.push(cost);
    }
    format!("{}:\n\n{}\n{}", describe(shape), align(&times), align(&costs))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_percentile_is_a_value_that_was_measured() {
        let values: Vec<f64> = (1..=200).rev().map(f64::from).collect();
        assert!((percentile(&values, 50) - 100.0).abs() < 1e-9);
        assert!((percentile(&values, 99) - 198.0).abs() < 1e-9);
        assert!((percentile(&[7.0], 99) - 7.0).abs() < 1e-9);
        assert!(percentile(&[], 50).is_nan());
    }
}
