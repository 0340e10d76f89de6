//! What a pass does for published ports and the sandboxes' way out: the gwbridge and its ports, the
//! kernel's rules, the reservations.

use std::{collections::BTreeMap, net::Ipv4Addr, path::Path};

use anyhow::{Result, anyhow};
use ipnet::Ipv4Net;
use tokio::sync::watch;

use super::{Findings, Worker};
use crate::{
    consul::schema::parse_mac,
    desired::{GatewayLink, PortInputs},
    docker::daemon::GWBRIDGE as DOCKER_GWBRIDGE,
    firewall::{self, Egress, Firewall, Mapping, Rules},
    net::{GWBRIDGE, GatewaySpec, Link, SandboxOffloads},
    publish::reserve::Reservations,
    repairs::Repair,
    state::{GatewayPort, LocalEndpoint},
};

/// What the loop remembers of all this from pass to pass.
pub(in crate::reconcile) struct Ports {
    pub(super) reservations: Reservations,
    firewall: Firewall,
    /// The rules last put in force.
    rules: Option<Rules>,
    /// Gateway ports of endpoints that were withdrawn, to be deleted.
    pub(super) leftovers: Vec<GatewayPort>,
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
    pub(super) async fn remove_gateways(&mut self, seen: &mut Findings) {
        for gone in std::mem::take(&mut self.ports.leftovers) {
            let used = self.shared.view().local.values().any(|endpoint| {
                let gateway = endpoint.gateway.as_ref();
                gateway.is_some_and(|gateway| gateway.host_ifname == gone.host_ifname)
            });
            if used {
                continue;
            }
            if seen.note(self.net.delete_gateway_port(&gone).await).is_none() {
                self.ports.leftovers.push(gone);
            }
        }
    }

    /// Makes the gwbridge, its ports and the reservations what they must be.
    pub(super) async fn repair_gateways(
        &mut self,
        local: &[(LocalEndpoint, u32)],
        links: &[Link],
        offloads: SandboxOffloads,
        seen: &mut Findings,
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
        seen.notes.extend(self.hold_reservations(local).await);
        let (Some(subnet), false) = (self.ports.subnet, own.is_empty()) else { return };
        let mtu = self.uplink.link.mtu;
        let bridge = self.net.ensure_gwbridge(subnet, mtu, &mut seen.repairs).await;
        let Some(bridge) = seen.note(bridge) else { return };
        for (gateway, endpoint) in own.into_values() {
            let spec = gateway_spec(gateway, &endpoint.netns, bridge.address, mtu, offloads);
            let Some(spec) = seen.note(spec) else { continue };
            let gone = links.iter().all(|link| link.name != gateway.host_ifname);
            let repaired = if gone && self.is_same_sandbox(endpoint).await.unwrap_or(false) {
                let made = self.net.create_gateway_port(&spec).await.map(drop);
                seen.repairs.add_if(Repair::GatewayPort, made.is_ok());
                made
            } else {
                self.net.repair_gateway_port(&spec, &mut seen.repairs).await
            };
            seen.note(repaired);
        }
    }

