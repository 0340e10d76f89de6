//! The tables that a terminal shows.

use super::{Report, Section, Series, Spread, number, ratios};
use crate::lab::table as align;

/// All tables, each section under its name.
pub(super) fn render(report: &Report) -> String {
    let mut text = String::new();
    for section in &report.sections {
        text.push_str(&format!("\n{}\n", section.name));
        for note in &section.notes {
            text.push_str(&format!("  {note}\n"));
        }
        for rows in rows(section) {
            text.push('\n');
            text.push_str(&align(&rows));
        }
    }
    let setting = &report.setting;
    text.push_str(&format!("\n{}; {}\n{}\n", setting.date, setting.machine, setting.command));
    text
}

/// A table for each kind of work, titles first.
pub(super) fn rows(section: &Section) -> Vec<Vec<Vec<String>>> {
    let tables = section.works().into_iter().map(|(work, all)| {
        let unit = all.first().map(|series| series.unit.clone()).unwrap_or_default();
        // A share of something is in relation already; that of what one lost may well be of nothing.
        let is_share = all.first().is_some_and(|series| series.unit == "%");
        let references = section.references.iter().filter(|_| !is_share);
        let references: Vec<_> = references.filter_map(|name| section.of(work, name)).collect();
        let mut titles = vec![work.to_owned(), unit, "lowest – highest".to_owned()];
        for reference in &references {
            titles.extend([format!("÷ {}", reference.contender), "lowest – highest".to_owned()]);
        }
        let rows = all.iter().map(|series| row(series, &references));
        [titles].into_iter().chain(rows).collect()
    });
    tables.collect()
}

fn row(series: &Series, references: &[&Series]) -> Vec<String> {
    let mut row = vec![series.contender.clone()];
    row.extend(cells(series.spread(), number));
    for reference in references {
        let ratios = ratios(&series.samples, &reference.samples);
        if reference.contender == series.contender || ratios.is_empty() {
            row.extend([String::new(), String::new()]);
        } else {
            row.extend(cells(Spread::of(&ratios), |ratio| format!("{ratio:.2}")));
        }
    }
    row
}

fn cells(spread: Spread, number: impl Fn(f64) -> String) -> [String; 2] {
    let Spread { median, lowest, highest } = spread;
    [number(median), format!("{} – {}", number(lowest), number(highest))]
}

#[cfg(test)]
mod tests {
    use super::super::Better;
    use super::*;

    #[test]
    fn each_contender_has_its_ratio_to_each_reference_but_itself() {
        let mut section = Section {
            references: vec!["host".to_owned(), "docker".to_owned(), "absent".to_owned()],
            ..Section::default()
        };
        for (contender, samples) in
            [("host", [40.0, 4.0]), ("ovnet", [20.0, 2.0]), ("docker", [10.0, 1.0])]
        {
            for sample in samples {
                section.add(contender, ("TCP", "Gb/s", Better::Higher), sample);
            }
        }
        let rows = rows(&section);
        let [table] = rows.as_slice() else { panic!("one kind of work") };
        assert_eq!(table[0][..2], ["TCP", "Gb/s"]);
        assert_eq!([&table[0][3], &table[0][5]], ["÷ host", "÷ docker"]);
        assert_eq!(
            table[2],
            ["ovnet", "11.0", "2.00 – 20.0", "0.50", "0.50 – 0.50", "2.00", "2.00 – 2.00"]
        );
        assert_eq!(table[1][3..], ["", "", "4.00", "4.00 – 4.00"]);
    }
}
