//! Attach: a sandbox becomes an endpoint of a network, or nothing has happened.

use std::path::PathBuf;

use anyhow::{Context as _, Result};
use ipnet::Ipv4Net;
use uuid::Uuid;

use super::{
    AddressClaim, Records, Refusal, Service, VethRequest, Wiring, carried_out, in_time, one_line,
    sandbox::SandboxId, validate,
};
use crate::{
    api::types::{Attach, EndpointView},
    consul::schema::{EndpointRecord, EndpointState, NetworkRecord, parse_mac},
    desired::endpoint_mtu,
    state::LocalEndpoint,
};

/// How far an attach got, so it can be undone from there. A step is marked before it begins where
/// it may have had an effect although it failed.
#[derive(Default)]
struct Progress {
    claiming: bool,
    claimed: Option<EndpointRecord>,
    host_ifname: Option<String>,
    adding: bool,
}

impl<R: Records, W: Wiring> Service<R, W> {
    /// Attaches a sandbox to a network: claims an address, makes the veth pair, wires it, announces
    /// the endpoint. Where any of it fails the rest is undone, and the error is the first cause.
    ///
    /// Goes on to its end when the future is dropped: a client that disconnects leaves an endpoint
    /// or nothing.
    pub async fn attach(&self, wanted: Attach) -> Result<EndpointView> {
        let service = self.clone();
        carried_out(async move { service.attach_or_undo(wanted).await }).await
    }

