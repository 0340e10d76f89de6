//! The agent on another kernel: hosts with traffic, and a kernel that is too old.
//!
//! `cargo xtask test kernels` runs these in an emulated machine; `OVNET_TC` says how TC programs are
//! attached on that kernel, as xtask's list of kernels has it: `tcx`, `clsact`, or `none` where the
//! agent must refuse to run.

#![allow(
    clippy::panic,
    clippy::unwrap_used,
    reason = "a test panics with what it found; the lint knows #[test] functions, not helpers"
)]

use std::{fs, net::Ipv4Addr, path::Path, process::Command};

use aya::programs::{SchedClassifier, TcAttachType};
use ovnet_agent::datapath::TcMode;
use ovnet_common::abi::Program;
use ovnet_tests::{
    bpf::{load, with_bpffs},
    cluster::{Cluster, Steps, Stream},
    lab::{Counters, ping_all},
    ports::{check, serve, ways},
    privilege,
};
use serde_json::Value;
use xtask::lab::{Options, default_bin_dir};

/// How TC programs must be attached here; skips the test where nobody says.
fn expected(test: &str) -> Option<String> {
    let expected = std::env::var("OVNET_TC").ok();
    if expected.is_none() {
        privilege::skip(test, "runs in what `cargo xtask test kernels` boots");
    }
    expected
}

/// What is asked of each kernel also where there is no time for more.
#[test]
fn every_program_is_loaded() {
    let name = "every_program_is_loaded";
    let Some(hook) = expected(name) else { return };
    with_bpffs(name, |folder| {
        let mut datapath = load(folder);
        for program in Program::ALL {
            let program = datapath.ebpf().program(program.name()).unwrap();
            // The kernel's word for it.
            println!("{}", program.info().unwrap().name_as_str().unwrap());
        }
        let by_tcx = datapath.tc_mode() == TcMode::Tcx;
        assert_eq!(by_tcx, hook == "tcx", "TC programs are attached by {hook} here");
    });
}

#[test]
fn two_hosts_by_tc() {
    two_hosts("two_hosts_by_tc", None);
}

#[test]
fn two_hosts_by_native_xdp() {
    two_hosts("two_hosts_by_native_xdp", Some("native"));
}

/// Ping, TCP and published ports between two hosts, carried by the programs alone where they carry
/// them on any kernel.
fn two_hosts(name: &str, xdp: Option<&str>) {
    let Some(hook) = expected(name) else { return };
    let change = |options: &mut Options| {
        options.hosts = 2;
        options.xdp = xdp.map(str::to_owned);
        // The kernel is what is tested, and the processor slow.
        options.stand_in = true;
    };
    let Some(cluster) = Cluster::up("kernels", change) else { return };
    let steps = Steps::default();
    cluster.sh("docker02", "ovnet network create ov_net1");
    let t1 = cluster.sandbox("docker01", "t1", "--network ov_net1 -p 90:80 -p 90:80/udp");
    let t2 = cluster.sandbox("docker01", "t2", "--network ov_net1");
    let t3 = cluster.sandbox("docker02", "t3", "--network ov_net1");
    steps.begin("attached as this kernel can");
    attached(&cluster, &hook, xdp);
    steps.begin("ping");
    let places = [("docker01/t1", t1), ("docker01/t2", t2), ("docker02/t3", t3)];
    for (from, _) in places {
        for (_, to) in places {
            cluster.wait_ping(from, to);
        }
    }
    overlay(&cluster, places, if xdp.is_some() { "uplink_xdp" } else { "from_uplink" }, &steps);
    serve(&cluster);
    let gateway = cluster.sh("docker01", "ip -4 -o address show dev ovnet_gwbridge");
    let gateway = gateway.split_whitespace().nth(3).unwrap().split('/').next().unwrap();
    for way in ways(gateway.parse().unwrap()) {
        for protocol in ["tcp", "udp"] {
            steps.begin(&format!("port, {}, {protocol}", way.label));
            check(&cluster, &way, protocol, xdp.is_some());
        }
    }
    for host in ["docker01", "docker02"] {
        assert_eq!(cluster.status(host)["errors"], Value::Array(Vec::new()), "{host}");
    }
}

