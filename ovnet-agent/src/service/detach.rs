//! Detach: which endpoints a request means, and their end.

use std::collections::BTreeSet;

use anyhow::Result;

use super::{
    Records, Refusal, Service, Wiring, carried_out, is_prefix, netns_of_name, one_line,
    sandbox::SandboxId,
};
use crate::{
    api::types::{Detach, Detached},
    state::LocalEndpoint,
};

impl<R: Records, W: Wiring> Service<R, W> {
    /// Detaches the endpoints of this host that match every field given.
    ///
    /// An endpoint is unwired before its address is released, so nobody else can have the address
    /// while it still works here. With Consul out of reach the endpoint goes all the same; its
    /// record follows when Consul is back, and the answer carries a warning.
    pub async fn detach(&self, wanted: Detach) -> Result<Detached> {
        let service = self.clone();
        carried_out(async move { service.detach_all(wanted).await }).await
    }

    async fn detach_all(&self, wanted: Detach) -> Result<Detached> {
        let local = self.wiring().local();
        let sandbox = wanted.netns.as_deref().map(|given| self.sandbox_of(given, &local));
        let selected = select(&local, &wanted, sandbox.as_ref())?;
        let mut detached = Detached::default();
        let mut failed = None;
        for endpoint in selected {
            match self.detach_one(endpoint, &mut detached.warnings).await {
                Ok(true) => detached.endpoints.push(self.view_local(endpoint)),
                // Another request was faster; it is gone, which is what was wanted.
                Ok(false) => {}
                Err(error) => {
                    tracing::warn!(id = endpoint.record.id, "{}", one_line(&error));
                    failed.get_or_insert(error);
                }
            }
        }
        failed.map_or(Ok(detached), Err)
    }

    async fn detach_one(
        &self,
        endpoint: &LocalEndpoint,
        warnings: &mut Vec<String>,
    ) -> Result<bool> {
        let LocalEndpoint { record, network, netns, .. } = endpoint;
        let _alone = self.shared.sandboxes.lock(&SandboxId::of(netns)).await;
        if self.wiring().local().iter().all(|other| other.record.id != record.id) {
            return Ok(false);
        }
        self.wiring().remove_local(&record.id).await?;
        self.wiring().release_ports(&record.id);
        if let Err(error) = self.give_back_gateway(endpoint).await {
            warnings.push(format!(
                "{} is detached, but its way out is still there: {}",
                label(endpoint),
                one_line(&error)
            ));
        }
        if let Err(error) = self.release(network, record).await {
            self.release_later(network.clone(), record.clone());
            warnings.push(format!(
                "{} is detached, but its address stays taken until Consul answers: {}",
                label(endpoint),
                one_line(&error)
            ));
        }
        Ok(true)
    }

    /// Deletes the gateway port of an endpoint that is gone, unless another one uses it. The
    /// sandbox must be locked: nobody may begin to share it now.
    async fn give_back_gateway(&self, endpoint: &LocalEndpoint) -> Result<()> {
        let Some(gateway) = &endpoint.gateway else { return Ok(()) };
        let shares = |it: &LocalEndpoint| {
            it.gateway.as_ref().is_some_and(|other| other.host_ifname == gateway.host_ifname)
        };
        if self.wiring().local().iter().any(shares) {
            return Ok(());
        }
        self.wiring().delete_gateway(gateway).await
    }

    /// The sandbox meant by a path or name; one that is gone is known by the path it had, so its
    /// endpoints can still be detached.
    fn sandbox_of(&self, given: &str, local: &[LocalEndpoint]) -> SandboxId {
        let textual = netns_of_name(given);
        match self.wiring().resolve_netns(given) {
            Ok(path) => SandboxId::of(&path),
            Err(_) => local
                .iter()
                .find(|endpoint| endpoint.netns == textual)
                .map_or(SandboxId::Gone(textual.clone()), |it| SandboxId::of(&it.netns)),
        }
    }
}

