//! What a pass does for published ports and the sandboxes' way out: the gwbridge and its ports, the
//! kernel's rules, the reservations.

use std::{collections::BTreeMap, net::Ipv4Addr};

use ipnet::Ipv4Net;
use tokio::sync::watch;

use super::Worker;
use crate::{
    desired::{GatewayLink, PortInputs},
    docker::daemon::GWBRIDGE as DOCKER_GWBRIDGE,
    firewall::{self, Egress, Firewall, Mapping, Rules},
    net::{GWBRIDGE, Link, SandboxOffloads},
    publish::reserve::Reservations,
    state::{GatewayPort, LocalEndpoint},
};

/// What the loop remembers of all this from pass to pass.
pub(in crate::reconcile) struct Ports {
    pub(super) reservations: Reservations,
    firewall: Firewall,
    /// The rules last put in force.
    rules: Option<Rules>,
    /// Gateway ports of endpoints that were withdrawn, to be deleted.
    pub(super) leftovers: Vec<String>,
    /// The subnet of `ovnet_gwbridge`, once there was one: what it is made again with.
    subnet: Option<Ipv4Net>,
    /// The offloads given to the sandboxes' ends, by the name of the bridge's port.
    offloads: BTreeMap<String, SandboxOffloads>,
    /// Where the task that forgets flows hears that a port changed what it leads to.
    pub(super) published: watch::Sender<()>,
}

impl Ports {
    pub(in crate::reconcile) fn new(
        reservations: Reservations,
        published: watch::Sender<()>,
    ) -> Self {
        Self {
            reservations,
            firewall: Firewall::default(),
            rules: None,
            leftovers: Vec::new(),
            subnet: None,
            offloads: BTreeMap::new(),
            published,
        }
    }
}

impl Worker {
    /// Learns which port of docker_gwbridge is a container's: only Docker knows, and only once the
    /// container runs; the plugin's calls do not tell.
    pub(super) async fn find_gateways(&self, local: &mut [(LocalEndpoint, u32)], links: &[Link]) {
        for (endpoint, _) in local.iter_mut() {
            let there = endpoint
                .gateway
                .as_ref()
                .is_some_and(|it| links.iter().any(|link| link.name == it.host_ifname));
            if endpoint.docker.is_none() || endpoint.ports.is_empty() || there {
                continue;
            }
            let found = self.net.find_gateway_port(&endpoint.netns, DOCKER_GWBRIDGE).await;
            let Ok(Some(gateway)) = found else { continue };
            endpoint.gateway = Some(gateway);
            if let Some(known) = self.shared.view().local.get_mut(&endpoint.record.id) {
                known.gateway.clone_from(&endpoint.gateway);
            }
            if let Err(error) = self.state.store(endpoint) {
                tracing::warn!(error = format!("{error:#}"), "a container's gateway is not kept");
            }
        }
    }

    /// Deletes the gateway ports of withdrawn endpoints that no other endpoint of their sandbox uses.
    pub(super) async fn remove_gateways(&mut self, notes: &mut Vec<String>) {
        for name in std::mem::take(&mut self.ports.leftovers) {
            let used = self.shared.view().local.values().any(|endpoint| {
                endpoint.gateway.as_ref().is_some_and(|gateway| gateway.host_ifname == name)
            });
            if used {
                continue;
            }
            if let Err(error) = self.net.delete_link(&name).await {
                notes.push(format!("{error:#}"));
                self.ports.leftovers.push(name);
            }
        }
    }

    /// Makes the gwbridge, its ports and the reservations what they must be.
    pub(super) async fn repair_gateways(
        &mut self,
        local: &[(LocalEndpoint, u32)],
        links: &[Link],
        offloads: SandboxOffloads,
        notes: &mut Vec<String>,
    ) {
        let own: BTreeMap<&str, (&GatewayPort, &LocalEndpoint)> = local
            .iter()
            .filter_map(|(endpoint, _)| Some((endpoint.gateway.as_ref()?, endpoint)))
            .filter(|(gateway, _)| gateway.bridge == GWBRIDGE)
            .map(|(gateway, endpoint)| (gateway.host_ifname.as_str(), (gateway, endpoint)))
            .collect();
        let there = links.iter().find(|link| link.name == GWBRIDGE);
        let has = there.and_then(|link| link.addresses.first()).map(Ipv4Net::trunc);
        self.ports.subnet = has.or(self.ports.subnet);
        for (endpoint, _) in local {
            notes.extend(self.ports.reservations.hold(endpoint));
        }
        let (Some(subnet), false) = (self.ports.subnet, own.is_empty()) else { return };
        let mtu = self.uplink.link.mtu;
        let bridge = match self.net.ensure_gwbridge(subnet, mtu).await {
            Ok(bridge) => bridge,
            Err(error) => return notes.push(format!("{error:#}")),
        };
        if let Err(error) = self.net.forward_ipv4(&self.uplink.link.name).await {
            notes.push(format!("{error:#}"));
        }
        for (gateway, endpoint) in own.into_values() {
            let address = bridge.address.addr();
            let repaired = self
                .net
                .repair_gateway_port(gateway, &endpoint.netns, address, mtu, offloads)
                .await;
            notes.extend(repaired.err().map(|error| format!("{error:#}")));
        }
    }

