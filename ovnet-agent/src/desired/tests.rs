use super::*;
use crate::consul::schema::{VERSION, format_mac};

const VNI: u32 = 4096;

fn host(vtep: [u8; 4]) -> HostRecord {
    HostRecord {
        v: VERSION,
        node: String::new(),
        vtep: vtep.into(),
        port: 4789,
        mtu: 1500,
        agent: "0.1.0".into(),
    }
}

fn network() -> NetworkRecord {
    NetworkRecord {
        v: VERSION,
        id: "net1".into(),
        name: "ov_net1".into(),
        vni: VNI,
        subnet: "10.0.0.0/24".parse().unwrap(),
        gateway: [10, 0, 0, 1].into(),
        ip_range: None,
        aux: BTreeMap::new(),
        mtu: None,
        internal: false,
        options: BTreeMap::new(),
        labels: BTreeMap::new(),
        created_by: "docker02".into(),
    }
}

fn record(host: &str, address: [u8; 4]) -> EndpointRecord {
    EndpointRecord {
        v: VERSION,
        id: format!("{host}-{address:?}"),
        address: address.into(),
        mac: format_mac(mac_of(address.into())),
        host: host.into(),
        names: vec![],
        state: EndpointState::Up,
    }
}

/// docker01 with one endpoint, 10.0.0.2, and docker02 with 10.0.0.3, all of it read.
pub(super) fn inputs() -> Inputs {
    let local = LocalEndpoint {
        record: record("docker01", [10, 0, 0, 2]),
        network: network(),
        netns: "/run/netns/t1".into(),
        ifname: "eth0".into(),
        host_ifname: "ovnet00000001".into(),
        mtu: 1450,
        docker: None,
        gateway: None,
        ports: Vec::new(),
    };
    let mut inputs = Inputs {
        node: "docker01".into(),
        uplink: UplinkView {
            ifindex: 2,
            name: "ens33".into(),
            address: [192, 168, 1, 11].into(),
            mac: [2, 0, 0, 0, 1, 11],
        },
        external: Some(3),
        vxlan_port: 4789,
        source_ports: (32768, 60999),
        xdp: None,
        settled: true,
        hosts: Some(BTreeMap::from([
            ("docker01".into(), host([192, 168, 1, 11])),
            ("docker02".into(), host([192, 168, 1, 12])),
        ])),
        seniority: Vec::new(),
        networks: BTreeMap::new(),
        endpoints: BTreeMap::new(),
        local: vec![(local, 7)],
        ports: PortInputs::default(),
        held: Held::default(),
    };
    announce(&mut inputs, record("docker01", [10, 0, 0, 2]));
    announce(&mut inputs, record("docker02", [10, 0, 0, 3]));
    inputs
}

fn announce(inputs: &mut Inputs, record: EndpointRecord) {
    inputs.endpoints.entry("net1".into()).or_default().insert(record.address, record);
}

fn key(address: [u8; 4]) -> EndpointKey {
    EndpointKey { vni: VNI, address: mapped(address) }
}

#[test]
fn a_network_with_one_endpoint_here_and_one_there() {
    let desired = desired(&inputs());
    assert_eq!(desired.contradictions, Vec::<String>::new());
    let tables = desired.tables;
    assert_eq!(tables.config.vtep, mapped([192, 168, 1, 11]));
    assert_eq!(tables.config.external_ifindex, 3);
    assert_eq!(tables.config.vxlan_port_be, 4789u16.to_be());
    assert_eq!(tables.hosts.keys().collect::<Vec<_>>(), [&mapped([192, 168, 1, 12])]);
    let here = tables.endpoints[&key([10, 0, 0, 2])];
    assert_eq!((here.ifindex, here.vtep), (7, [0; 16]));
    let there = tables.endpoints[&key([10, 0, 0, 3])];
    assert_eq!((there.ifindex, there.vtep), (0, mapped([192, 168, 1, 12])));
    assert_eq!(there.mac, [2, 0x42, 10, 0, 0, 3]);
    assert_eq!(tables.ports[&7].address, mapped([10, 0, 0, 2]));
    assert_eq!(tables.networks[&VNI].gateway_mac, [2, 0x42, 10, 0, 0, 1]);
    let attached: Vec<_> =
        desired.attachments.iter().map(|it| (it.program, it.interface.as_str())).collect();
    assert_eq!(
        attached,
        [
            (Program::FromContainer, "ovnet00000001"),
            (Program::FromUplink, "ens33"),
            (Program::FromOverlay, "ovnet-vx"),
        ]
    );
}

