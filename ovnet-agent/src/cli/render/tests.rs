//! What is printed, letter by letter.

use super::*;
use crate::{
    api::types::LocalView,
    consul::schema::{EndpointRecord, VERSION},
    publish::Protocol,
    service::fake,
};

fn port(protocol: Protocol, host_port: u16, container_port: u16) -> PublishedPort {
    PublishedPort { protocol, host_address: [0, 0, 0, 0].into(), host_port, container_port }
}

#[test]
fn ports_are_listed() {
    let mut all = vec![
        port(Protocol::Tcp, 90, 80),
        port(Protocol::Udp, 32768, 53),
        PublishedPort { host_address: [192, 168, 1, 12].into(), ..port(Protocol::Tcp, 91, 81) },
    ];
    assert_eq!(
        ports(&all),
        "80/tcp -> 0.0.0.0:90\n53/udp -> 0.0.0.0:32768\n81/tcp -> 192.168.1.12:91\n"
    );
    assert_eq!(host_ports(&all), "0.0.0.0:90\n0.0.0.0:32768\n192.168.1.12:91\n");
    all.extend([port(Protocol::Tcp, 92, 82), port(Protocol::Tcp, 91, 81)]);
    all.push(port(Protocol::Tcp, 93, 80));
    assert_eq!(
        short_ports(&all),
        "0.0.0.0:90-92->80-82/tcp, 0.0.0.0:93->80/tcp, 192.168.1.12:91->81/tcp, \
         0.0.0.0:32768->53/udp"
    );
    assert_eq!((ports(&[]), short_ports(&[])), Default::default());
}

#[test]
fn networks_are_listed() {
    let mut second = fake::network("a_rather_long_name", 4097);
    second.created_by = "docker03".into();
    let all = [fake::network("ov_net1", 4096), second];
    assert_eq!(
        networks(&all, false),
        "NETWORK ID     NAME                 VNI       SUBNET        GATEWAY    CREATED BY\n\
         00001000-000   ov_net1              4096      10.0.0.0/24   10.0.0.1   docker02\n\
         00001001-000   a_rather_long_name   4097      10.0.1.0/24   10.0.1.1   docker03\n"
    );
    assert!(networks(&all, true).contains("\n00001000-0000-4000-8000-000000000000   ov_net1"));
    assert_eq!(
        networks(&[], false),
        "NETWORK ID   NAME      VNI       SUBNET    GATEWAY   CREATED BY\n"
    );
}

#[test]
fn endpoints_are_listed() {
    let record = EndpointRecord {
        v: VERSION,
        id: "0123456789abcdef".repeat(4),
        address: [10, 0, 0, 2].into(),
        mac: "02:42:0a:00:00:02".into(),
        host: "docker01".into(),
        names: vec!["t1".into(), "web".into()],
        state: EndpointState::Up,
    };
    let local = LocalView {
        netns: "/run/netns/t1".into(),
        ifname: "eth0".into(),
        host_ifname: "ovnet01234567".into(),
        mtu: 1450,
        tx_packets: 10,
        tx_bytes: 1450,
        rx_packets: 0,
        rx_bytes: 0,
        gateway: None,
        ports: vec![port(Protocol::Tcp, 90, 80)],
    };
    let other = EndpointRecord {
        host: "docker02".into(),
        names: vec![],
        state: EndpointState::Reserved,
        ..record.clone()
    };
    let all = [
        EndpointView { record, network: "ov_net1".into(), local: Some(local) },
        EndpointView { record: other, network: "ov_net1".into(), local: None },
    ];
    let expected = "\
ENDPOINT ID    NETWORK   ADDRESS    HOST       NAMES     STATE      SANDBOX         INTERFACE   PORTS                TX        RX
0123456789ab   ov_net1   10.0.0.2   docker01   t1,web    up         /run/netns/t1   eth0        0.0.0.0:90->80/tcp   1.45kB    0B
0123456789ab   ov_net1   10.0.0.2   docker02             reserved   -               -           -                    -         -
";
    assert_eq!(endpoints(&all, false), expected);
}

