//! What a pass does around the endpoints of this host: their veths, MTU, settings and state files.

use std::collections::BTreeMap;

use anyhow::Result;
use ipnet::Ipv4Net;

use super::{Findings, Worker};
use crate::{
    consul::schema::parse_mac,
    desired::endpoint_mtu,
    net::{GWBRIDGE, Link, SandboxOffloads, VethSpec},
    reconcile::Description,
    repairs::Repair,
    state::LocalEndpoint,
};

/// What the name of an inner end begins with until Docker has given it another.
const INNER_PREFIX: &str = "ovnetp";

impl Worker {
    /// Deletes the veth pairs that an agent killed in the middle of an attach left. Only at the
    /// start, when no attach can be under way. One of an endpoint whose state is lost is left alone,
    /// and so is, as long as there is such an endpoint, every sandbox's way out.
    pub(super) async fn remove_leftovers(&self) -> Result<()> {
        let ids = self.state.ids()?;
        let links = self.net.links().await?;
        let gateways: Vec<String> = self
            .shared
            .view()
            .local
            .values()
            .filter_map(|it| Some(it.gateway.as_ref()?.host_ifname.clone()))
            .collect();
        for Link { name, kind, .. } in links {
            let of_nobody = name.strip_prefix("ovnetg").is_some_and(|digits| {
                digits.len() == 8
                    && digits.bytes().all(|it| it.is_ascii_hexdigit())
                    && !gateways.contains(&name)
                    && self.held.is_empty()
            });
            let is_ours = kind.as_deref() == Some("veth")
                && name.strip_prefix("ovnet").is_some_and(|digits| {
                    digits.len() == 8
                        && digits.bytes().all(|it| it.is_ascii_hexdigit())
                        && !ids.iter().any(|id| id.starts_with(digits))
                        && !self.held.contains(&name)
                });
            if is_ours || kind.as_deref() == Some("veth") && of_nobody {
                tracing::info!(name, "removing the interface of an attach that was cut short");
                self.net.delete_link(&name).await?;
            }
        }
        Ok(())
    }

    /// The local endpoints whose veth is there, each with its ifindex. A veth that is gone is made
    /// again where its sandbox is still there; else the endpoint is withdrawn.
    pub(super) async fn wired(
        &mut self,
        links: &[Link],
        offloads: SandboxOffloads,
        seen: &mut Findings,
    ) -> Result<Vec<(LocalEndpoint, u32)>> {
        let by_name: BTreeMap<&str, u32> =
            links.iter().map(|link| (link.name.as_str(), link.index)).collect();
        let local: Vec<LocalEndpoint> = self.shared.view().local.values().cloned().collect();
        let mut wired = Vec::with_capacity(local.len());
        for endpoint in local {
            match by_name.get(endpoint.host_ifname.as_str()) {
                Some(ifindex) => wired.push((endpoint, *ifindex)),
                // Attached while the list of links was on its way: ask again, by name.
                None => match self.net.link(&endpoint.host_ifname).await? {
                    Some(link) => wired.push((endpoint, link.index)),
                    None => wired.extend(self.without_veth(endpoint, offloads, seen).await),
                },
            }
        }
        Ok(wired)
    }

    /// What becomes of an endpoint whose veth is gone.
    async fn without_veth(
        &mut self,
        endpoint: LocalEndpoint,
        offloads: SandboxOffloads,
        seen: &mut Findings,
    ) -> Option<(LocalEndpoint, u32)> {
        match self.make_again(&endpoint, offloads).await {
            Ok(Some(ifindex)) => {
                seen.repairs.add(Repair::Veth);
                Some((endpoint, ifindex))
            }
            Ok(None) => {
                seen.repairs.add(Repair::Sandbox);
                self.withdraw(&endpoint);
                None
            }
            // Its sandbox is there, so its address is not given up; the next pass tries again.
            Err(error) => {
                seen.notes.push(format!("an endpoint's veth is gone: {error:#}"));
                None
            }
        }
    }

    /// Makes a veth again that somebody deleted; `None` where its sandbox is gone, or was never
    /// looked at, or another one has its name.
    async fn make_again(
        &self,
        endpoint: &LocalEndpoint,
        offloads: SandboxOffloads,
    ) -> Result<Option<u32>> {
        if !self.is_same_sandbox(endpoint).await? {
            return Ok(None);
        }
        let veth = self.net.create_veth(&self.veth_spec(endpoint, offloads)?).await?;
        let LocalEndpoint { record, network, host_ifname, .. } = endpoint;
        tracing::warn!(
            network = network.name, address = %record.address, host_ifname,
            "an endpoint's veth was deleted; it is made again"
        );
        Ok(Some(veth.ifindex))
    }

