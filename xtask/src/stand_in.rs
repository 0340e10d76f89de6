//! A development stand-in for Consul, for machines where no Consul can be had.
//!
//! It speaks the part of Consul's HTTP API that ovnet uses: the KV store with recursion,
//! check-and-set, locks and blocking queries, sessions with a TTL, transactions. It keeps
//! everything in memory, is one server and no cluster, and knows no ACLs. One contract test suite
//! (`tests/tests/consul.rs`) runs against it and against a real Consul, so that it stays honest.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use axum::{
    Json, Router,
    body::Bytes,
    extract::{Path, Query, State},
    http::{HeaderMap, HeaderName, HeaderValue, StatusCode},
    response::{IntoResponse, Response},
    routing::{get, put},
    serve::ListenerExt as _,
};
use serde_json::{Value, json};
use tokio::{net::TcpListener, sync::watch};

pub mod store;

use store::{NewSession, Operation, Store};

/// How often sessions are looked through for those that ran out.
const SWEEP: Duration = Duration::from_millis(250);
/// How long a blocking query waits where it does not say, and at most; as Consul.
const DEFAULT_WAIT: Duration = Duration::from_secs(300);
const LONGEST_WAIT: Duration = Duration::from_secs(600);
/// The longest a transaction may be, as Consul's.
const MAX_OPERATIONS: usize = 64;

/// Serves until the process ends or the socket fails. Nothing is kept when it does.
pub async fn serve(listener: TcpListener) -> Result<()> {
    let address = listener.local_addr().context("read the stand-in's own address")?;
    let (changed, _) = watch::channel(());
    let server = Server { store: Arc::new(Mutex::new(Store::new())), changed };
    let sweeper = tokio::spawn(sweep(server.clone()));
    let router = Router::new()
        .route("/v1/kv/", get(read_root))
        .route("/v1/kv/{*key}", get(read).put(write).delete(remove))
        .route("/v1/txn", put(transact))
        .route("/v1/session/create", put(create_session))
        .route("/v1/session/renew/{id}", put(renew_session))
        .route("/v1/session/destroy/{id}", put(destroy_session))
        .route("/v1/session/info/{id}", get(session_info))
        .route("/v1/session/list", get(list_sessions))
        .route("/v1/session/node/{node}", get(list_sessions))
        .route("/v1/status/leader", get(async move || Json(address.to_string())))
        .route("/v1/agent/self", get(agent_self))
        .with_state(server);
    // Without this each answer waits for the client's delayed acknowledgement, 40 ms.
    let listener = listener.tap_io(|connection| {
        if let Err(error) = connection.set_nodelay(true) {
            eprintln!("the Consul stand-in goes on without TCP_NODELAY: {error}");
        }
    });
    let result = axum::serve(listener, router).await;
    sweeper.abort();
    result.with_context(|| format!("serve the Consul stand-in on {address}"))
}

#[derive(Clone)]
struct Server {
    store: Arc<Mutex<Store>>,
    /// Told after every change, for the blocking queries.
    changed: watch::Sender<()>,
}

impl Server {
    fn store(&self) -> MutexGuard<'_, Store> {
        self.store.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn change<T>(&self, change: impl FnOnce(&mut Store) -> T) -> T {
        let result = change(&mut self.store());
        self.changed.send_replace(());
        result
    }
}

type Parameters = Query<HashMap<String, String>>;

async fn sweep(server: Server) {
    let mut tick = tokio::time::interval(SWEEP);
    loop {
        tick.tick().await;
        let expired = server.store().expire(Instant::now());
        if expired {
            server.changed.send_replace(());
        }
    }
}

async fn read_root(server: State<Server>, parameters: Parameters) -> Response {
    read(server, Path(String::new()), parameters).await
}

async fn read(
    State(server): State<Server>,
    Path(key): Path<String>,
    Query(parameters): Parameters,
) -> Response {
    let given = |name: &str| parameters.contains_key(name);
    let index = match parameters.get("index").map(|index| index.parse::<u64>()) {
        None => 0,
        Some(Ok(index)) => index,
        Some(Err(_)) => return (StatusCode::BAD_REQUEST, "Invalid index").into_response(),
    };
    let wait = match parameters.get("wait").map(|wait| parse_duration(wait)) {
        None => DEFAULT_WAIT,
        Some(Some(wait)) => wait.min(LONGEST_WAIT),
        Some(None) => return (StatusCode::BAD_REQUEST, "Invalid wait time").into_response(),
    };
    let deadline = tokio::time::Instant::now() + wait;
    let mut changes = server.changed.subscribe();
    loop {
        let (found, body) = {
            let store = server.store();
            let prefix = given("recurse") || given("keys");
            let found = if prefix { store.prefix_index(&key) } else { store.key_index(&key) };
            let body = if given("keys") {
                store.keys(&key, parameters.get("separator").map_or("", String::as_str))
            } else if given("recurse") {
                store.list(&key)
            } else if given("raw") {
                match store.raw(&key) {
                    Some(raw) => return (index_header(found), raw).into_response(),
                    None => Vec::new(),
                }
            } else {
                store.get(&key).into_iter().collect()
            };
            (found, body)
        };
        let waited = tokio::time::Instant::now() >= deadline;
        if index == 0 || found > index || waited {
            return match body.is_empty() {
                true => (StatusCode::NOT_FOUND, index_header(found)).into_response(),
                false => (index_header(found), Json(body)).into_response(),
            };
        }
        // A change or the deadline; either way the answer is looked at again.
        let _ = tokio::time::timeout_at(deadline, changes.changed()).await;
    }
}

