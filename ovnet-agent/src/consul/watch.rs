//! Blocking queries into snapshots of everything this host needs to know.
//!
//! What was read stays until its deletion was read (invariant 7): a failed query, an empty
//! answer, an index that went backwards, a sentinel that is not the one we knew, and a record that
//! became unreadable all keep what the snapshot had. [`super`] says what the sentinel is for.

mod lost;

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::Result;
use tokio::{
    sync::{mpsc, watch},
    task::{AbortHandle, JoinSet},
    time::MissedTickBehavior,
};

use super::{
    client::{Consul, Listing},
    folder::{Folder, Follow, Outcome},
    networks::{endpoints_folder, network_key},
    orphans::Orphans,
    schema::{EndpointRecord, HostRecord, NetworkRecord},
    sentinel,
    snapshot::{HostEntry, Snapshot},
    transaction::Operation,
};

/// The pause after a good answer: a burst of writes then costs a few queries, not one each.
const PAUSE: Duration = Duration::from_millis(20);
/// An answer that comes sooner than this with no new index is not one of a query that waited.
const TOO_SOON: Duration = Duration::from_secs(1);
/// The pause after the first failure; doubled with each further one, up to [`LONGEST_BACKOFF`].
const FIRST_BACKOFF: Duration = Duration::from_millis(250);
/// The longest pause between attempts, before jitter of up to as much again. Short, because a
/// cluster must have converged within 5 s of Consul answering, and putting back what was lost takes
/// several steps one after the other. What it costs is a few requests a second and host.
const LONGEST_BACKOFF: Duration = Duration::from_secs(1);

/// Between looks at what Consul has lost and nobody puts back.
const LOOK: Duration = Duration::from_secs(1);

/// The task that watches; it ends when this is dropped.
#[derive(Debug)]
pub struct Watcher {
    wanted: mpsc::UnboundedSender<BTreeSet<String>>,
    task: AbortHandle,
}

impl Watcher {
    /// Starts watching hosts and networks. The receiver's first value is an empty snapshot in
    /// which nothing was read yet.
    pub fn spawn(consul: Consul) -> (Self, watch::Receiver<Arc<Snapshot>>) {
        let initial = Snapshot {
            consul_state: format!("connecting to Consul at {}", consul.describe()),
            ..Snapshot::default()
        };
        let (publish, snapshots) = watch::channel(Arc::new(initial));
        consul.remember(snapshots.clone());
        let (wanted, requests) = mpsc::unbounded_channel();
        let task = tokio::spawn(Watch::new(consul, publish).run(requests)).abort_handle();
        (Self { wanted, task }, snapshots)
    }

    /// Says of which networks, by id, the endpoints are to be watched from now on, and of no
    /// other.
    pub fn want_endpoints(&self, network_ids: BTreeSet<String>) {
        // The task ends only with us, so there is always someone to receive it.
        let _ = self.wanted.send(network_ids);
    }
}

impl Drop for Watcher {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// What is watched.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Subject {
    Hosts,
    Networks,
    Endpoints(String),
}

impl Subject {
    fn folder(&self) -> String {
        match self {
            Self::Hosts => "hosts/".into(),
            Self::Networks => "networks/".into(),
            Self::Endpoints(id) => endpoints_folder(id),
        }
    }
}

/// One watched folder: its records and the query under way.
struct Watched {
    records: Records,
    failures: u32,
    /// Answers without the sentinel since the last one that had it.
    bare: u32,
    /// Answers in a row whose index did not go forwards. Where that goes on, waiting for the next
    /// one would be asking as fast as Consul answers.
    odd: u32,
    problem: Option<String>,
    query: AbortHandle,
    /// The index that the query under way waits for; 0 for one that asks for what there is.
    asked: u64,
    /// Tells the answers of this watching of the folder from those of an earlier one.
    generation: u64,
}

enum Records {
    Hosts(Folder<HostEntry>),
    Networks(Folder<NetworkRecord>),
    Endpoints(Folder<EndpointRecord>),
}