#[test]
fn nothing_is_taken_for_the_truth_before_it_was_read() {
    let mut inputs = inputs();
    inputs.hosts = None;
    inputs.settled = false;
    inputs.endpoints.clear();
    assert_eq!(desired(&inputs).authority, Authority::default());
}

#[test]
fn a_host_on_another_port_cannot_take_part() {
    let mut inputs = inputs();
    inputs.vxlan_port = 8472;
    let desired = desired(&inputs);
    assert!(desired.tables.hosts.is_empty());
    assert_eq!(desired.contradictions, ["host docker02 has VXLAN port 4789, the others 8472"]);
}

#[test]
fn a_reserved_address_is_no_endpoint_yet() {
    let mut inputs = inputs();
    let reserved =
        EndpointRecord { state: EndpointState::Reserved, ..record("docker02", [10, 0, 0, 4]) };
    announce(&mut inputs, reserved);
    assert!(!desired(&inputs).tables.endpoints.contains_key(&key([10, 0, 0, 4])));
}

#[test]
fn an_endpoint_of_an_unknown_host_is_left_out() {
    let mut inputs = inputs();
    announce(&mut inputs, record("docker09", [10, 0, 0, 4]));
    assert!(!desired(&inputs).tables.endpoints.contains_key(&key([10, 0, 0, 4])));
}

#[test]
fn a_host_cannot_claim_an_address_of_an_endpoint_here() {
    let mut inputs = inputs();
    announce(&mut inputs, record("docker02", [10, 0, 0, 2]));
    let desired = desired(&inputs);
    assert_eq!(desired.tables.endpoints[&key([10, 0, 0, 2])].ifindex, 7);
    assert_eq!(desired.contradictions.len(), 1);
}

#[test]
fn a_host_cannot_claim_our_vtep_address() {
    let mut inputs = inputs();
    let hosts = inputs.hosts.as_mut().unwrap();
    hosts.insert("docker02".into(), host([192, 168, 1, 11]));
    let desired = desired(&inputs);
    assert!(desired.tables.hosts.is_empty());
    assert!(!desired.tables.endpoints.contains_key(&key([10, 0, 0, 3])));
}

#[test]
fn of_two_hosts_with_one_vtep_address_the_one_that_had_it_first_keeps_it() {
    let mut inputs = inputs();
    let hosts = inputs.hosts.as_mut().unwrap();
    hosts.insert("aaa".into(), host([192, 168, 1, 12]));
    inputs.seniority = ["docker01", "docker02", "aaa"].map(str::to_owned).to_vec();
    announce(&mut inputs, record("aaa", [10, 0, 0, 4]));
    let desired = desired(&inputs);
    assert!(desired.tables.endpoints.contains_key(&key([10, 0, 0, 3])));
    assert!(!desired.tables.endpoints.contains_key(&key([10, 0, 0, 4])));
    let told = "hosts docker02 and aaa both claim the VTEP address 192.168.1.12; docker02 keeps it";
    assert_eq!(desired.contradictions, [told]);
}

#[test]
fn nobody_is_the_gateway_or_of_the_network_itself_or_outside_the_subnet() {
    let mut inputs = inputs();
    inputs.local[0].0.network.aux.insert("router".into(), [10, 0, 0, 9].into());
    for address in [[10, 0, 0, 1], [10, 0, 1, 4], [10, 0, 0, 0], [10, 0, 0, 255], [10, 0, 0, 9]] {
        announce(&mut inputs, record("docker02", address));
    }
    let desired = desired(&inputs);
    assert_eq!(desired.tables.endpoints.len(), 2);
    assert_eq!(desired.contradictions.len(), 5);
}

