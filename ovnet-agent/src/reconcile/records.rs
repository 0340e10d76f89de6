//! This host's own records in Consul: put back where they were lost, removed where nothing stands
//! behind them.
//!
//! Attaching and detaching write the records themselves; this is for what happens in between: data
//! wiped from Consul, a sandbox that vanished, an agent that died in the middle of an attach.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use super::Shared;
use crate::{
    consul::{
        Lease, Snapshot,
        schema::{EndpointRecord, NetworkRecord},
    },
    state::LocalEndpoint,
};

/// An endpoint younger than this is still being attached: its attach writes the record.
const SETTLE: Duration = Duration::from_secs(30);

/// Between attempts to put back what Consul lost: passes come much faster.
const RETRY: Duration = Duration::from_secs(1);

/// Keeps them. Its writes run beside the loop, one at a time per endpoint.
pub(super) struct OwnRecords {
    shared: Arc<Shared>,
    added: BTreeMap<String, Instant>,
    /// When what was lost was last put back, or tried to be, by id.
    tried: Mutex<BTreeMap<String, Instant>>,
    /// Networks whose endpoints were compared since Consul was last out of reach.
    compared: BTreeSet<String>,
    busy: Arc<Mutex<BTreeSet<String>>>,
    /// Records of endpoints that are gone, by endpoint id, until Consul has released them.
    gone: Arc<Mutex<BTreeMap<String, Gone>>>,
}

type Gone = (NetworkRecord, EndpointRecord);

impl OwnRecords {
    pub(super) fn new(shared: Arc<Shared>) -> Self {
        let (added, tried) = (BTreeMap::new(), Mutex::default());
        let compared = BTreeSet::new();
        Self { shared, added, tried, compared, busy: Arc::default(), gone: Arc::default() }
    }

    /// Notes that this endpoint is being attached now.
    pub(super) fn added(&mut self, id: &str) {
        self.added.insert(id.to_owned(), Instant::now());
    }

    /// When to look again although nothing happened: what is put back may fail.
    pub(super) fn next_try(&self) -> Option<Instant> {
        lock(&self.tried).values().min().map(|at| *at + RETRY)
    }

    /// Compares what Consul said with what is here. Only what was read is compared.
    pub(super) fn keep(
        &mut self,
        snapshot: &Snapshot,
        local: &[(LocalEndpoint, u32)],
        whole: bool,
    ) {
        self.added.retain(|_, since| since.elapsed() < SETTLE);
        if snapshot.consul_state != "connected" {
            self.compared.clear();
            lock(&self.tried).clear();
            return;
        }
        self.restore_lost(snapshot, local);
        if whole || self.compared.is_empty() {
            let gone: Vec<Gone> = lock(&self.gone).values().cloned().collect();
            for gone in gone {
                self.try_release(gone);
            }
        }
        let mut compared = BTreeSet::new();
        for (endpoint, _) in local {
            let LocalEndpoint { record, network, .. } = endpoint;
            // Looked at only by the timer, and when Consul is back: a record just written need not
            // be in the snapshot yet.
            if !whole && self.compared.contains(&network.id) {
                continue;
            }
            let read = snapshot.endpoints.get(&network.id);
            compared.extend(read.map(|_| network.id.clone()));
            let found = read.map(|endpoints| endpoints.get(&record.address));
            if found == Some(Some(record)) {
                // Its attach wrote the record: it is over.
                self.added.remove(&record.id);
            }
            if self.added.contains_key(&record.id) {
                continue;
            }
            if snapshot.networks.as_ref().is_some_and(|read| !read.contains_key(&network.name)) {
                self.restore(network);
            }
            if found.is_some_and(|found| found != Some(record)) {
                self.publish(network, record);
            }
        }
        self.compared.extend(compared);
    }

    /// Has the lease look where Consul says something else of this host than it announces. The lease
    /// knows best, and does nothing where all is well by now.
    pub(super) fn keep_announced(&self, snapshot: &Snapshot, lease: &Lease) {
        let Some(hosts) = &snapshot.hosts else { return };
        let ours = lease.record();
        let says = hosts.get(&ours.node).map(|entry| &entry.record);
        if snapshot.has_lost_host(&ours.node) || says != Some(&ours) {
            lease.look();
        }
    }