    /// Whether what an endpoint's path leads to is the sandbox that it was attached in.
    pub(super) async fn is_same_sandbox(&self, endpoint: &LocalEndpoint) -> Result<bool> {
        let Some(known) = self.sandboxes.get(&endpoint.record.id) else { return Ok(false) };
        Ok(self.net.sandbox_cookie(&endpoint.netns).await? == Some(*known))
    }

    /// What an endpoint's veth must be.
    fn veth_spec(&self, endpoint: &LocalEndpoint, offloads: SandboxOffloads) -> Result<VethSpec> {
        let LocalEndpoint { record, network, netns, ifname, host_ifname, .. } = endpoint;
        Ok(VethSpec {
            host_ifname: host_ifname.clone(),
            netns: netns.clone(),
            ifname: Some(ifname.clone()),
            mac: parse_mac(&record.mac)?,
            address: Ipv4Net::new(record.address, network.subnet.prefix_len())?,
            mtu: endpoint_mtu(network, self.uplink.link.mtu),
            offloads,
        })
    }

    /// Remembers which namespace a sandbox is, once it is as it must be: from then on what is
    /// otherwise was broken by somebody. A path alone may lead to another one tomorrow, and Docker
    /// furnishes its sandboxes itself.
    pub(super) async fn remember_sandboxes(&mut self, local: &[(LocalEndpoint, u32)]) {
        self.sandboxes.retain(|id, _| local.iter().any(|(it, _)| it.record.id == *id));
        for (endpoint, _) in local {
            let LocalEndpoint { record, network, netns, ifname, host_ifname, .. } = endpoint;
            if ifname.is_empty() || self.sandboxes.contains_key(&record.id) {
                continue;
            }
            let address = Ipv4Net::new(record.address, network.subnet.prefix_len());
            let furnished = match (&endpoint.docker, address) {
                (None, _) => true,
                (Some(_), Err(_)) => false,
                (Some(_), Ok(address)) => {
                    let furnished = self.net.is_furnished(host_ifname, netns, address).await;
                    furnished.unwrap_or(false)
                }
            };
            if furnished && let Ok(Some(cookie)) = self.net.sandbox_cookie(netns).await {
                self.sandboxes.insert(record.id.clone(), cookie);
            }
        }
    }

    /// Whether an event told of something that only a pass over everything puts right.
    pub(super) fn is_broken(&self, links: &[Link]) -> bool {
        let there = |name: &str| links.iter().find(|link| link.name == name);
        let bridge = there(GWBRIDGE).filter(|it| it.up && !it.addresses.is_empty());
        self.shared.view().local.values().any(|endpoint| {
            let gateway = endpoint.gateway.as_ref().filter(|it| it.bridge == GWBRIDGE);
            let cut_off = gateway.is_some_and(|gateway| {
                let port = there(&gateway.host_ifname);
                let of = port.filter(|it| it.up).and_then(|it| it.controller);
                of.is_none() || of != bridge.map(|it| it.index)
            });
            cut_off || there(&endpoint.host_ifname).is_some_and(|it| !it.up)
        })
    }

    /// Adds what was learned of an endpoint to its state, which is what is announced again where
    /// Consul loses it.
    pub(super) fn describe(&mut self, description: Description) -> Result<Option<LocalEndpoint>> {
        let Description { id, names, container, ports } = description;
        let Some(mut endpoint) = self.shared.view().local.get(&id).cloned() else {
            return Ok(None);
        };
        endpoint.record.names = names;
        if let Some(docker) = &mut endpoint.docker {
            docker.container = Some(container);
            // Those of our own sandboxes are asked for when they are attached.
            endpoint.ports = ports;
        }
        self.state.store(&endpoint)?;
        self.own_records.added(&id);
        self.shared.view().local.insert(id, endpoint.clone());
        Ok(Some(endpoint))
    }

