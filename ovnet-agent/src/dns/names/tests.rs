use proptest::prelude::*;

use super::*;
use crate::consul::schema::{VERSION, format_mac, mac_of};

fn network(name: &str, subnet: &str) -> NetworkRecord {
    let subnet: ipnet::Ipv4Net = subnet.parse().unwrap();
    NetworkRecord {
        v: VERSION,
        id: format!("id-{name}"),
        name: name.into(),
        vni: 4096,
        subnet,
        gateway: subnet.hosts().next().unwrap(),
        ip_range: None,
        aux: Default::default(),
        mtu: None,
        internal: false,
        options: Default::default(),
        labels: Default::default(),
        created_by: String::new(),
    }
}

fn endpoint(address: [u8; 4], host: &str, names: &[&str]) -> EndpointRecord {
    EndpointRecord {
        v: VERSION,
        id: "e".into(),
        address: address.into(),
        mac: format_mac(mac_of(address.into())),
        host: host.into(),
        names: names.iter().map(|name| name.to_string()).collect(),
        state: EndpointState::Up,
    }
}

/// Two networks as one asker sees them.
#[derive(Debug)]
struct Example {
    networks: Vec<(NetworkRecord, Vec<EndpointRecord>)>,
    hosts: Option<BTreeSet<String>>,
}

impl Example {
    fn new() -> Self {
        let mut reserved = endpoint([10, 0, 0, 9], "docker01", &["soon"]);
        reserved.state = EndpointState::Reserved;
        let first = vec![
            endpoint([10, 0, 0, 2], "docker01", &["t1", "0123456789ab"]),
            endpoint([10, 0, 0, 3], "docker02", &["t2", "Alias_2", "web.prod"]),
            endpoint([10, 0, 0, 4], "docker03", &["t2"]),
            endpoint([10, 0, 0, 5], "lost", &["t5"]),
            endpoint([10, 0, 0, 6], "docker01", &[]),
            reserved,
        ];
        let second = vec![
            endpoint([10, 0, 1, 2], "docker01", &["t1"]),
            endpoint([10, 0, 1, 3], "docker02", &["t2.ov_net1", &"x".repeat(64), "good"]),
        ];
        let hosts = ["docker01", "docker02", "docker03"].map(str::to_owned);
        Self {
            networks: vec![
                (network("ov_net1", "10.0.0.0/24"), first),
                (network("a.b", "10.0.1.0/24"), second),
            ],
            hosts: Some(hosts.into()),
        }
    }

    fn directory(&self, networks: std::ops::Range<usize>) -> Directory<'_> {
        let networks = self.networks[networks].iter();
        let networks = networks
            .map(|(record, endpoints)| Network { record, endpoints: endpoints.iter().collect() });
        Directory { networks: networks.collect(), hosts: self.hosts.as_ref() }
    }

    /// The answer to an asker that is on the first network only.
    fn ask(&self, name: &str, kind: Kind) -> Answer {
        answer(&self.directory(0..1), &Question { name: name.into(), kind }, 0)
    }

    fn ask_both(&self, name: &str, kind: Kind) -> Answer {
        answer(&self.directory(0..2), &Question { name: name.into(), kind }, 0)
    }
}

fn addresses<const N: usize>(addresses: [[u8; 4]; N]) -> Answer {
    Answer::Addresses(addresses.map(Ipv4Addr::from).into())
}

#[test]
fn every_name_of_an_endpoint_is_answered_alone_and_with_its_network() {
    let example = Example::new();
    for name in ["t1", "0123456789ab", "t1.ov_net1", "0123456789ab.ov_net1"] {
        assert_eq!(example.ask(name, Kind::Address), addresses([[10, 0, 0, 2]]), "{name}");
    }
    for name in ["alias_2", "web.prod", "alias_2.ov_net1", "web.prod.ov_net1"] {
        assert_eq!(example.ask(name, Kind::Address), addresses([[10, 0, 0, 3]]), "{name}");
    }
    assert_eq!(example.ask_both("t1.a.b", Kind::Address), addresses([[10, 0, 1, 2]]));
}

#[test]
fn a_name_on_two_hosts_or_networks_has_all_addresses() {
    let example = Example::new();
    assert_eq!(example.ask("t2", Kind::Address), addresses([[10, 0, 0, 3], [10, 0, 0, 4]]));
    assert_eq!(example.ask_both("t1", Kind::Address), addresses([[10, 0, 0, 2], [10, 0, 1, 2]]));
}

