//! Attach: a sandbox becomes an endpoint of a network, or nothing has happened.

use std::path::PathBuf;

use anyhow::{Context as _, Result};
use ipnet::Ipv4Net;
use uuid::Uuid;

use super::{
    AddressClaim, Records, Refusal, Service, VethRequest, Wiring, carried_out, in_time, one_line,
    publish::{self, WayOut},
    sandbox::SandboxId,
    validate,
};
use crate::{
    api::types::{Attach, EndpointView},
    consul::schema::{EndpointRecord, EndpointState, NetworkRecord, parse_mac},
    desired::endpoint_mtu,
    publish::{reserve::Owner, spec::PortRequest},
    state::{GatewayPort, LocalEndpoint},
};

/// What an attach is going to make, decided before anything is changed.
struct Plan {
    /// Id of the endpoint.
    id: String,
    /// Name of the host-side veth.
    host_ifname: String,
    /// Name of the host end of the gateway port, where one is made.
    gateway_ifname: String,
    /// The sandbox.
    netns: PathBuf,
    /// Its way out.
    way_out: WayOut,
    /// The ports to be published.
    ports: Vec<PortRequest>,
}

/// How far an attach got, so it can be undone from there. A step is marked before it begins where
/// it may have had an effect although it failed.
#[derive(Default)]
struct Progress {
    reserved: bool,
    claiming: bool,
    claimed: Option<EndpointRecord>,
    host_ifname: Option<String>,
    gateway: Option<GatewayPort>,
    adding: bool,
}

impl<R: Records, W: Wiring> Service<R, W> {
    /// Attaches a sandbox to a network: reserves the host ports it publishes, claims an address,
    /// makes the veth pair and the way out, wires them, announces the endpoint. Where any of it fails the rest is undone, and the error is the first cause.
    ///
    /// Goes on to its end when the future is dropped: a client that disconnects leaves an endpoint
    /// or nothing.
    pub async fn attach(&self, wanted: Attach) -> Result<EndpointView> {
        let service = self.clone();
        carried_out(async move { service.attach_or_undo(wanted).await }).await
    }

    async fn attach_or_undo(&self, wanted: Attach) -> Result<EndpointView> {
        validate::attach(&wanted)?;
        let ports = publish::requests(&wanted)?;
        let network = self.find_network(&wanted.network).await?;
        if let Some(address) = wanted.ip {
            validate::address(&network, address)?;
        }
        let netns = self.wiring().resolve_netns(&wanted.netns)?;
        let sandbox = SandboxId::of(&netns);
        let _alone = self.shared.sandboxes.lock(&sandbox).await;

        let local = self.wiring().local();
        if let Some(other) = local.iter().find(|endpoint| {
            endpoint.network.id == network.id && SandboxId::of(&endpoint.netns) == sandbox
        }) {
            return Err(Refusal::conflict(format!(
                "sandbox {} is in network {} already, as {} with address {}: detach it first",
                netns.display(),
                network.name,
                other.record.names.first().unwrap_or(&other.record.id),
                other.record.address
            )));
        }

        let way_out = self.way_out(&wanted, &network, &netns, &local).await?;
        let (id, host_ifname, gateway_ifname) = new_id(&local);
        let plan = Plan { id: id.clone(), host_ifname, gateway_ifname, netns, way_out, ports };
        self.begin(&network, &id);
        let mut progress = Progress::default();
        let made = self.attach_steps(&wanted, &network, plan, &mut progress).await;
        let result = match made {
            Ok(endpoint) => Ok(self.view_local(&endpoint)),
            Err(cause) => Err(self.undo(&network, &id, progress, cause).await),
        };
        self.end(&id);
        result
    }

