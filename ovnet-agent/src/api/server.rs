//! The server: routes, limits, and errors as JSON.

use std::{sync::Arc, time::Duration};

use anyhow::Result;
use axum::{
    Json, Router,
    body::Bytes,
    extract::{
        DefaultBodyLimit, Path, Query, Request, State,
        rejection::{BytesRejection, QueryRejection},
    },
    http::StatusCode,
    middleware::{self, Next},
    response::{IntoResponse, Response},
    routing::{get, post},
};
use serde::{Deserialize, de::DeserializeOwned};
use tokio::sync::{Semaphore, watch};

use super::{
    http::{Bounds, Server},
    monitor,
    socket::Socket,
    types::{
        Attach, CounterView, CreateNetwork, Detach, Detached, EndpointView, ErrorBody, HostView,
        NetworkView, Status,
    },
};
use crate::{
    consul::schema::NetworkRecord,
    publish::PublishedPort,
    service::{Kind, Records, Service, Wiring, kind_of, one_line},
};

/// What a client may cost. The largest body is a network's with hundreds of labels.
const BOUNDS: Bounds = Bounds {
    connections: 512,
    body: 64 * 1024,
    request: Duration::from_secs(10),
    refuse: |status, line| Error::new(status, line).into_response(),
};
/// Requests worked on at once; further ones wait.
const AT_ONCE: usize = 256;
/// Monitors at once: each is sent every event.
const MONITORS: usize = 16;
/// How long a request may take, waiting included. Attach and detach have shorter deadlines of their
/// own for each step, so this is for what hangs.
const DEADLINE: Duration = Duration::from_secs(120);
/// How long requests under way may take once the agent is asked to end.
const GRACE: Duration = Duration::from_secs(10);

/// What handlers share.
pub(super) struct Api<R, W> {
    pub(super) service: Service<R, W>,
    pub(super) ending: watch::Receiver<bool>,
    pub(super) monitors: Arc<Semaphore>,
}

impl<R, W> Clone for Api<R, W> {
    fn clone(&self) -> Self {
        let Self { service, ending, monitors } = self;
        Self { service: service.clone(), ending: ending.clone(), monitors: Arc::clone(monitors) }
    }
}

/// Answers requests on the socket until `shutdown` is ready; then requests under way end, within
/// a bounded time, and the socket goes.
pub async fn serve<R: Records, W: Wiring>(
    socket: Socket,
    service: Service<R, W>,
    shutdown: impl Future<Output = ()> + Send + 'static,
) {
    let (end, ending) = watch::channel(false);
    let api = Api { service, ending, monitors: Arc::new(Semaphore::new(MONITORS)) };
    let stop = async move {
        shutdown.await;
        // Monitors never end by themselves, and the server waits for what is under way.
        end.send_replace(true);
    };
    Server::new("the API's socket", router(api), BOUNDS).serve(socket, stop, GRACE).await;
}

fn router<R: Records, W: Wiring>(api: Api<R, W>) -> Router {
    let at_once = Arc::new(Semaphore::new(AT_ONCE));
    Router::new()
        .route("/v1/networks", get(networks::<R, W>).post(create_network::<R, W>))
        .route("/v1/networks/{name}", get(network::<R, W>).delete(remove_network::<R, W>))
        .route("/v1/endpoints", get(endpoints::<R, W>).post(attach::<R, W>))
        .route("/v1/endpoints/detach", post(detach::<R, W>))
        .route("/v1/endpoints/{name}/ports", get(ports::<R, W>))
        .route("/v1/hosts", get(hosts::<R, W>))
        .route("/v1/status", get(status::<R, W>))
        .route("/v1/counters", get(counters::<R, W>))
        .route("/v1/monitor", get(monitor::monitor::<R, W>))
        .fallback(|| async { Error::new(StatusCode::NOT_FOUND, "the API has no such path") })
        .method_not_allowed_fallback(|| async {
            Error::new(StatusCode::METHOD_NOT_ALLOWED, "the API has no such method on this path")
        })
        .layer(DefaultBodyLimit::disable())
        .layer(middleware::from_fn_with_state(at_once, bounded))
        .with_state(api)
}

/// Bounds how many requests are worked on at once and how long each takes.
async fn bounded(State(at_once): State<Arc<Semaphore>>, request: Request, next: Next) -> Response {
    let path = format!("{} {}", request.method(), request.uri().path());
    let work = async {
        // The semaphore is never closed; without a permit there is nothing to hold back, though.
        let _permit = at_once.acquire().await;
        next.run(request).await
    };
    match tokio::time::timeout(DEADLINE, work).await {
        Ok(response) => response,
        Err(_) => Error::new(
            StatusCode::GATEWAY_TIMEOUT,
            format!(
                "{path} took longer than {DEADLINE:?}; a change may still be going on: see `ovnet \
                 status` and the agent's log"
            ),
        )
        .into_response(),
    }
}

