//! Pools and networks: claimed when Docker asks for a subnet, published when their name is known.

use std::{collections::BTreeMap, net::Ipv4Addr, time::Instant};

use anyhow::{Context as _, Result, bail, ensure};
use ipnet::Ipv4Net;
use serde_json::Value;

use super::{ADDRESS_SPACES, CONSUL_DEADLINE, Driver, RESERVATION_LIFE};
use crate::{
    consul::{
        Publish,
        pending::gateway_of,
        schema::{NetworkRecord, PendingRecord, VERSION, check_network},
    },
    docker::{
        book::{Bound, Making},
        daemon::{ID_OPTION, MTU_OPTION},
        plugin::types::{CreateNetwork, Pool, RequestPool},
    },
    service::{Records, Refusal, Wiring, one_line},
};

impl<R: Records, W: Wiring> Driver<R, W> {
    /// `RequestPool`: the pool of a network there is, else a subnet claimed for one to come.
    pub async fn request_pool(&self, wanted: RequestPool) -> Result<Pool> {
        if wanted.v6 {
            return Err(Refusal::invalid(
                "ovnet networks are IPv4 only: create the network without --ipv6",
            ));
        }
        let subnet = parse_optional::<Ipv4Net>("--subnet", &wanted.pool)?;
        let ip_range = parse_optional::<Ipv4Net>("--ip-range", &wanted.sub_pool)?;
        if let Some(id) = wanted.options.get(ID_OPTION) {
            let network = self.network_of_pool(id).await?;
            if let Some(subnet) = subnet.filter(|subnet| *subnet != network.subnet) {
                return Err(Refusal::invalid(format!(
                    "network {} has the subnet {} and not {subnet}",
                    network.name, network.subnet
                )));
            }
            return Ok(pool_of(&network));
        }
        if let Some(network) = self.made_here_with(subnet) {
            // Docker starts again and asks for what it has; or a user wants the subnet for another
            // network, which CreateNetwork refuses.
            return Ok(pool_of(&network));
        }
        let claim = self.in_time("claim a subnet", self.claim(subnet, ip_range)).await?;
        let (id, subnet) = (claim.id.clone(), claim.subnet.to_string());
        let making = Making { claim, gateway: None, since: Instant::now() };
        self.book().pages().making.insert(id.clone(), making);
        Ok(Pool { id, subnet, data: BTreeMap::new() })
    }

    async fn claim(
        &self,
        subnet: Option<Ipv4Net>,
        ip_range: Option<Ipv4Net>,
    ) -> Result<PendingRecord> {
        let routes = self.wiring().routes().await?;
        self.records().claim_pending(subnet, ip_range, &routes).await
    }

    /// A network this host's Docker has, or is making, with that subnet.
    fn made_here_with(&self, subnet: Option<Ipv4Net>) -> Option<NetworkRecord> {
        let subnet = subnet?;
        let pages = self.book().pages();
        let bound = pages.bound.values().map(|bound| &bound.network);
        let found = bound.clone().find(|network| network.subnet == subnet).cloned();
        found.or_else(|| {
            let making = pages.making.values().find(|making| making.claim.subnet == subnet)?;
            unnamed(&making.claim, making.gateway).ok()
        })
    }

    /// The network behind a pool, without a name where it is being made.
    pub(super) async fn network_of_pool(&self, pool: &str) -> Result<NetworkRecord> {
        if let Some(bound) = self.book().of_network(pool) {
            return Ok(bound.network);
        }
        if let Some(making) = self.book().pages().making.get(pool) {
            return unnamed(&making.claim, making.gateway);
        }
        let what = format!("look up network {pool}");
        self.in_time(&what, async {
            // Of an agent before this one.
            if let Some(claim) =
                self.records().pending().await?.into_iter().find(|it| it.id == pool)
            {
                return unnamed(&claim, None);
            }
            self.records().network(pool).await
        })
        .await
    }

    /// `ReleasePool`: nothing but what was claimed for a network that was not made after all.
    pub async fn release_pool(&self, pool: &str) {
        if self.book().pages().making.remove(pool).is_some() {
            self.give_up_claim(pool.to_owned());
        }
    }

