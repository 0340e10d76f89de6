//! Published ports: what the fast path must know of them, and where their answers come in. Pure.

use std::{collections::BTreeMap, net::Ipv4Addr};

use ovnet_common::{
    abi::{PortValue, Program, mapped},
    published::{PublishedKey, PublishedValue, published_flags},
};

use super::Desired;
use crate::{
    consul::schema::parse_mac,
    datapath::Attachment,
    publish::PublishedPort,
    state::{GatewayPort, LocalEndpoint},
};

/// What is known of this host besides the endpoints.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PortInputs {
    /// Whether programs serve published ports (`--ports bpf`).
    pub fast: bool,
    /// `ovnet_gwbridge`, where there is one: ifindex and MAC.
    pub gwbridge: Option<(u32, [u8; 6])>,
    /// The addresses of this host that a port published on every address is reached by.
    pub addresses: Vec<Ipv4Addr>,
    /// The gwbridges' ports that are there, by name.
    pub gateways: BTreeMap<String, GatewayLink>,
}

/// A gwbridge's port, as the kernel has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GatewayLink {
    /// ifindex of the end on the host.
    pub ifindex: u32,
    /// MAC of the bridge.
    pub bridge_mac: [u8; 6],
    /// MTU of the pair in bytes.
    pub mtu: u32,
    /// Whether the sandbox's end takes XDP frames.
    pub takes_xdp: bool,
}

/// Enters the published ports of the local endpoints.
pub(super) fn enter(desired: &mut Desired, inputs: &PortInputs, local: &[(LocalEndpoint, u32)]) {
    for (endpoint, _) in local {
        let Some(gateway) = &endpoint.gateway else { continue };
        let Some(link) = inputs.gateways.get(&gateway.host_ifname) else { continue };
        let Ok(mac) = parse_mac(&gateway.mac) else {
            let name = &gateway.host_ifname;
            desired.contradictions.push(format!("the gateway port {name} has no MAC address"));
            continue;
        };
        // What a sandbox of ours may call itself; Docker's containers are Docker's business.
        if endpoint.docker.is_none() {
            let address = mapped(gateway.address.octets());
            let value = PortValue { vni: 0, address, mac, reserved: 0 };
            desired.tables.ports.insert(link.ifindex, value);
        }
        let publishes = inputs.fast && !endpoint.network.internal && !endpoint.ports.is_empty();
        // Docker's containers go out as Docker has them do, unless they publish something.
        if publishes || endpoint.docker.is_none() {
            desired.attachments.insert(Attachment {
                program: Program::FromGwbridge,
                ifindex: link.ifindex,
                interface: gateway.host_ifname.clone(),
                xdp: None,
            });
        }
        if !publishes {
            continue;
        }
        for port in &endpoint.ports {
            publish(desired, inputs, port, value(port, gateway, link, mac));
        }
    }
    desired.tables.config.published = u16::from(!desired.tables.published.is_empty());
}

/// Where a port leads.
fn value(
    port: &PublishedPort,
    gateway: &GatewayPort,
    link: &GatewayLink,
    mac: [u8; 6],
) -> PublishedValue {
    PublishedValue {
        address: mapped(gateway.address.octets()),
        ifindex: link.ifindex,
        port_be: port.container_port.to_be(),
        mac,
        gateway_mac: link.bridge_mac,
        mtu: u16::try_from(link.mtu).unwrap_or(u16::MAX),
        flags: if link.takes_xdp { published_flags::XDP } else { 0 },
    }
}

