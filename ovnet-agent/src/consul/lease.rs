//! This host's own record, held by a session for as long as the agent lives.

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use anyhow::{Context as _, Result, anyhow};
use tokio::{
    sync::{Notify, oneshot, watch},
    task::AbortHandle,
};

use super::{
    client::{Consul, Entry},
    networks::encode,
    schema::HostRecord,
    transaction::Operation,
    watch::backoff,
};

/// How long the session lives without renewal; Consul may take up to twice as long to end it.
const TTL: Duration = Duration::from_secs(15);
/// Between renewals: several may fail before the lease is in danger. It is also how long it takes
/// at most to see that Consul came back without this host's record.
const RENEWAL: Duration = Duration::from_secs(3);
/// How long withdrawing may take: a stop must not hang on a Consul that is gone.
const WITHDRAWAL: Duration = Duration::from_secs(5);

/// The task that keeps `hosts/<node>` written and locked. Dropping it stops the renewal, and the
/// lease is lost after the TTL; [`Lease::withdraw`] is the clean way out.
#[derive(Debug)]
pub struct Lease {
    record: watch::Sender<HostRecord>,
    problem: Arc<Mutex<Option<String>>>,
    stop: Arc<Notify>,
    look: Arc<Notify>,
    changed: Arc<Notify>,
    stopped: oneshot::Receiver<Result<()>>,
    task: AbortHandle,
}

/// Whether a [`Lease`] is held. What only the one owner of a host's name may do waits for it.
#[derive(Clone, Debug)]
pub struct Announced(Arc<Mutex<Option<String>>>);

impl Announced {
    /// Whether it is held now.
    pub fn now(&self) -> bool {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).is_none()
    }
}

impl Lease {
    /// Starts announcing this host, and goes on trying for as long as it takes.
    pub fn spawn(consul: Consul, record: HostRecord) -> Self {
        let (record, records) = watch::channel(record);
        let problem = Arc::new(Mutex::new(Some("not announced yet".to_owned())));
        let (stop, look) = (Arc::new(Notify::new()), Arc::new(Notify::new()));
        let changed = Arc::new(Notify::new());
        let (done, stopped) = oneshot::channel();
        let (problem_of, changed_of) = (problem.clone(), changed.clone());
        let keeper =
            Keeper { consul, records, problem: problem_of, changed: changed_of, session: None };
        let task = tokio::spawn(keeper.run(stop.clone(), look.clone(), done)).abort_handle();
        Self { record, problem, stop, look, changed, stopped, task }
    }

    /// Announces something else from now on: the VTEP address or the MTU changed.
    pub fn update(&self, record: HostRecord) {
        self.record.send_if_modified(|current| {
            let changed = *current != record;
            *current = record;
            changed
        });
    }

    /// What is announced, or to be.
    pub fn record(&self) -> HostRecord {
        self.record.borrow().clone()
    }

    /// Looks at once, instead of at the next renewal, whether the record is as it must be: somebody
    /// saw that it is not.
    pub fn look(&self) {
        self.look.notify_one();
    }

    /// Returns when [`Self::problem`] is another one than at the last return. For one caller.
    pub async fn changed(&self) {
        self.changed.notified().await;
    }

    /// Tells from elsewhere whether this host is announced.
    pub fn announced(&self) -> Announced {
        Announced(Arc::clone(&self.problem))
    }