type Shared<R, W> = State<Api<R, W>>;
type Answer<T> = Result<Json<T>, Error>;

async fn networks<R: Records, W: Wiring>(api: Shared<R, W>) -> Answer<Vec<NetworkRecord>> {
    Ok(Json(api.service.networks().await?))
}

async fn create_network<R: Records, W: Wiring>(
    api: Shared<R, W>,
    body: Result<Bytes, BytesRejection>,
) -> Answer<NetworkRecord> {
    let wanted: CreateNetwork = read(body)?;
    Ok(Json(api.service.create_network(wanted).await?))
}

async fn network<R: Records, W: Wiring>(
    api: Shared<R, W>,
    Path(name): Path<String>,
) -> Answer<NetworkView> {
    Ok(Json(api.service.network(&name).await?))
}

async fn remove_network<R: Records, W: Wiring>(
    api: Shared<R, W>,
    Path(name): Path<String>,
) -> Answer<NetworkRecord> {
    Ok(Json(api.service.remove_network(&name).await?))
}

/// Query of `GET /v1/endpoints`.
#[derive(Deserialize)]
struct Which {
    network: Option<String>,
    #[serde(default)]
    local: bool,
}

async fn endpoints<R: Records, W: Wiring>(
    api: Shared<R, W>,
    which: Result<Query<Which>, QueryRejection>,
) -> Answer<Vec<EndpointView>> {
    let Query(Which { network, local }) =
        which.map_err(|refused| Error::new(refused.status(), refused.body_text()))?;
    let network = network.as_deref();
    Ok(Json(if local {
        api.service.local_endpoints(network)
    } else {
        api.service.endpoints(network).await?
    }))
}

async fn attach<R: Records, W: Wiring>(
    api: Shared<R, W>,
    body: Result<Bytes, BytesRejection>,
) -> Answer<EndpointView> {
    let wanted: Attach = read(body)?;
    Ok(Json(api.service.attach(wanted).await?))
}

async fn detach<R: Records, W: Wiring>(
    api: Shared<R, W>,
    body: Result<Bytes, BytesRejection>,
) -> Answer<Detached> {
    let wanted: Detach = read(body)?;
    Ok(Json(api.service.detach(wanted).await?))
}

async fn ports<R: Records, W: Wiring>(
    api: Shared<R, W>,
    Path(name): Path<String>,
) -> Answer<Vec<PublishedPort>> {
    Ok(Json(api.service.ports(&name)?))
}

async fn hosts<R: Records, W: Wiring>(api: Shared<R, W>) -> Answer<Vec<HostView>> {
    Ok(Json(api.service.hosts().await?))
}

async fn status<R: Records, W: Wiring>(api: Shared<R, W>) -> Json<Status> {
    Json(api.service.wiring().status())
}

async fn counters<R: Records, W: Wiring>(api: Shared<R, W>) -> Answer<Vec<CounterView>> {
    Ok(Json(api.service.wiring().counters()?))
}

/// Reads a JSON body whatever its content type says, and tells on one line what is wrong with it.
fn read<T: DeserializeOwned>(body: Result<Bytes, BytesRejection>) -> Result<T, Error> {
    let body = body.map_err(|refused| Error::new(refused.status(), refused.body_text()))?;
    serde_json::from_slice(&body).map_err(|error| {
        Error::new(StatusCode::BAD_REQUEST, format!("the request cannot be read: {error}"))
    })
}

/// An answer that is an [`ErrorBody`].
pub(super) struct Error {
    status: StatusCode,
    line: String,
}

impl Error {
    pub(super) fn new(status: StatusCode, line: impl Into<String>) -> Self {
        Self { status, line: line.into() }
    }
}

impl From<anyhow::Error> for Error {
    fn from(error: anyhow::Error) -> Self {
        let status = match kind_of(&error) {
            Some(Kind::Invalid) => StatusCode::BAD_REQUEST,
            Some(Kind::NotFound) => StatusCode::NOT_FOUND,
            Some(Kind::Conflict) => StatusCode::CONFLICT,
            None => StatusCode::INTERNAL_SERVER_ERROR,
        };
        Self { status, line: one_line(&error) }
    }
}

impl IntoResponse for Error {
    fn into_response(self) -> Response {
        (self.status, Json(ErrorBody { error: self.line })).into_response()
    }
}
