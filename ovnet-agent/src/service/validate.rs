//! Checks of what people type that need nothing but the request itself. Pure.

use std::net::Ipv4Addr;

use anyhow::Result;

use super::Refusal;
use crate::{
    api::types::{Attach, CreateNetwork},
    consul::schema::NetworkRecord,
};

/// The smallest MTU IPv4 works with (RFC 791).
const MIN_MTU: u32 = 68;
/// The largest MTU a packet's length field has room for.
const MAX_MTU: u32 = 65535;
/// IFNAMSIZ without its terminating zero.
const MAX_IFNAME: usize = 15;

/// A network's name is part of a key in Consul and of commands: Docker's own rule for names.
pub(super) fn network(wanted: &CreateNetwork) -> Result<()> {
    name("network name", &wanted.name)?;
    if let Some(mtu) = wanted.mtu
        && !(MIN_MTU..=MAX_MTU).contains(&mtu)
    {
        return Err(Refusal::invalid(format!(
            "MTU {mtu} of network {} is not between {MIN_MTU} and {MAX_MTU}",
            wanted.name
        )));
    }
    for (what, net) in [("subnet", wanted.subnet), ("IP range", wanted.ip_range)] {
        if let Some(net) = net
            && net != net.trunc()
        {
            return Err(Refusal::invalid(format!(
                "{what} {net} has bits set after its prefix: did you mean {}?",
                net.trunc()
            )));
        }
    }
    if wanted.subnet.is_none() {
        let given = [
            ("--gateway", wanted.gateway.is_some()),
            ("--ip-range", wanted.ip_range.is_some()),
            ("--aux-address", !wanted.aux.is_empty()),
        ];
        if let Some((flag, _)) = given.iter().find(|(_, given)| *given) {
            return Err(Refusal::invalid(format!(
                "{flag} needs --subnet: without it the subnet of network {} is not known yet",
                wanted.name
            )));
        }
    }
    Ok(())
}

/// The names, the interface and everything else of an attach but its address.
pub(super) fn attach(wanted: &Attach) -> Result<()> {
    if wanted.network.is_empty() {
        return Err(Refusal::invalid("no network is named: say which one with --network"));
    }
    if wanted.netns.is_empty() {
        return Err(Refusal::invalid("no sandbox is named: say which one with --netns"));
    }
    for given in wanted.name.iter().chain(&wanted.aliases) {
        name("endpoint name", given)?;
    }
    if let Some(ifname) = &wanted.ifname {
        // What the kernel's dev_valid_name() refuses, told before anything is made.
        let bad = ifname.is_empty()
            || ifname.len() > MAX_IFNAME
            || ifname == "."
            || ifname == ".."
            || !ifname.chars().all(|c| c.is_ascii_graphic() && c != '/' && c != ':')
            || ifname == "lo";
        if bad {
            return Err(Refusal::invalid(format!(
                "interface name {ifname:?} is not possible: 1 to {MAX_IFNAME} characters, no \
                 spaces, slashes or colons, and not lo"
            )));
        }
    }
    Ok(())
}

/// Whether an endpoint of `network` may have `address` at all; whether it is free is Consul's to
/// say.
pub(super) fn address(network: &NetworkRecord, address: Ipv4Addr) -> Result<()> {
    let NetworkRecord { name, subnet, gateway, aux, .. } = network;
    if !subnet.contains(&address) {
        return Err(Refusal::invalid(format!(
            "address {address} is not in subnet {subnet} of network {name}"
        )));
    }
    // A /31 or /32 has neither a network nor a broadcast address (RFC 3021).
    if subnet.prefix_len() < 31 {
        for (what, special) in [("network", subnet.network()), ("broadcast", subnet.broadcast())] {
            if address == special {
                return Err(Refusal::invalid(format!(
                    "address {address} is the {what} address of subnet {subnet} of network {name}"
                )));
            }
        }
    }
    if address == *gateway {
        return Err(Refusal::conflict(format!(
            "address {address} is the gateway of network {name}: choose another"
        )));
    }
    if let Some((aux, _)) = aux.iter().find(|(_, taken)| **taken == address) {
        return Err(Refusal::conflict(format!(
            "address {address} is kept by network {name} as auxiliary address {aux}: choose another"
        )));
    }
    Ok(())
}

