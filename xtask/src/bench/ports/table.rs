//! The table at the end, and the medians and ratios in it.

use super::Samples;
use super::work::{Sample, Work};
use crate::lab::measure::median;
use crate::lab::table as align;

/// A median, and between what the values lie.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Spread {
    median: f64,
    lowest: f64,
    highest: f64,
}

impl Spread {
    fn of(values: impl Iterator<Item = f64> + Clone) -> Self {
        Self {
            median: median(values.clone()),
            lowest: values.clone().fold(f64::INFINITY, f64::min),
            highest: values.fold(0.0, f64::max),
        }
    }
}

/// Ours by theirs, round by round: what they have in common then, drops out.
fn ratios(ours: &[Sample], theirs: &[Sample]) -> Spread {
    Spread::of(ours.iter().zip(theirs).map(|(ours, theirs)| ours.rate / theirs.rate))
}

/// For each kind of work what each contender did, the first of them being ours.
pub(super) fn render(labels: &[&str], samples: &[Samples]) -> String {
    let mut text = String::new();
    for (kind, work) in Work::ALL.into_iter().enumerate() {
        let of_kind = |samples: &Samples| samples.get(kind).cloned().unwrap_or_default();
        let ours = samples.first().map(of_kind).unwrap_or_default();
        let ((unit, in_unit), (piece, in_piece)) = (work.unit(), work.piece());
        let cpu = format!("CPU µs per {piece}");
        let titles =
            [work.name(), unit, "lowest – highest", "ovnet ÷ it", "lowest – highest", &cpu];
        let mut rows = vec![titles.map(str::to_owned).to_vec()];
        for (index, (label, samples)) in labels.iter().zip(samples).enumerate() {
            let samples = of_kind(samples);
            let rate = Spread::of(samples.iter().map(|sample| sample.rate / in_unit));
            let cpu = median(samples.iter().map(|sample| sample.cpu * in_piece * 1e6));
            let ratio = ratios(&ours, &samples);
            let (ratio, between) = if index == 0 {
                (String::new(), String::new())
            } else {
                let Spread { median, lowest, highest } = ratio;
                (format!("{median:.2}"), format!("{lowest:.2} – {highest:.2}"))
            };
            rows.push(vec![
                (*label).to_owned(),
                format!("{:.2}", rate.median),
                format!("{:.2} – {:.2}", rate.lowest, rate.highest),
                ratio,
                between,
                format!("{cpu:.1}"),
            ]);
        }
        text.push_str(&align(&rows));
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn samples(rates: &[f64]) -> Vec<Sample> {
        rates.iter().map(|rate| Sample { rate: *rate, cpu: 1.0 / rate }).collect()
    }

    #[test]
    fn ratios_are_those_of_each_round() {
        // The second round was slow for both.
        let found = ratios(&samples(&[20.0, 2.0, 30.0]), &samples(&[10.0, 1.0, 10.0]));
        assert_eq!(found, Spread { median: 2.0, lowest: 2.0, highest: 3.0 });
    }

    #[test]
    fn each_kind_of_work_has_its_contenders_and_units() {
        let of = |gigabits: f64, connections: f64, packets: f64| {
            vec![samples(&[gigabits * 1e9]), samples(&[connections]), samples(&[packets])]
        };
        let labels = ["ovnet", "docker iptables"];
        let text = render(&labels, &[of(12.0, 9000.0, 400_000.0), of(8.0, 4500.0, 320_000.0)]);
        let lines: Vec<Vec<&str>> = text
            .lines()
            .map(|line| line.split("  ").map(str::trim).filter(|it| !it.is_empty()).collect())
            .collect();
        let titles =
            ["TCP, one flow", "Gb/s", "lowest – highest", "ovnet ÷ it", "lowest – highest"];
        assert_eq!(lines[0][..5], titles);
        assert_eq!(lines[1], ["ovnet", "12.00", "12.00 – 12.00", "666.7"]);
        assert_eq!(lines[2][..4], ["docker iptables", "8.00", "8.00 – 8.00", "1.50"]);
        assert_eq!(lines[6][..4], ["docker iptables", "4.50", "4.50 – 4.50", "2.00"]);
        assert_eq!(lines[6][5], "222.2");
        assert_eq!(lines[10][..4], ["docker iptables", "320.00", "320.00 – 320.00", "1.25"]);
    }
}