#[test]
fn several_addresses_take_turns_at_the_front() {
    let example = Example::new();
    let directory = example.directory(0..1);
    let question = Question { name: "t2".into(), kind: Kind::Address };
    assert_eq!(answer(&directory, &question, 0), addresses([[10, 0, 0, 3], [10, 0, 0, 4]]));
    assert_eq!(answer(&directory, &question, 1), addresses([[10, 0, 0, 4], [10, 0, 0, 3]]));
    assert_eq!(answer(&directory, &question, 2), answer(&directory, &question, 0));
}

#[test]
fn another_type_of_a_name_that_exists_is_empty_and_not_refused() {
    let example = Example::new();
    assert_eq!(example.ask("t2", Kind::Other), Answer::Empty);
    assert_eq!(example.ask("t2", Kind::Pointer), Answer::Empty);
    assert_eq!(example.ask("t2.ov_net1", Kind::Other), Answer::Empty);
    assert_eq!(example.ask("2.0.0.10.in-addr.arpa", Kind::Address), Answer::Empty);
}

#[test]
fn what_is_not_of_the_asker_s_networks_is_foreign() {
    let example = Example::new();
    for name in ["example.org", "", "t9", "t1.a.b", "good", "t1.ov_net", "t1.ov_net1.", "t1."] {
        assert_eq!(example.ask(name, Kind::Address), Answer::Foreign, "{name}");
    }
    for name in ["2.1.0.10.in-addr.arpa", "1.0.18.172.in-addr.arpa", "0.0.10.in-addr.arpa"] {
        assert_eq!(example.ask(name, Kind::Pointer), Answer::Foreign, "{name}");
    }
    let nobody = Directory::default();
    let question = Question { name: "t1".into(), kind: Kind::Address };
    assert_eq!(answer(&nobody, &question, 0), Answer::Foreign);
}

#[test]
fn an_address_has_its_endpoint_s_first_name_with_the_network() {
    let example = Example::new();
    let name = |name: &str| Answer::Name(name.into());
    assert_eq!(example.ask("2.0.0.10.in-addr.arpa", Kind::Pointer), name("t1.ov_net1"));
    assert_eq!(example.ask("3.0.0.10.in-addr.arpa", Kind::Pointer), name("t2.ov_net1"));
    assert_eq!(example.ask_both("2.1.0.10.in-addr.arpa", Kind::Pointer), name("t1.a.b"));
}

#[test]
fn addresses_of_our_networks_without_a_name_are_nobody_s() {
    let example = Example::new();
    // The gateway, one that is free, one without names, a claimed one, one of a host that is gone.
    for last in [1, 77, 6, 9, 5] {
        let name = format!("{last}.0.0.10.in-addr.arpa");
        assert_eq!(example.ask(&name, Kind::Pointer), Answer::Nobody, "{name}");
    }
}

#[test]
fn reserved_addresses_and_hosts_that_are_gone_are_not_answered() {
    let mut example = Example::new();
    assert_eq!(example.ask("soon", Kind::Address), Answer::Foreign);
    assert_eq!(example.ask("t5", Kind::Address), Answer::Foreign);
    example.hosts = None;
    assert_eq!(example.ask("t5", Kind::Address), addresses([[10, 0, 0, 5]]), "not yet read");
}

#[test]
fn a_whole_name_hides_the_same_text_as_name_and_network() {
    let example = Example::new();
    assert_eq!(example.ask_both("t2.ov_net1", Kind::Address), addresses([[10, 0, 1, 3]]));
}

#[test]
fn a_name_that_cannot_be_sent_is_passed_over() {
    let mut example = Example::new();
    example.networks[1].1[1].names = vec!["x".repeat(64), "a..b".into(), "good".into()];
    let answer = example.ask_both("3.1.0.10.in-addr.arpa", Kind::Pointer);
    assert_eq!(answer, Answer::Name("good.a.b".into()));
    assert!(!is_domain_name(&["x"; 128].join(".")));
}

#[test]
fn only_whole_addresses_are_read_backwards() {
    assert_eq!(reversed("4.3.2.1.in-addr.arpa"), Some([1, 2, 3, 4].into()));
    for wrong in ["04.3.2.1", "+4.3.2.1", "256.3.2.1", "4.3.2", "5.4.3.2.1", "", "x.3.2.1"] {
        assert_eq!(reversed(&format!("{wrong}.in-addr.arpa")), None, "{wrong}");
    }
    assert_eq!(reversed("in-addr.arpa"), None);
    assert_eq!(reversed("4.3.2.1"), None);
}

fn any_name() -> impl Strategy<Value = String> {
    "[abAB]{1,2}([._-][ab]){0,2}"
}

