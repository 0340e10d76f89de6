//! The client of the API, for `ovnet` and for tests.

use std::{
    io::ErrorKind,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, anyhow, bail};
use bytes::{Bytes, BytesMut};
use http_body_util::{BodyExt as _, Full};
use hyper::{Method, Request, Response, StatusCode, body::Incoming, client::conn::http1, header};
use hyper_util::rt::TokioIo;
use serde::{Serialize, de::DeserializeOwned};
use tokio::net::UnixStream;

use super::types::{
    Attach, CounterView, CreateNetwork, Detach, Detached, EndpointView, ErrorBody, HostView,
    MonitorLine, NetworkView, Status,
};
use crate::{consul::schema::NetworkRecord, publish::PublishedPort};

/// Longer than the server's own deadline, so its answer is what a user reads.
const DEADLINE: Duration = Duration::from_secs(130);

/// How long to wait for room where too many connect at once, and between two attempts.
const CROWDED: Duration = Duration::from_secs(10);
const AGAIN: Duration = Duration::from_millis(10);

/// A client of the agent on one socket. Every request has a connection of its own.
#[derive(Clone, Debug)]
pub struct Client {
    socket: PathBuf,
}

impl Client {
    /// A client; nothing is connected yet.
    pub fn new(socket: impl Into<PathBuf>) -> Self {
        Self { socket: socket.into() }
    }

    /// The socket it talks to.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// All networks.
    pub async fn networks(&self) -> Result<Vec<NetworkRecord>> {
        self.get("/v1/networks").await
    }

    /// One network with its endpoints.
    pub async fn network(&self, name_or_id: &str) -> Result<NetworkView> {
        self.get(&format!("/v1/networks/{}", encode(name_or_id))).await
    }

    /// Creates a network.
    pub async fn create_network(&self, wanted: &CreateNetwork) -> Result<NetworkRecord> {
        self.post("/v1/networks", wanted).await
    }

    /// Removes a network.
    pub async fn remove_network(&self, name_or_id: &str) -> Result<NetworkRecord> {
        let path = format!("/v1/networks/{}", encode(name_or_id));
        self.call(Method::DELETE, &path, Bytes::new()).await
    }

    /// Endpoints of all hosts, or with `local` of this one only; of one network where it is given.
    pub async fn endpoints(&self, network: Option<&str>, local: bool) -> Result<Vec<EndpointView>> {
        let mut path = format!("/v1/endpoints?local={local}");
        if let Some(network) = network {
            path.push_str(&format!("&network={}", encode(network)));
        }
        self.get(&path).await
    }

    /// Attaches a sandbox to a network.
    pub async fn attach(&self, wanted: &Attach) -> Result<EndpointView> {
        self.post("/v1/endpoints", wanted).await
    }

    /// Detaches endpoints.
    pub async fn detach(&self, wanted: &Detach) -> Result<Detached> {
        self.post("/v1/endpoints/detach", wanted).await
    }

    /// The published ports of an endpoint of this host.
    pub async fn ports(&self, name_or_id: &str) -> Result<Vec<PublishedPort>> {
        self.get(&format!("/v1/endpoints/{}/ports", encode(name_or_id))).await
    }

    /// All hosts.
    pub async fn hosts(&self) -> Result<Vec<HostView>> {
        self.get("/v1/hosts").await
    }

    /// How the agent is.
    pub async fn status(&self) -> Result<Status> {
        self.get("/v1/status").await
    }

    /// All counters, zeroes included.
    pub async fn counters(&self) -> Result<Vec<CounterView>> {
        self.get("/v1/counters").await
    }

    /// Drops as they happen.
    pub async fn monitor(&self) -> Result<Monitor> {
        let open = self.send(Method::GET, "/v1/monitor", Bytes::new());
        let response = tokio::time::timeout(DEADLINE, open)
            .await
            .map_err(|_| anyhow!("the agent did not answer in {DEADLINE:?}"))??;
        let response = refused(response).await?;
        Ok(Monitor { body: response.into_body(), read: BytesMut::new() })
    }

    async fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T> {
        self.call(Method::GET, path, Bytes::new()).await
    }