    /// Reserves what the endpoints publish; a line for each port that cannot be had.
    async fn hold_reservations(&self, local: &[(LocalEndpoint, u32)]) -> Vec<String> {
        let reservations = self.ports.reservations.clone();
        let endpoints: Vec<_> = local.iter().map(|(endpoint, _)| endpoint.clone()).collect();
        // Whoever has a port is looked for in `/proc`, process by process.
        let hold = move || endpoints.iter().flat_map(|it| reservations.hold(it)).collect();
        tokio::task::spawn_blocking(hold).await.unwrap_or_else(|error| vec![error.to_string()])
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
        seen: &mut Findings,
    ) {
        let bridge = links.iter().find(|link| link.name == GWBRIDGE);
        let subnet = bridge.and_then(|link| link.addresses.first()).map(Ipv4Net::trunc);
        let egress = subnet.map(|subnet| Egress { bridge: GWBRIDGE.to_owned(), subnet });
        let rules = Rules {
            outward: outward(&self.uplink.link.name, links),
            vxlan_port: self.shared.options.vxlan_port,
            egress,
            mappings: mappings(local),
        };
        let unchanged = self.ports.rules.as_ref() == Some(&rules);
        if unchanged && !whole {
            return;
        }
        let enforced = if Firewall::available() {
            self.ports.firewall.ensure(&rules).await
        } else {
            Err(anyhow!(
                "there is no nft: containers have no way out, and can send VXLAN in a host's name: \
                 install nftables"
            ))
        };
        // Only behind rules that keep sandboxes from the host's loopback, and from others' bridges.
        if rules.egress.is_some() {
            let allowed = enforced.is_ok();
            if let Some(changed) = seen.note(self.net.route_loopback_to_gwbridge(allowed).await) {
                seen.repairs.add_if(Repair::Sysctl, changed && unchanged);
            }
            // With the rules, not at the next repair: a policy that drops would cut a new sandbox
            // off until then.
            if allowed && let Some(opened) = seen.note(firewall::accept_forwarding(GWBRIDGE).await)
            {
                seen.repairs.add_if(Repair::Rules, opened && unchanged);
            }
        }
        if let Some(changed) = seen.note(enforced) {
            seen.repairs.add_if(Repair::Rules, changed && unchanged);
            self.ports.rules = Some(rules);
        }
    }
}

/// What a gateway port must be.
fn gateway_spec(
    gateway: &GatewayPort,
    netns: &Path,
    bridge: Ipv4Net,
    mtu: u32,
    offloads: SandboxOffloads,
) -> Result<GatewaySpec> {
    Ok(GatewaySpec {
        bridge: gateway.bridge.clone(),
        host_ifname: gateway.host_ifname.clone(),
        netns: netns.to_owned(),
        ifname: Some(gateway.ifname.clone()),
        mac: parse_mac(&gateway.mac)?,
        address: Ipv4Net::new(gateway.address, bridge.prefix_len())?,
        gateway: bridge.addr(),
        mtu,
        offloads,
    })
}

/// The interfaces that other hosts are behind: the uplink, and each bridge with a port that is no
/// container's or virtual machine's. Pure.
fn outward(uplink: &str, links: &[Link]) -> Vec<String> {
    let leads_out = |bridge: &&Link| {
        let mut ports = links.iter().filter(|link| link.controller == Some(bridge.index));
        ports.any(|port| !matches!(port.kind.as_deref(), Some("veth" | "tun")))
    };
    let bridges = links.iter().filter(|link| link.kind.as_deref() == Some("bridge"));
    let bridges = bridges.filter(leads_out).map(|bridge| bridge.name.clone());
    let mut names: Vec<String> = bridges.chain([uplink.to_owned()]).collect();
    // In one order: these are compared with those of the last pass.
    names.sort();
    names.dedup();
    names
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bridge_leads_out_where_a_port_of_it_does() {
        let link = |index, name: &str, kind: &str, controller| Link {
            index,
            name: name.into(),
            kind: (!kind.is_empty()).then(|| kind.into()),
            controller,
            ..Link::default()
        };
        let links = [
            link(2, "ens33", "", None),
            link(3, "ens34", "", Some(10)),
            link(4, "bond0.7", "vlan", Some(11)),
            link(5, "veth1", "veth", Some(12)),
            link(6, "vnet0", "tun", Some(13)),
            link(7, "veth2", "veth", Some(10)),
            link(10, "br0", "bridge", None),
            link(11, "br7", "bridge", None),
            link(12, "docker0", "bridge", None),
            link(13, "virbr0", "bridge", None),
            link(14, "br-empty", "bridge", None),
        ];
        assert_eq!(outward("ens33", &links), ["br0", "br7", "ens33"]);
        assert_eq!(outward("br0", &links), ["br0", "br7"]);
    }
}