    fn withdraw(&mut self, endpoint: &LocalEndpoint) {
        let LocalEndpoint { record, network, .. } = endpoint;
        tracing::info!(
            network = network.name, address = %record.address, names = ?record.names,
            "an endpoint's sandbox is gone; it is withdrawn"
        );
        self.shared.view().local.remove(&record.id);
        if let Err(error) = self.state.remove(&record.id) {
            tracing::warn!(error = format!("{error:#}"), "the endpoint's state stays behind");
        }
        self.ports.reservations.release(&record.id);
        if let Some(gateway) = &endpoint.gateway
            && endpoint.docker.is_none()
        {
            self.ports.leftovers.push(gateway.clone());
        }
        self.own_records.release(network, record);
    }

    /// Learns the names of interfaces that Docker moved into their sandboxes: until then nothing
    /// inside is looked at.
    pub(super) async fn find_inner_ends(&self, local: &mut [(LocalEndpoint, u32)]) {
        for (endpoint, _) in local.iter_mut().filter(|(it, _)| it.ifname.is_empty()) {
            let inner = self.net.inner_ifname(&endpoint.host_ifname, &endpoint.netns).await;
            // Not there yet, or the path is not: Docker makes it after the plugin's call.
            let Ok(Some(ifname)) = inner else { continue };
            // Docker moves it first and renames it then.
            if ifname.starts_with(INNER_PREFIX) {
                continue;
            }
            endpoint.ifname = ifname;
            if let Some(known) = self.shared.view().local.get_mut(&endpoint.record.id) {
                known.ifname.clone_from(&endpoint.ifname);
            }
            if let Err(error) = self.state.store(endpoint) {
                tracing::warn!(error = format!("{error:#}"), "an interface's name is not kept");
            }
        }
    }

    /// Keeps every endpoint's MTU at the uplink's minus 50, or the network's.
    pub(super) async fn follow_mtu(
        &mut self,
        local: &[(LocalEndpoint, u32)],
        links: &[Link],
        seen: &mut Findings,
    ) {
        for (endpoint, ifindex) in local {
            let wanted = endpoint_mtu(&endpoint.network, self.uplink.link.mtu);
            let found = links.iter().find(|link| link.index == *ifindex).map(|link| link.mtu);
            if endpoint.mtu == wanted && found.is_none_or(|mtu| mtu == wanted) {
                continue;
            }
            let LocalEndpoint { host_ifname, netns, .. } = endpoint;
            if endpoint.ifname.is_empty() {
                // On its way into the sandbox; the pass that finds it there looks at it again.
                continue;
            }
            let set = self.net.set_endpoint_mtu(host_ifname, netns, wanted).await;
            if seen.note(set).is_none() {
                continue;
            }
            // Where the uplink is what it was, somebody else set the interface to another MTU.
            seen.repairs.add_if(Repair::Veth, endpoint.mtu == wanted);
            let endpoint = LocalEndpoint { mtu: wanted, ..endpoint.clone() };
            seen.note(self.state.store(&endpoint));
            self.shared.view().local.insert(endpoint.record.id.clone(), endpoint);
        }
    }

    /// Puts back what somebody else may have changed of an endpoint: both ends of its veth, with
    /// their settings.
    pub(super) async fn repair_sandboxes(
        &self,
        local: &[(LocalEndpoint, u32)],
        offloads: SandboxOffloads,
        seen: &mut Findings,
    ) {
        for (endpoint, _) in local {
            let LocalEndpoint { record, host_ifname, netns, ifname, .. } = endpoint;
            if self.sandboxes.contains_key(&record.id) {
                if let Some(spec) = seen.note(self.veth_spec(endpoint, offloads)) {
                    let repaired = self.net.repair_endpoint(&spec, &mut seen.repairs).await;
                    seen.note(repaired);
                }
                continue;
            }
            let host_side = self.net.prepare_endpoint_host_side(host_ifname, &mut seen.repairs);
            let host_side = host_side.await;
            seen.note(host_side);
            if !ifname.is_empty() {
                let inside = self.net.set_endpoint_offloads(host_ifname, netns, offloads).await;
                seen.note(inside);
            }
        }
    }

    /// After the pass that unwired it: the veth, and then the state file that remembers it.
    pub(super) async fn forget(
        &mut self,
        id: &str,
        endpoint: Option<&LocalEndpoint>,
    ) -> Result<()> {
        if let Some(endpoint) = endpoint {
            self.net.delete_link(&endpoint.host_ifname).await?;
        }
        self.state.remove(id)
    }
}
