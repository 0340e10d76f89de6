//! Endpoints of this host whose state is lost: the kernel keeps what it has of them. Pure.

use std::collections::{BTreeMap, BTreeSet};

use ovnet_common::abi::Program;

use super::Desired;
use crate::datapath::{Attachment, Tables};

/// What the kernel has of such endpoints.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Held {
    /// Their entries in the tables.
    tables: Tables,
    /// Their programs.
    attachments: BTreeSet<Attachment>,
}

impl Held {
    /// What `tables` have of these host-side veths, and of the ways out of their sandboxes, of which
    /// only their owners know whose they are: of every one that is in `others`. Both are names by
    /// ifindex.
    pub fn of(
        tables: &Tables,
        veths: &BTreeMap<u32, String>,
        others: &BTreeMap<u32, String>,
    ) -> Self {
        let mut held = Self::default();
        let mut hook = |program, ifindex: u32, interface: &str| {
            let interface = interface.to_owned();
            held.attachments.insert(Attachment { program, ifindex, interface, xdp: None });
        };
        for (ifindex, name) in veths {
            hook(Program::FromContainer, *ifindex, name);
            let Some(port) = tables.ports.get(ifindex) else { continue };
            held.tables.ports.insert(*ifindex, *port);
            let network = tables.networks.get(&port.vni);
            held.tables.networks.extend(network.map(|value| (port.vni, *value)));
        }
        let published = tables.published.iter().filter(|(_, to)| others.contains_key(&to.ifindex));
        for (key, to) in published {
            hook(Program::FromGwbridge, to.ifindex, &others[&to.ifindex]);
            held.tables.published.insert(*key, *to);
        }
        for (ifindex, port) in tables.ports.iter().filter(|(_, port)| port.vni == 0) {
            let Some(name) = others.get(ifindex) else { continue };
            hook(Program::FromGwbridge, *ifindex, name);
            held.tables.ports.insert(*ifindex, *port);
        }
        let local = tables.endpoints.iter().filter(|(_, to)| veths.contains_key(&to.ifindex));
        held.tables.endpoints = local.map(|(key, value)| (*key, *value)).collect();
        held
    }
}

/// Enters them where nobody who is known has the place.
pub(super) fn enter(desired: &mut Desired, held: &Held) {
    let Held { tables, attachments } = held;
    for (ifindex, port) in &tables.ports {
        desired.tables.ports.entry(*ifindex).or_insert(*port);
    }
    for (vni, network) in &tables.networks {
        desired.tables.networks.entry(*vni).or_insert(*network);
    }
    for (key, endpoint) in &tables.endpoints {
        desired.tables.endpoints.entry(*key).or_insert(*endpoint);
    }
    for (key, to) in &tables.published {
        desired.tables.published.entry(*key).or_insert(*to);
    }
    desired.tables.config.published = u16::from(!desired.tables.published.is_empty());
    desired.attachments.extend(attachments.iter().cloned());
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        desired::{GatewayLink, desired},
        diff::{Actual, diff},
        publish::{Protocol, PublishedPort},
        state::GatewayPort,
    };

    /// An endpoint with a way out and a port, and the same host when its state is lost.
    #[test]
    fn an_endpoint_whose_state_is_lost_keeps_everything_it_has() {
        let mut inputs = super::super::tests::inputs();
        let (endpoint, ifindex) = &mut inputs.local[0];
        endpoint.gateway = Some(GatewayPort {
            bridge: "ovnet_gwbridge".into(),
            host_ifname: "ovnetg1".into(),
            ifname: "eth1".into(),
            address: [172, 18, 0, 2].into(),
            mac: "02:42:ac:12:00:02".into(),
        });
        endpoint.ports = vec![PublishedPort {
            protocol: Protocol::Tcp,
            host_address: [0; 4].into(),
            host_port: 90,
            container_port: 80,
        }];
        inputs.ports.fast = true;
        inputs.ports.addresses = vec![inputs.uplink.address];
        let link = GatewayLink { ifindex: 99, bridge_mac: [2; 6], mtu: 1500, takes_xdp: false };
        inputs.ports.gateways = BTreeMap::from([("ovnetg1".into(), link)]);
        let veths = BTreeMap::from([(*ifindex, endpoint.host_ifname.clone())]);
        let others = BTreeMap::from([(99, "ovnetg1".to_owned())]);
        let whole = desired(&inputs);
        assert_eq!((whole.tables.ports.len(), whole.tables.published.len()), (2, 1));

        inputs.local.clear();
        inputs.ports.gateways.clear();
        let actual = Actual {
            tables: whole.tables.clone(),
            attached: whole.attachments.clone(),
            stale_links: Vec::new(),
        };
        let ops = diff(&desired(&inputs), &actual);
        assert!(!ops.is_empty(), "without holding it everything would go");
        inputs.held = Held::of(&whole.tables, &veths, &others);
        assert_eq!(diff(&desired(&inputs), &actual), []);
    }
}
