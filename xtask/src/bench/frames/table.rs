//! The tables at the end.

use super::contenders::Kind;
use super::live::{Sample, Share};
use crate::lab::measure::median;
use crate::lab::table as align;

/// What was measured of one contender.
#[derive(Clone, Debug)]
pub(super) struct Measured {
    /// What a table calls it.
    pub(super) label: &'static str,
    /// What becomes of its frames.
    pub(super) kind: Kind,
    /// By round.
    pub(super) samples: Vec<Sample>,
    /// What the programs took.
    pub(super) shares: Vec<Share>,
}

/// A median, and between what the values lie.
fn spread(values: &[f64]) -> (f64, f64, f64) {
    let lowest = values.iter().copied().fold(f64::INFINITY, f64::min);
    let highest = values.iter().copied().fold(0.0, f64::max);
    (median(values.iter().copied()), lowest, highest)
}

/// The first of a kind by another, round by round: what they have in common then, drops out.
fn ratios(first: &[Sample], other: &[Sample]) -> Vec<f64> {
    first.iter().zip(other).map(|(first, other)| first.rate / other.rate).collect()
}

/// All contenders, by kind.
pub(super) fn render(measured: &[Measured]) -> String {
    let mut text = String::new();
    for kind in Kind::ALL {
        let titles =
            [kind.name(), "million/s", "lowest – highest", "ns", "first ÷ it", "lowest – highest"];
        let mut rows = vec![titles.map(str::to_owned).to_vec()];
        let of_kind: Vec<&Measured> = measured.iter().filter(|it| it.kind == kind).collect();
        for (index, it) in of_kind.iter().enumerate() {
            let rates: Vec<f64> = it.samples.iter().map(|sample| sample.rate / 1e6).collect();
            let (rate, low, high) = spread(&rates);
            let mut row = vec![
                it.label.to_owned(),
                format!("{rate:.2}"),
                format!("{low:.2} – {high:.2}"),
                format!("{:.0}", median(it.samples.iter().map(|sample| sample.nanoseconds))),
            ];
            if let Some(first) = of_kind.first().filter(|_| index > 0) {
                let (ratio, low, high) = spread(&ratios(&first.samples, &it.samples));
                row.extend([format!("{ratio:.2}"), format!("{low:.2} – {high:.2}")]);
            }
            rows.push(row);
        }
        text.push_str(&align(&rows));
        text.push('\n');
    }
    text.push_str(&programs(measured));
    text
}

/// What the programs took of it.
fn programs(measured: &[Measured]) -> String {
    let mut rows = vec![["program, as it ran above", "ns a run", "in"].map(str::to_owned).to_vec()];
    for it in measured {
        for Share { program, nanoseconds, .. } in &it.shares {
            rows.push(vec![program.clone(), format!("{nanoseconds:.0}"), it.label.to_owned()]);
        }
    }
    align(&rows)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn samples(rates: &[f64]) -> Vec<Sample> {
        let sample =
            |rate: &f64| Sample { rate: *rate, nanoseconds: 1e9 / rate, injected: 1, lost: 0 };
        rates.iter().map(sample).collect()
    }

    #[test]
    fn ratios_are_those_of_each_round() {
        // The second round was slow for both.
        let found = ratios(&samples(&[20.0, 2.0, 30.0]), &samples(&[10.0, 1.0, 10.0]));
        assert_eq!(spread(&found), (2.0, 2.0, 3.0));
    }

    #[test]
    fn each_kind_is_compared_with_its_first() {
        let measured = |label, kind, rate: f64| Measured {
            label,
            kind,
            samples: samples(&[rate]),
            shares: vec![Share { program: "it".to_owned(), nanoseconds: 99.6, runs: 1.0 }],
        };
        let text = render(&[
            measured("ovnet", Kind::Delivered, 1_200_000.0),
            measured("kernel", Kind::Delivered, 300_000.0),
            measured("drops", Kind::Unknown, 9_000_000.0),
        ]);
        let lines: Vec<Vec<&str>> = text
            .lines()
            .map(|line| line.split("  ").map(str::trim).filter(|it| !it.is_empty()).collect())
            .collect();
        assert_eq!(lines[1], ["ovnet", "1.20", "1.20 – 1.20", "833"]);
        assert_eq!(lines[2], ["kernel", "0.30", "0.30 – 0.30", "3333", "4.00", "4.00 – 4.00"]);
        assert_eq!(lines[5], ["drops", "9.00", "9.00 – 9.00", "111"]);
        assert!(lines.contains(&vec!["it", "100", "drops"]), "{text}");
    }
}