impl Records {
    fn kept(&self) -> Vec<&str> {
        match self {
            Self::Hosts(folder) => folder.kept().collect(),
            Self::Networks(folder) => folder.kept().collect(),
            Self::Endpoints(folder) => folder.kept().collect(),
        }
    }

    fn overwritten(&self) -> Vec<&str> {
        match self {
            Self::Hosts(folder) => folder.overwritten().collect(),
            Self::Networks(folder) => folder.overwritten().collect(),
            Self::Endpoints(folder) => folder.overwritten().collect(),
        }
    }
}

struct Answer {
    subject: Subject,
    generation: u64,
    took: Duration,
    result: Result<Option<Listing>>,
}

struct Watch {
    consul: Consul,
    publish: watch::Sender<Arc<Snapshot>>,
    watched: BTreeMap<Subject, Watched>,
    queries: JoinSet<Answer>,
    generations: u64,
    orphans: Orphans,
    wiped: Option<Instant>,
    remembered: BTreeSet<String>,
}

impl Watch {
    fn new(consul: Consul, publish: watch::Sender<Arc<Snapshot>>) -> Self {
        Self {
            consul,
            publish,
            watched: BTreeMap::new(),
            queries: JoinSet::new(),
            generations: 0,
            orphans: Orphans::default(),
            wiped: None,
            remembered: BTreeSet::new(),
        }
    }

