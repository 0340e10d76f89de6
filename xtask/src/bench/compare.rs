//! `cargo xtask bench compare`: what got slower or faster from one report to another, beyond the noise.

use std::path::PathBuf;

use anyhow::{Result, bail, ensure};

use super::report::{Better, Report, Section, Series, Spread, number, ratios};
use crate::lab::table;

/// Less than this is not told of, however small the spread.
const LEAST: f64 = 0.03;

/// Arguments of `cargo xtask bench compare`.
#[derive(clap::Args)]
pub(super) struct Args {
    /// The report of before, as `--json` wrote it.
    old: PathBuf,
    /// The report of now.
    new: PathBuf,
    /// Show what has not changed, too.
    #[arg(long)]
    all: bool,
}

/// How a contender did at one kind of work, then and now.
#[derive(Clone, Debug, PartialEq)]
struct Change {
    section: String,
    work: String,
    contender: String,
    /// What is compared: the unit, or what it is in relation to.
    of: String,
    old: Spread,
    new: Spread,
    verdict: Verdict,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Verdict {
    Slower,
    Faster,
    Same,
    /// The reference itself: that it differs says something of the machine, not of the project.
    Machine,
}

/// Compares, and fails where something got slower.
///
/// # Errors
/// A report cannot be read, they have nothing in common, or something got slower.
pub(super) fn run(args: &Args) -> Result<()> {
    let (old, new) = (Report::read(&args.old)?, Report::read(&args.new)?);
    let changes = changes(&old, &new);
    ensure!(!changes.is_empty(), "the reports have no section, work and contender in common");
    let shown: Vec<_> =
        changes.iter().filter(|it| args.all || it.verdict != Verdict::Same).collect();
    if !shown.is_empty() {
        print!("{}", render(&shown));
    }
    let of = |verdict| changes.iter().filter(|it| it.verdict == verdict).count();
    let (slower, faster) = (of(Verdict::Slower), of(Verdict::Faster));
    println!("{} compared: {slower} slower, {faster} faster", changes.len());
    if slower > 0 {
        bail!("{slower} got slower beyond the noise");
    }
    Ok(())
}

fn changes(old: &Report, new: &Report) -> Vec<Change> {
    let mut changes = Vec::new();
    for section in &new.sections {
        let Some(before) = old.sections.iter().find(|it| it.name == section.name) else { continue };
        for series in &section.series {
            if let Some(then) = before.of(&series.work, &series.contender) {
                changes.push(change((before, then), (section, series)));
            }
        }
    }
    changes
}

/// By the ratio to the first reference where both have one, since the machine's speed drops out of
/// it; else by the figures themselves.
fn change((before, then): (&Section, &Series), (section, now): (&Section, &Series)) -> Change {
    let reference = section.references.first();
    let related = reference.filter(|name| now.unit != "%" && **name != now.contender);
    let related = related.and_then(|name| {
        let of = |section: &Section, series: &Series| {
            let ratios = ratios(&series.samples, &section.of(&series.work, name)?.samples);
            (!ratios.is_empty()).then(|| Spread::of(&ratios))
        };
        Some((format!("÷ {name}"), of(before, then)?, of(section, now)?))
    });
    let (of, old, new) = related.unwrap_or_else(|| (now.unit.clone(), then.spread(), now.spread()));
    let verdict = match judge(now.better, old, new) {
        Verdict::Slower | Verdict::Faster if reference == Some(&now.contender) => Verdict::Machine,
        verdict => verdict,
    };
    Change {
        section: section.name.clone(),
        work: now.work.clone(),
        contender: now.contender.clone(),
        of,
        old,
        new,
        verdict,
    }
}

/// Beyond the noise is what no sample of the one run has in common with those of the other.
fn judge(better: Better, old: Spread, new: Spread) -> Verdict {
    let difference = (new.median - old.median).abs();
    if old.overlaps(&new) || difference <= LEAST * old.median.abs() {
        return Verdict::Same;
    }
    match (better, new.median > old.median) {
        (Better::Higher, true) | (Better::Lower, false) => Verdict::Faster,
        _ => Verdict::Slower,
    }
}

fn render(changes: &[&Change]) -> String {
    let titles = ["", "section", "work", "contender", "what", "before", "now", "now ÷ before"]
        .map(str::to_owned);
    let mut rows = vec![titles.to_vec()];
    for Change { section, work, contender, of, old, new, verdict } in changes.iter().copied() {
        let verdict = match verdict {
            Verdict::Slower => "SLOWER",
            Verdict::Faster => "faster",
            Verdict::Same => "same",
            Verdict::Machine => "(machine)",
        };
        let show = |spread: &Spread| {
            let Spread { median, lowest, highest } = *spread;
            format!("{} ({} – {})", number(median), number(lowest), number(highest))
        };
        rows.push(vec![
            verdict.to_owned(),
            section.clone(),
            work.clone(),
            contender.clone(),
            of.clone(),
            show(old),
            show(new),
            if old.median == 0.0 {
                String::new()
            } else {
                format!("{:.2}", new.median / old.median)
            },
        ]);
    }
    table(&rows)
}

#[cfg(test)]
mod tests {
    use super::super::report::Setting;
    use super::*;

    const FLOW: (&str, &str, Better) = ("TCP", "Gb/s", Better::Higher);
    const TAIL: (&str, &str, Better) = ("p99", "µs", Better::Lower);

    fn report(machine: f64, ovnet: [f64; 3], tail: [f64; 3]) -> Report {
        let mut section =
            Section { name: "gso".into(), references: vec!["host".into()], ..Section::default() };
        for round in 0..3 {
            section.add("host", FLOW, 40.0 * machine);
            section.add("ovnet", FLOW, ovnet[round] * machine);
            section.add("ovnet", TAIL, tail[round]);
        }
        let setting =
            Setting { command: String::new(), date: String::new(), machine: String::new() };
        Report { setting, sections: vec![section] }
    }

    fn verdicts(old: &Report, new: &Report) -> Vec<Verdict> {
        changes(old, new).iter().map(|it| it.verdict).collect()
    }

    #[test]
    fn a_slower_machine_is_no_slower_contender() {
        let old = report(1.0, [20.0, 21.0, 19.0], [30.0, 31.0, 32.0]);
        let new = report(0.5, [20.0, 21.0, 19.0], [30.0, 31.0, 32.0]);
        assert_eq!(verdicts(&old, &new), [Verdict::Machine, Verdict::Same, Verdict::Same]);
    }

    #[test]
    fn what_spreads_do_not_share_is_a_change() {
        let old = report(1.0, [20.0, 21.0, 19.0], [30.0, 31.0, 32.0]);
        let new = report(1.0, [24.0, 23.0, 22.0], [40.0, 41.0, 33.0]);
        assert_eq!(verdicts(&old, &new)[1..], [Verdict::Faster, Verdict::Slower]);
        assert_eq!(verdicts(&new, &old)[1..], [Verdict::Slower, Verdict::Faster]);
    }

    #[test]
    fn overlap_and_trifles_are_none() {
        let old = report(1.0, [20.0, 21.0, 19.0], [30.0, 30.0, 30.0]);
        let new = report(1.0, [25.0, 24.0, 20.5], [30.5, 30.5, 30.5]);
        assert_eq!(verdicts(&old, &new)[1..], [Verdict::Same, Verdict::Same]);
    }
}