#[test]
fn hosts_are_listed() {
    let host = |node: &str, state: &str, agent: &str, this| HostView {
        node: node.into(),
        vtep: [192, 168, 1, 11].into(),
        port: 4789,
        mtu: 1500,
        agent: agent.into(),
        state: state.into(),
        this,
        path: None,
    };
    let reached = |path: &str, round_trip_us| {
        Some(PathView { path: path.into(), seconds: 37, round_trip_us })
    };
    let (mut near, mut far) =
        (host("near", "lost", "0.1.0", false), host("far", "up", "0.1.0", false));
    (near.path, far.path) = (reached("reachable", Some(12_345)), reached("unreachable", None));
    assert_eq!(
        hosts(&[host("docker01", "up", "0.1.0", true), host("byhand", "up", "", false), near, far]),
        "HOST         VTEP           PORT      MTU       STATE     PATH                   AGENT\n\
         docker01 *   192.168.1.11   4789      1500      up        -                      0.1.0\n\
         byhand       192.168.1.11   4789      1500      up        -                      -\n\
         near         192.168.1.11   4789      1500      lost      reachable in 12.34ms   0.1.0\n\
         far          192.168.1.11   4789      1500      up        unreachable for 37s    0.1.0\n"
    );
}

#[test]
fn counters_are_sorted_and_zeroes_hidden() {
    let counter = |program: &str, verdict: &str, packets, bytes| CounterView {
        program: program.into(),
        verdict: verdict.into(),
        packets,
        bytes,
    };
    let all = [
        counter("uplink_xdp", "pass", 1, 60),
        counter("from_container", "spoofed-mac", 2, 120),
        counter("from_container", "slow-fragment", 0, 0),
        counter("from_container", "encapsulate", 1_000_000, 1_450_000_000),
        counter("from_tomorrow", "new", 1, 1),
    ];
    assert_eq!(
        counters(&all, false),
        "PROGRAM          VERDICT       PACKETS   BYTES\n\
         from_container   encapsulate   1000000   1.45GB\n\
         from_container   spoofed-mac   2         120B\n\
         uplink_xdp       pass          1         60B\n\
         from_tomorrow    new           1         1B\n"
    );
    let lines = counters(&all, true);
    assert_eq!(lines.lines().nth(2), Some("from_container   slow-fragment   0         0B"));
}

#[test]
fn the_status_is_told() {
    let mut it = Status {
        node: "docker01".into(),
        agent: "0.1.0".into(),
        uplink: "ens33".into(),
        vtep: Some([192, 168, 1, 11].into()),
        uplink_mtu: 1500,
        consul: "192.168.1.11:8500".into(),
        consul_state: "connected".into(),
        xdp: "off: veth loses its offloads".into(),
        tc: "tcx".into(),
        hosts: 3,
        networks: 1,
        local_endpoints: 2,
        published_ports: 2,
        flow_entries: 6,
        flow_capacity: 65536,
        repairs: serde_json::from_str(r#"{"map-entry":3,"rules":1}"#).unwrap(),
        unreadable_records: 0,
        state_files_set_aside: 0,
        peers: vec![],
        warnings: vec![],
        errors: vec![],
    };
    assert_eq!(
        status(&it),
        "Host: docker01\n\
         Agent: 0.1.0\n\
         Uplink: ens33 (VTEP 192.168.1.11, MTU 1500)\n\
         Consul: 192.168.1.11:8500 (connected)\n\
         TC: tcx\n\
         XDP: off: veth loses its offloads\n\
         Hosts: 3\n\
         Networks: 1\n\
         Local endpoints: 2\n\
         Published ports: 2 (flow entries 6 of 65536)\n\
         Repairs: 4 (map-entry 3, rules 1)\n\
         Unreadable records: 0\n\
         State files set aside: 0\n\
         Peers: 0 of 0 reachable\n\
         Warnings: none\n\
         Errors: none\n"
    );
    it.vtep = None;
    it.warnings = vec!["host docker02 does not answer".into()];
    it.errors = vec!["endpoint 10.0.0.2: its veth is gone".into()];
    let text = status(&it);
    assert!(text.contains("(VTEP none, MTU 1500)"), "{text}");
    assert!(text.contains("\nWarnings:\n host docker02 does not answer\n"), "{text}");
    assert!(text.ends_with("Errors:\n endpoint 10.0.0.2: its veth is gone\n"), "{text}");
}

#[test]
fn drops_are_told() {
    let mut view = MonitorView {
        timestamp_ns: 12_000_345_678,
        program: "from_container".into(),
        reason: "no-endpoint".into(),
        ifindex: 7,
        interface: "ovnet01234567".into(),
        length: 98,
        summary: "10.0.0.2 > 10.0.0.9 icmp echo-request seq 1".into(),
        data: "00".into(),
    };
    assert_eq!(
        monitor(&MonitorLine::Drop(view.clone())),
        "12.000345 from_container ovnet01234567 no-endpoint 98 bytes: 10.0.0.2 > 10.0.0.9 icmp \
         echo-request seq 1"
    );
    view.interface.clear();
    assert!(monitor(&MonitorLine::Drop(view)).contains(" ifindex 7 "));
    assert_eq!(monitor(&MonitorLine::Missed { missed: 6 }), "6 drops missed: they came too fast");
}