    async fn attach_or_undo(&self, wanted: Attach) -> Result<EndpointView> {
        validate::attach(&wanted)?;
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

        let (id, host_ifname) = new_id(&local);
        self.begin(&network, &id);
        let mut progress = Progress::default();
        let made =
            self.attach_steps(&wanted, &network, netns, &id, host_ifname, &mut progress).await;
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
        netns: PathBuf,
        id: &str,
        host_ifname: String,
        progress: &mut Progress,
    ) -> Result<LocalEndpoint> {
        let mut names: Vec<String> = Vec::new();
        for name in wanted.name.iter().chain(&wanted.aliases) {
            if !names.contains(name) {
                names.push(name.clone());
            }
        }

        progress.claiming = true;
        let claim = AddressClaim { id: id.to_owned(), names, address: wanted.ip };
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
            gateway: None,
            ports: Vec::new(),
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
        let Progress { claiming, claimed, host_ifname, adding } = progress;
        let mut left = Vec::new();
        if adding && let Err(error) = self.wiring().remove_local(id).await {
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

/// A new endpoint's id, 64 hexadecimal digits as Docker's, and the name of its host-side veth,
/// which no other endpoint of this host has.
fn new_id(local: &[LocalEndpoint]) -> (String, String) {
    loop {
        let id = format!("{}{}", Uuid::new_v4().simple(), Uuid::new_v4().simple());
        let host_ifname: String = format!("ovnet{}", id.get(..8).unwrap_or(&id));
        if local.iter().all(|endpoint| endpoint.host_ifname != host_ifname) {
            return (id, host_ifname);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::service::{
        fake::{self, attach},
        kind_of,
    };

    #[tokio::test]
    async fn an_attach_leaves_an_announced_wired_endpoint() {
        let (service, fake) = fake::service(&["ov_net1"]);
        let mut wanted = attach("ov_net1", "t1");
        wanted.aliases = vec!["web".into(), "t1".into()];
        let view = service.attach(wanted).await.unwrap();
        assert_eq!(view.record.id.len(), 64);
        assert_eq!(view.record.names, ["t1", "web"]);
        assert_eq!(view.record.state, EndpointState::Up);
        let local = view.local.unwrap();
        assert_eq!(local.host_ifname, format!("ovnet{}", &view.record.id[..8]));
        assert_eq!((local.ifname.as_str(), local.mtu), ("eth0", 1450));
        assert_eq!(fake.records(), [view.record]);
        assert_eq!(fake.links(), [local.host_ifname]);
        assert_eq!(
            fake.calls(),
            ["network", "claim_address", "create_veth", "add_local", "publish_endpoint"]
        );
    }

    #[tokio::test]
    async fn a_failure_of_any_step_leaves_nothing() {
        for step in ["network", "claim_address", "create_veth", "add_local", "publish_endpoint"] {
            let (service, fake) = fake::service(&["ov_net1"]);
            fake.fail(step);
            let error = service.attach(attach("ov_net1", "t1")).await.unwrap_err();
            assert_eq!(one_line(&error), format!("{step} was told to fail"));
            assert_eq!(fake.records(), [], "{step}");
            assert!(fake.links().is_empty(), "{step}");
            assert!(fake.local().is_empty(), "{step}");
            assert!(service.attaching().is_empty(), "{step}");
            // And it is as if nothing had been tried.
            fake.fail("");
            service.attach(attach("ov_net1", "t1")).await.unwrap();
        }
    }

    #[tokio::test]
    async fn what_cannot_be_undone_is_told_after_the_cause() {
        let (service, fake) = fake::service(&["ov_net1"]);
        fake.fail("add_local");
        fake.fail("remove_local");
        let error = service.attach(attach("ov_net1", "t1")).await.unwrap_err();
        assert_eq!(
            one_line(&error),
            "add_local was told to fail; and undoing it failed: remove_local was told to fail"
        );
        // The failed step does not keep the others from being undone.
        assert_eq!(fake.records(), []);
        assert!(fake.links().is_empty());
    }

    #[tokio::test]
    async fn a_claim_whose_answer_was_lost_is_released() {
        let (service, fake) = fake::service(&["ov_net1"]);
        fake.fail("claim_address after");
        service.attach(attach("ov_net1", "t1")).await.unwrap_err();
        assert_eq!(fake.records().len(), 1);
        fake.fail("");
        fake::eventually(|| fake.records().is_empty()).await;
    }

    #[tokio::test]
    async fn an_address_that_could_not_be_released_is_released_later() {
        let (service, fake) = fake::service(&["ov_net1"]);
        fake.fail("publish_endpoint");
        fake.fail("release_endpoint");
        service.attach(attach("ov_net1", "t1")).await.unwrap_err();
        assert_eq!(fake.records().len(), 1);
        fake.fail("");
        fake::eventually(|| fake.records().is_empty()).await;
    }

    #[tokio::test]
    async fn a_sandbox_may_be_in_two_networks_but_not_twice_in_one() {
        let (service, fake) = fake::service(&["ov_net1", "ov_net2"]);
        service.attach(attach("ov_net1", "t1")).await.unwrap();
        service.attach(attach("ov_net2", "t1")).await.unwrap();
        let error = service.attach(attach("ov_net1", "t1")).await.unwrap_err();
        assert_eq!(kind_of(&error), Some(crate::service::Kind::Conflict));
        assert_eq!(
            one_line(&error),
            "sandbox /run/netns/t1 is in network ov_net1 already, as t1 with address 10.0.0.2: \
             detach it first"
        );
        assert_eq!(fake.records().len(), 2);
    }

    #[tokio::test]
    async fn of_two_attaches_of_one_sandbox_at_once_one_is_refused() {
        let (service, fake) = fake::service(&["ov_net1"]);
        let (a, b) = tokio::join!(
            service.attach(attach("ov_net1", "t1")),
            service.attach(attach("ov_net1", "t1"))
        );
        assert!(a.is_ok() != b.is_ok());
        assert_eq!(fake.records().len(), 1);
    }

    #[tokio::test]
    async fn two_hundred_at_once_get_two_hundred_addresses() {
        let (service, fake) = fake::service(&["ov_net1"]);
        let attaches = (0..200).map(|n| {
            let service = service.clone();
            tokio::spawn(async move { service.attach(attach("ov_net1", &format!("t{n}"))).await })
        });
        let mut addresses = BTreeSet::new();
        for attached in futures::future::join_all(attaches).await {
            addresses.insert(attached.unwrap().unwrap().record.address);
        }
        assert_eq!(addresses.len(), 200);
        assert_eq!(fake.local().len(), 200);
    }

    #[tokio::test]
    async fn an_attach_goes_on_when_its_client_is_gone() {
        let (service, fake) = fake::service(&["ov_net1"]);
        let gate = fake.hold("create_veth");
        let asked = tokio::spawn({
            let service = service.clone();
            async move { service.attach(attach("ov_net1", "t1")).await }
        });
        fake::eventually(|| fake.calls().contains(&"create_veth")).await;
        asked.abort();
        drop(gate);
        fake::eventually(|| fake.records().iter().any(|it| it.state == EndpointState::Up)).await;
        assert_eq!(fake.local().len(), 1);
    }

    #[tokio::test]
    async fn another_sandbox_does_not_wait() {
        let (service, fake) = fake::service(&["ov_net1"]);
        let gate = fake.hold("create_veth");
        let slow = tokio::spawn({
            let service = service.clone();
            async move { service.attach(attach("ov_net1", "t1")).await }
        });
        fake::eventually(|| fake.calls().contains(&"create_veth")).await;
        fake.let_others_pass();
        service.attach(attach("ov_net1", "t2")).await.unwrap();
        drop(gate);
        slow.await.unwrap().unwrap();
    }

    #[tokio::test]
    async fn wrong_requests_change_nothing() {
        let (service, fake) = fake::service(&["ov_net1"]);
        service
            .attach(Attach { ip: Some([10, 0, 0, 7].into()), ..attach("ov_net1", "t1") })
            .await
            .unwrap();
        let before = (fake.records(), fake.links());
        let t2 = attach("ov_net1", "t2");
        let tries = [
            (Attach { network: "none".into(), ..t2.clone() }, "there is no network none"),
            (attach("ov_net1", "missing"), "there is no network namespace missing"),
            (Attach { ip: Some([10, 9, 0, 2].into()), ..t2.clone() }, "is not inside subnet"),
            (Attach { ip: Some([10, 0, 0, 1].into()), ..t2.clone() }, "is taken: it is the"),
            (Attach { ip: Some([10, 0, 0, 7].into()), ..t2.clone() }, "is taken"),
            (Attach { name: Some("a b".into()), ..t2.clone() }, "endpoint name"),
            (Attach { ifname: Some("a/b".into()), ..t2.clone() }, "interface name"),
        ];
        for (wanted, part) in tries {
            let error = service.attach(wanted).await.unwrap_err();
            assert!(error.to_string().contains(part), "{error}");
        }
        assert_eq!((fake.records(), fake.links()), before);
    }

    #[tokio::test]
    async fn a_network_is_found_by_the_start_of_its_id() {
        let (service, _) = fake::service(&["ov_net1"]);
        let id = fake::network("ov_net1", 4096).id;
        service.attach(attach(&id[..6], "t1")).await.unwrap();
        service.attach(attach(&id, "t2")).await.unwrap();
        assert!(service.attach(attach(&id[..3], "t3")).await.is_err());
    }
}
