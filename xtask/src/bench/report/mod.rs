//! What a benchmark found: every sample of every round, where and how it was measured, and what people
//! are shown of it: a table, a JSON file, plots, Markdown.
//!
//! A report is made of sections, one for each lab or setting that was measured. A section has series:
//! what one contender did at one kind of work, one sample for each round. Samples of the same round
//! were taken one after the other, so ratios are made of those, round by round.

mod markdown;
mod number;
mod plot;
mod stats;
mod table;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result};
use serde::{Deserialize, Serialize};

use crate::{machine, tools};

pub(super) use self::number::number;
pub(super) use self::stats::{Spread, ratios};

/// All that one run found.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Report {
    /// Where, when and by what command.
    pub(super) setting: Setting,
    /// In the order they are shown.
    pub(super) sections: Vec<Section>,
}

/// Figures without it say nothing.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Setting {
    /// What was typed, with `cargo xtask` in front.
    pub(super) command: String,
    /// The day, by UTC: `2026-11-23`.
    pub(super) date: String,
    /// Processors, kernel, and whether others were at work.
    pub(super) machine: String,
}

/// What was measured in turns.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(super) struct Section {
    /// Its heading, which is its name in comparisons, too.
    pub(super) name: String,
    /// What one must know to read the figures, a sentence each.
    pub(super) notes: Vec<String>,
    /// Contenders that the others are set in relation to. By the first one, comparisons with other
    /// reports cancel out how fast the machine was; plots mark the ratio to it.
    pub(super) references: Vec<String>,
    /// What was measured.
    pub(super) series: Vec<Series>,
}

/// One contender at one kind of work.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Series {
    /// What was done.
    pub(super) work: String,
    /// Who did it.
    pub(super) contender: String,
    /// What is counted.
    pub(super) unit: String,
    /// Which figures are the good ones.
    pub(super) better: Better,
    /// One for each round.
    pub(super) samples: Vec<f64>,
}

/// Which figures are the good ones.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Better {
    /// Throughput and the like.
    Higher,
    /// Latency, cost and the like.
    Lower,
}

/// Where a report goes besides the terminal.
#[derive(Clone, Debug, Default, clap::Args)]
pub(super) struct Output {
    /// Write every sample to this file, for `bench compare`.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Draw plots into this folder, as SVG and as PNG.
    #[arg(long, value_name = "FOLDER")]
    plots: Option<PathBuf>,
    /// Write tables, and links to the plots, to this file as Markdown.
    #[arg(long, value_name = "FILE")]
    markdown: Option<PathBuf>,
}

impl Report {
    /// A report of this moment and machine. Made before the measurements, because it says whether
    /// others were at work.
    ///
    /// # Errors
    /// The date is not to be had.
    pub(super) fn new() -> Result<Self> {
        let arguments: Vec<String> = std::env::args().skip(1).collect();
        let date = tools::output(Command::new("date").args(["-u", "+%Y-%m-%d"]))?;
        let command = format!("cargo xtask {}", arguments.join(" "));
        let setting = Setting { command, date, machine: machine::describe() };
        Ok(Self { setting, sections: Vec::new() })
    }

    /// One that was written with `--json`.
    ///
    /// # Errors
    /// The file cannot be read, or is none.
    pub(super) fn read(file: &Path) -> Result<Self> {
        let what = || format!("cannot read the report {}", file.display());
        let text = fs::read_to_string(file).with_context(what)?;
        serde_json::from_str(&text).with_context(what)
    }
}

impl Section {
    /// Adds what one round measured to the series it belongs to.
    pub(super) fn add(
        &mut self,
        contender: &str,
        (work, unit, better): (&str, &str, Better),
        sample: f64,
    ) {
        let is_it = |it: &&mut Series| it.work == work && it.contender == contender;
        match self.series.iter_mut().find(is_it) {
            Some(series) => series.samples.push(sample),
            None => self.series.push(Series {
                work: work.to_owned(),
                contender: contender.to_owned(),
                unit: unit.to_owned(),
                better,
                samples: vec![sample],
            }),
        }
    }

