//! What tests begin with.

use std::collections::BTreeMap;

use ipnet::Ipv4Net;

use super::NODE;
use crate::{
    api::types::Attach,
    consul::schema::{EndpointRecord, EndpointState, NetworkRecord, VERSION, format_mac, mac_of},
    state::LocalEndpoint,
};

pub(crate) fn network(name: &str, vni: u32) -> NetworkRecord {
    NetworkRecord {
        v: VERSION,
        id: format!("{vni:08x}-0000-4000-8000-000000000000"),
        name: name.into(),
        vni,
        subnet: Ipv4Net::new([10, 0, (vni - 4096).try_into().unwrap(), 0].into(), 24).unwrap(),
        gateway: [10, 0, (vni - 4096).try_into().unwrap(), 1].into(),
        ip_range: None,
        aux: BTreeMap::new(),
        mtu: None,
        internal: false,
        options: BTreeMap::new(),
        labels: BTreeMap::new(),
        created_by: "docker02".into(),
    }
}

/// A request to attach the sandbox `netns`, under that name.
pub(crate) fn attach(network: &str, netns: &str) -> Attach {
    Attach {
        network: network.into(),
        netns: netns.into(),
        name: Some(netns.into()),
        ..Default::default()
    }
}

/// The record of an endpoint of this host.
pub(crate) fn record() -> EndpointRecord {
    let address = [10, 0, 0, 2].into();
    EndpointRecord {
        v: VERSION,
        id: "0123456789abcdef".repeat(4),
        address,
        mac: format_mac(mac_of(address)),
        host: NODE.into(),
        names: vec!["t1".into()],
        state: EndpointState::Up,
    }
}

/// That endpoint as its host knows it.
pub(crate) fn local_endpoint() -> LocalEndpoint {
    LocalEndpoint {
        record: record(),
        network: network("ov_net1", 4096),
        netns: "/run/netns/t1".into(),
        ifname: "eth0".into(),
        host_ifname: "ovnet01234567".into(),
        mtu: 1450,
        docker: None,
        gateway: None,
        ports: Vec::new(),
    }
}