async fn write(
    State(server): State<Server>,
    Path(key): Path<String>,
    Query(parameters): Parameters,
    value: Bytes,
) -> Response {
    let mut operation = Operation { key, value: value.to_vec(), ..Operation::default() };
    operation.flags = parameters.get("flags").and_then(|flags| flags.parse().ok()).unwrap_or(0);
    operation.verb = "set".into();
    if let Some(index) = parameters.get("cas") {
        let Ok(index) = index.parse() else {
            return (StatusCode::BAD_REQUEST, "Invalid cas index").into_response();
        };
        (operation.verb, operation.index) = ("cas".into(), index);
    }
    for (parameter, verb) in [("acquire", "lock"), ("release", "unlock")] {
        if let Some(session) = parameters.get(parameter) {
            (operation.verb, operation.session) = (verb.into(), session.clone());
            if !server.store().has_session(session) {
                let message = format!("invalid session {session:?}");
                return (StatusCode::INTERNAL_SERVER_ERROR, message).into_response();
            }
        }
    }
    Json(server.change(|store| store.apply(&[operation])).is_ok()).into_response()
}

async fn remove(
    State(server): State<Server>,
    Path(key): Path<String>,
    Query(parameters): Parameters,
) -> Response {
    let mut operation = Operation { key, verb: "delete".into(), ..Operation::default() };
    if parameters.contains_key("recurse") {
        operation.verb = "delete-tree".into();
    } else if let Some(index) = parameters.get("cas") {
        let Ok(index) = index.parse() else {
            return (StatusCode::BAD_REQUEST, "Invalid cas index").into_response();
        };
        (operation.verb, operation.index) = ("delete-cas".into(), index);
    }
    Json(server.change(|store| store.apply(&[operation])).is_ok()).into_response()
}

async fn transact(State(server): State<Server>, body: Bytes) -> Response {
    let operations: Result<Vec<Operation>> = serde_json::from_slice::<Vec<Value>>(&body)
        .map_err(anyhow::Error::from)
        .and_then(|operations| operations.iter().map(Operation::parse).collect());
    let operations = match operations {
        Ok(operations) if operations.len() > MAX_OPERATIONS => {
            let message = format!("Transaction contains more than {MAX_OPERATIONS} operations");
            return (StatusCode::PAYLOAD_TOO_LARGE, message).into_response();
        }
        Ok(operations) => operations,
        Err(error) => {
            let message = format!("Failed to parse body: {error:#}");
            return (StatusCode::BAD_REQUEST, message).into_response();
        }
    };
    match server.change(|store| store.apply(&operations)) {
        Ok(results) => Json(json!({ "Results": results, "Errors": null })).into_response(),
        Err(errors) => {
            let errors: Vec<_> = errors
                .iter()
                .map(|(index, what)| json!({ "OpIndex": index, "What": what }))
                .collect();
            let body = json!({ "Results": null, "Errors": errors });
            (StatusCode::CONFLICT, Json(body)).into_response()
        }
    }
}

async fn create_session(State(server): State<Server>, body: Bytes) -> Response {
    // Without a body, or without a field, Consul's defaults hold.
    let body = if body.is_empty() { Bytes::from_static(b"{}") } else { body };
    let parsed = serde_json::from_slice::<Value>(&body)
        .map_err(anyhow::Error::from)
        .and_then(|body| NewSession::parse(&body));
    match parsed {
        Ok(session) => {
            let id = server.change(|store| store.create_session(session, Instant::now()));
            Json(json!({ "ID": id })).into_response()
        }
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, format!("{error:#}")).into_response(),
    }
}

async fn renew_session(State(server): State<Server>, Path(id): Path<String>) -> Response {
    match server.store().renew_session(&id, Instant::now()) {
        Some(session) => Json(json!([session])).into_response(),
        None => (StatusCode::NOT_FOUND, format!("Session id '{id}' not found")).into_response(),
    }
}

async fn destroy_session(State(server): State<Server>, Path(id): Path<String>) -> Response {
    server.change(|store| store.destroy_session(&id, Instant::now()));
    Json(true).into_response()
}

async fn session_info(State(server): State<Server>, Path(id): Path<String>) -> Response {
    let store = server.store();
    let sessions: Vec<_> =
        store.sessions().into_iter().filter(|session| session["ID"] == id.as_str()).collect();
    (index_header(store.index()), Json(sessions)).into_response()
}

async fn list_sessions(State(server): State<Server>) -> Response {
    let store = server.store();
    (index_header(store.index()), Json(store.sessions())).into_response()
}

async fn agent_self() -> Response {
    Json(json!({ "Config": {
        "NodeName": "stand-in",
        "Version": "0.0.0-stand-in",
        "Server": true,
    } }))
    .into_response()
}

fn index_header(index: u64) -> HeaderMap {
    let mut headers = HeaderMap::new();
    headers.insert(HeaderName::from_static("x-consul-index"), HeaderValue::from(index));
    headers
        .insert(HeaderName::from_static("x-consul-knownleader"), HeaderValue::from_static("true"));
    headers
}

/// A duration as Go writes it, of one unit: `15s`, `500ms`, `5m`, `1h`.
fn parse_duration(text: &str) -> Option<Duration> {
    let digits = text.find(|c: char| !c.is_ascii_digit())?;
    let (number, unit) = text.split_at(digits);
    let number: u64 = number.parse().ok()?;
    match unit {
        "ms" => Some(Duration::from_millis(number)),
        "s" => Some(Duration::from_secs(number)),
        "m" => Some(Duration::from_secs(number.checked_mul(60)?)),
        "h" => Some(Duration::from_secs(number.checked_mul(3600)?)),
        _ => None,
    }
}