    async fn attach_steps(
        &self,
        wanted: &Attach,
        network: &NetworkRecord,
        plan: Plan,
        progress: &mut Progress,
    ) -> Result<LocalEndpoint> {
        let Plan { id, host_ifname, gateway_ifname, netns, way_out, ports } = plan;
        let mut names: Vec<String> = Vec::new();
        for name in wanted.name.iter().chain(&wanted.aliases) {
            if !names.contains(name) {
                names.push(name.clone());
            }
        }

        // First, because it is refused the most often and touches nothing but this host.
        let ports = if ports.is_empty() {
            Vec::new()
        } else {
            let addresses = self.wiring().local_addresses().await?;
            progress.reserved = true;
            self.wiring().reserve_ports(Owner::new(&id, &names), ports, addresses).await?
        };

        progress.claiming = true;
        let claim = AddressClaim { id, names, address: wanted.ip };
        let record = in_time(
            &format!("claim an address of network {}", network.name),
            self.records().claim_address(network, &claim),
        )
        .await?;
        progress.claimed = Some(record.clone());

        let mac = parse_mac(&record.mac)
            .with_context(|| format!("read the record of endpoint {}", record.address))?;
        let mtu = endpoint_mtu(network, self.wiring().uplink_mtu());
        let request = VethRequest {
            host_ifname: host_ifname.clone(),
            netns: netns.clone(),
            ifname: wanted.ifname.clone(),
            mac,
            address: Ipv4Net::new(record.address, network.subnet.prefix_len())
                .with_context(|| format!("network {}: its subnet", network.name))?,
            mtu,
        };
        // Not marked before: create_veth leaves nothing where it fails, and the name it failed on
        // may be somebody else's link.
        let ifname = self.wiring().create_veth(&request).await?;
        progress.host_ifname = Some(host_ifname.clone());
        let gateway = match way_out {
            WayOut::None => None,
            WayOut::Shared(gateway) => Some(gateway),
            WayOut::New => {
                let made = self.wiring().create_gateway(&netns, &gateway_ifname).await?;
                progress.gateway = Some(made.clone());
                Some(made)
            }
        };

        let record = EndpointRecord { state: EndpointState::Up, ..record };
        let network = network.clone();
        let endpoint = LocalEndpoint {
            record,
            network,
            netns,
            ifname,
            host_ifname,
            mtu,
            docker: None,
            gateway,
            ports,
        };
        progress.adding = true;
        self.wiring().add_local(endpoint.clone()).await?;
        in_time(
            &format!("announce endpoint {}", endpoint.record.address),
            self.records().publish_endpoint(&endpoint.network, &endpoint.record, None),
        )
        .await?;
        Ok(endpoint)
    }

    /// Undoes, last step first, all that was done, and returns the cause with what could not be
    /// undone added to it.
    async fn undo(
        &self,
        network: &NetworkRecord,
        id: &str,
        progress: Progress,
        cause: anyhow::Error,
    ) -> anyhow::Error {
        let Progress { reserved, claiming, claimed, host_ifname, gateway, adding } = progress;
        let mut left = Vec::new();
        if adding && let Err(error) = self.wiring().remove_local(id).await {
            left.push(one_line(&error));
        }
        if let Some(gateway) = gateway
            && let Err(error) = self.wiring().delete_gateway(&gateway).await
        {
            left.push(one_line(&error));
        }
        if let Some(host_ifname) = host_ifname
            && let Err(error) = self.wiring().delete_link(&host_ifname).await
        {
            left.push(one_line(&error));
        }
        if let Some(record) = claimed {
            if let Err(error) = self.release(network, &record).await {
                self.release_later(network.clone(), record);
                left.push(one_line(&error));
            }
        } else if claiming && super::kind_of(&cause).is_none() {
            // The claim's answer may have been lost after Consul had carried it out.
            self.forget_later(network.clone(), id.to_owned());
        }
        if reserved {
            self.wiring().release_ports(id);
        }
        if left.is_empty() {
            return cause;
        }
        tracing::warn!(id, network = network.name, ?left, "an attach could not be undone whole");
        // Flattened, because context() would put what is left before the cause.
        match super::kind_of(&cause) {
            Some(kind) => Refusal { kind, line: undone_line(&cause, &left) }.into(),
            None => anyhow::anyhow!(undone_line(&cause, &left)),
        }
    }
}

fn undone_line(cause: &anyhow::Error, left: &[String]) -> String {
    format!("{}; and undoing it failed: {}", one_line(cause), left.join("; "))
}

/// A new endpoint's id, 64 hexadecimal digits as Docker's, and the names of its host-side veth and
/// of its gateway port, which no other endpoint of this host has.
fn new_id(local: &[LocalEndpoint]) -> (String, String, String) {
    loop {
        let id = format!("{}{}", Uuid::new_v4().simple(), Uuid::new_v4().simple());
        let digits = id.get(..8).unwrap_or(&id);
        let (host_ifname, gateway) = (format!("ovnet{digits}"), format!("ovnetg{digits}"));
        let is_free = |it: &LocalEndpoint| {
            // A gateway port may outlive the endpoint it was made with.
            it.host_ifname != host_ifname
                && it.gateway.as_ref().is_none_or(|it| it.host_ifname != gateway)
        };
        if local.iter().all(is_free) {
            return (id, host_ifname, gateway);
        }
    }
}

#[cfg(test)]
mod tests;