/// The endpoints a request means. Pure.
///
/// A name or a sandbox may mean several endpoints, one per network, and then means all of them. A
/// network alone, or a name that different sandboxes share, is refused where it means several:
/// more would go than whoever typed it had in mind.
fn select<'a>(
    local: &'a [LocalEndpoint],
    wanted: &Detach,
    sandbox: Option<&SandboxId>,
) -> Result<Vec<&'a LocalEndpoint>> {
    if wanted == &Detach::default() {
        return Err(Refusal::invalid(
            "nothing to detach is named: give an endpoint's name or id, --network or --netns",
        ));
    }
    let mut found: Vec<_> = local
        .iter()
        .filter(|it| wanted.network.as_deref().is_none_or(|network| in_network(it, network)))
        .filter(|it| sandbox.is_none_or(|sandbox| SandboxId::of(&it.netns) == *sandbox))
        .collect();
    if let Some(endpoint) = &wanted.endpoint {
        found = closest(found, endpoint);
    }
    if found.is_empty() {
        return Err(Refusal::not_found(format!(
            "no endpoint of this host {}: see `ovnet endpoint ls --local`",
            described(wanted)
        )));
    }
    if let Some(endpoint) = found.iter().find(|it| it.docker.is_some()) {
        // Docker would go on believing in it.
        let name = endpoint.record.names.first().map_or("CONTAINER", String::as_str);
        return Err(Refusal::conflict(format!(
            "{} is Docker's: `docker network disconnect {} {name}` detaches it",
            label(endpoint),
            endpoint.network.name
        )));
    }
    if wanted.netns.is_none() {
        let what = || described(wanted).replacen("has", "have", 1).replacen("is in", "are in", 1);
        of_one_sandbox(&found, what, "by id or with --netns")?;
    }
    Ok(found)
}

/// Those an endpoint's name or id means, by the closest reading that anything answers to: a name
/// hides another's alias, and both hide the start of an id. Pure.
pub(super) fn closest<'a>(all: Vec<&'a LocalEndpoint>, text: &str) -> Vec<&'a LocalEndpoint> {
    let readings: [fn(&LocalEndpoint, &str) -> bool; 3] = [
        |it, text| it.record.id == text || it.record.names.first().is_some_and(|n| n == text),
        |it, text| it.record.names.iter().any(|name| name == text),
        |it, text| is_prefix(text, &it.record.id),
    ];
    readings
        .iter()
        .map(|reads| all.iter().copied().filter(|it| reads(it, text)).collect::<Vec<_>>())
        .find(|matching| !matching.is_empty())
        .unwrap_or_default()
}

/// Refuses endpoints of several sandboxes: what they have in common is the start of the line, and
/// its end tells how to say which.
pub(super) fn of_one_sandbox(
    found: &[&LocalEndpoint],
    what: impl Fn() -> String,
    how: &str,
) -> Result<()> {
    let sandboxes: BTreeSet<_> = found.iter().map(|it| &it.netns).collect();
    if sandboxes.len() < 2 {
        return Ok(());
    }
    let mut labels: Vec<_> = found.iter().map(|it| label(it)).collect();
    labels.sort();
    Err(Refusal::conflict(format!(
        "{} endpoints {}; say which {how}",
        found.len(),
        [what(), labels.join(", ")].join(": ")
    )))
}

fn in_network(endpoint: &LocalEndpoint, network: &str) -> bool {
    let record = &endpoint.network;
    record.name == network || record.id == network || is_prefix(network, &record.id)
}

fn described(wanted: &Detach) -> String {
    let Detach { network, netns, endpoint } = wanted;
    let parts: Vec<_> = [
        endpoint.as_ref().map(|it| format!("has name or id {it}")),
        network.as_ref().map(|it| format!("is in network {it}")),
        netns.as_ref().map(|it| format!("is in sandbox {it}")),
    ]
    .into_iter()
    .flatten()
    .collect();
    parts.join(" and ")
}

