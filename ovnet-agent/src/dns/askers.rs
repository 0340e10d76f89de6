//! Who asks: the networks of the container that has a source address.
//!
//! A query comes from any address inside a container, of an overlay or of docker_gwbridge, whose
//! addresses only Docker and the kernel know. So the addresses inside the sandboxes of this host's
//! endpoints are listed, which works for every runtime, and what was found is remembered
//! (in `memory`). What is not remembered is looked for by one task that all who wait share: first
//! where an asker was before and in sandboxes never looked into, which is cheap and done at once,
//! then everywhere, at most four times a second. It is a task of its own because those who wait
//! give up: a round that takes longer than they wait is of use to the next who asks.

use std::{
    net::Ipv4Addr,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use anyhow::Result;
use tokio::{
    sync::{Notify, oneshot},
    task::JoinHandle,
    time::{sleep_until, timeout},
};

mod memory;

use self::memory::{Group, Memory};
use super::server::{Asker, Networks};
use crate::consul::schema::NetworkRecord;

/// Least time between the starts of two rounds through all sandboxes, whatever is asked.
pub const SCANS: Duration = Duration::from_millis(250);
/// Least time between two attempts to find the sandbox of an endpoint that had none yet.
const REGROUP: Duration = Duration::from_millis(50);
/// How long looking into one sandbox may take; others wait.
const LOOK_INTO: Duration = Duration::from_secs(1);

/// An endpoint of this host, as far as it tells who asks.
#[derive(Clone, Debug)]
pub struct Sandbox {
    /// Id of the endpoint.
    pub endpoint: String,
    /// The network it is on.
    pub network: NetworkRecord,
    /// Path of its network namespace.
    pub netns: PathBuf,
}

/// Where endpoints and addresses are looked up.
pub trait Places: Send + Sync + 'static {
    /// Ids of this host's endpoints, in a fixed order. Asked for with every query.
    fn endpoints(&self) -> Vec<String>;
    /// This host's endpoints.
    fn sandboxes(&self) -> Vec<Sandbox>;
    /// What tells one namespace from another (device and inode), however its path is spelled;
    /// `None` where there is none, yet or any more.
    fn identity(&self, netns: &Path) -> Option<(u64, u64)>;
    /// The IPv4 addresses inside a namespace.
    fn addresses(&self, netns: &Path) -> impl Future<Output = Result<Vec<Ipv4Addr>>> + Send;
}

/// The memory of who has which address, and the task that fills it.
#[derive(Debug)]
pub struct Askers<P>(Arc<Shared<P>>);

#[derive(Debug)]
struct Shared<P> {
    places: P,
    memory: Mutex<Memory>,
    /// Somebody waits who may not have waited when the task looked last.
    asked: Notify,
}

impl<P: Places> Askers<P> {
    /// Nothing is known yet.
    pub fn new(places: P) -> Self {
        let (memory, asked) = (Mutex::default(), Notify::new());
        Self(Arc::new(Shared { places, memory, asked }))
    }

    /// What is known of who has the address, without waiting. Needs the current tokio runtime:
    /// what has become doubtful is looked at again in the background.
    pub fn known(&self, source: Ipv4Addr) -> Asker {
        let mut memory = self.0.memory();
        let (asker, doubtful) = memory.known(source);
        if doubtful && memory.doubtful.insert(source) {
            self.0.wake(&mut memory);
        }
        asker
    }

    /// The networks of who has the address, none for a stranger, looking where needed.
    pub async fn find(&self, source: Ipv4Addr) -> Networks {
        let (tell, told) = oneshot::channel();
        {
            let mut memory = self.0.memory();
            memory.waiting.entry(source).or_default().push(tell);
            self.0.wake(&mut memory);
        }
        // An error is a task that panicked.
        told.await.unwrap_or_default()
    }
}

impl<P: Places> Shared<P> {
    fn wake(self: &Arc<Self>, memory: &mut Memory) {
        if memory.scanner.as_ref().is_none_or(JoinHandle::is_finished) {
            memory.scanner = Some(tokio::spawn(Arc::clone(self).scan()));
        } else {
            self.asked.notify_one();
        }
    }

