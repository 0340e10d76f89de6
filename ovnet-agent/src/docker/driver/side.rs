//! What the comparison of Docker's networks with Consul's ([`crate::docker::sync`]) needs of the
//! driver, of Consul and of this host.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use anyhow::{Context as _, Result};
use tokio::sync::{Notify, watch};

use super::Driver;
use crate::{
    consul::{Publish, Snapshot, schema::NetworkRecord},
    docker::{
        book::Bound,
        sync::{Networks, Side},
    },
    reconcile::Description,
    service::{
        Records as _, Wiring as _,
        real::{ConsulRecords, HostWiring},
    },
    state::LocalEndpoint,
};

/// The driver of this host as the comparison sees it.
#[derive(Clone)]
pub struct HostSide {
    driver: Driver<ConsulRecords, HostWiring>,
    changed: watch::Receiver<u64>,
}

impl HostSide {
    /// The side of this driver.
    pub fn new(driver: Driver<ConsulRecords, HostWiring>) -> Self {
        let (sender, changed) = watch::channel(0);
        let mut snapshots = driver.wiring().reconciler.snapshots();
        // Ends with the watch of Consul, or with the last receiver.
        tokio::spawn(async move {
            let mut before = None;
            loop {
                let now = networks_of(&snapshots.borrow_and_update());
                if before.as_ref() != Some(&now) {
                    before = Some(now);
                    sender.send_modify(|count| *count += 1);
                }
                if snapshots.changed().await.is_err() || sender.is_closed() {
                    return;
                }
            }
        });
        Self { driver, changed }
    }

    /// Adds what this Consul has not because it is not the one it was: another, or wiped while no
    /// agent looked. The same Consul without a record is a deletion.
    fn tell_lost(&self, identity: &str, networks: &mut Networks) {
        let book = self.driver.book();
        for bound in book.all().into_values() {
            let network = &bound.network;
            if network.name.is_empty() || bound.consul.as_deref() == Some(identity) {
                continue;
            }
            if networks.by_id(&network.id).is_some() && !networks.lost.contains(&network.name) {
                // Its next absence from this Consul is a deletion.
                let bound = Bound { consul: Some(identity.to_owned()), ..bound };
                if let Err(error) = book.bind(bound) {
                    tracing::debug!("{error:#}");
                }
            } else if networks.by_name(&network.name).is_none()
                && !networks.unreadable.contains(&network.name)
            {
                networks.lost.insert(network.name.clone());
            }
        }
    }
}

impl Side for HostSide {
    fn networks(&self) -> Networks {
        let snapshot = self.driver.wiring().reconciler.snapshot();
        let mut networks = networks_of(&snapshot);
        if let Some(identity) = &snapshot.identity {
            self.tell_lost(identity, &mut networks);
        }
        networks
    }

    fn changed(&self) -> watch::Receiver<u64> {
        self.changed.clone()
    }

    fn created(&self) -> Arc<Notify> {
        Arc::clone(&self.driver.shared.created)
    }

    fn bound(&self) -> BTreeMap<String, NetworkRecord> {
        let all = self.driver.book().all();
        all.into_iter().map(|(docker, bound)| (docker, bound.network)).collect()
    }

    async fn publish(
        &self,
        docker_id: &str,
        name: &str,
        labels: BTreeMap<String, String>,
    ) -> Result<Publish> {
        self.driver.publish(docker_id, name, labels).await
    }

    fn bind(&self, docker_id: &str, network: &NetworkRecord) -> Result<()> {
        if self.driver.book().bound(docker_id).is_some_and(|bound| bound.network == *network) {
            return Ok(());
        }
        let (docker, network) = (docker_id.to_owned(), network.clone());
        self.driver.book().bind(Bound { docker, network, consul: None })
    }

    async fn unbind(&self, docker_id: &str) -> Result<()> {
        let _alone = self.driver.shared.naming.lock().await;
        let unpublished = self.driver.book().bound(docker_id).map(|bound| bound.network);
        self.driver.book().unbind(docker_id)?;
        if let Some(network) = unpublished.filter(|network| network.name.is_empty()) {
            self.driver.give_up_claim(network.id);
        }
        Ok(())
    }

    fn removing(&self, docker_id: &str, yes: bool) {
        let mut pages = self.driver.book().pages();
        if yes {
            pages.removing.insert(docker_id.to_owned());
        } else {
            pages.removing.remove(docker_id);
        }
    }

    fn creating(&self, network_id: &str, yes: bool) {
        let mut pages = self.driver.book().pages();
        if yes {
            pages.creating.insert(network_id.to_owned());
        } else {
            pages.creating.remove(network_id);
        }
    }

    async fn restore(&self, network: &NetworkRecord) -> Result<()> {
        self.driver.records().restore_network(network).await
    }

    fn endpoints(&self) -> Vec<LocalEndpoint> {
        let mut local = self.driver.wiring().local();
        local.retain(|endpoint| endpoint.docker.is_some());
        local
    }

    async fn remove_endpoint(&self, id: &str) -> Result<()> {
        let local = self.driver.wiring().local();
        let endpoint = local.into_iter().find(|endpoint| endpoint.record.id == id);
        self.driver.delete_endpoint(id).await?;
        if let Some(LocalEndpoint { network, record, .. }) = endpoint {
            // Docker will not give the address back: it has forgotten the endpoint.
            self.driver.release_of(&network.id, record.address).await;
        }
        Ok(())
    }

    async fn describe_endpoint(&self, description: Description) -> Result<()> {
        let described = self.driver.wiring().describe_local(description).await?;
        // Gone in the meantime, and its names with it.
        let Some(LocalEndpoint { network, record, .. }) = described else { return Ok(()) };
        let announced = self.driver.records().publish_endpoint(&network, &record, None);
        let announced = self.driver.in_time("announce the names", announced).await;
        // One that ended meanwhile had its record put back. While Docker has not given its address
        // back it is no orphan, and goes with the address.
        if self.driver.shared.service.is_orphan(&record) {
            self.driver.shared.service.release_later(network, record);
            return Ok(());
        }
        announced.with_context(|| format!("endpoint {}", record.address))
    }

    fn note(&self, notes: BTreeSet<String>) {
        self.driver.wiring().reconciler.set_notes(notes);
    }
}

fn networks_of(snapshot: &Snapshot) -> Networks {
    let read = snapshot.networks.clone();
    let lost = read.iter().flatten().map(|(name, _)| name.clone());
    let lost = lost.filter(|name| snapshot.has_lost_network(name)).collect();
    let unreadable = snapshot.unreadable_networks.clone();
    Networks { read, lost, unreadable, connected: snapshot.consul_state == "connected" }
}
