use ovnet_common::abi::{Program, mapped};
use proptest::prelude::*;

use super::*;
use crate::desired::Authority;

const VNI: u32 = 4096;

fn key(vni: u32, last: u8) -> EndpointKey {
    EndpointKey { vni, address: mapped([10, 0, 0, last]) }
}

fn remote(host: u8) -> EndpointValue {
    EndpointValue { vtep: mapped([192, 168, 1, host]), ..EndpointValue::default() }
}

fn local(ifindex: u32) -> EndpointValue {
    EndpointValue { ifindex, ..EndpointValue::default() }
}

fn attachment(ifindex: u32) -> Attachment {
    Attachment {
        program: Program::FromContainer,
        ifindex,
        interface: format!("ovnet{ifindex:08x}"),
        xdp: None,
    }
}

/// The network in use, with an endpoint here and one on another host.
fn tables() -> Tables {
    let mut tables = Tables::default();
    tables.networks.insert(VNI, NetworkValue::default());
    tables.hosts.insert(mapped([192, 168, 1, 12]), HostValue::default());
    tables.endpoints.insert(key(VNI, 2), local(7));
    tables.endpoints.insert(key(VNI, 3), remote(12));
    tables.ports.insert(7, PortValue::default());
    tables
}

fn everything_read() -> Authority {
    Authority { hosts: true, settled: true, endpoints: BTreeSet::from([VNI]) }
}

#[test]
fn what_is_as_it_should_be_needs_no_step() {
    let attachments = BTreeSet::from([attachment(7)]);
    let desired = Desired {
        tables: tables(),
        attachments: attachments.clone(),
        authority: everything_read(),
        contradictions: Vec::new(),
    };
    let actual = Actual { tables: tables(), attached: attachments, stale_links: Vec::new() };
    assert_eq!(diff(&desired, &actual), []);
}

#[test]
fn a_start_without_consul_removes_nothing_of_other_hosts() {
    let mut want = tables();
    want.hosts.clear();
    want.endpoints.remove(&key(VNI, 3));
    let desired = Desired { tables: want, ..Desired::default() };
    let actual = Actual { tables: tables(), ..Actual::default() };
    assert_eq!(diff(&desired, &actual), []);
}

#[test]
fn a_start_that_finds_a_host_missing_leaves_it_its_grace() {
    let mut want = tables();
    want.hosts.clear();
    want.endpoints.remove(&key(VNI, 3));
    let authority = Authority { settled: false, ..everything_read() };
    let desired = Desired { tables: want, authority, ..Desired::default() };
    let actual = Actual { tables: tables(), ..Actual::default() };
    assert_eq!(diff(&desired, &actual), []);
}

#[test]
fn an_endpoint_whose_host_is_there_goes_with_its_record_at_once() {
    let mut want = tables();
    want.endpoints.remove(&key(VNI, 3));
    let authority = Authority { settled: false, ..everything_read() };
    let desired = Desired { tables: want, authority, ..Desired::default() };
    let actual = Actual { tables: tables(), ..Actual::default() };
    assert_eq!(diff(&desired, &actual), [Op::RemoveEndpoint(key(VNI, 3))]);
}

#[test]
fn a_host_that_is_gone_takes_its_endpoints_along_read_or_not() {
    let mut want = tables();
    want.hosts.clear();
    want.endpoints.remove(&key(VNI, 3));
    let authority = Authority { endpoints: BTreeSet::new(), ..everything_read() };
    let desired = Desired { tables: want, authority, ..Desired::default() };
    let actual = Actual { tables: tables(), ..Actual::default() };
    assert_eq!(
        diff(&desired, &actual),
        [Op::RemoveEndpoint(key(VNI, 3)), Op::RemoveHost(mapped([192, 168, 1, 12]))]
    );
}

#[test]
fn what_was_read_to_be_gone_is_removed() {
    let mut want = tables();
    want.hosts.clear();
    want.endpoints.remove(&key(VNI, 3));
    let desired = Desired { tables: want, authority: everything_read(), ..Desired::default() };
    let actual = Actual { tables: tables(), ..Actual::default() };
    assert_eq!(
        diff(&desired, &actual),
        [Op::RemoveEndpoint(key(VNI, 3)), Op::RemoveHost(mapped([192, 168, 1, 12]))]
    );
}

#[test]
fn an_endpoint_of_this_host_is_removed_without_asking_consul() {
    let mut want = tables();
    want.endpoints.remove(&key(VNI, 2));
    want.ports.clear();
    let desired = Desired { tables: want, ..Desired::default() };
    let actual = Actual { tables: tables(), ..Actual::default() };
    assert_eq!(diff(&desired, &actual), [Op::RemoveEndpoint(key(VNI, 2)), Op::RemovePort(7)]);
}