    /// `CreateNetwork`: binds Docker's network to the network of ovnet it stands for.
    pub async fn create_network(&self, wanted: CreateNetwork) -> Result<()> {
        if self.book().bound(&wanted.network).is_some() {
            return Ok(());
        }
        ensure!(!wanted.network.is_empty(), "the call names no network");
        let generic = options(&wanted)?;
        let id = generic.get(ID_OPTION).cloned();
        let [data] = wanted.ipv4.as_slice() else {
            return Err(Refusal::invalid("an ovnet network has one IPv4 subnet"));
        };
        if !ADDRESS_SPACES.contains(&data.address_space.as_str()) {
            return Err(Refusal::invalid(
                "an ovnet network needs ovnet's addresses, or hosts would give one address out \
                 twice: docker network create -d ovnet --ipam-driver ovnet NAME",
            ));
        }
        if !wanted.ipv6.is_empty() {
            return Err(Refusal::invalid("ovnet networks are IPv4 only"));
        }
        let subnet: Ipv4Net = data.pool.parse().context("the pool's subnet")?;
        let network = match id {
            Some(id) => self.network_of_pool(&id).await?,
            None => {
                let claim = self.claimed(subnet).await?;
                let gateway = parse_optional::<Ipv4Net>("the gateway", &data.gateway)?;
                let gateway = gateway.map(|it| it.addr());
                let mut network = unnamed(&claim, gateway)?;
                for (name, address) in &data.aux_addresses {
                    let address: Ipv4Net = address.parse().context("--aux-address")?;
                    network.aux.insert(name.clone(), address.addr());
                }
                network.internal =
                    wanted.options.get("com.docker.network.internal") == Some(&Value::Bool(true));
                network.mtu = generic
                    .get(MTU_OPTION)
                    .map(|mtu| mtu.parse())
                    .transpose()
                    .with_context(|| format!("-o {MTU_OPTION}"))?;
                network.created_by = self.shared.service.node().to_owned();
                network.options = generic;
                network.options.remove(MTU_OPTION);
                check_network(&network)?;
                network
            }
        };
        ensure!(
            network.subnet == subnet,
            "network {} has the subnet {} and not {subnet}",
            network.name,
            network.subnet
        );
        let id = network.id.clone();
        self.book().bind(Bound { docker: wanted.network, network, consul: None })?;
        self.book().pages().making.remove(&id);
        self.shared.created.notify_one();
        Ok(())
    }

    /// The claim behind a subnet that Docker makes a network with.
    async fn claimed(&self, subnet: Ipv4Net) -> Result<PendingRecord> {
        let (claim, holder) = {
            let pages = self.book().pages();
            let claim = pages.making.values().find(|it| it.claim.subnet == subnet);
            let holder = pages.bound.values().find(|it| it.network.subnet == subnet);
            let name = |bound: &Bound| match bound.network.name.as_str() {
                "" => format!("{} being made", bound.docker),
                name => name.to_owned(),
            };
            (claim.map(|it| it.claim.clone()), holder.map(name))
        };
        if let Some(holder) = holder {
            return Err(Refusal::conflict(format!(
                "subnet {subnet} is that of network {holder}: choose another one"
            )));
        }
        match claim {
            Some(claim) => Ok(claim),
            // Of an agent before this one.
            None => self
                .in_time("look up the claim of the subnet", self.records().pending())
                .await?
                .into_iter()
                .find(|claim| claim.subnet == subnet)
                .with_context(|| format!("subnet {subnet} was not claimed: try again")),
        }
    }

    /// Publishes a network made here under the name Docker gave it.
    pub async fn publish(
        &self,
        docker: &str,
        name: &str,
        labels: BTreeMap<String, String>,
    ) -> Result<Publish> {
        let _alone = self.shared.naming.lock().await;
        let bound = self.book().bound(docker).ok_or_else(|| super::unknown_network(docker))?;
        let network = NetworkRecord { name: name.to_owned(), labels, ..bound.network };
        let what = format!("publish network {name}");
        let published = self.in_time(&what, self.records().publish_network(&network)).await?;
        if let Publish::Done(network) = &published {
            let network = network.clone();
            self.book().bind(Bound { docker: bound.docker, network, consul: None })?;
        }
        self.shared.named.notify_waiters();
        Ok(published)
    }

    /// The network behind Docker's network or pool once it has its name, which it gets right after
    /// Docker has made it.
    pub(super) async fn named(&self, pool: &str) -> Result<NetworkRecord> {
        let named = async {
            loop {
                let notified = self.shared.named.notified();
                let network = self.network_of_pool(pool).await?;
                if !network.name.is_empty() {
                    return Ok(network);
                }
                notified.await;
            }
        };
        match tokio::time::timeout(CONSUL_DEADLINE, named).await {
            Ok(network) => network,
            Err(_) => bail!(
                "the network is not known to the other hosts yet: try again, and see `ovnet status` \
                 for what is in the way"
            ),
        }
    }

