//! HTTP to Consul: a thin, bounded layer over `consulrs`, plus the transaction it lacks.
//!
//! Everything here is bounded in time. Keys are given and returned without the prefix.

use std::{
    path::Path,
    sync::{Arc, OnceLock, PoisonError, RwLock},
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use consulrs::{
    api::{
        self, ApiResponse,
        features::{Blocking, ConsistencyMode, FeaturedEndpoint, Features},
        kv::{common::KVPair, requests::ReadKeyRequest},
        session::requests::CreateSessionRequest,
    },
    client::{ConsulClient, ConsulClientSettings},
    error::ClientError,
    session,
};
use reqwest::Url;
use rustify_derive::Endpoint;
use tokio::sync::{Mutex, MutexGuard, Semaphore, watch};

use super::{
    connect::{build_http, connect_as, parse_address},
    failure::{Failure, bounded},
    health::{self, Health},
    schema::check_name,
    snapshot::Snapshot,
    token::Token,
    transaction::{Conflict, Operation, Transaction, TransactionAnswer},
};

/// How long any request but a blocking query may take, connecting included.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(10);
/// How many requests other than blocking queries are under way at once. Consul takes 200
/// connections from one address and resets those beyond.
const MAX_REQUESTS: usize = 32;
/// How long Consul is asked to hold a blocking query open. It adds up to a sixteenth of it.
const BLOCKING_WAIT: Duration = Duration::from_secs(60);

/// A connection to Consul, bound to a prefix and to this host's name. Cheap to clone.
#[derive(Clone)]
pub struct Consul {
    inner: Arc<Inner>,
}

struct Inner {
    /// As it was given.
    url: Url,
    /// Replaced as a whole, and with it its open connections, by [`Consul::reconnect`].
    client: RwLock<Arc<ConsulClient>>,
    /// Changed when the connections there are have become useless.
    cut: watch::Sender<()>,
    /// Changed when a request had no answer in time. A blocking query would notice a minute later.
    stalled: watch::Sender<()>,
    token: Token,
    requests: Semaphore,
    claims: Mutex<()>,
    /// What the watcher has read, once there is one.
    known: OnceLock<watch::Receiver<Arc<Snapshot>>>,
    health: health::Counters,
    described: String,
    /// Ends in a slash.
    prefix: String,
    node: String,
}

/// How to read. What decides something at once is read as it is: a leader that has just started
/// otherwise answers from before its last writes, and what is not there yet counts as gone. A query that
/// waits learns of them when they come.
fn features(blocking: Option<Blocking>) -> Features {
    let mode = blocking.is_none().then_some(ConsistencyMode::CONSISTENT);
    Features { blocking, cached: None, filter: None, mode }
}

impl Consul {
    /// Prepares a client; nothing is sent yet.
    ///
    /// `address` is `host:port`, `http://…`, `https://…` or, as Docker took it,
    /// `consul://host:port[/prefix]`, whose path goes before `prefix`. The variables
    /// `CONSUL_HTTP_TOKEN`, `CONSUL_HTTP_TOKEN_FILE`, `CONSUL_CACERT`, `CONSUL_CLIENT_CERT`,
    /// `CONSUL_CLIENT_KEY`, `CONSUL_TLS_SERVER_NAME` and `CONSUL_HTTP_SSL_VERIFY` are honoured.
    /// Fails on an address, prefix or node name that cannot be one and on certificates and tokens
    /// that cannot be read.
    pub fn new(address: &str, prefix: &str, node: &str) -> Result<Self> {
        Self::with_token_file(address, prefix, node, None)
    }

    /// As [`Self::new`], with the ACL token in a file, where one is given. A file that is replaced
    /// is read again.
    pub fn with_token_file(
        address: &str,
        prefix: &str,
        node: &str,
        token_file: Option<&Path>,
    ) -> Result<Self> {
        check_name("host name", node)?;
        let (url, path) = parse_address(address)?;
        let prefix: Vec<&str> =
            path.split('/').chain(prefix.split('/')).filter(|part| !part.is_empty()).collect();
        for part in &prefix {
            check_name("part of the prefix", part)?;
        }
        let prefix = prefix.iter().map(|part| format!("{part}/")).collect();

        // consulrs would panic on one that cannot be sent.
        let token = Token::find(token_file)?;
        let settings = ConsulClientSettings {
            address: connect_as(&url)?.to_string(),
            ca_certs: Vec::new(),
            client_cert: None,
            client_key: None,
            token: token.now(),
            verify: true,
            version: 1,
        };
        let described = match url.scheme() {
            "https" => url.to_string().trim_end_matches('/').to_owned(),
            _ => url.to_string().trim_start_matches("http://").trim_end_matches('/').to_owned(),
        };
        let inner = Inner {
            client: RwLock::new(Arc::new(build_client(settings, &url)?)),
            url,
            token,
            cut: watch::Sender::new(()),
            stalled: watch::Sender::new(()),
            requests: Semaphore::new(MAX_REQUESTS),
            claims: Mutex::new(()),
            known: OnceLock::new(),
            health: health::Counters::default(),
            described,
            prefix,
            node: node.to_owned(),
        };
        Ok(Self { inner: Arc::new(inner) })
    }

    /// Gives every open connection up, and with it the requests on their way, which fail. For a
    /// host whose address changed: what was connected from the old one would wait for an answer
    /// that cannot come, a blocking query for more than a minute.
    pub fn reconnect(&self) -> Result<()> {
        self.renew_client()?;
        self.inner.cut.send_replace(());
        Ok(())
    }

    fn renew_client(&self) -> Result<()> {
        let settings = self.client().settings.clone();
        let client = Arc::new(build_client(settings, &self.inner.url)?);
        *self.inner.client.write().unwrap_or_else(PoisonError::into_inner) = client;
        Ok(())
    }

    /// The client with the token as it is now.
    fn client(&self) -> Arc<ConsulClient> {
        let client = self.inner.client.read().unwrap_or_else(PoisonError::into_inner).clone();
        let token = self.inner.token.now();
        if client.settings.token == token {
            return client;
        }
        let settings = ConsulClientSettings { token, ..client.settings.clone() };
        let http = client.http.http.clone();
        let http = rustify::clients::reqwest::Client::new(&settings.address, http);
        let client = Arc::new(ConsulClient { http, settings });
        *self.inner.client.write().unwrap_or_else(PoisonError::into_inner) = Arc::clone(&client);
        client
    }

    /// Consul's address for messages, without credentials.
    pub fn describe(&self) -> &str {
        &self.inner.described
    }

    /// How Consul has answered so far.
    pub fn health(&self) -> Health {
        self.inner.health.read()
    }

    /// This host's name.
    pub fn node(&self) -> &str {
        &self.inner.node
    }

    /// Takes what the watcher reads into account from now on: what Consul lost is still taken.
    pub(super) fn remember(&self, snapshots: watch::Receiver<Arc<Snapshot>>) {
        // The agent has one watcher. A second one, as in a test, would read the same.
        let _ = self.inner.known.set(snapshots);
    }

    /// What the watcher has read last; nothing where there is none.
    pub(super) fn known(&self) -> Arc<Snapshot> {
        self.inner.known.get().map(|known| known.borrow().clone()).unwrap_or_default()
    }

    /// Waits for this host's turn to claim an address: one at a time, so that it competes with
    /// other hosts only and never with itself.
    pub(super) async fn claiming(&self) -> MutexGuard<'_, ()> {
        self.inner.claims.lock().await
    }

    /// Asks whether Consul is there and has a leader.
    pub async fn ping(&self) -> Result<()> {
        let answer = self.bounded(api::exec_with_result(&*self.client(), Leader {})).await;
        let leader = answer.map_err(|failure| self.explain(failure))?.response;
        ensure!(
            !leader.is_empty(),
            "Consul at {} has no leader: wait, or look at its log",
            self.describe()
        );
        Ok(())
    }

    /// What goes before every key; ends in a slash.
    #[cfg(test)]
    pub(super) fn prefix(&self) -> &str {
        &self.inner.prefix
    }

    /// Reads one key; `None` where there is none.
    pub(super) async fn get(&self, key: &str) -> Result<Option<Entry>> {
        let key = format!("{}{key}", self.inner.prefix);
        let request = ReadKeyRequest { key, features: Some(features(None)), ..Default::default() };
        match self.bounded(api::exec_with_result(&*self.client(), request)).await {
            Ok(mut answer) => answer.response.pop().map(|pair| self.entry(pair)).transpose(),
            Err(Failure::Answered { code: 404, .. }) => Ok(None),
            Err(failure) => Err(self.explain(failure)),
        }
    }

    /// Reads every key of a folder (which ends in a slash) at once; `None` where there is none.
    pub(super) async fn list(&self, folder: &str) -> Result<Option<Listing>> {
        let request = self.folder_request(folder, None);
        let answer = self.bounded(api::exec_with_result(&*self.client(), request)).await;
        self.listing(answer)
    }

    /// As [`Self::list`], returning only when the folder's index passes `index`, or after a while
    /// with nothing changed.
    pub(super) async fn list_after(&self, folder: &str, index: u64) -> Result<Option<Listing>> {
        let wait = Some(format!("{}s", BLOCKING_WAIT.as_secs()));
        let limit = BLOCKING_WAIT + BLOCKING_WAIT / 16 + REQUEST_TIMEOUT;
        let request = self.folder_request(folder, Some(Blocking { index, wait }));
        let client = self.client();
        let request = self.unless_cut(api::exec_with_result(&*client, request));
        let mut stalled = self.inner.stalled.subscribe();
        let answer = tokio::select! {
            answer = bounded(limit, request) => answer,
            // The sender lives as long as we do.
            _ = stalled.changed() => Err(Failure::Unreached("it does not answer".into())),
        };
        let answer = self.counted(answer);
        self.listing(answer)
    }

    fn folder_request(&self, folder: &str, blocking: Option<Blocking>) -> ReadKeyRequest {
        let (key, features) = (format!("{}{folder}", self.inner.prefix), Some(features(blocking)));
        ReadKeyRequest { key, recurse: Some(true), features, ..Default::default() }
    }

    fn listing(
        &self,
        answer: std::result::Result<ApiResponse<Vec<KVPair>>, Failure>,
    ) -> Result<Option<Listing>> {
        match answer {
            Ok(ApiResponse { response, index, .. }) => {
                let index = index.and_then(|index| index.parse().ok()).unwrap_or(0);
                let entries: Result<Vec<_>> =
                    response.into_iter().map(|pair| self.entry(pair)).collect();
                Ok(Some(Listing { index, entries: entries? }))
            }
            Err(Failure::Answered { code: 404, .. }) => Ok(None),
            Err(failure) => Err(self.explain(failure)),
        }
    }

    /// Carries out all operations or none. `Err` inside says which could not be; every other
    /// failure leaves it open whether they were carried out.
    pub(super) async fn transact(
        &self,
        operations: Vec<Operation>,
    ) -> Result<std::result::Result<(), Conflict>> {
        let operations: Vec<_> = operations
            .into_iter()
            .map(|Operation(mut kv)| {
                kv.key = format!("{}{}", self.inner.prefix, kv.key);
                serde_json::json!({ "KV": kv })
            })
            .collect();
        let body = serde_json::to_vec(&operations).context("encode a transaction")?;
        match self.bounded(api::exec_with_result(&*self.client(), Transaction { body })).await {
            Ok(_) => Ok(Ok(())),
            Err(Failure::Answered { code: 409, message }) => {
                // Everything Consul could not do is in the body of the refusal.
                let answer: TransactionAnswer = serde_json::from_str(&message)
                    .with_context(|| format!("read Consul's refusal {message:?}"))?;
                let conflict = Conflict { errors: answer.errors.unwrap_or_default() };
                // What the token does not allow is told as if others had been faster.
                match conflict.denied() {
                    Some(message) => Err(self.explain(Failure::Answered { code: 403, message })),
                    None => Ok(Err(conflict)),
                }
            }
            Err(failure) => Err(self.explain(failure)),
        }
    }

    /// Creates a session that releases what it holds when it is not renewed for `ttl`, which
    /// Consul stretches up to twofold, and returns its id.
    pub(super) async fn create_session(&self, ttl: Duration) -> Result<String> {
        let request = CreateSessionRequest {
            name: Some(format!("ovnet {}", self.node())),
            ttl: Some(format!("{}s", ttl.as_secs())),
            behavior: Some("release".into()),
            // After a crash the next agent of this host must get its record at once; that two
            // agents act for one host is excluded by the socket, not by a delay.
            lock_delay: Some("0s".into()),
            // Not tied to the health of whichever Consul agent answers us: it need not be ours.
            node_checks: Some(Vec::new()),
            ..Default::default()
        };
        let answer = self.bounded(api::exec_with_result(&*self.client(), request)).await;
        Ok(answer.map_err(|failure| self.explain(failure))?.response.id)
    }

    /// Renews a session; `false` where it is gone.
    pub(super) async fn renew_session(&self, id: &str) -> Result<bool> {
        match self.bounded(session::renew(&*self.client(), id, None)).await {
            Ok(_) => Ok(true),
            Err(Failure::Answered { code: 404, .. }) => Ok(false),
            Err(failure) => Err(self.explain(failure)),
        }
    }

    /// Ends a session; what it held is released. One that is gone is no error.
    pub(super) async fn destroy_session(&self, id: &str) -> Result<()> {
        match self.bounded(session::delete(&*self.client(), id, None)).await {
            Ok(_) | Err(Failure::Answered { code: 404, .. }) => Ok(()),
            Err(failure) => Err(self.explain(failure)),
        }
    }

    async fn bounded<T>(
        &self,
        request: impl Future<Output = std::result::Result<T, ClientError>>,
    ) -> std::result::Result<T, Failure> {
        let client = self.client();
        // Waiting for one's turn counts: a Consul that hangs makes everybody fail in time.
        let answer = bounded(REQUEST_TIMEOUT, async {
            // Acquiring fails only on a closed semaphore, and nobody closes it.
            let _turn = self.inner.requests.acquire().await.ok();
            self.unless_cut(request).await
        })
        .await;
        // Other connections lead nowhere either: to a machine that lost its power without a word,
        // say. Each that is kept would cost its next user as long. Once for all that time out.
        if matches!(answer, Err(Failure::Late(_))) && Arc::ptr_eq(&client, &self.client()) {
            if let Err(error) = self.renew_client() {
                tracing::warn!("{error:#}");
            }
            self.inner.stalled.send_replace(());
        }
        self.counted(answer)
    }

    fn counted<T>(
        &self,
        answer: std::result::Result<T, Failure>,
    ) -> std::result::Result<T, Failure> {
        self.inner.health.count(match &answer {
            Ok(_) => Some(200),
            Err(Failure::Answered { code, .. }) => Some(*code),
            Err(Failure::Unreached(_) | Failure::Late(_)) => None,
        });
        answer
    }

    /// The request's outcome, or an error as soon as [`Self::reconnect`] cuts it off.
    async fn unless_cut<T>(
        &self,
        request: impl Future<Output = std::result::Result<T, ClientError>>,
    ) -> std::result::Result<T, Failure> {
        let mut cut = self.inner.cut.subscribe();
        tokio::select! {
            result = request => result.map_err(Failure::from),
            // The sender lives as long as we do.
            _ = cut.changed() => {
                Err(Failure::Unreached("this host's address changed meanwhile".into()))
            }
        }
    }

    fn entry(&self, pair: KVPair) -> Result<Entry> {
        let KVPair { create_index, key, modify_index, session, value, .. } = pair;
        let key = key
            .strip_prefix(&self.inner.prefix)
            .with_context(|| format!("Consul answered with the key {key}, not under our prefix"))?
            .to_owned();
        let value: Vec<u8> = match value {
            Some(value) => {
                value.try_into().with_context(|| format!("decode the value of the key {key}"))?
            }
            None => Vec::new(),
        };
        Ok(Entry { key, value, create_index, modify_index, session })
    }

    fn explain(&self, failure: Failure) -> anyhow::Error {
        failure.explain(self.describe(), &self.inner.token, &self.inner.prefix)
    }
}

/// One key as read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Entry {
    /// Without the prefix.
    pub(super) key: String,
    pub(super) value: Vec<u8>,
    pub(super) create_index: u64,
    pub(super) modify_index: u64,
    /// The session that holds it.
    pub(super) session: Option<String>,
}

/// A folder as read at one moment.
#[derive(Clone, Debug)]
pub(super) struct Listing {
    /// To wait on; 0 where Consul gave none.
    pub(super) index: u64,
    pub(super) entries: Vec<Entry>,
}

/// `GET /v1/status/leader`, which consulrs has not.
#[derive(Debug, Endpoint)]
#[endpoint(path = "status/leader", response = "String")]
struct Leader {}

impl FeaturedEndpoint for Leader {
    fn features(&self) -> Option<Features> {
        None
    }
}

fn build_client(settings: ConsulClientSettings, url: &Url) -> Result<ConsulClient> {
    let http = build_http(url).context("prepare the connection to Consul")?;
    let http = rustify::clients::reqwest::Client::new(&settings.address, http);
    Ok(ConsulClient { http, settings })
}
