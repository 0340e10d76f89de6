//! What the simulated hosts do at Consul: write records, have endpoints come and go, wait for news.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Context as _, Result};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use hyper::Method;
use serde_json::{Value, json};
use tokio::task::JoinHandle;
use tokio::time::{Instant, MissedTickBehavior};

use super::cluster::{Cluster, Record};
use super::http::Connection;

/// Operations that Consul takes in one transaction.
const TRANSACTION: usize = 64;
/// How many endpoints that come and go are there at a time.
const PASSING: u32 = 50;
/// What an agent waits after an answer before it asks again.
const PAUSE: Duration = Duration::from_millis(20);

/// Consul, as a simulated host sees it.
pub(super) struct Store {
    connection: Connection,
}

impl Store {
    /// Connects.
    pub(super) async fn open(consul: SocketAddr) -> Result<Self> {
        Ok(Self { connection: Connection::tcp(consul).await? })
    }

    /// Writes the whole cluster. The hosts' records are locked by one session, shared by all, that
    /// does not end: what keeping a thousand sessions costs is not measured here.
    pub(super) async fn fill(&mut self, cluster: &Cluster) -> Result<()> {
        let session = json!({ "Name": "simulated hosts", "Behavior": "release", "NodeChecks": [] });
        let path = "/v1/session/create";
        let answer = self.connection.ask(Method::PUT, path, session.to_string()).await?;
        let session: Value = serde_json::from_slice(&answer).context("read the session")?;
        let session = session.get("ID").and_then(Value::as_str).context("a session has an ID")?;
        let hosts = cluster.host_records().map(|it| lock(&it, session));
        let networks = cluster.network_records();
        let endpoints = cluster.endpoint_records().map(|it| set(&it));
        let all = networks.iter().map(set).chain(hosts).chain(endpoints);
        let mut batch = Vec::new();
        for operation in all {
            batch.push(operation);
            if batch.len() == TRANSACTION {
                self.transact(std::mem::take(&mut batch)).await?;
            }
        }
        self.transact(batch).await
    }

    /// Writes a record.
    pub(super) async fn write(&mut self, record: &Record) -> Result<()> {
        self.transact(vec![set(record)]).await
    }

    /// Deletes a record.
    pub(super) async fn delete(&mut self, record: &Record) -> Result<()> {
        self.transact(vec![delete(record)]).await
    }

    async fn transact(&mut self, operations: Vec<Value>) -> Result<()> {
        let body = Value::from(operations).to_string();
        self.connection.ask(Method::PUT, "/v1/txn", body).await.map(drop)
    }
}

/// Endpoints that come and go until this is dropped.
pub(super) struct Churn {
    task: JoinHandle<Result<()>>,
    changes: Arc<AtomicU64>,
    since: Instant,
}

impl Churn {
    /// Starts so many changes a second: every other one an endpoint that comes, or one that goes.
    pub(super) async fn start(
        consul: SocketAddr,
        cluster: Cluster,
        per_second: u32,
    ) -> Result<Self> {
        let mut store = Store::open(consul).await?;
        let changes = Arc::new(AtomicU64::new(0));
        let counted = Arc::clone(&changes);
        let task = tokio::spawn(async move {
            let mut ticks = tokio::time::interval(Duration::from_secs(1) / per_second);
            ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
            // Twice as many as are there at a time, in a circle.
            for turn in (0..2 * PASSING).cycle() {
                for (number, comes) in [(turn, true), ((turn + PASSING) % (2 * PASSING), false)] {
                    ticks.tick().await;
                    let (record, _) = cluster.passing(number);
                    match comes {
                        true => store.write(&record).await?,
                        false => store.delete(&record).await?,
                    }
                    counted.fetch_add(1, Ordering::Relaxed);
                }
            }
            Ok(())
        });
        Ok(Self { task, changes, since: Instant::now() })
    }

    /// Ends it; how many changes there were a second.
    pub(super) async fn stop(self) -> Result<f64> {
        if self.task.is_finished() {
            self.task.await.context("the churn died")??;
            anyhow::bail!("the churn ended");
        }
        self.task.abort();
        let changes = u32::try_from(self.changes.load(Ordering::Relaxed)).unwrap_or(u32::MAX);
        Ok(f64::from(changes) / self.since.elapsed().as_secs_f64())
    }
}

/// Waits for news of the endpoints of the first network as an agent does, and reads them whole, until
/// it is dropped.
pub(super) struct Watcher(JoinHandle<()>);

impl Watcher {
    /// Starts one.
    pub(super) fn start(consul: SocketAddr) -> Self {
        Self(tokio::spawn(async move {
            // One that fails begins anew, as an agent does.
            loop {
                let _ = watch(consul).await;
                tokio::time::sleep(PAUSE).await;
            }
        }))
    }
}

impl Drop for Watcher {
    fn drop(&mut self) {
        self.0.abort();
    }
}

async fn watch(consul: SocketAddr) -> Result<()> {
    let mut connection = Connection::tcp(consul).await?;
    let (folder, mut index) = (Cluster::folder(0), 0);
    loop {
        let path = format!("/v1/kv/{folder}?recurse=true&index={index}&wait=60s");
        (index, _) = connection.drain(&path).await?;
        tokio::time::sleep(PAUSE).await;
    }
}

fn set(Record { key, value }: &Record) -> Value {
    json!({ "KV": { "Verb": "set", "Key": key, "Value": STANDARD.encode(value) } })
}

fn lock(Record { key, value }: &Record, session: &str) -> Value {
    let value = STANDARD.encode(value);
    json!({ "KV": { "Verb": "lock", "Key": key, "Value": value, "Session": session } })
}

fn delete(Record { key, .. }: &Record) -> Value {
    json!({ "KV": { "Verb": "delete", "Key": key } })
}