    /// Looks until nobody waits.
    async fn scan(self: Arc<Self>) {
        loop {
            let everywhere = {
                let mut memory = self.memory();
                if memory.absent && memory.grouped.is_none_or(|at| at.elapsed() >= REGROUP) {
                    self.regroup(&mut memory);
                }
                memory.tell();
                if !memory.is_awaited() {
                    // A next one may be made from now on, as the memory is locked.
                    memory.scanner = None;
                    return;
                }
                memory.everywhere
            };
            if self.look_where_likely().await {
                continue;
            }
            match everywhere.map(|began| began + SCANS) {
                Some(next) if next > Instant::now() => tokio::select! {
                    () = sleep_until(next.into()) => {}
                    // By one who may be found without a round.
                    () = self.asked.notified() => {}
                },
                _ => self.look_everywhere().await,
            }
        }
    }

    /// Looks where somebody was before and where nobody looked before, as most who are not known
    /// have just been started. Whether there was such a sandbox.
    async fn look_where_likely(&self) -> bool {
        let groups = self.memory().likely();
        for group in &groups {
            self.look(group).await;
        }
        !groups.is_empty()
    }

    /// Looks everywhere while one is not found who waited when it began, even if none of them waits
    /// any more: most ask again.
    async fn look_everywhere(&self) {
        let (groups, sources) = {
            let mut memory = self.memory();
            memory.everywhere = Some(Instant::now());
            let sources: Vec<Ipv4Addr> = memory.waiting.keys().copied().collect();
            (memory.groups.clone(), sources)
        };
        let mut all = true;
        for group in &groups {
            // A long round delays nobody who is easily found.
            self.look_where_likely().await;
            all &= self.look(group).await;
            let mut memory = self.memory();
            memory.tell();
            if sources.iter().all(|source| matches!(memory.known(*source).0, Asker::Known(_))) {
                return;
            }
        }
        self.look_where_likely().await;
        self.memory().conclude(&sources, all);
    }

    /// Looks into one sandbox. It may be gone, as its container may be about to stop: then nobody
    /// is in it, and the result is `false`.
    async fn look(&self, group: &Group) -> bool {
        let inside = match timeout(LOOK_INTO, self.places.addresses(&group.netns)).await {
            Ok(Ok(inside)) => Some(inside),
            Ok(Err(error)) => {
                tracing::debug!("look for who asks: {error:#}");
                self.memory().remember(group, Vec::new());
                None
            }
            Err(_) => {
                tracing::debug!("look for who asks in {}: no answer", group.netns.display());
                None
            }
        };
        // A look that did not end says nothing against what was seen before.
        let Some(inside) = inside else { return false };
        self.memory().remember(group, inside);
        true
    }

    /// The memory, without what it remembers of endpoints that are gone.
    fn memory(&self) -> MutexGuard<'_, Memory> {
        let endpoints = self.places.endpoints();
        // Every change leaves it whole.
        let mut memory = self.memory.lock().unwrap_or_else(PoisonError::into_inner);
        if memory.endpoints != endpoints {
            memory.endpoints = endpoints;
            memory.distrust();
            self.regroup(&mut memory);
        }
        memory
    }

    /// Lists the sandboxes, each once, with all endpoints in it. An endpoint may be there before
    /// its sandbox: Docker up to 27 names the namespace to a driver before it makes it.
    fn regroup(&self, memory: &mut Memory) {
        let mut groups: Vec<Group> = Vec::new();
        let mut absent = false;
        for Sandbox { endpoint, network, netns } in self.places.sandboxes() {
            let Some(identity) = self.places.identity(&netns) else {
                absent = true;
                continue;
            };
            match groups.iter_mut().find(|group| group.identity == identity) {
                Some(group) => {
                    group.endpoints.push(endpoint);
                    group.networks = group.networks.iter().cloned().chain([network]).collect();
                }
                None => groups.push(Group {
                    identity,
                    netns,
                    endpoints: vec![endpoint],
                    networks: [network].into(),
                }),
            }
        }
        memory.replace(groups, absent);
    }
}

#[cfg(test)]
mod tests;