fn label(endpoint: &LocalEndpoint) -> String {
    let LocalEndpoint { record, network, .. } = endpoint;
    let id = record.id.get(..12).unwrap_or(&record.id);
    match record.names.first() {
        Some(name) => format!("{name} ({id}, {} in {})", record.address, network.name),
        None => format!("{id} ({} in {})", record.address, network.name),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        api::types::Attach,
        service::{
            Kind,
            fake::{self, attach},
            kind_of,
        },
    };

    fn named(endpoint: &str) -> Detach {
        Detach { endpoint: Some(endpoint.into()), ..Default::default() }
    }

    async fn three() -> (fake::FakeService, fake::Fake) {
        let (service, fake) = fake::service(&["ov_net1", "ov_net2"]);
        for (network, netns) in [("ov_net1", "t1"), ("ov_net2", "t1"), ("ov_net1", "t2")] {
            let aliases = vec!["web".into()];
            service.attach(Attach { aliases, ..attach(network, netns) }).await.unwrap();
        }
        (service, fake)
    }

    fn remaining(fake: &fake::Fake) -> Vec<(String, String)> {
        let mut all: Vec<_> = fake
            .local()
            .into_iter()
            .map(|it| (it.record.names[0].clone(), it.network.name))
            .collect();
        all.sort();
        all
    }

    #[tokio::test]
    async fn a_name_means_its_endpoints_in_all_networks() {
        let (service, fake) = three().await;
        let detached = service.detach(named("t1")).await.unwrap();
        assert_eq!(detached.endpoints.len(), 2);
        assert_eq!(remaining(&fake), [("t2".into(), "ov_net1".into())]);
        assert_eq!((fake.records().len(), fake.links().len()), (1, 1));
    }

    #[tokio::test]
    async fn a_network_narrows_a_name() {
        let (service, fake) = three().await;
        let wanted = Detach { network: Some("ov_net2".into()), ..named("t1") };
        service.detach(wanted).await.unwrap();
        assert_eq!(
            remaining(&fake),
            [("t1".into(), "ov_net1".into()), ("t2".into(), "ov_net1".into())]
        );
    }

    #[tokio::test]
    async fn a_sandbox_means_all_its_endpoints_by_name_or_path() {
        for netns in ["t1", "/run/netns/t1"] {
            let (service, fake) = three().await;
            let wanted = Detach { netns: Some(netns.into()), ..Default::default() };
            service.detach(wanted).await.unwrap();
            assert_eq!(remaining(&fake), [("t2".into(), "ov_net1".into())]);
        }
    }

    #[tokio::test]
    async fn a_sandbox_that_is_gone_can_still_be_detached() {
        let (service, fake) = three().await;
        fake.lose_netns("t2");
        let wanted = Detach { netns: Some("t2".into()), ..Default::default() };
        assert_eq!(service.detach(wanted).await.unwrap().endpoints.len(), 1);
    }

    #[tokio::test]
    async fn a_network_alone_must_mean_one_sandbox() {
        let (service, fake) = three().await;
        let only = |network: &str| Detach { network: Some(network.into()), ..Default::default() };
        let error = service.detach(only("ov_net1")).await.unwrap_err();
        assert_eq!(kind_of(&error), Some(Kind::Conflict));
        let line = error.to_string();
        assert!(line.starts_with("2 endpoints are in network ov_net1: t1 ("), "{line}");
        assert_eq!(fake.local().len(), 3);
        service.detach(only("ov_net2")).await.unwrap();
        assert_eq!(fake.local().len(), 2);
    }

    #[tokio::test]
    async fn an_alias_of_two_sandboxes_is_refused() {
        let (service, fake) = three().await;
        let error = service.detach(named("web")).await.unwrap_err();
        let line = error.to_string();
        assert!(line.starts_with("3 endpoints have name or id web: "), "{line}");
        assert!(line.ends_with("; say which by id or with --netns"), "{line}");
        assert_eq!(fake.local().len(), 3);
    }

    #[tokio::test]
    async fn an_id_and_its_start_mean_one_endpoint() {
        for length in [64, 12] {
            let (service, fake) = three().await;
            let id = fake.local()[1].record.id.clone();
            let detached = service.detach(named(&id[..length])).await.unwrap();
            assert_eq!(detached.endpoints[0].record.id, id);
            assert_eq!(fake.local().len(), 2);
        }
    }

    #[tokio::test]
    async fn nothing_named_and_nothing_found_are_clear() {
        let (service, _) = three().await;
        let error = service.detach(Detach::default()).await.unwrap_err();
        assert_eq!(kind_of(&error), Some(Kind::Invalid));
        let wanted = Detach { network: Some("ov_net2".into()), ..named("t9") };
        let error = service.detach(wanted).await.unwrap_err();
        assert_eq!(kind_of(&error), Some(Kind::NotFound));
        assert_eq!(
            error.to_string(),
            "no endpoint of this host has name or id t9 and is in network ov_net2: see `ovnet \
             endpoint ls --local`"
        );
    }

    #[tokio::test]
    async fn a_detach_without_consul_releases_the_address_later() {
        let (service, fake) = fake::service(&["ov_net1"]);
        service.attach(attach("ov_net1", "t1")).await.unwrap();
        fake.fail("release_endpoint");
        let detached = service.detach(named("t1")).await.unwrap();
        assert!(detached.warnings[0].contains("its address stays taken until Consul answers"));
        assert!(fake.local().is_empty());
        fake.fail("");
        fake::eventually(|| fake.records().is_empty()).await;
    }

    #[tokio::test]
    async fn an_endpoint_that_cannot_be_unwired_keeps_its_address_and_stops_no_other() {
        let (service, fake) = three().await;
        fake.fail("remove_local once");
        service.detach(named("t1")).await.unwrap_err();
        assert_eq!((fake.local().len(), fake.records().len()), (2, 2));
    }
}
