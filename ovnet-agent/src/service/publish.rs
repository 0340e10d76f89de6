//! Published ports of an endpoint, and the way out of its sandbox that they need.

use std::path::Path;

use anyhow::Result;

use super::{Records, Refusal, Service, Wiring, detach, sandbox::SandboxId};
use crate::{
    api::types::Attach,
    consul::schema::NetworkRecord,
    publish::{PublishedPort, spec, spec::PortRequest},
    state::{GatewayPort, LocalEndpoint},
};

/// How an endpoint's sandbox reaches the world.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum WayOut {
    /// Not by us: it must not, or has a way of its own.
    None,
    /// By what another endpoint of the sandbox has.
    Shared(GatewayPort),
    /// By what is to be made.
    New,
}

/// The ports an attach asks for; the asker's to mend where that makes no sense.
pub(super) fn requests(wanted: &Attach) -> Result<Vec<PortRequest>> {
    spec::requests(&wanted.publish, wanted.publish_all, &wanted.expose).map_err(Refusal::invalid)
}

impl<R: Records, W: Wiring> Service<R, W> {
    /// Which way out an endpoint gets. Refuses to publish ports where it gets none.
    pub(super) async fn way_out(
        &self,
        wanted: &Attach,
        network: &NetworkRecord,
        netns: &Path,
        local: &[LocalEndpoint],
    ) -> Result<WayOut> {
        let publishes = wanted.publish_all || !wanted.publish.is_empty();
        if network.internal {
            if publishes {
                return Err(Refusal::invalid(format!(
                    "network {} is internal: nothing of it is published; attach without -p and -P, \
                     or to another network",
                    network.name
                )));
            }
            return Ok(WayOut::None);
        }
        if !self.wiring().egress() {
            if publishes {
                return Err(Refusal::invalid(
                    "no port can be published: the agent of this host runs with --egress off",
                ));
            }
            return Ok(WayOut::None);
        }
        let sandbox = SandboxId::of(netns);
        let shared = local
            .iter()
            // Docker takes away what is Docker's without asking us.
            .filter(|it| it.docker.is_none() && SandboxId::of(&it.netns) == sandbox)
            .find_map(|it| it.gateway.clone());
        if let Some(shared) = shared {
            return Ok(WayOut::Shared(shared));
        }
        if self.wiring().has_default_route(netns).await? {
            if publishes {
                return Err(Refusal::conflict(format!(
                    "sandbox {} has a default route of its own, so answers would not come back \
                     through ovnet: remove the route, or attach without -p and -P",
                    netns.display()
                )));
            }
            return Ok(WayOut::None);
        }
        Ok(WayOut::New)
    }

    /// The published ports of an endpoint of this host, named as for a detach, by the port inside;
    /// of all networks it is in under that name.
    pub fn ports(&self, endpoint: &str) -> Result<Vec<PublishedPort>> {
        let local = self.wiring().local();
        let found = detach::closest(local.iter().collect(), endpoint);
        if found.is_empty() {
            return Err(Refusal::not_found(format!(
                "no endpoint of this host has name or id {endpoint}: see `ovnet endpoint ls --local`"
            )));
        }
        detach::of_one_sandbox(&found, || format!("have name or id {endpoint}"), "by id")?;
        let mut ports: Vec<_> = found.into_iter().flat_map(|it| it.ports.iter().copied()).collect();
        sort(&mut ports);
        // Of a container that Docker has in several networks.
        ports.dedup();
        Ok(ports)
    }
}

/// By the port inside, as `docker port` lists them.
pub(super) fn sort(ports: &mut [PublishedPort]) {
    ports.sort_by_key(|it| (it.container_port, it.protocol, it.host_address, it.host_port));
}

#[cfg(test)]
mod tests;