    /// `DeleteNetwork`: the user's order, so the network goes everywhere, or stays and the error
    /// says who uses it.
    pub async fn delete_network(&self, docker: &str) -> Result<()> {
        let _alone = self.shared.naming.lock().await;
        let Some(Bound { network, .. }) = self.book().bound(docker) else { return Ok(()) };
        let ours = {
            let mut pages = self.book().pages();
            // Docker also deletes what it gave up making, and this host's part of a network of
            // other hosts is no reason to remove theirs.
            let twice = pages.bound.values().filter(|it| it.network.id == network.id).count() > 1;
            pages.removing.remove(docker) || pages.creating.contains(&network.id) || twice
        };
        if network.name.is_empty() {
            // Where the answer of its publication was lost it is published all the same.
            let removed = self.remove_everywhere(&network).await;
            removed.unwrap_or_else(|error| tracing::warn!("{}", one_line(&error)));
            self.give_up_claim(network.id);
        } else if !ours {
            self.remove_everywhere(&network).await?;
        }
        self.book().unbind(docker)
    }

    /// Removes a network from Consul; one that is gone is what was wanted.
    async fn remove_everywhere(&self, network: &NetworkRecord) -> Result<()> {
        let what = format!("remove network {}", network.name);
        let is_there = async || {
            let known = self.in_time(&what, self.records().networks()).await?;
            anyhow::Ok(known.iter().any(|it| it.id == network.id))
        };
        if !is_there().await? {
            return Ok(());
        }
        match self.in_time(&what, self.records().remove_network(&network.id)).await {
            // Another host was faster.
            Err(_) if !is_there().await.unwrap_or(true) => Ok(()),
            removed => removed.map(drop),
        }
    }

    /// Gives the claim of a network up that was never published. Where Consul does not answer it is
    /// found again among this host's claims.
    pub(super) fn give_up_claim(&self, id: String) {
        let driver = self.clone();
        tokio::spawn(async move {
            let released = driver.records().release_pending(&id);
            if let Err(error) = driver.in_time("give a claim up", released).await {
                tracing::debug!(error = format!("{error:#}"), "a claim is given up later");
            }
        });
    }

    /// Gives up claims that no network came of: of calls Docker did not go on with, and of an agent
    /// that was killed in between.
    pub(super) async fn forget_stale_claims(&self) {
        let stale: Vec<String> = {
            let mut pages = self.book().pages();
            let stale = pages.making.extract_if(.., |_, it| it.since.elapsed() > RESERVATION_LIFE);
            stale.map(|(id, _)| id).collect()
        };
        stale.into_iter().for_each(|id| self.give_up_claim(id));
        let Ok(claims) = self.in_time("list claims", self.records().pending()).await else {
            return;
        };
        for claim in claims {
            let mut pages = self.book().pages();
            let known = pages.making.contains_key(&claim.id)
                || pages.bound.values().any(|bound| bound.network.id == claim.id);
            if !known {
                // Its call may still be under way: it has as long as any other.
                let since = Instant::now();
                pages.making.insert(claim.id.clone(), Making { claim, gateway: None, since });
            }
        }
    }
}

/// The pool of a network there is.
fn pool_of(network: &NetworkRecord) -> Pool {
    let (id, subnet) = (network.id.clone(), network.subnet.to_string());
    Pool { id, subnet, data: BTreeMap::new() }
}

/// The options of `-o`.
fn options(wanted: &CreateNetwork) -> Result<BTreeMap<String, String>> {
    let Some(Value::Object(generic)) = wanted.options.get("com.docker.network.generic") else {
        return Ok(BTreeMap::new());
    };
    generic
        .iter()
        .map(|(key, value)| match value {
            Value::String(text) => Ok((key.clone(), text.clone())),
            other => bail!("option {key} is {other} and not a text"),
        })
        .collect()
}

/// The record of a network from its claim; the name follows.
fn unnamed(claim: &PendingRecord, gateway: Option<Ipv4Addr>) -> Result<NetworkRecord> {
    Ok(NetworkRecord {
        v: VERSION,
        id: claim.id.clone(),
        name: String::new(),
        vni: claim.vni,
        subnet: claim.subnet,
        gateway: gateway_of(claim, gateway)?,
        ip_range: claim.ip_range,
        aux: BTreeMap::new(),
        mtu: None,
        internal: false,
        options: BTreeMap::new(),
        labels: BTreeMap::new(),
        created_by: String::new(),
    })
}

/// A text that Docker leaves empty where nothing was given.
pub(super) fn parse_optional<
    T: std::str::FromStr<Err: std::error::Error + Send + Sync + 'static>,
>(
    what: &str,
    text: &str,
) -> Result<Option<T>> {
    if text.is_empty() {
        return Ok(None);
    }
    Ok(Some(text.parse().with_context(|| format!("{what} {text:?}"))?))
}