    async fn post<T: DeserializeOwned>(&self, path: &str, body: &impl Serialize) -> Result<T> {
        let body = serde_json::to_vec(body).context("write the request")?;
        self.call(Method::POST, path, body.into()).await
    }

    async fn call<T: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        body: Bytes,
    ) -> Result<T> {
        let whole = async {
            let response = refused(self.send(method, path, body).await?).await?;
            let body = response.into_body().collect().await.context("read the agent's answer")?;
            serde_json::from_slice(&body.to_bytes())
                .context("the agent's answer cannot be read: are agent and client of one version?")
        };
        tokio::time::timeout(DEADLINE, whole)
            .await
            .map_err(|_| anyhow!("the agent did not answer in {DEADLINE:?}"))?
    }

    async fn send(&self, method: Method, path: &str, body: Bytes) -> Result<Response<Incoming>> {
        let stream = self.connect().await.map_err(|error| {
            let socket = self.socket.display();
            match error.kind() {
                ErrorKind::PermissionDenied => {
                    anyhow!("cannot reach the agent at {socket}: only root may; try sudo")
                }
                _ => {
                    anyhow!("cannot reach the agent at {socket}: is ovnet-agent running? ({error})")
                }
            }
        })?;
        let (mut sender, connection) =
            http1::handshake(TokioIo::new(stream)).await.context("talk to the agent")?;
        // It ends with the connection, which ends when the response is read or dropped; an error
        // of it is seen by the request too.
        tokio::spawn(connection);
        let request = Request::builder()
            .method(method)
            .uri(path)
            // HTTP/1.1 wants one; a socket has no name.
            .header(header::HOST, "ovnet")
            .header(header::CONTENT_TYPE, "application/json")
            .body(Full::new(body))
            .context("make the request")?;
        sender.send_request(request).await.context("talk to the agent")
    }

    /// Connects; where more wait to be accepted than there is room for, when there is room.
    async fn connect(&self) -> std::io::Result<UnixStream> {
        let until = Instant::now() + CROWDED;
        loop {
            match UnixStream::connect(&self.socket).await {
                Err(error) if error.kind() == ErrorKind::WouldBlock && Instant::now() < until => {
                    tokio::time::sleep(AGAIN).await;
                }
                other => return other,
            }
        }
    }
}

/// An answer as it is, or the error it tells.
async fn refused(response: Response<Incoming>) -> Result<Response<Incoming>> {
    let status = response.status();
    if status.is_success() {
        return Ok(response);
    }
    let body = response.into_body().collect().await.context("read the agent's answer")?.to_bytes();
    match serde_json::from_slice(&body) {
        Ok(ErrorBody { error }) => bail!(error),
        Err(_) if status == StatusCode::NOT_FOUND => {
            bail!("the agent does not know this request: are agent and client of one version?")
        }
        Err(_) => bail!("the agent answered {status}"),
    }
}

/// A stream of drops.
#[derive(Debug)]
pub struct Monitor {
    body: Incoming,
    read: BytesMut,
}

impl Monitor {
    /// The next line; `None` when the agent has ended.
    pub async fn next(&mut self) -> Result<Option<MonitorLine>> {
        loop {
            if let Some(end) = self.read.iter().position(|byte| *byte == b'\n') {
                let line = self.read.split_to(end + 1);
                return serde_json::from_slice(&line).map(Some).context(
                    "the agent's answer cannot be read: are agent and client of one version?",
                );
            }
            match self.body.frame().await {
                None => return Ok(None),
                Some(frame) => {
                    let frame = frame.context("read the agent's answer")?;
                    if let Some(data) = frame.data_ref() {
                        self.read.extend_from_slice(data);
                    }
                }
            }
        }
    }
}

/// Percent-encodes one segment of a path or one value of a query (RFC 3986 §2.1).
fn encode(text: &str) -> String {
    text.bytes()
        .map(|byte| {
            if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) {
                char::from(byte).to_string()
            } else {
                format!("%{byte:02X}")
            }
        })
        .collect()
}

#[cfg(test)]
mod tests;