    /// What a contender did at a kind of work.
    pub(super) fn of(&self, work: &str, contender: &str) -> Option<&Series> {
        self.series.iter().find(|it| it.work == work && it.contender == contender)
    }

    /// The kinds of work, each with its series, in the order of their first samples.
    fn works(&self) -> Vec<(&str, Vec<&Series>)> {
        let mut works: Vec<(&str, Vec<&Series>)> = Vec::new();
        for series in &self.series {
            match works.iter_mut().find(|(work, _)| *work == series.work) {
                Some((_, of_it)) => of_it.push(series),
                None => works.push((&series.work, vec![series])),
            }
        }
        let contenders = self.contenders();
        let place = |it: &&Series| contenders.iter().position(|name| *name == it.contender);
        for (_, series) in &mut works {
            series.sort_by_key(place);
        }
        works
    }

    /// The contenders: the first reference, then the others in the order of their first samples.
    fn contenders(&self) -> Vec<&str> {
        let mut names: Vec<&str> = Vec::new();
        let first = self.references.first().map(String::as_str);
        for name in first.into_iter().chain(self.series.iter().map(|it| it.contender.as_str())) {
            if !names.contains(&name) {
                names.push(name);
            }
        }
        names
    }
}

impl Series {
    /// Its median and what it lies between.
    pub(super) fn spread(&self) -> Spread {
        Spread::of(&self.samples)
    }
}

impl Output {
    /// Prints the tables, and writes what was asked for.
    ///
    /// # Errors
    /// A file cannot be written, or there is no font for the plots.
    pub(super) fn write(&self, report: &Report) -> Result<()> {
        println!("{}", table::render(report));
        if let Some(file) = &self.json {
            let text = serde_json::to_string_pretty(report).context("the report")?;
            write(file, &text)?;
        }
        let mut plots = Vec::new();
        if let Some(folder) = &self.plots {
            plots = plot::draw(report, folder)?;
        }
        if let Some(file) = &self.markdown {
            let folder = file.parent().unwrap_or(Path::new(""));
            // Links are from where the Markdown is, if the plots are below.
            let links: Vec<_> =
                plots.iter().map(|it| it.strip_prefix(folder).unwrap_or(it)).collect();
            write(file, &markdown::render(report, &links))?;
        }
        Ok(())
    }

    /// Whether it can be written when the time has come: better known before an hour's measurements.
    ///
    /// # Errors
    /// There is no font for the plots.
    pub(super) fn check(&self) -> Result<()> {
        self.plots.as_ref().map_or(Ok(()), |_| plot::require())
    }
}

fn write(file: &Path, text: &str) -> Result<()> {
    fs::write(file, text).with_context(|| format!("cannot write {}", file.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn samples_go_to_their_series_and_come_back_from_json() {
        let mut section = Section { references: vec!["host".to_owned()], ..Section::default() };
        let flow = ("TCP", "Gb/s", Better::Higher);
        for (contender, sample) in [("ovnet", 20.0), ("host", 40.0), ("ovnet", 22.0)] {
            section.add(contender, flow, sample);
        }
        section.add("ovnet", ("UDP", "1000/s", Better::Higher), 500.0);
        assert_eq!(section.of("TCP", "ovnet").unwrap().samples, [20.0, 22.0]);
        let works = section.works();
        assert_eq!(works.iter().map(|(work, _)| *work).collect::<Vec<_>>(), ["TCP", "UDP"]);
        // The reference comes first, whoever was measured first.
        assert_eq!(works[0].1[0].contender, "host");
        let setting = Setting {
            command: "cargo xtask bench".into(),
            date: "2026-11-23".into(),
            machine: "2 × EPYC".into(),
        };
        let report = Report { setting, sections: vec![section] };
        let text = serde_json::to_string(&report).unwrap();
        assert_eq!(serde_json::from_str::<Report>(&text).unwrap(), report);
    }
}
