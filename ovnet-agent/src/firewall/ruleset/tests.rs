//! The rules as `nft` reads them.

use super::*;

fn mapping(protocol: Protocol, host_address: [u8; 4], own: bool) -> Mapping {
    Mapping {
        protocol,
        host_address: host_address.into(),
        host_port: 90,
        backend: [172, 18, 0, 2].into(),
        container_port: 80,
        bridge: "ovnet_gwbridge".into(),
        own,
    }
}

fn all() -> Rules {
    Rules {
        outward: vec!["ens33".into()],
        vxlan_port: 4789,
        egress: Some(Egress {
            bridge: "ovnet_gwbridge".into(),
            subnet: "172.18.0.0/16".parse().unwrap(),
        }),
        mappings: vec![
            mapping(Protocol::Tcp, [0, 0, 0, 0], true),
            mapping(Protocol::Udp, [192, 168, 1, 11], true),
            mapping(Protocol::Tcp, [127, 0, 0, 1], true),
            mapping(Protocol::Udp, [0, 0, 0, 0], false),
        ],
    }
}

/// How many rules of a chain.
fn count(rules: &Rules, chain: &str) -> usize {
    shape(&batch(rules))[chain]
}

#[test]
fn a_mapping_has_its_rules_and_dockers_only_the_one_for_answers() {
    let all = all();
    assert_eq!(count(&all, "output"), 3);
    assert_eq!(count(&all, "prerouting"), 2, "nobody comes to 127.0.0.1 from elsewhere");
    assert_eq!(count(&all, "postrouting"), 3 + 6, "and nobody is answered from there");
}

#[test]
fn with_nothing_to_do_the_guard_stays() {
    let rules = Rules { egress: None, mappings: vec![], ..all() };
    for (chain, rules) in shape(&batch(&rules)) {
        let expected = match chain.as_str() {
            "guard" => 3,
            "raw" => 1,
            _ => 0,
        };
        assert_eq!(rules, expected, "{chain}");
    }
}

#[test]
fn other_rules_have_another_digest_and_the_same_the_same() {
    let digest = |rules: &Rules| {
        let shape = shape(&batch(rules));
        shape.into_keys().find(|name| name.starts_with(DIGEST)).unwrap()
    };
    let first = all();
    assert_eq!(digest(&first), digest(&first.clone()));
    let mut other = all();
    other.mappings[0].host_port = 91;
    assert_ne!(digest(&first), digest(&other));
}

#[test]
fn the_answers_of_a_mapping_of_one_address_keep_that_address() {
    let text = serde_json::to_string(&batch(&all())).unwrap();
    assert!(text.contains(r#"{"snat":{"addr":"192.168.1.11","port":90}}"#), "{text}");
    assert!(text.contains(r#"{"masquerade":{"port":90}}"#), "{text}");
}

#[test]
fn by_udp_sandboxes_leave_under_ports_that_nothing_is_published_on() {
    let range = |ports: &[(Protocol, u16)]| {
        let mapping =
            |&(protocol, host_port)| Mapping { host_port, ..mapping(protocol, [0, 0, 0, 0], true) };
        unpublished_ports(&ports.iter().map(mapping).collect::<Vec<_>>())
    };
    use Protocol::{Tcp, Udp};
    assert_eq!(range(&[]), None, "as the kernel does");
    assert_eq!(range(&[(Tcp, 5000)]), None, "flags tell");
    assert_eq!(range(&[(Udp, 53)]), Some(1024..=65535));
    assert_eq!(range(&[(Udp, 1024)]), Some(1025..=65535));
    assert_eq!(range(&[(Udp, 65535)]), Some(1024..=65534));
    assert_eq!(range(&[(Udp, 40000), (Udp, 53)]), Some(1024..=39999));
    assert_eq!(range(&[(Udp, 2000), (Udp, 60000)]), Some(2001..=59999));
    let every: Vec<_> = (1024..=65535).map(|port| (Udp, port)).collect();
    assert_eq!(range(&every), None, "there is none to choose");
    assert_eq!(range(&every[1..]), Some(1024..=1024));
}

#[test]
fn interfaces_that_lead_out_are_no_other_container_s() {
    let rules = Rules { outward: vec!["br0".into(), "br1".into()], ..all() };
    let text = serde_json::to_string(&batch(&rules)).unwrap();
    for (key, name) in
        [("iifname", "br0"), ("iifname", "br1"), ("oifname", "br0"), ("oifname", "br1")]
    {
        let not = format!(r#"{{"left":{{"meta":{{"key":"{key}"}}}},"right":"{name}","op":"!="}}"#);
        assert_eq!(text.matches(&not).count(), 1, "{not} in {text}");
    }
}