    /// Why this host is not announced at the moment, in one line; `None` while it is.
    pub fn problem(&self) -> Option<String> {
        self.problem.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Takes the announcement back, so that the others need not wait for the lease to run out.
    /// Gives up after a few seconds.
    pub async fn withdraw(mut self) -> Result<()> {
        // A permit is kept if the task is not waiting for it just now.
        self.stop.notify_one();
        let gave_up = || anyhow!("no answer within {} s", WITHDRAWAL.as_secs());
        match tokio::time::timeout(WITHDRAWAL, &mut self.stopped).await {
            Ok(Ok(result)) => result,
            Ok(Err(_)) => Err(anyhow!("its task is gone")),
            Err(_) => Err(gave_up()),
        }
        .context("withdraw this host from Consul; its lease runs out by itself")
    }
}

impl Consul {
    /// Deletes this host's record, whoever holds its lock, and says whether there was one. For
    /// taking a host out for good; a running agent withdraws by its [`Lease`].
    pub async fn remove_host(&self) -> Result<bool> {
        let key = format!("hosts/{}", self.node());
        let Some(entry) = self.get(&key).await? else { return Ok(false) };
        let operations = vec![Operation::delete_cas(key, entry.modify_index)];
        match self.transact(operations).await? {
            Ok(()) => Ok(true),
            Err(conflict) => Err(anyhow!("the record of host {} changed: {conflict}", self.node())),
        }
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        self.task.abort();
    }
}

struct Keeper {
    consul: Consul,
    records: watch::Receiver<HostRecord>,
    problem: Arc<Mutex<Option<String>>>,
    changed: Arc<Notify>,
    session: Option<String>,
}

impl Keeper {
    async fn run(
        mut self,
        stop: Arc<Notify>,
        look: Arc<Notify>,
        done: oneshot::Sender<Result<()>>,
    ) {
        let mut failures = 0;
        loop {
            // A stop waits for the step under way, which is bounded, rather than leave a session
            // behind that nobody knows the id of.
            let pause = match self.step().await {
                Ok(()) => {
                    failures = 0;
                    self.report(None);
                    RENEWAL
                }
                Err(error) => {
                    self.report(Some(format!("{error:#}")));
                    let pause = backoff(failures).min(RENEWAL);
                    failures = failures.saturating_add(1);
                    pause
                }
            };
            tokio::select! {
                () = stop.notified() => break,
                () = tokio::time::sleep(pause) => {}
                // Not while it fails: what is seen then is what is being mended.
                () = look.notified(), if failures == 0 => {}
                changed = self.records.changed() => {
                    if changed.is_err() {
                        // The Lease is being dropped, and with it this task.
                        return;
                    }
                }
            }
        }
        // The receiver is gone only where withdraw gave up waiting.
        let _ = done.send(self.withdraw().await);
    }

    /// Makes sure, once, that a live session of ours holds the record and that it says what it
    /// must.
    async fn step(&mut self) -> Result<()> {
        let record = self.records.borrow_and_update().clone();
        if let Some(session) = &self.session
            && !self.consul.renew_session(session).await?
        {
            tracing::warn!("Consul ended this host's session; announcing the host again");
            self.session = None;
        }
        let session = match &self.session {
            Some(session) => session.clone(),
            None => {
                let session = self.consul.create_session(TTL).await?;
                self.session = Some(session.clone());
                session
            }
        };
        let (key, value) = (self.key(), encode(&record)?);
        if let Some(entry) = self.consul.get(&key).await? {
            match &entry.session {
                Some(holder) if *holder == session && entry.value == value => return Ok(()),
                Some(holder) if *holder == session => {}
                Some(holder) => self.take_over(&record, &entry, holder).await?,
                None => {}
            }
        }
        let lock = Operation::lock(key, value, session);
        self.consul.transact(vec![lock]).await?.map_err(|conflict| {
            anyhow!("the record of host {} could not be locked: {conflict}", record.node)
        })
    }

    /// Ends the session of an earlier life of this agent. What tells it from another machine that
    /// was given the same name is the VTEP address.
    async fn take_over(&self, record: &HostRecord, entry: &Entry, holder: &str) -> Result<()> {
        match HostRecord::parse(&record.node, &entry.value) {
            Ok(there) if there.vtep == record.vtep => {
                tracing::info!("taking over the record of this host from the agent before");
                self.consul.destroy_session(holder).await
            }
            Ok(there) => Err(anyhow!(
                "another agent with VTEP {} is announced as host {} and alive: give one of the \
                 two another --node",
                there.vtep,
                record.node
            )),
            Err(why) => Err(anyhow!(
                "another agent is announced as host {}, in a way that cannot be read ({why:#}): \
                 give one of the two another --node",
                record.node
            )),
        }
    }

    async fn withdraw(&mut self) -> Result<()> {
        let Some(session) = self.session.take() else { return Ok(()) };
        let key = self.key();
        // Only what our session holds is ours to delete.
        let entry = self.consul.get(&key).await?;
        if let Some(entry) = entry.filter(|entry| entry.session.as_deref() == Some(&*session)) {
            // On a conflict someone else has it by now.
            let _ =
                self.consul.transact(vec![Operation::delete_cas(key, entry.modify_index)]).await?;
        }
        self.consul.destroy_session(&session).await
    }

    fn report(&self, problem: Option<String>) {
        let mut current = self.problem.lock().unwrap_or_else(PoisonError::into_inner);
        if *current == problem {
            return;
        }
        match &problem {
            Some(why) => tracing::warn!("this host is not announced: {why}; trying on"),
            None => tracing::info!("this host is announced in Consul"),
        }
        *current = problem;
        // A permit is kept for whoever is not waiting just now.
        self.changed.notify_one();
    }

    fn key(&self) -> String {
        format!("hosts/{}", self.records.borrow().node)
    }
}
