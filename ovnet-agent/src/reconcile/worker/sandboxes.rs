//! What a pass does around the endpoints of this host: their veths, MTU, settings and state files.

use std::collections::BTreeMap;

use anyhow::Result;

use super::Worker;
use crate::{
    desired::endpoint_mtu,
    net::{Link, SandboxOffloads},
    reconcile::Description,
    repairs::{Repair, Repairs},
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

    /// The local endpoints whose veth is there, each with its ifindex. An endpoint whose veth is
    /// gone lost its sandbox: it is withdrawn.
    pub(super) async fn wired(
        &mut self,
        links: &[Link],
        repairs: &mut Repairs,
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
                    None => {
                        self.withdraw(&endpoint);
                        repairs.add(Repair::Sandbox);
                    }
                },
            }
        }
        Ok(wired)
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
        notes: &mut Vec<String>,
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
            if let Err(error) = self.net.set_endpoint_mtu(host_ifname, netns, wanted).await {
                notes.push(format!("{error:#}"));
                continue;
            }
            let endpoint = LocalEndpoint { mtu: wanted, ..endpoint.clone() };
            if let Err(error) = self.state.store(&endpoint) {
                notes.push(format!("{error:#}"));
            }
            self.shared.view().local.insert(endpoint.record.id.clone(), endpoint);
        }
    }

    /// Puts back what somebody else may have changed around an endpoint: sysctls, offloads.
    pub(super) async fn repair_sandboxes(
        &self,
        local: &[(LocalEndpoint, u32)],
        offloads: SandboxOffloads,
        notes: &mut Vec<String>,
    ) {
        for (endpoint, _) in local {
            let LocalEndpoint { host_ifname, netns, .. } = endpoint;
            let host_side = self.net.prepare_endpoint_host_side(host_ifname).await;
            let inside = if endpoint.ifname.is_empty() {
                Ok(())
            } else {
                self.net.set_endpoint_offloads(host_ifname, netns, offloads).await
            };
            for error in [host_side, inside].into_iter().filter_map(Result::err) {
                notes.push(format!("{error:#}"));
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
