//! `cargo xtask bench control`: what the control plane costs, and how it grows.
//!
//! Two hosts with real agents and a real Consul, and any number of simulated hosts, whose records are
//! written as those of agents are. For each size a lab of its own: what a bigger one left behind in
//! Consul would be felt by the smaller one after it.

mod cluster;
mod http;
mod observe;
mod point;
mod store;
mod table;

use std::fs;
use std::path::PathBuf;

use anyhow::{Context as _, Result, ensure};
use serde_json::json;

use self::cluster::{Cluster, Shape};
use self::point::{Plan, Point};
use crate::{lab, machine, tools};

/// Arguments of `cargo xtask bench control`.
#[derive(clap::Args)]
pub(super) struct Args {
    /// Simulated hosts.
    #[arg(long, value_delimiter = ',', default_value = "10,100", value_name = "N,…", value_parser = clap::value_parser!(u32).range(1..=3000))]
    hosts: Vec<u32>,
    /// Simulated endpoints of all of them together.
    #[arg(long, value_delimiter = ',', default_value = "1000,10000", value_name = "N,…", value_parser = clap::value_parser!(u32).range(1..=100_000))]
    endpoints: Vec<u32>,
    /// How the endpoints lie in networks; both where absent.
    #[arg(long, value_enum, value_name = "SHAPE")]
    shape: Option<Shape>,
    /// Endpoints that come or go in a second, under churn.
    #[arg(long, default_value_t = 20, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1000))]
    churn: u32,
    /// Simulated hosts that wait for news of the first network, and read them, as agents do.
    #[arg(long, default_value_t = 0, value_name = "N", value_parser = clap::value_parser!(u32).range(0..=1000))]
    watchers: u32,
    /// How often something is attached, and a record written, in each condition.
    #[arg(long, default_value_t = 100, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1000))]
    samples: u32,
    /// One size, 20 samples: to see that it works.
    #[arg(long)]
    quick: bool,
    /// Write every measurement to this file, too.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Take ovnet-agent and ovnet from here instead of building them.
    #[arg(long, value_name = "FOLDER")]
    bin_dir: Option<PathBuf>,
    /// Which lab, where there are several.
    #[arg(long, hide = true, default_value = "bench-control")]
    prefix: String,
}

/// Carries out `cargo xtask bench control`.
pub(super) fn run(mut args: Args) -> Result<()> {
    ensure!(tools::is_root(), "a lab is made of network namespaces and needs root: use sudo");
    if args.quick {
        (args.hosts, args.endpoints, args.samples) = (vec![100], vec![1000], 20);
    }
    let bin_dir = match &args.bin_dir {
        None => lab::build(true, false)?,
        Some(given) => {
            lab::bring(false)?;
            given.clone()
        }
    };
    let shapes = args.shape.map_or_else(|| vec![Shape::One, Shape::Spread], |shape| vec![shape]);
    let mut all: Vec<(Shape, Vec<Point>)> = Vec::new();
    for shape in shapes {
        let mut points = Vec::new();
        for &endpoints in &args.endpoints {
            for &hosts in &args.hosts {
                let cluster = Cluster { shape, hosts, endpoints };
                let plan = Plan {
                    cluster,
                    watchers: args.watchers,
                    churn: args.churn,
                    samples: args.samples,
                    bin_dir: bin_dir.clone(),
                    prefix: args.prefix.clone(),
                };
                eprintln!(
                    "  {hosts} hosts, {endpoints} endpoints, {} networks",
                    cluster.networks().0
                );
                let point = point::measure(&plan)
                    .with_context(|| format!("{hosts} hosts, {endpoints} endpoints"))?;
                points.push(point);
            }
        }
        println!("{}", table::render(shape, &points));
        all.push((shape, points));
    }
    let setting = format!(
        "churn of {} changes a second in all networks, {} samples; {}",
        args.churn,
        args.samples,
        machine::describe()
    );
    println!("{setting}");
    if let Some(file) = &args.json {
        let shapes: Vec<_> = all
            .iter()
            .map(|(shape, points)| json!({ "shape": table::describe(*shape), "points": points }))
            .collect();
        let report = json!({ "setting": setting, "shapes": shapes });
        fs::write(file, serde_json::to_string_pretty(&report)?)
            .with_context(|| format!("cannot write {}", file.display()))?;
    }
    Ok(())
}