/// A MAC as `02:42:0a:00:00:02`.
pub(super) fn parse_mac(text: &str) -> Option<[u8; 6]> {
    let mut mac = [0; 6];
    let mut parts = text.split(':');
    for byte in &mut mac {
        // from_str_radix() would take a sign.
        let part = parts.next().filter(|part| {
            part.len() == 2 && part.bytes().all(|digit| digit.is_ascii_hexdigit())
        })?;
        *byte = u8::from_str_radix(part, 16).ok()?;
    }
    parts.next().is_none().then_some(mac)
}

fn name(what: &str, name: &str) -> Result<()> {
    let first = name.chars().next().is_some_and(|c| c.is_ascii_alphanumeric());
    let rest = name.chars().all(|c| c.is_ascii_alphanumeric() || "_.-".contains(c));
    if first && rest && name.len() <= 128 {
        return Ok(());
    }
    Err(Refusal::invalid(format!(
        "{what} {name:?} is not possible: up to 128 letters, digits, '_', '.' and '-', beginning \
         with a letter or digit"
    )))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::service::{Kind, fake::network as record, kind_of};

    fn line<T: std::fmt::Debug>(result: Result<T>) -> String {
        result.unwrap_err().to_string()
    }

    #[test]
    fn names_follow_dockers_rule() {
        for good in ["a", "ov_net1", "my.net-2", "0"] {
            name("network name", good).unwrap();
        }
        for bad in ["", "_a", "-a", "a/b", "a b", "ä", ".", &"a".repeat(129)] {
            assert!(name("network name", bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_subnet_must_end_at_its_prefix() {
        let wanted = CreateNetwork {
            name: "n".into(),
            subnet: Some("172.19.0.5/24".parse().unwrap()),
            ..Default::default()
        };
        assert_eq!(
            line(network(&wanted)),
            "subnet 172.19.0.5/24 has bits set after its prefix: did you mean 172.19.0.0/24?"
        );
    }

    #[test]
    fn a_gateway_needs_a_subnet() {
        let gateway = Some([10, 0, 0, 1].into());
        let wanted = CreateNetwork { name: "n".into(), gateway, ..Default::default() };
        assert!(line(network(&wanted)).starts_with("--gateway needs --subnet"));
    }

    #[test]
    fn an_mtu_out_of_range_is_refused() {
        for mtu in [0, 67, 65536] {
            let wanted = CreateNetwork { name: "n".into(), mtu: Some(mtu), ..Default::default() };
            assert!(network(&wanted).is_err(), "{mtu}");
        }
    }

    #[test]
    fn interface_names_are_the_kernels() {
        for bad in ["", "a/b", "a b", "sixteen_letters_", "..", "lo", "a:1"] {
            let wanted = Attach {
                network: "n".into(),
                netns: "t1".into(),
                ip: None,
                name: None,
                aliases: vec![],
                ifname: Some(bad.into()),
            };
            assert!(attach(&wanted).is_err(), "{bad}");
        }
    }

    #[test]
    fn an_address_is_checked_against_its_network() {
        let mut network = record("ov_net1", 4096);
        network.aux.insert("router".into(), [10, 0, 0, 9].into());
        address(&network, [10, 0, 0, 2].into()).unwrap();
        for (bad, kind, part) in [
            ([10, 0, 1, 2], Kind::Invalid, "not in subnet 10.0.0.0/24 of network ov_net1"),
            ([10, 0, 0, 0], Kind::Invalid, "the network address"),
            ([10, 0, 0, 255], Kind::Invalid, "the broadcast address"),
            ([10, 0, 0, 1], Kind::Conflict, "the gateway of network ov_net1"),
            ([10, 0, 0, 9], Kind::Conflict, "auxiliary address router"),
        ] {
            let error = address(&network, bad.into()).unwrap_err();
            assert_eq!(kind_of(&error), Some(kind));
            assert!(error.to_string().contains(part), "{error}");
        }
    }

    #[test]
    fn macs_are_read_as_they_are_written() {
        assert_eq!(parse_mac("02:42:0a:00:00:02"), Some([2, 0x42, 10, 0, 0, 2]));
        for bad in [
            "",
            "02:42:0a:00:00",
            "02:42:0a:00:00:02:03",
            "2:42:0a:00:00:02",
            "zz:42:0a:00:00:02",
            "02:42:0a:00:00:+2",
        ] {
            assert_eq!(parse_mac(bad), None, "{bad}");
        }
    }
}