#[test]
fn a_mac_of_another_endpoint_takes_nothing_from_it() {
    let mut inputs = inputs();
    let double = EndpointRecord {
        mac: format_mac(mac_of([10, 0, 0, 2].into())),
        ..record("docker02", [10, 0, 0, 4])
    };
    announce(&mut inputs, double);
    // Packets are delivered by address; what is written into a frame is for its receiver alone.
    let tables = desired(&inputs).tables;
    assert_eq!(tables.endpoints[&key([10, 0, 0, 2])].ifindex, 7);
    assert_eq!(tables.ports[&7].mac, [2, 0x42, 10, 0, 0, 2]);
    assert_eq!(tables.endpoints[&key([10, 0, 0, 4])].vtep, mapped([192, 168, 1, 12]));
}

#[test]
fn a_vni_is_the_networks_whose_endpoint_was_here_first() {
    let mut inputs = inputs();
    let (mut liar, _) = inputs.local[0].clone();
    liar.network.id = "net0".into();
    liar.network.name = "aaa".into();
    liar.record = record("docker01", [10, 0, 0, 5]);
    liar.host_ifname = "ovnet00000002".into();
    inputs.local.insert(0, (liar, 8));
    let stolen = BTreeMap::from([([10, 0, 0, 3].into(), record("aaa", [10, 0, 0, 3]))]);
    inputs.endpoints.insert("net0".into(), stolen);
    let desired = desired(&inputs);
    assert_eq!(desired.tables.endpoints.len(), 2);
    let honest = desired.tables.endpoints[&key([10, 0, 0, 3])];
    assert_eq!(honest.vtep, mapped([192, 168, 1, 12]));
    assert_eq!(desired.tables.ports.keys().collect::<Vec<_>>(), [&7]);
    let told = "endpoint 10.0.0.5 of network aaa is cut off: VNI 4096 is network ov_net1's here";
    assert_eq!(desired.contradictions, [told]);
    // Without a program the host itself would forward what it sends.
    assert!(desired.attachments.iter().any(|it| it.interface == "ovnet00000002"));
}

#[test]
fn networks_that_reuse_a_vni_or_overlap_are_told_of() {
    let mut inputs = inputs();
    let other = |name: &str, vni, subnet: &str| NetworkRecord {
        id: name.into(),
        name: name.into(),
        vni,
        subnet: subnet.parse().unwrap(),
        ..network()
    };
    let networks = [
        network(),
        other("a", 4097, "10.1.0.0/24"),
        other("b", VNI, "10.2.0.0/24"),
        other("c", 4098, "10.0.0.128/25"),
        other("d", 4099, "10.0.1.0/24"),
    ];
    inputs.networks = networks.into_iter().map(|it| (it.name.clone(), it)).collect();
    assert_eq!(
        desired(&inputs).contradictions,
        [
            "networks b and ov_net1 both say VNI 4096",
            "networks ov_net1 and c overlap: 10.0.0.0/24 and 10.0.0.128/25",
        ]
    );
}

#[test]
fn xdp_is_attached_beside_tc_not_instead() {
    let mut inputs = inputs();
    inputs.xdp = Some(XdpMode::Native);
    let programs: BTreeSet<_> = desired(&inputs).attachments.iter().map(|it| it.program).collect();
    assert!(programs.contains(&Program::FromUplink) && programs.contains(&Program::UplinkXdp));
}

#[test]
fn an_endpoints_mtu_leaves_room_for_the_headers() {
    assert_eq!(endpoint_mtu(&network(), 1500), 1450);
    assert_eq!(endpoint_mtu(&network(), 9000), 8950);
    let small = NetworkRecord { mtu: Some(1400), ..network() };
    assert_eq!(endpoint_mtu(&small, 1500), 1400);
    let large = NetworkRecord { mtu: Some(9000), ..network() };
    assert_eq!(endpoint_mtu(&large, 1500), 1450);
}
