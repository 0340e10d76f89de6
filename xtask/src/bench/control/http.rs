//! HTTP on a connection that is kept: to Consul, and to an agent's socket.

use std::net::SocketAddr;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use http_body_util::{BodyExt as _, Full};
use hyper::body::{Bytes, Incoming};
use hyper::client::conn::http1::{self, SendRequest};
use hyper::{Method, Request, Response};
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpStream, UnixStream};
use tokio::time::timeout;

/// How long an answer may take; a blocking query has its own, shorter, in its address.
const LIMIT: Duration = Duration::from_secs(90);

/// A connection; one request at a time.
pub(super) struct Connection {
    sender: SendRequest<Full<Bytes>>,
    to: String,
}

impl Connection {
    /// Connects to a server on TCP, from this thread's network namespace.
    pub(super) async fn tcp(server: SocketAddr) -> Result<Self> {
        let stream = TcpStream::connect(server).await;
        let stream = stream.with_context(|| format!("connect to {server}"))?;
        // What is measured is not the kernel's patience with small packets.
        stream.set_nodelay(true).with_context(|| format!("connect to {server}"))?;
        Self::of(stream, server.to_string()).await
    }

    /// Connects to a socket in the file system.
    pub(super) async fn unix(socket: &Path) -> Result<Self> {
        let shown = socket.display().to_string();
        let stream = UnixStream::connect(socket).await;
        Self::of(stream.with_context(|| format!("connect to {shown}"))?, shown).await
    }

    async fn of(
        stream: impl AsyncRead + AsyncWrite + Send + Unpin + 'static,
        to: String,
    ) -> Result<Self> {
        let (sender, connection) = http1::handshake(TokioIo::new(stream))
            .await
            .with_context(|| format!("speak HTTP with {to}"))?;
        // It ends with the sender; what goes wrong is told by the request that meets it.
        tokio::spawn(connection);
        Ok(Self { sender, to })
    }

    /// Sends a request and reads the answer to its end.
    pub(super) async fn ask(&mut self, method: Method, path: &str, body: String) -> Result<Bytes> {
        let what = format!("{method} {path} of {}", self.to);
        let work = async {
            let answer = self.send(method, path, body).await?;
            let status = answer.status();
            let body = answer.into_body().collect().await.context("read the answer")?.to_bytes();
            let said = || String::from_utf8_lossy(&body).chars().take(300).collect::<String>();
            ensure!(status.is_success(), "{status}: {}", said());
            Ok(body)
        };
        timeout(LIMIT, work).await.context("no answer in time").flatten().context(what)
    }

    /// Asks for a folder and reads the answer without keeping it; gives Consul's index and how many
    /// bytes there were.
    pub(super) async fn drain(&mut self, path: &str) -> Result<(u64, usize)> {
        let work = async {
            let answer = self.send(Method::GET, path, String::new()).await?;
            let index = answer.headers().get("X-Consul-Index");
            let index = index.and_then(|it| it.to_str().ok()?.parse().ok()).unwrap_or(0);
            let (mut body, mut bytes) = (answer.into_body(), 0);
            while let Some(frame) = body.frame().await {
                bytes += frame.context("read the answer")?.data_ref().map_or(0, Bytes::len);
            }
            Ok((index, bytes))
        };
        let done = timeout(LIMIT, work).await.context("no answer in time").flatten();
        done.with_context(|| format!("GET {path} of {}", self.to))
    }

    async fn send(
        &mut self,
        method: Method,
        path: &str,
        body: String,
    ) -> Result<Response<Incoming>> {
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header("Host", "lab")
            .header("Content-Type", "application/json")
            .body(Full::new(Bytes::from(body)))
            .context("write the request")?;
        self.sender.ready().await.context("it closed the connection")?;
        self.sender.send_request(request).await.context("send the request")
    }
}