    async fn run(mut self, mut requests: mpsc::UnboundedReceiver<BTreeSet<String>>) {
        self.start(Subject::Hosts);
        self.start(Subject::Networks);
        let mut look = tokio::time::interval(LOOK);
        look.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                _ = look.tick() => self.give_up_orphans(),
                request = requests.recv() => match request {
                    Some(network_ids) => self.want(&network_ids),
                    None => return,
                },
                Some(answer) = self.queries.join_next() => match answer {
                    Ok(answer) => self.take_in(answer),
                    // Aborted by ourselves, because it is not wanted any more.
                    Err(error) if error.is_cancelled() => {}
                    Err(error) => tracing::error!(%error, "a query to Consul died"),
                },
            }
        }
    }

    fn start(&mut self, subject: Subject) {
        self.generations += 1;
        let generation = self.generations;
        let query = self.query(subject.clone(), generation, Duration::ZERO, 0, false);
        let folder = subject.folder();
        let records = match &subject {
            Subject::Hosts => Records::Hosts(Folder::new(folder)),
            Subject::Networks => Records::Networks(Folder::new(folder)),
            Subject::Endpoints(_) => Records::Endpoints(Folder::new(folder)),
        };
        let watched = Watched {
            records,
            failures: 0,
            bare: 0,
            odd: 0,
            problem: None,
            query,
            asked: 0,
            generation,
        };
        self.watched.insert(subject, watched);
    }

    fn want(&mut self, network_ids: &BTreeSet<String>) {
        let unwanted: Vec<_> = self
            .watched
            .keys()
            .filter(|subject| match subject {
                Subject::Endpoints(id) => !network_ids.contains(id),
                _ => false,
            })
            .cloned()
            .collect();
        for subject in &unwanted {
            if let Some(watched) = self.watched.remove(subject) {
                watched.query.abort();
            }
        }
        for id in network_ids {
            let subject = Subject::Endpoints(id.clone());
            if !self.watched.contains_key(&subject) {
                self.start(subject);
            }
        }
        if !unwanted.is_empty() {
            self.publish();
        }
    }

    /// Asks again after `pause`: at once what there is for index 0, else what comes after `index`.
    fn query(
        &mut self,
        subject: Subject,
        generation: u64,
        pause: Duration,
        index: u64,
        make_sentinel: bool,
    ) -> AbortHandle {
        let consul = self.consul.clone();
        let network = match &subject {
            Subject::Endpoints(id) => self.name_of(id),
            _ => None,
        };
        self.queries.spawn(async move {
            tokio::time::sleep(pause).await;
            let started = Instant::now();
            let result = async {
                if make_sentinel {
                    create_sentinel(&consul, &subject, network.as_deref()).await?;
                }
                let folder = subject.folder();
                match index {
                    0 => consul.list(&folder).await,
                    index => consul.list_after(&folder, index).await,
                }
            }
            .await;
            Answer { subject, generation, took: started.elapsed(), result }
        })
    }

    fn name_of(&self, network_id: &str) -> Option<String> {
        let Some(Watched { records: Records::Networks(networks), .. }) =
            self.watched.get(&Subject::Networks)
        else {
            return None;
        };
        let found = networks.records().find(|(_, network)| network.id == network_id);
        found.map(|(name, _)| name.to_owned())
    }

    fn take_in(&mut self, Answer { subject, generation, took, result }: Answer) {
        let Some(watched) = self.watched.get_mut(&subject) else { return };
        if watched.generation != generation {
            return;
        }
        let outcome = result.map(|listing| match &mut watched.records {
            Records::Hosts(folder) => folder.take_in(listing, |name, entry| {
                let record = HostRecord::parse(name, &entry.value)?;
                Ok(HostEntry { record, locked: entry.session.is_some() })
            }),
            Records::Networks(folder) => {
                folder.take_in(listing, |name, entry| NetworkRecord::parse(name, &entry.value))
            }
            Records::Endpoints(folder) => {
                folder.take_in(listing, |name, entry| EndpointRecord::parse(name, &entry.value))
            }
        });
        let (mut start_over, mut odd) = (false, false);
        let (problem, next, make_sentinel) = match outcome {
            Ok(Outcome::Good { next }) => {
                odd = next <= watched.asked && took < TOO_SOON;
                (None, next, false)
            }
            Ok(Outcome::WentBack { next }) => {
                (start_over, odd) = (true, true);
                (None, next, false)
            }
            Ok(Outcome::NoSentinel { lost }) => {
                start_over = lost;
                (None, 0, true)
            }
            Err(error) => (Some(error), 0, false),
        };
        let pause = if problem.is_some() {
            let pause = backoff(watched.failures);
            watched.failures = watched.failures.saturating_add(1);
            pause
        } else if make_sentinel {
            let pause = backoff(watched.bare);
            watched.bare = watched.bare.saturating_add(1);
            // The first try needs no waiting: this is how a new cluster begins, and how one goes
            // on whose Consul came back empty.
            if watched.bare == 1 { Duration::ZERO } else { pause }
        } else {
            (watched.failures, watched.bare) = (0, 0);
            watched.odd = if odd { watched.odd.saturating_add(1) } else { 0 };
            match watched.odd {
                0 | 1 if next == 0 => FIRST_BACKOFF,
                0 | 1 => PAUSE,
                more => backoff(more - 2),
            }
        };
        let problem = problem.map(|error| format!("{error:#}"));
        if watched.problem != problem {
            match &problem {
                Some(why) => tracing::warn!("{why}; going on with what was read before"),
                None => tracing::info!("{} is read from Consul", subject.folder()),
            }
            watched.problem = problem;
        }
        let query = self.query(subject.clone(), generation, pause, next, make_sentinel);
        if let Some(watched) = self.watched.get_mut(&subject) {
            (watched.query, watched.asked) = (query, next);
        }
        if start_over {
            self.remember();
            self.start_over(|other, it| *other != subject && it.asked != 0);
        } else if subject == Subject::Networks {
            // A network that was put back may be one whose folder of endpoints waits for it.
            self.start_over(|other, it| matches!(other, Subject::Endpoints(_)) && it.bare > 0);
        }
        self.publish();
    }

    /// Reads folders from the start: a query that waits for an index that Consul will not reach for
    /// a long time would see nothing until it times out.
    fn start_over(&mut self, which: impl Fn(&Subject, &Watched) -> bool) {
        let others = self.watched.iter().filter(|(other, it)| which(other, it));
        let others: Vec<_> = others.map(|(other, _)| other.clone()).collect();
        for subject in others {
            self.generations += 1;
            let generation = self.generations;
            // The query that is given up here may have been about to make the sentinel.
            let make_sentinel = self.watched.get(&subject).is_some_and(|it| it.bare > 0);
            let query = self.query(subject.clone(), generation, Duration::ZERO, 0, make_sentinel);
            if let Some(watched) = self.watched.get_mut(&subject) {
                std::mem::replace(&mut watched.query, query).abort();
                (watched.generation, watched.asked) = (generation, 0);
            }
        }
    }

    fn publish(&self) {
        let mut snapshot = Snapshot {
            wiped: self.wiped,
            remembered: self.remembered.clone(),
            consul_state: "connected".into(),
            ..Snapshot::default()
        };
        for (subject, Watched { records, problem, .. }) in &self.watched {
            if let Some(problem) = problem {
                snapshot.consul_state.clone_from(problem);
            }
            let folder = subject.folder();
            let key = |name: &str| format!("{folder}{name}");
            snapshot.lost.extend(records.kept().into_iter().map(key));
            snapshot.overwritten.extend(records.overwritten().into_iter().map(key));
            match (subject, records) {
                (_, Records::Hosts(folder)) => {
                    snapshot.unreadable += folder.unreadable().len();
                    snapshot.hosts = folder.was_read().then(|| by_name(folder));
                }
                (_, Records::Networks(folder)) => {
                    snapshot.unreadable += folder.unreadable().len();
                    snapshot.unreadable_networks = folder.unreadable().map(str::to_owned).collect();
                    snapshot.identity = folder.identity().map(ToString::to_string);
                    snapshot.networks = folder.was_read().then(|| by_name(folder));
                }
                (Subject::Endpoints(id), Records::Endpoints(folder)) => {
                    snapshot.unreadable += folder.unreadable().len();
                    if folder.was_read() {
                        let identity = folder.identity().map(|it| (id.clone(), it.to_string()));
                        snapshot.endpoint_identities.extend(identity);
                        let records = folder.records();
                        let records = records.map(|(_, record)| (record.address, record.clone()));
                        snapshot.endpoints.insert(id.clone(), records.collect());
                    }
                }
                (_, Records::Endpoints(_)) => {}
            }
        }
        if snapshot.hosts.is_none() || snapshot.networks.is_none() {
            // Until both were read, a folder that was says nothing about Consul as a whole.
            if snapshot.consul_state == "connected" {
                snapshot.consul_state =
                    format!("connecting to Consul at {}", self.consul.describe());
            }
        }
        self.publish.send_if_modified(|current| {
            let changed = **current != snapshot;
            if changed {
                *current = Arc::new(snapshot);
            }
            changed
        });
    }
}