/// Ping and TCP across the wire and on one host; `program` delivers what the wire brings.
fn overlay(cluster: &Cluster, places: [(&str, Ipv4Addr); 3], program: &str, steps: &Steps) {
    const PINGS: u64 = 20;
    let [(one, t1), (two, t2), (three, t3)] = places;
    let counters = Counters::now(&cluster.lab);
    for (from, to) in [(one, t3), (three, t1), (two, t1)] {
        steps.begin(&format!("pings from {from}"));
        ping_all(&cluster.lab, from, to, &["-c", &PINGS.to_string()]);
    }
    let counted = counters.since();
    counted.only_fast();
    for host in ["docker01", "docker02"] {
        // A request and a reply of each of the two ways across the wire.
        counted.at_least(host, "from_container", "encapsulate", 2 * PINGS);
        counted.at_least(host, program, "deliver", 2 * PINGS);
    }
    counted.at_least("docker01", "from_container", "deliver", 2 * PINGS);
    for (from, to, address) in [(one, three, t3), (three, one, t1), (one, two, t2)] {
        steps.begin(&format!("TCP from {from}"));
        Stream::start(&cluster.lab, from, to, address).must_be_whole();
    }
    counters.since().only_fast();
}

/// The agent says how its programs are attached, and the kernel says the same.
fn attached(cluster: &Cluster, hook: &str, xdp: Option<&str>) {
    let status = cluster.status("docker01");
    assert_eq!(status["tc"], hook, "{status}");
    let query = || Ok(SchedClassifier::query_tcx("ens33", TcAttachType::Ingress).ok());
    let tcx = cluster.lab.inside("docker01", query).unwrap().map(|(_, programs)| programs);
    let filters = cluster.sh("docker01", "tc filter show dev ens33 ingress");
    let by_tcx = tcx.iter().flatten().any(|it| it.name_as_str() == Some("from_uplink"));
    let by_clsact = filters.contains("from_uplink");
    assert_eq!((by_tcx, by_clsact), (hook == "tcx", hook == "clsact"), "{filters}");
    // A kernel that knows no such question is no kernel with TCX whose answer is that nothing is there.
    assert_eq!(tcx.is_some(), hook == "tcx");
    let link = cluster.sh("docker01", "ip -d link show ens33");
    assert_eq!(link.contains(" xdp "), xdp.is_some(), "{link}");
}

/// One line says why, and nothing of the agent is there afterwards.
#[test]
fn a_kernel_that_is_too_old_is_refused() {
    let name = "a_kernel_that_is_too_old_is_refused";
    let Some(hook) = expected(name) else { return };
    assert_eq!(hook, "none", "this kernel is not too old");
    let agent = default_bin_dir().unwrap().join("ovnet-agent");
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
    let release = release.trim();
    let before = traces();
    let arguments = ["--consul", "127.0.0.1:8500", "--advertise", "eth0"];
    let output = Command::new(&agent).args(arguments).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    println!("{said}");
    let line = format!(
        "ovnet-agent: Linux {release} is too old: 6.1 is the oldest kernel that works, see \
         `ovnet-agent check`\n"
    );
    assert_eq!((said.as_str(), output.status.code()), (line.as_str(), Some(1)));
    assert_eq!(String::from_utf8_lossy(&output.stdout), "");

    let output = Command::new(&agent).arg("check").args(arguments).output().unwrap();
    let table = String::from_utf8_lossy(&output.stdout).into_owned();
    println!("{table}");
    let row = table.lines().find(|row| row.starts_with("kernel  ")).unwrap();
    let words: Vec<&str> = row.split_whitespace().collect();
    assert_eq!(words[..3], ["kernel", release, "fail"], "{row}");
    assert!(row.ends_with("6.1 is the oldest kernel that works"), "{row}");
    assert!(table.contains("The agent cannot run on this host"), "{table}");
    assert_eq!(output.status.code(), Some(1));
    assert_eq!(traces(), before);
}

/// All that an agent makes or changes: links, pins, files, the rules, and loaded programs.
fn traces() -> Vec<String> {
    let mut traces: Vec<String> = ["/sys/fs/bpf", "/run", "/var/lib", "/sys/class/net"]
        .iter()
        .flat_map(|folder| fs::read_dir(Path::new(folder)).into_iter().flatten().flatten())
        .map(|entry| entry.path().display().to_string())
        .collect();
    traces.sort();
    let ruleset = Command::new("nft").args(["list", "ruleset"]).output().unwrap();
    traces.push(String::from_utf8_lossy(&ruleset.stdout).into_owned());
    traces.push(aya::programs::loaded_programs().count().to_string());
    traces
}