fn any_network(index: u8) -> impl Strategy<Value = (NetworkRecord, Vec<EndpointRecord>)> {
    let endpoint = (2..20u8, 0..4u8, prop::collection::vec(any_name(), 0..3), any::<bool>());
    (any_name(), prop::collection::vec(endpoint, 0..8)).prop_map(move |(name, endpoints)| {
        let mut by_address = std::collections::BTreeMap::new();
        for (last, host, names, up) in endpoints {
            let names: Vec<&str> = names.iter().map(String::as_str).collect();
            let mut it = endpoint_at(index, last, host, &names);
            it.state = if up { EndpointState::Up } else { EndpointState::Reserved };
            by_address.insert(last, it);
        }
        let record = network(&name, &format!("10.0.{index}.0/24"));
        (record, by_address.into_values().collect())
    })
}

fn endpoint_at(network: u8, last: u8, host: u8, names: &[&str]) -> EndpointRecord {
    endpoint([10, 0, network, last], &format!("host{host}"), names)
}

fn any_example() -> impl Strategy<Value = Example> {
    let hosts = prop::option::of(prop::collection::btree_set("host[0-3]", 0..4));
    (any_network(0), any_network(1), hosts)
        .prop_map(|(a, b, hosts)| Example { networks: vec![a, b], hosts })
}

proptest! {
    /// Exactly the endpoints that are up, on hosts that are there, on the asker's networks and
    /// named so are answered; the name may come in any case and with any turn.
    #[test]
    fn answers_are_complete_and_nothing_else(
        example in any_example(), of in 0..3usize, asked in any_name(),
        on in prop::option::of(0..2usize), turn in any::<usize>(),
    ) {
        let networks = match of { 0 => 0..0, 1 => 1..2, _ => 0..2 };
        let suffix = on.map(|on| format!(".{}", example.networks[on].0.name)).unwrap_or_default();
        let name = format!("{asked}{suffix}").to_lowercase();
        let expected = |qualified: bool| {
            let mut expected = BTreeSet::new();
            for (record, endpoints) in &example.networks[networks.clone()] {
                for it in endpoints {
                    let there = example.hosts.as_ref().is_none_or(|hosts| hosts.contains(&it.host));
                    let named = it.names.iter().any(|its| {
                        let its = if qualified { format!("{its}.{}", record.name) } else { its.clone() };
                        its.to_lowercase() == name
                    });
                    if there && named && it.state == EndpointState::Up {
                        expected.insert(it.address);
                    }
                }
            }
            expected
        };
        let expected = Some(expected(false)).filter(|it| !it.is_empty()).unwrap_or(expected(true));
        let directory = example.directory(networks.clone());
        let ask = |kind| answer(&directory, &Question { name: name.clone(), kind }, turn);
        match ask(Kind::Address) {
            Answer::Addresses(found) => {
                prop_assert_eq!(found.len(), expected.len(), "no address twice");
                prop_assert_eq!(BTreeSet::from_iter(found), expected);
                prop_assert_eq!(ask(Kind::Other), Answer::Empty);
            }
            other => {
                prop_assert_eq!(other, Answer::Foreign);
                prop_assert!(expected.is_empty());
                prop_assert_eq!(ask(Kind::Other), Answer::Foreign);
            }
        }
    }

    /// The name an address has leads back to the address, unless that very text is another's name.
    #[test]
    fn names_of_addresses_lead_back(example in any_example(), network in 0..2u8, last in 0..20u8) {
        let directory = example.directory(0..2);
        let name = format!("{last}.{network}.0.10.in-addr.arpa");
        match answer(&directory, &Question { name, kind: Kind::Pointer }, 0) {
            Answer::Name(name) => {
                let question = Question { name: name.to_lowercase(), kind: Kind::Address };
                let Answer::Addresses(found) = answer(&directory, &question, 0) else {
                    return Err(TestCaseError::fail("a name without addresses"));
                };
                let hidden = directory
                    .networks
                    .iter()
                    .flat_map(|it| &it.endpoints)
                    .any(|it| it.names.iter().any(|its| its.eq_ignore_ascii_case(&name)));
                prop_assert!(hidden || found.contains(&[10, 0, network, last].into()));
            }
            other => prop_assert_eq!(other, Answer::Nobody),
        }
    }

    #[test]
    fn no_text_makes_it_fail(name in ".{0,40}", reverse in any::<bool>()) {
        let suffix = if reverse { REVERSE } else { "" };
        let question = Question { name: format!("{name}{suffix}"), kind: Kind::Pointer };
        answer(&Example::new().directory(0..2), &question, usize::MAX);
    }
}
