//! The port metrics are read at. Whoever can connect can ask, so everything a client can cost is
//! bounded: connections, the size of a request, the time it may take, and how often the numbers are
//! read.

use std::{
    net::SocketAddrV4,
    os::fd::AsRawFd as _,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, anyhow};
use axum::{
    Router,
    extract::State,
    http::{StatusCode, header},
    response::{IntoResponse as _, Response},
    routing::get,
};
use hyper::server::conn::http1;
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    service::TowerToHyperService,
};
use nix::{
    errno::Errno,
    sys::socket::{
        AddressFamily, Backlog, SockFlag, SockType, SockaddrIn, bind, listen, setsockopt, socket,
        sockopt,
    },
};
use prometheus_client::encoding::prometheus_text::CONTENT_TYPE;
use tokio::{
    net::{TcpListener, TcpStream},
    sync::Semaphore,
    time::{sleep, timeout},
};

/// Between attempts to listen where the port is taken.
const RETRY: Duration = Duration::from_secs(2);
/// Pause after an error of the socket, as of too many open files.
const PAUSE: Duration = Duration::from_millis(100);
/// Connections at once; more are closed at once. One request each.
const CONNECTIONS: usize = 16;
/// How long a connection may last: its request, the numbers, and a client that reads them.
const CONNECTION: Duration = Duration::from_secs(10);
/// How long the head of a request may take, as a whole.
const HEAD: Duration = Duration::from_secs(5);
/// Bytes of a request's head that are read; hyper takes no less.
const LARGEST_HEAD: usize = 8192;
/// How long numbers are given out again before they are read anew.
const FRESH: Duration = Duration::from_secs(1);

/// Makes the page.
pub trait Source: Fn() -> Result<String> + Send + Sync + 'static {}

impl<F: Fn() -> Result<String> + Send + Sync + 'static> Source for F {}

/// Serves the page at an address, which an interface may get later. Ends when it is dropped.
pub async fn serve<S: Source>(address: SocketAddrV4, page: Arc<S>) {
    let mut complained = false;
    loop {
        match Listener::bind(address) {
            Ok(listener) => {
                tracing::info!(%address, "metrics are served");
                complained = false;
                listener.run(Arc::clone(&page)).await;
            }
            Err(error) if !complained => {
                tracing::warn!("no metrics are served: {error:#}");
                complained = true;
            }
            Err(_) => {}
        }
        sleep(RETRY).await;
    }
}

/// A bound socket.
#[derive(Debug)]
pub struct Listener(TcpListener);

impl Listener {
    /// Binds it, also where no interface has the address yet. Port 0 is any.
    pub fn bind(address: SocketAddrV4) -> Result<Self> {
        let make = || -> Result<TcpListener, Errno> {
            let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
            let tcp = socket(AddressFamily::Inet, SockType::Stream, flags, None)?;
            setsockopt(&tcp, sockopt::IpFreebind, &true)?;
            // Connections of an agent before us may still be in TIME_WAIT.
            setsockopt(&tcp, sockopt::ReuseAddr, &true)?;
            bind(tcp.as_raw_fd(), &SockaddrIn::from(address))?;
            listen(&tcp, Backlog::new(128)?)?;
            TcpListener::from_std(tcp.into())
                .map_err(|error| error.raw_os_error().map_or(Errno::EIO, Errno::from_raw))
        };
        make().map(Self).map_err(|error| match error {
            Errno::EADDRINUSE => anyhow!(
                "port {} of {} is taken: `ss -lntp 'sport = :{0}'` shows by whom; give --metrics \
                 another one",
                address.port(),
                address.ip()
            ),
            other => anyhow!(other).context(format!("listen on {address}")),
        })
    }

    /// Where it listens.
    pub fn address(&self) -> Result<std::net::SocketAddr> {
        self.0.local_addr().context("ask for the address of the metrics")
    }

    /// Answers for ever.
    pub async fn run<S: Source>(self, page: Arc<S>) {
        let permits = Arc::new(Semaphore::new(CONNECTIONS));
        let router = router(Cached { source: page, last: Arc::default() });
        loop {
            let stream = match self.0.accept().await {
                Ok((stream, _)) => stream,
                Err(error) => {
                    tracing::debug!(%error, "accept a connection for metrics");
                    sleep(PAUSE).await;
                    continue;
                }
            };
            // Closed where there are too many: those that are there end soon.
            let Ok(permit) = Arc::clone(&permits).try_acquire_owned() else { continue };
            let router = router.clone();
            tokio::spawn(async move {
                // Whatever it came to, it is over, and nobody's business but the client's.
                let _ = timeout(CONNECTION, converse(stream, router)).await;
                drop(permit);
            });
        }
    }
}

async fn converse(stream: TcpStream, router: Router) -> hyper::Result<()> {
    http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD)
        .max_buf_size(LARGEST_HEAD)
        .keep_alive(false)
        .serve_connection(TokioIo::new(stream), TowerToHyperService::new(router))
        .await
}

fn router<S: Source>(cached: Cached<S>) -> Router {
    Router::new()
        .route("/metrics", get(metrics::<S>))
        .route("/", get(|| async { "The metrics are at /metrics.\n" }))
        .with_state(cached)
}

/// The page and when it was made. Clones share it.
struct Cached<S> {
    source: Arc<S>,
    last: Arc<Mutex<Option<Made>>>,
}

/// A page, with the time it was made at.
type Made = (Instant, Arc<str>);

impl<S> Clone for Cached<S> {
    fn clone(&self) -> Self {
        Self { source: Arc::clone(&self.source), last: Arc::clone(&self.last) }
    }
}

impl<S: Source> Cached<S> {
    fn page(&self) -> Result<Arc<str>> {
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        match &*last {
            Some((at, page)) if at.elapsed() < FRESH => Ok(Arc::clone(page)),
            _ => {
                let page: Arc<str> = (self.source)()?.into();
                *last = Some((Instant::now(), Arc::clone(&page)));
                Ok(page)
            }
        }
    }
}

async fn metrics<S: Source>(State(cached): State<Cached<S>>) -> Response {
    // Reading the maps is some hundred system calls, and may wait for a pass.
    let made = tokio::task::spawn_blocking(move || cached.page()).await;
    match made.context("make the page").flatten() {
        Ok(page) => ([(header::CONTENT_TYPE, CONTENT_TYPE)], page.to_string()).into_response(),
        Err(error) => {
            tracing::warn!("no metrics: {error:#}");
            (StatusCode::INTERNAL_SERVER_ERROR, format!("{error:#}\n")).into_response()
        }
    }
}

#[cfg(test)]
mod tests;
