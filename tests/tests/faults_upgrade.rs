//! The agent killed, stopped, and succeeded by one of another version, earlier or later, under running
//! traffic: nothing is lost, nothing comes twice, and one program is on each hook throughout.
//!
//! `OVNET_RUNS=10 OVNET_SECONDS=60` is the long form of `an_upgrade_under_load`. An agent passes for
//! one of another version by two hidden options; with `OVNET_OTHER_BUILD`, a folder that has the
//! `ovnet-agent` and `ovnet` of another ABI version, the upgrade is to that and back as well.

#![allow(
    clippy::panic,
    clippy::unwrap_used,
    reason = "a test panics with what it found; the lint knows #[test] functions, not helpers"
)]

#[path = "faults_upgrade/clsact.rs"]
mod clsact;
#[path = "faults_upgrade/connections.rs"]
mod connections;
#[path = "faults_upgrade/load.rs"]
mod load;
#[path = "faults_upgrade/steps.rs"]
mod steps;

use std::{collections::BTreeSet, fs};

use ovnet_common::abi::ABI_VERSION;
use ovnet_tests::cluster::{Cluster, ProgramWatch, text, until};

/// The versions of the folders of pins on a host.
fn versions(cluster: &Cluster, host: &str) -> BTreeSet<u32> {
    let bpffs = cluster.lab.host(host).unwrap().root().join("sys/fs/bpf/ovnet");
    let entries = fs::read_dir(bpffs).into_iter().flatten();
    let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    names.map(|name| name.strip_prefix('v').unwrap().parse().unwrap()).collect()
}

/// Starts the agent of a host as one of a version that changed these maps; as this build without.
fn start(cluster: &Cluster, host: &str, version: Option<u32>, changed: &str, more: &[&str]) {
    let version = version.map(|it| it.to_string());
    let mut arguments = Vec::new();
    if let Some(version) = &version {
        arguments.extend(["--abi-version", version]);
        if !changed.is_empty() {
            arguments.extend(["--abi-changed", changed]);
        }
    }
    arguments.extend(more);
    let started = cluster.lab.start_agent(host, &arguments);
    started.unwrap_or_else(|error| panic!("{error:#}"));
}

/// Waits until the agent of a host has removed what others left.
fn succeeded(cluster: &Cluster, host: &str, version: Option<u32>) {
    let only = BTreeSet::from([version.unwrap_or(ABI_VERSION)]);
    until("the former folder to be gone", || (versions(cluster, host) == only).then_some(()));
}

/// Watches every hook of a host at TCX ingress: the uplink, the kernel's vxlan device, the first
/// endpoint's veth and its port of the bridge.
fn watch(cluster: &Cluster, host: &str) -> ProgramWatch {
    let local = cluster.json(host, "endpoint ls --local")[0]["local"].clone();
    let mut expected = vec![
        ("ens33".to_owned(), "from_uplink"),
        ("ovnet-vx".to_owned(), "from_overlay"),
        (text(&local, "host_ifname").unwrap().to_owned(), "from_container"),
    ];
    if let Ok(gateway) = text(&local["gateway"], "host_ifname") {
        expected.push((gateway.to_owned(), "from_gwbridge"));
    }
    let expected: Vec<(&str, &str)> =
        expected.iter().map(|(interface, program)| (interface.as_str(), *program)).collect();
    ProgramWatch::start(cluster, host, &expected)
}