    /// Puts back at once what Consul lost with its data: until then others may be given an address
    /// that is in use here. A snapshot keeps what was lost, so presence in it proves nothing. And
    /// what somebody else has written over: who reads it for the first time believes it.
    fn restore_lost(&self, snapshot: &Snapshot, local: &[(LocalEndpoint, u32)]) {
        let mut tried = lock(&self.tried);
        tried.retain(|_, at| at.elapsed() < RETRY);
        let mut is_due = |id: &String| {
            let due = !tried.contains_key(id);
            if due {
                tried.insert(id.clone(), Instant::now());
            }
            due
        };
        // A network belongs to the host that created it, also where it has no endpoint there.
        let created = snapshot.networks.iter().flat_map(BTreeMap::values).filter(|network| {
            network.created_by == self.shared.options.node
                && snapshot.has_lost_network(&network.name)
        });
        for network in created {
            if is_due(&network.id) {
                self.restore(network);
            }
        }
        for (LocalEndpoint { record, network, .. }, _) in local {
            // As it was read before, which is as all hosts know it.
            let before = snapshot.networks.as_ref().and_then(|it| it.get(&network.name));
            if let Some(before) = before.filter(|it| it.id == network.id)
                && snapshot.has_overwritten_network(&network.name)
                && is_due(&network.id)
            {
                self.rewrite(before);
            }
            if snapshot.has_overwritten_endpoint(&network.id, record.address) {
                if is_due(&record.id) {
                    self.reclaim(network, record);
                }
            } else if snapshot.has_lost_network(&network.name) {
                // Its endpoints can be announced when it is there.
                if is_due(&network.id) {
                    self.restore(network);
                }
            } else if snapshot.has_lost_endpoint(&network.id, record.address) && is_due(&record.id)
            {
                self.publish(network, record);
            }
        }
    }

    /// Removes the record of an endpoint that is gone, now or at a repair after Consul is back.
    pub(super) fn release(&self, network: &NetworkRecord, record: &EndpointRecord) {
        lock(&self.gone).insert(record.id.clone(), (network.clone(), record.clone()));
        self.try_release((network.clone(), record.clone()));
    }

    fn try_release(&self, (network, record): Gone) {
        let (shared, gone) = (Arc::clone(&self.shared), Arc::clone(&self.gone));
        self.spawn(record.id.clone(), async move {
            match shared.consul.release_endpoint(&network.id, &record).await {
                Ok(()) => drop(lock(&gone).remove(&record.id)),
                Err(error) => tracing::warn!(
                    error = format!("{error:#}"),
                    "the record of an endpoint that is gone stays until the next try"
                ),
            }
        });
    }

    fn publish(&self, network: &NetworkRecord, record: &EndpointRecord) {
        let (network, record) = (network.clone(), record.clone());
        let (shared, gone) = (Arc::clone(&self.shared), Arc::clone(&self.gone));
        self.spawn(record.id.clone(), async move {
            match shared.consul.publish_endpoint(&network, &record).await {
                Ok(()) => tracing::info!(
                    network = network.name, address = %record.address,
                    "put an endpoint's lost record back"
                ),
                Err(error) => {
                    tracing::warn!(error = format!("{error:#}"), "an endpoint is not announced");
                }
            }
            // A detach forgets the endpoint first and releases the record then. One that did both
            // while this write was on its way had its record put back by it.
            if !shared.view().local.contains_key(&record.id) {
                lock(&gone).insert(record.id.clone(), (network.clone(), record.clone()));
                if shared.consul.release_endpoint(&network.id, &record).await.is_ok() {
                    lock(&gone).remove(&record.id);
                }
            }
        });
    }

    fn reclaim(&self, network: &NetworkRecord, record: &EndpointRecord) {
        let (network, record) = (network.clone(), record.clone());
        let consul = self.shared.consul.clone();
        self.spawn(record.id.clone(), async move {
            match consul.reclaim_endpoint(&network, &record).await {
                Ok(()) => tracing::warn!(
                    network = network.name, address = %record.address,
                    "somebody wrote over an endpoint's record; put it back"
                ),
                Err(error) => {
                    tracing::warn!(error = format!("{error:#}"), "an endpoint is not announced");
                }
            }
        });
    }

    fn rewrite(&self, network: &NetworkRecord) {
        let (consul, network) = (self.shared.consul.clone(), network.clone());
        self.spawn(network.id.clone(), async move {
            match consul.rewrite_network(&network).await {
                Ok(()) => tracing::warn!(
                    network = network.name,
                    "somebody wrote over a network's record; put it back"
                ),
                Err(error) => {
                    tracing::warn!(error = format!("{error:#}"), "a network in use has no record");
                }
            }
        });
    }

    fn restore(&self, network: &NetworkRecord) {
        let (consul, network) = (self.shared.consul.clone(), network.clone());
        self.spawn(network.id.clone(), async move {
            match consul.restore_network(&network).await {
                Ok(()) => tracing::info!(network = network.name, "put a lost network back"),
                Err(error) => {
                    tracing::warn!(error = format!("{error:#}"), "a network in use has no record");
                }
            }
        });
    }

    /// Runs `work` unless the same object's is still under way.
    fn spawn(&self, id: String, work: impl Future<Output = ()> + Send + 'static) {
        let busy = Arc::clone(&self.busy);
        if !lock(&busy).insert(id.clone()) {
            return;
        }
        tokio::spawn(async move {
            work.await;
            lock(&busy).remove(&id);
        });
    }
}

fn lock<T>(shared: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    shared.lock().unwrap_or_else(PoisonError::into_inner)
}