#[test]
fn a_network_nobody_here_is_in_any_more_goes_with_all_its_endpoints() {
    let desired = Desired::default();
    let mut have = tables();
    have.hosts.clear();
    let actual = Actual { tables: have, ..Actual::default() };
    assert_eq!(
        diff(&desired, &actual),
        [
            Op::RemoveEndpoint(key(VNI, 2)),
            Op::RemoveEndpoint(key(VNI, 3)),
            Op::RemovePort(7),
            Op::RemoveNetwork(VNI)
        ]
    );
}

#[test]
fn additions_come_before_removals_and_tables_before_programs() {
    let mut want = tables();
    want.endpoints.remove(&key(VNI, 3));
    want.endpoints.insert(key(VNI, 4), remote(12));
    let desired = Desired {
        tables: want,
        attachments: BTreeSet::from([attachment(8)]),
        authority: everything_read(),
        contradictions: Vec::new(),
    };
    let actual = Actual {
        tables: tables(),
        attached: BTreeSet::from([attachment(7)]),
        stale_links: vec!["links/from_uplink-9".into()],
    };
    assert_eq!(
        diff(&desired, &actual),
        [
            Op::SetEndpoint(key(VNI, 4), remote(12)),
            Op::Attach(attachment(8)),
            Op::Detach(attachment(7)),
            Op::RemoveLink("links/from_uplink-9".into()),
            Op::RemoveEndpoint(key(VNI, 3)),
        ]
    );
}

fn any_tables() -> impl Strategy<Value = Tables> {
    let endpoint = prop_oneof![(1u8..4).prop_map(remote), (1u32..4).prop_map(local)];
    let endpoints = proptest::collection::btree_map(((0u32..3), (2u8..6)), endpoint, 0..8);
    let hosts = proptest::collection::btree_set(1u8..4, 0..4);
    let networks = proptest::collection::btree_set(0u32..3, 0..3);
    let ports = proptest::collection::btree_set(1u32..4, 0..4);
    let published = proptest::collection::btree_map(1u16..4, 1u32..3, 0..4);
    let all = (endpoints, hosts, networks, ports, published);
    all.prop_map(|(endpoints, hosts, networks, ports, published)| Tables {
        config: HostConfig::default(),
        endpoints: endpoints.into_iter().map(|((vni, last), it)| (key(vni, last), it)).collect(),
        hosts: hosts
            .into_iter()
            .map(|host| (mapped([192, 168, 1, host]), HostValue::default()))
            .collect(),
        networks: networks.into_iter().map(|vni| (vni, NetworkValue::default())).collect(),
        ports: ports.into_iter().map(|port| (port, PortValue::default())).collect(),
        published: published
            .into_iter()
            .map(|(port_be, ifindex)| {
                let value = PublishedValue { ifindex, ..PublishedValue::default() };
                (PublishedKey { port_be, ..PublishedKey::default() }, value)
            })
            .collect(),
    })
}

#[test]
fn answers_of_a_published_port_are_translated_before_the_first_question_and_after_the_last() {
    let answers = Attachment {
        program: Program::FromGwbridge,
        ifindex: 9,
        interface: "ovnetg1".into(),
        xdp: None,
    };
    let (key, value) = (PublishedKey::default(), PublishedValue::default());
    let with = Tables { published: [(key, value)].into(), ..Tables::default() };
    let desired = Desired {
        tables: with.clone(),
        attachments: [attachment(7), answers.clone()].into(),
        ..Desired::default()
    };
    assert_eq!(
        diff(&desired, &Actual::default()),
        [Op::Attach(answers.clone()), Op::SetPublished(key, value), Op::Attach(attachment(7)),]
    );
    let actual = Actual { tables: with, attached: [answers.clone()].into(), ..Actual::default() };
    assert_eq!(diff(&Desired::default(), &actual), [Op::RemovePublished(key), Op::Detach(answers)]);
}

proptest! {
    #[test]
    fn with_everything_read_the_steps_lead_to_what_is_desired(
        want in any_tables(), mut have in any_tables()
    ) {
        let authority = Authority { hosts: true, settled: true, endpoints: (0..3).collect() };
        let desired = Desired { tables: want.clone(), authority, ..Desired::default() };
        let actual = Actual { tables: have.clone(), ..Actual::default() };
        for op in diff(&desired, &actual) {
            crate::apply::record(&mut have, &op);
        }
        prop_assert_eq!(&have, &want);
        let again = Actual { tables: have, ..Actual::default() };
        prop_assert_eq!(diff(&desired, &again), []);
    }

    #[test]
    fn with_nothing_read_no_host_and_no_remote_endpoint_in_use_is_removed(
        want in any_tables(), have in any_tables()
    ) {
        let desired = Desired { tables: want.clone(), ..Desired::default() };
        let actual = Actual { tables: have.clone(), ..Actual::default() };
        for op in diff(&desired, &actual) {
            prop_assert!(!matches!(op, Op::RemoveHost(_)));
            if let Op::RemoveEndpoint(key) = op {
                let ours = have.endpoints[&key].ifindex != 0;
                prop_assert!(ours || !want.networks.contains_key(&key.vni));
            }
        }
    }
}
