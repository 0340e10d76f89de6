use std::{collections::BTreeMap, time::Duration};

use super::*;
use crate::{
    api::types::{CounterView, Status},
    consul::Health,
    metrics::process::Process,
    peers::{Counts, Known},
    reconcile::Activity,
    repairs::Repairs,
};

fn numbers() -> Numbers {
    let counter = |program: &str, verdict: &str, packets| CounterView {
        program: program.into(),
        verdict: verdict.into(),
        packets,
        bytes: packets * 100,
    };
    let peer = |last: u8, state, round_trip| Known {
        vtep: [192, 168, 1, last].into(),
        mtu: 1500,
        state,
        lasting: Duration::from_secs(5),
        round_trip,
    };
    let trip = Some(Duration::from_micros(250));
    let mut repairs = Repairs::default();
    repairs.add_many(Repair::MapEntry, 7);
    Numbers {
        status: Status {
            node: "docker01".into(),
            agent: "0.1.0".into(),
            uplink: "ens33".into(),
            vtep: Some([192, 168, 1, 11].into()),
            uplink_mtu: 1500,
            consul: "192.168.1.11:8500".into(),
            consul_state: "connected".into(),
            xdp: "off".into(),
            tc: "tcx".into(),
            hosts: 4,
            networks: 1,
            local_endpoints: 2,
            published_ports: 3,
            flow_entries: 6,
            flow_capacity: 65536,
            repairs,
            unreadable_records: 1,
            state_files_set_aside: 2,
            peers: vec![],
            warnings: vec![],
            errors: vec!["one".into()],
        },
        counters: vec![
            counter("from_uplink", "deliver", 5),
            counter("from_uplink", "not-local", 2),
            counter("uplink_xdp", "not-local", 3),
        ],
        peers: BTreeMap::from([
            ("docker02".into(), peer(12, State::Reachable, trip)),
            ("docker03".into(), peer(13, State::Unreachable, None)),
            ("docker04".into(), peer(14, State::Narrow, trip)),
            ("docker05".into(), peer(15, State::Unknown, None)),
        ]),
        probes: Counts { sent: 20, answered: 15 },
        activity: Activity {
            passes: 9,
            failed_passes: 1,
            failed_steps: 2,
            tables: [("HOSTS", 3, 4096), ("A", 0, 1), ("B", 0, 1), ("C", 0, 1), ("D", 0, 1)],
        },
        consul: Health {
            requests: 30,
            failures: 4,
            answered_ago: Some(Duration::from_millis(1500)),
        },
        process: Process {
            cpu_seconds: 1.5,
            max_fds: Some(1024),
            open_fds: 20,
            ..Process::default()
        },
    }
}

#[test]
fn every_number_is_on_the_page() {
    let text = numbers().text().unwrap();
    let lines: Vec<&str> = text.lines().collect();
    for line in [
        r#"ovnet_agent_info{node="docker01",version="0.1.0"} 1"#,
        "ovnet_hosts 4",
        "ovnet_networks 1",
        "ovnet_local_endpoints 2",
        "ovnet_published_ports 3",
        "ovnet_unreadable_records 1",
        "ovnet_state_files_set_aside 2",
        "ovnet_errors 1",
        r#"ovnet_reconcile_passes_total{result="done"} 9"#,
        r#"ovnet_reconcile_passes_total{result="failed"} 1"#,
        "ovnet_reconcile_failed_steps_total 2",
        r#"ovnet_repairs_total{kind="map-entry"} 7"#,
        r#"ovnet_repairs_total{kind="rules"} 0"#,
        r#"ovnet_program_packets_total{program="from_uplink",verdict="deliver"} 5"#,
        r#"ovnet_program_bytes_total{program="from_uplink",verdict="deliver"} 500"#,
        r#"ovnet_dropped_packets_total{reason="not-local"} 5"#,
        r#"ovnet_dropped_packets_total{reason="truncated"} 0"#,
        r#"ovnet_map_entries{map="HOSTS"} 3"#,
        r#"ovnet_map_capacity{map="HOSTS"} 4096"#,
        r#"ovnet_map_entries{map="CONNTRACK"} 6"#,
        r#"ovnet_map_capacity{map="CONNTRACK"} 65536"#,
        r#"ovnet_peers{path="reachable"} 1"#,
        r#"ovnet_peers{path="narrow"} 1"#,
        r#"ovnet_peers{path="unreachable"} 1"#,
        r#"ovnet_peers{path="unknown"} 1"#,
        r#"ovnet_peer_reachable{peer="docker02",vtep="192.168.1.12"} 1"#,
        r#"ovnet_peer_reachable{peer="docker03",vtep="192.168.1.13"} 0"#,
        r#"ovnet_peer_reachable{peer="docker04",vtep="192.168.1.14"} 1"#,
        r#"ovnet_peer_full_size_reachable{peer="docker04",vtep="192.168.1.14"} 0"#,
        r#"ovnet_peer_round_trip_seconds{peer="docker02",vtep="192.168.1.12"} 0.00025"#,
        "ovnet_probes_sent_total 20",
        "ovnet_probes_answered_total 15",
        "ovnet_consul_connected 1",
        "ovnet_consul_requests_total 30",
        "ovnet_consul_request_failures_total 4",
        "ovnet_consul_last_answer_age_seconds 1.5",
        "process_cpu_seconds_total 1.5",
        "process_open_fds 20",
        "process_max_fds 1024",
        "# TYPE ovnet_repairs_total counter",
        "# TYPE ovnet_hosts gauge",
    ] {
        assert!(lines.contains(&line), "no {line} in:\n{text}");
    }
    assert!(!text.contains("docker05"), "nothing is known of it yet");
}

/// What Prometheus asks of the format: each name described once, before its values, and values that
/// are numbers.
#[test]
fn the_page_is_well_formed() {
    let text = numbers().text().unwrap();
    let mut described = std::collections::BTreeSet::new();
    for line in text.lines() {
        if let Some(rest) = line.strip_prefix("# TYPE ") {
            let (name, kind) = rest.split_once(' ').unwrap();
            assert!(described.insert(name.to_owned()), "{name} twice");
            assert!(kind == "counter" || kind == "gauge", "{line}");
            assert_eq!(kind == "counter", name.ends_with("_total"), "{line}");
        } else if let Some(rest) = line.strip_prefix("# HELP ") {
            assert!(rest.ends_with('.'), "{line}");
        } else {
            let (key, value) = line.rsplit_once(' ').unwrap();
            let name = key.split('{').next().unwrap();
            assert!(described.contains(name), "{line} before its type");
            value.parse::<f64>().unwrap();
        }
    }
}

#[test]
fn what_is_not_known_is_not_told() {
    let mut numbers = numbers();
    numbers.peers.clear();
    numbers.consul = Health::default();
    numbers.process.max_fds = None;
    let text = numbers.text().unwrap();
    for name in ["ovnet_peer_reachable", "round_trip", "last_answer", "process_max_fds"] {
        assert!(!text.contains(name), "{name}");
    }
}