/// Makes a folder's sentinel, unless there is one by now, or the network it belongs to is gone.
async fn create_sentinel(consul: &Consul, subject: &Subject, network: Option<&str>) -> Result<()> {
    let mut operations = vec![sentinel::create(&subject.folder())];
    if let Subject::Endpoints(id) = subject {
        // A removed network must stay removed, and nobody would ever clean up a folder made for it.
        let Some(name) = network else { return Ok(()) };
        let Some(entry) = consul.get(&network_key(name)).await? else { return Ok(()) };
        if !NetworkRecord::parse(name, &entry.value).is_ok_and(|network| network.id == *id) {
            return Ok(());
        }
        operations.push(Operation::check_index(entry.key, entry.modify_index));
    }
    // A conflict means that another host made it, which is as good.
    let _ = consul.transact(operations).await?;
    Ok(())
}

fn by_name<T: Clone + Follow>(folder: &Folder<T>) -> BTreeMap<String, T> {
    folder.records().map(|(name, record)| (name.to_owned(), record.clone())).collect()
}

/// How long to wait after so many failures before: doubling, bounded, and with jitter so that the
/// hosts of a cluster do not all come back to a restarted Consul in the same instant.
pub(super) fn backoff(failures: u32) -> Duration {
    let base = FIRST_BACKOFF.saturating_mul(1 << failures.min(10)).min(LONGEST_BACKOFF);
    base + base.mul_f64(rand::random_range(0.0..1.0))
}
