//! Giving addresses back: at once, later where Consul is out of reach, and those nobody has.

use std::{collections::BTreeSet, time::Duration};

use anyhow::Result;

use super::{Records, Service, Wiring, in_time};
use crate::consul::schema::{EndpointRecord, NetworkRecord};

/// How long to wait before trying again to release an address; doubled each time.
const FIRST_WAIT: Duration = Duration::from_millis(100);
/// What the wait grows to.
const LONGEST_WAIT: Duration = Duration::from_secs(30);

impl<R: Records, W: Wiring> Service<R, W> {
    /// Deletes an endpoint's record, in bounded time.
    pub(super) async fn release(
        &self,
        network: &NetworkRecord,
        record: &EndpointRecord,
    ) -> Result<()> {
        in_time(
            &format!("release address {} of network {}", record.address, network.name),
            self.records().release_endpoint(&network.id, record),
        )
        .await
    }

    /// Releases an address as soon as Consul lets us: a detach does not wait for it, and an address
    /// that nobody has must not stay taken.
    pub(crate) fn release_later(&self, network: NetworkRecord, record: EndpointRecord) {
        let service = self.clone();
        tokio::spawn(async move {
            let mut wait = FIRST_WAIT;
            loop {
                tokio::time::sleep(wait).await;
                wait = (wait * 2).min(LONGEST_WAIT);
                if service.release(&network, &record).await.is_ok() {
                    tracing::info!(
                        address = %record.address, network = network.name,
                        "the address of an endpoint that is gone is released"
                    );
                    return;
                }
            }
        });
    }

    /// Finds and releases the record of an endpoint whose claim ended without a clear answer.
    pub(super) fn forget_later(&self, network: NetworkRecord, id: String) {
        let service = self.clone();
        tokio::spawn(async move {
            let mut wait = FIRST_WAIT;
            loop {
                if let Ok(records) =
                    in_time("list endpoints", service.records().endpoints(&network.id)).await
                {
                    if let Some(record) = records.into_iter().find(|record| record.id == id) {
                        service.release_later(network, record);
                    }
                    return;
                }
                tokio::time::sleep(wait).await;
                wait = (wait * 2).min(LONGEST_WAIT);
            }
        });
    }

    /// Releases this host's records that stand for no endpoint of it, as an agent killed in the
    /// middle of an attach leaves them, and returns how many. For the start, once Consul answers
    /// and the local endpoints are loaded.
    ///
    /// Only records of this host are touched (invariant 6), and none of an attach under way.
    pub async fn release_orphans(&self) -> Result<usize> {
        let mut released = 0;
        for network in self.records().networks().await? {
            for record in self.records().endpoints(&network.id).await? {
                if !self.is_orphan(&record) {
                    continue;
                }
                self.release(&network, &record).await?;
                tracing::info!(
                    address = %record.address, network = network.name, id = record.id,
                    "released an address that no endpoint of this host has"
                );
                released += 1;
            }
        }
        Ok(released)
    }

    /// Releases this host's records that stood for no endpoint of it in the last look, either, in
    /// networks where something ended since. `before` is what the last look found; the answer of a
    /// claim may be lost, and a record be written after all. What fails is tried again in the next.
    pub async fn sweep(&self, before: &mut BTreeSet<String>) {
        let mut found = BTreeSet::new();
        let touched = std::mem::take(&mut *self.touched());
        for network in touched.into_values() {
            match self.sweep_network(&network, before).await {
                Ok(orphans) if orphans.is_empty() => continue,
                Ok(orphans) => found.extend(orphans),
                Err(error) => tracing::debug!("{}", super::one_line(&error)),
            }
            self.touched().entry(network.id.clone()).or_insert(network);
        }
        *before = found;
    }

    async fn sweep_network(
        &self,
        network: &NetworkRecord,
        before: &BTreeSet<String>,
    ) -> Result<Vec<String>> {
        let mut orphans = Vec::new();
        for record in self.records().endpoints(&network.id).await? {
            if !self.is_orphan(&record) {
                continue;
            }
            if before.contains(&record.id) {
                self.release(network, &record).await?;
                tracing::info!(
                    address = %record.address, network = network.name, id = record.id,
                    "released an address that no endpoint of this host has"
                );
            }
            orphans.push(record.id);
        }
        Ok(orphans)
    }

    /// Whether a record of this host stands for no endpoint of it, nor for one under way.
    pub(crate) fn is_orphan(&self, record: &EndpointRecord) -> bool {
        // In this order: an attach is under way until after it is among the local ones.
        let attaching = self.attaching().contains_key(&record.id);
        let local = || {
            let wiring = self.wiring();
            wiring.local().iter().any(|it| it.record.id == record.id) || wiring.holds(&record.id)
        };
        record.host == self.shared.node && !attaching && !local()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        consul::schema::EndpointState,
        service::fake::{self, attach},
    };

    #[tokio::test]
    async fn orphans_of_this_host_are_released_and_nobody_elses() {
        let (service, fake) = fake::service(&["ov_net1"]);
        let kept = service.attach(attach("ov_net1", "t1")).await.unwrap().record;
        let orphan = |id: &str, last, host: &str| EndpointRecord {
            id: id.into(),
            address: [10, 0, 0, last].into(),
            host: host.into(),
            state: EndpointState::Reserved,
            ..kept.clone()
        };
        let other = orphan("c", 52, "docker02");
        let under_way = orphan("d", 53, fake::NODE);
        for record in [orphan("b", 51, fake::NODE), other.clone(), under_way.clone()] {
            fake.put("ov_net1", record);
        }
        let network = fake::network("ov_net1", 4096);
        service.begin(&network, "d");
        assert_eq!(service.release_orphans().await.unwrap(), 1);
        assert_eq!(fake.records(), [kept.clone(), other.clone(), under_way.clone()]);

        // Afterwards only where something was begun, and only what two looks found.
        fake.put("ov_net1", orphan("e", 54, fake::NODE));
        let mut seen = BTreeSet::new();
        service.sweep(&mut seen).await;
        assert_eq!((seen.len(), fake.records().len()), (1, 4));
        service.sweep(&mut seen).await;
        assert_eq!(fake.records(), [kept, other, under_way]);
        service.sweep(&mut seen).await;
        assert!(service.touched().is_empty());
        // What ends after a look is looked for in the next one.
        service.end("d");
        service.sweep(&mut seen).await;
        assert_eq!(seen.len(), 1);
    }
}
