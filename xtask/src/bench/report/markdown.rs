//! The report as Markdown, for a file of the project that holds the record.

use std::path::Path;

use super::{Report, table};

/// Setting, plots and tables. `plots` are links to the sections' plots, in their order, where there
/// are any.
pub(super) fn render(report: &Report, plots: &[&Path]) -> String {
    let setting = &report.setting;
    let machine = setting.machine.replace('\n', "; ");
    let mut text = format!("`{}` on {}: {machine}.\n", setting.command, setting.date);
    let mut plots = plots.iter();
    for section in &report.sections {
        text.push_str(&format!("\n### {}\n\n", section.name));
        if !section.notes.is_empty() {
            text.push_str(&format!("{}\n\n", section.notes.join(" ")));
        }
        if let Some(plot) = plots.next() {
            text.push_str(&format!("![{}]({})\n\n", section.name, plot.display()));
        }
        for rows in table::rows(section) {
            let mut rows = rows.iter().map(|row| format!("| {} |\n", row.join(" | ")));
            let Some(titles) = rows.next() else { continue };
            let columns = titles.matches('|').count() - 1;
            let aligned = ["|---|", &"---:|".repeat(columns.saturating_sub(1)), "\n"].concat();
            text.push_str(&[titles, aligned].concat());
            text.extend(rows);
            text.push('\n');
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::super::{Better, Section, Setting};
    use super::*;

    #[test]
    fn sections_have_their_plots_and_tables() {
        let mut section = Section { name: "Packets".into(), ..Section::default() };
        section.notes.push("Both on one machine.".into());
        section.add("ovnet", ("UDP", "1000/s", Better::Higher), 500.0);
        let setting = Setting {
            command: "cargo xtask bench".into(),
            date: "2026-11-23".into(),
            machine: "2 × EPYC\nload 3".into(),
        };
        let report = Report { setting, sections: vec![section] };
        let text = render(&report, &[Path::new("plots/packets.svg")]);
        assert_eq!(
            text,
            "`cargo xtask bench` on 2026-11-23: 2 × EPYC; load 3.\n\n### Packets\n\n\
             Both on one machine.\n\n![Packets](plots/packets.svg)\n\n\
             | UDP | 1000/s | lowest – highest |\n|---|---:|---:|\n\
             | ovnet | 500 | 500 – 500 |\n\n"
        );
    }
}