    /// What the programs must know for published ports.
    pub(super) async fn port_inputs(
        &mut self,
        local: &[(LocalEndpoint, u32)],
        links: &[Link],
        xdp: Option<SandboxOffloads>,
    ) -> PortInputs {
        let mut inputs =
            PortInputs { fast: self.shared.options.ports_by_bpf, ..PortInputs::default() };
        let own = links.iter().find(|link| link.name == GWBRIDGE);
        inputs.gwbridge = own.map(|link| (link.index, link.mac));
        // Of those that are down, too: an address is its host's, not its interface's.
        let others = links.iter().filter(|link| !link.loopback);
        inputs.addresses = others
            .flat_map(|link| link.addresses.iter().map(Ipv4Net::addr))
            .collect::<Vec<Ipv4Addr>>();
        let mut offloads = BTreeMap::new();
        for (endpoint, _) in local {
            let Some(gateway) = &endpoint.gateway else { continue };
            let name = &gateway.host_ifname;
            let link = links.iter().find(|link| link.name == *name);
            let bridge = links.iter().find(|link| link.name == gateway.bridge);
            let (Some(link), Some(bridge)) = (link, bridge) else { continue };
            let takes_xdp = match xdp {
                None => false,
                Some(wanted) if self.ports.offloads.get(name) == Some(&wanted) => true,
                Some(wanted) => {
                    let set = self.net.set_endpoint_offloads(name, &endpoint.netns, wanted).await;
                    set.is_ok()
                }
            };
            if let Some(wanted) = xdp.filter(|_| takes_xdp) {
                offloads.insert(name.clone(), wanted);
            }
            let (ifindex, mtu) = (link.index, link.mtu);
            let entry = GatewayLink { ifindex, bridge_mac: bridge.mac, mtu, takes_xdp };
            inputs.gateways.insert(name.clone(), entry);
        }
        self.ports.offloads = offloads;
        inputs
    }

    /// Puts the kernel's rules in force: where they changed, and where somebody may have.
    pub(super) async fn enforce_rules(
        &mut self,
        local: &[(LocalEndpoint, u32)],
        links: &[Link],
        whole: bool,
        notes: &mut Vec<String>,
    ) {
        let bridge = links.iter().find(|link| link.name == GWBRIDGE);
        let subnet = bridge.and_then(|link| link.addresses.first()).map(Ipv4Net::trunc);
        let egress = subnet.map(|subnet| Egress { bridge: GWBRIDGE.to_owned(), subnet });
        let rules =
            Rules { vxlan_port: self.shared.options.vxlan_port, egress, mappings: mappings(local) };
        if self.ports.rules.as_ref() == Some(&rules) && !whole {
            return;
        }
        if !Firewall::available() {
            notes.push(
                "there is no nft: containers have no way out and can send VXLAN in this host's \
                 name: install nftables"
                    .into(),
            );
            return;
        }
        // With the rules, not at the next repair: a policy that drops would cut a new sandbox off until
        // then.
        if rules.egress.is_some()
            && let Err(error) = firewall::accept_forwarding(GWBRIDGE).await
        {
            notes.push(format!("{error:#}"));
        }
        match self.ports.firewall.ensure(&rules).await {
            Ok(_) => self.ports.rules = Some(rules),
            Err(error) => notes.push(format!("{error:#}")),
        }
    }
}

/// The mappings of published ports, each once: a sandbox in two networks publishes what it does by
/// both. Pure.
fn mappings(local: &[(LocalEndpoint, u32)]) -> Vec<Mapping> {
    let mut mappings = BTreeMap::new();
    for (endpoint, _) in local.iter().filter(|(it, _)| !it.network.internal) {
        let Some(gateway) = &endpoint.gateway else { continue };
        for port in &endpoint.ports {
            mappings.entry(*port).or_insert_with(|| Mapping {
                protocol: port.protocol,
                host_address: port.host_address,
                host_port: port.host_port,
                backend: gateway.address,
                container_port: port.container_port,
                bridge: gateway.bridge.clone(),
                own: endpoint.docker.is_none(),
            });
        }
    }
    mappings.into_values().collect()
}