/// Enters a port under each address it is reached by from outside. What two endpoints claim, the
/// first one keeps.
fn publish(desired: &mut Desired, inputs: &PortInputs, port: &PublishedPort, to: PublishedValue) {
    let every = port.host_address.is_unspecified();
    // Packets for 127.0.0.0/8 never come in by an uplink.
    let reached = inputs.addresses.iter().filter(|it| every || **it == port.host_address);
    for address in reached {
        let key = PublishedKey {
            address: mapped(address.octets()),
            port_be: port.host_port.to_be(),
            protocol: port.protocol.number(),
            reserved: 0,
        };
        let kept = *desired.tables.published.entry(key).or_insert(to);
        if (kept.ifindex, kept.port_be) != (to.ifindex, to.port_be) {
            desired.contradictions.push(format!(
                "port {}/{} of {address} is published by two sandboxes; the first keeps it",
                port.host_port, port.protocol
            ));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::publish::Protocol;

    fn inputs() -> PortInputs {
        let link = GatewayLink {
            ifindex: 9,
            bridge_mac: [2, 0x42, 172, 18, 0, 1],
            mtu: 1500,
            takes_xdp: false,
        };
        PortInputs {
            fast: true,
            gwbridge: None,
            addresses: vec![[192, 168, 1, 11].into(), [10, 9, 9, 9].into()],
            gateways: BTreeMap::from([("ovnetg1".into(), link)]),
        }
    }

    fn endpoint(ports: &[PublishedPort]) -> (LocalEndpoint, u32) {
        let mut local = super::super::tests::inputs().local.remove(0);
        local.0.gateway = Some(GatewayPort {
            bridge: "ovnet_gwbridge".into(),
            host_ifname: "ovnetg1".into(),
            ifname: "eth1".into(),
            address: [172, 18, 0, 2].into(),
            mac: "02:42:ac:12:00:02".into(),
        });
        local.0.ports = ports.to_vec();
        local
    }

    fn port(host_address: [u8; 4], host_port: u16) -> PublishedPort {
        let host_address = host_address.into();
        PublishedPort { protocol: Protocol::Tcp, host_address, host_port, container_port: 80 }
    }

    fn entered(inputs: &PortInputs, local: &[(LocalEndpoint, u32)]) -> Desired {
        let mut desired = Desired::default();
        enter(&mut desired, inputs, local);
        desired
    }

    #[test]
    fn a_port_on_every_address_is_entered_under_each() {
        let desired = entered(&inputs(), &[endpoint(&[port([0; 4], 90)])]);
        let published = &desired.tables.published;
        assert_eq!(published.len(), 2);
        assert!(published.keys().all(|key| key.port_be == 90u16.to_be() && key.protocol == 6));
        let to = published.values().next().unwrap();
        assert_eq!(to.address, mapped([172, 18, 0, 2]));
        assert_eq!((to.ifindex, to.port_be, to.flags), (9, 80u16.to_be(), 0));
        assert_eq!(desired.tables.config.published, 1);
        assert_eq!(desired.attachments.len(), 1);
    }

    #[test]
    fn a_port_on_one_address_is_entered_there_and_one_on_loopback_nowhere() {
        let ports = [port([10, 9, 9, 9], 90), port([127, 0, 0, 1], 91)];
        let desired = entered(&inputs(), &[endpoint(&ports)]);
        let keys: Vec<_> = desired.tables.published.keys().collect();
        assert_eq!(keys.len(), 1);
        assert_eq!(keys[0].address, mapped([10, 9, 9, 9]));
    }

    #[test]
    fn who_a_sandbox_is_on_the_bridge_is_entered_for_ours_only() {
        let own = endpoint(&[]);
        let desired = entered(&inputs(), std::slice::from_ref(&own));
        let (address, mac) = (mapped([172, 18, 0, 2]), [2, 0x42, 172, 18, 0, 2]);
        let expected = PortValue { vni: 0, address, mac, reserved: 0 };
        assert_eq!(desired.tables.ports, BTreeMap::from([(9, expected)]));

        let mut dockers = endpoint(&[port([0; 4], 90)]);
        let docker = crate::state::DockerEndpoint { network: "a".repeat(64), container: None };
        dockers.0.docker = Some(docker);
        let desired = entered(&inputs(), &[dockers]);
        assert!(desired.tables.ports.is_empty() && !desired.tables.published.is_empty());
    }

    #[test]
    fn nothing_is_entered_without_a_way_to_deliver() {
        let ports = [port([0; 4], 90)];
        let unused = |inputs: &PortInputs, endpoint| {
            let desired = entered(inputs, &[endpoint]);
            desired.tables.published.is_empty()
                && desired.attachments.len() <= 1
                && desired.tables.config.published == 0
        };
        assert!(unused(&PortInputs { fast: false, ..inputs() }, endpoint(&ports)));
        assert!(unused(&PortInputs { gateways: BTreeMap::new(), ..inputs() }, endpoint(&ports)));
        assert!(unused(&inputs(), endpoint(&[])));
        let mut internal = endpoint(&ports);
        internal.0.network.internal = true;
        assert!(unused(&inputs(), internal));
        let mut without = endpoint(&ports);
        without.0.gateway = None;
        assert!(unused(&inputs(), without));
    }

    #[test]
    fn of_two_claims_the_first_is_kept_and_the_other_reported() {
        let mut second = endpoint(&[port([0; 4], 90)]);
        second.0.ports[0].container_port = 81;
        let desired = entered(&inputs(), &[endpoint(&[port([0; 4], 90)]), second]);
        assert!(desired.tables.published.values().all(|to| to.port_be == 80u16.to_be()));
        assert_eq!(desired.contradictions.len(), 2);
        // The endpoint of a second network of the same sandbox says the same thing again.
        let twice =
            entered(&inputs(), &[endpoint(&[port([0; 4], 90)]), endpoint(&[port([0; 4], 90)])]);
        assert!(twice.contradictions.is_empty());
    }
}
