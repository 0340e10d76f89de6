//! HTTP on a unix socket whose clients cost only so much, however slow, endless or many they are.
//!
//! axum's own server bounds neither connections nor how long a request's head takes to arrive. Here
//! a connection carries one request, which must be there whole, head and body, within a time and a
//! size; then it is worked on, and its answer must be taken within a time. There are so many
//! connections at once. Where one more comes, the oldest that is not worked on makes room, after it
//! had its time, so that who asks and listens is always served. Where files run out, some kept in
//! reserve still let somebody ask why.

use std::{
    fs::File,
    os::fd::OwnedFd,
    time::{Duration, Instant},
};

use axum::{Router, body::Body, extract::Request, http::StatusCode, response::Response};
use bytes::BytesMut;
use http_body_util::BodyExt as _;
use hyper::{
    body::{Body as _, Incoming},
    server::conn::http1,
    service::{Service as _, service_fn},
};
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    service::TowerToHyperService,
};
use tokio::{
    net::{UnixListener, UnixStream},
    sync::watch,
    task::{AbortHandle, JoinSet},
    time::{sleep, timeout},
};

use super::socket::Socket;

/// Bytes of a request's head that are read.
const HEAD: usize = 16 * 1024;
/// Bytes read of a body beyond the largest, for whoever is told that it is too large.
const LINGER: u64 = 256 * 1024;
/// How long an answer that ends may take to be taken.
const ANSWER: Duration = Duration::from_secs(30);
/// How long a connection has to ask before another may have its place.
const PATIENCE: Duration = Duration::from_millis(100);
/// Pause after a connection could not be accepted: trying at once would only spin.
const PAUSE: Duration = Duration::from_millis(100);
/// Open files kept to be let go where there are no others.
const RESERVE: usize = 4;

/// What clients may cost.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Bounds {
    /// Connections at once.
    pub(crate) connections: usize,
    /// The largest body taken, in bytes.
    pub(crate) body: usize,
    /// How long a request may take to arrive, head and body.
    pub(crate) request: Duration,
    /// An answer that says why there is none, in one line.
    pub(crate) refuse: fn(StatusCode, &str) -> Response,
}

/// A server of one socket.
#[derive(Debug)]
pub(crate) struct Server {
    what: &'static str,
    bounds: Bounds,
    router: Router,
    tasks: JoinSet<()>,
    open: Vec<Open>,
    reserve: Vec<OwnedFd>,
    /// Whether the last attempt to accept failed, so that it is told once.
    failing: bool,
}

/// A connection there is, the oldest first.
#[derive(Debug)]
struct Open {
    task: AbortHandle,
    phase: watch::Receiver<Phase>,
    since: Instant,
}

/// Where a connection is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// Its request arrives.
    Asking,
    /// Its request is worked on, or its answer has no end.
    Busy,
    /// Its answer is being sent.
    Answering,
}

impl Server {
    /// A server for these routes. `what` is the socket, for messages: "the API's socket".
    pub(crate) fn new(what: &'static str, router: Router, bounds: Bounds) -> Self {
        let (tasks, open, reserve) = (JoinSet::new(), Vec::new(), Vec::new());
        Self { what, bounds, router, tasks, open, reserve, failing: false }
    }

    /// Answers on the socket until `shutdown` is ready; what is asked by then is answered within
    /// `grace`, or given up. Where the socket's file is removed it is made again.
    pub(crate) async fn serve(
        mut self,
        mut socket: Socket,
        shutdown: impl Future<Output = ()>,
        grace: Duration,
    ) {
        let mut shutdown = std::pin::pin!(shutdown);
        loop {
            tokio::select! {
                () = &mut shutdown => break,
                () = self.accept(socket.listener()) => {}
                () = socket.lost() => socket.make_again(),
            }
        }
        self.end(grace).await;
        // Its file goes with it.
        drop(socket);
    }

    /// [`Server::serve`] on a socket whose file is somebody else's.
    pub(crate) async fn serve_on(
        mut self,
        listener: UnixListener,
        shutdown: impl Future<Output = ()>,
        grace: Duration,
    ) {
        tokio::select! {
            () = shutdown => {}
            () = self.accept(&listener) => {}
        }
        self.end(grace).await;
    }

    /// Accepts and answers until this is dropped; what was accepted goes on.
    async fn accept(&mut self, listener: &UnixListener) {
        loop {
            self.refill();
            self.make_room().await;
            let stream = loop {
                let error = match listener.accept().await {
                    Ok((stream, _)) => break stream,
                    Err(error) => error,
                };
                self.tell(&error);
                // A file of the reserve makes room for the connection, and for nothing else: it is
                // not put back before.
                let exhausted = [libc::EMFILE, libc::ENFILE].map(Some);
                if !exhausted.contains(&error.raw_os_error()) || self.reserve.pop().is_none() {
                    sleep(PAUSE).await;
                }
            };
            if self.reserve.len() == RESERVE {
                self.failing = false;
            }
            self.take(stream);
        }
    }

    /// Waits until all that was asked is answered; who has not asked yet is not waited for.
    async fn end(&mut self, grace: Duration) {
        for connection in &self.open {
            if *connection.phase.borrow() == Phase::Asking {
                connection.task.abort();
            }
        }
        let ended = async { while self.tasks.join_next().await.is_some() {} };
        if timeout(grace, ended).await.is_err() {
            tracing::warn!("requests under way are given up: they did not end in {grace:?}");
        }
    }

    fn tell(&mut self, error: &std::io::Error) {
        if !std::mem::replace(&mut self.failing, true) {
            tracing::warn!(
                "{} takes few for the moment: {error}; where too many files are open, raise \
                 LimitNOFILE= of the unit",
                self.what
            );
        }
    }

    /// Puts files in reserve again, where there are any to be had.
    fn refill(&mut self) {
        while self.reserve.len() < RESERVE {
            match File::open("/dev/null") {
                Ok(file) => self.reserve.push(file.into()),
                Err(_) => return,
            }
        }
    }

    /// Waits until there is room for one more connection. The oldest that is not worked on makes it,
    /// once it had its time to ask: of a crowd that comes at once nobody else would be heard.
    async fn make_room(&mut self) {
        loop {
            while self.tasks.try_join_next().is_some() {}
            self.open.retain(|it| !it.task.is_finished());
            if self.open.len() < self.bounds.connections {
                return;
            }
            let idle = self.open.iter().position(|it| *it.phase.borrow() != Phase::Busy);
            let wait = match idle.and_then(|at| Some((at, self.open.get(at)?.since.elapsed()))) {
                Some((at, age)) if age >= PATIENCE => return self.open.remove(at).task.abort(),
                Some((_, age)) => PATIENCE.saturating_sub(age),
                // All of them are worked on, which ends some time.
                None => PATIENCE,
            };
            sleep(wait).await;
        }
    }

    fn take(&mut self, stream: UnixStream) {
        let (enter, phase) = watch::channel(Phase::Asking);
        let task = self.tasks.spawn(converse(stream, self.router.clone(), self.bounds, enter));
        self.open.push(Open { task, phase, since: Instant::now() });
    }
}

/// Answers one request, and ends.
async fn converse(stream: UnixStream, router: Router, bounds: Bounds, enter: watch::Sender<Phase>) {
    let phase = enter.subscribe();
    let router = TowerToHyperService::new(router);
    let enter = &enter;
    let service = service_fn(|request: Request<Incoming>| {
        let router = router.clone();
        async move {
            let request = match arrived(request, bounds).await {
                Ok(request) => request,
                Err(refusal) => {
                    enter.send_replace(Phase::Answering);
                    return Ok(refusal);
                }
            };
            enter.send_replace(Phase::Busy);
            let answer = router.call(request).await;
            let ends = answer.as_ref().is_ok_and(|it| it.body().size_hint().exact().is_some());
            if ends {
                enter.send_replace(Phase::Answering);
            }
            answer
        }
    });
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(bounds.request)
        .max_buf_size(HEAD)
        .keep_alive(false)
        .serve_connection(TokioIo::new(stream), service);
    tokio::select! {
        // Whatever it came to, it is the client's business alone.
        _ = connection => {}
        () = overdue(phase, bounds.request) => {}
    }
}

/// Waits until a connection has been too long where it is.
async fn overdue(mut phase: watch::Receiver<Phase>, request: Duration) {
    loop {
        let now = *phase.borrow_and_update();
        // The request has its own time, and an answer that says so; this is for what is left.
        let limit = match now {
            Phase::Asking => Some(request * 3),
            Phase::Busy => None,
            Phase::Answering => Some(ANSWER),
        };
        // Its sender lives as long as the connection, which this is raced with.
        let another = async { drop(phase.wait_for(|it| *it != now).await) };
        match limit {
            None => another.await,
            Some(limit) if timeout(limit, another).await.is_err() => return,
            Some(_) => {}
        }
    }
}

/// The request with its body whole.
async fn arrived(request: Request<Incoming>, bounds: Bounds) -> Result<Request, Response> {
    let (head, mut body) = request.into_parts();
    let mut read = BytesMut::new();
    let mut length = body.size_hint().lower();
    let largest = bounds.body as u64;
    let all = async {
        let mut came = 0;
        // Somewhat more is taken than is of use: who is not done sending would not read why not.
        while came <= largest + LINGER
            && let Some(frame) = body.frame().await
        {
            let Ok(data) = frame?.into_data() else { continue };
            came += data.len() as u64;
            length = length.max(came);
            if length <= largest {
                read.extend_from_slice(&data);
            }
        }
        Ok::<_, hyper::Error>(())
    };
    let came = timeout(bounds.request, all).await;
    let refuse = |status, line: String| (bounds.refuse)(status, &line);
    match came {
        _ if length > largest => Err(refuse(
            StatusCode::PAYLOAD_TOO_LARGE,
            format!("the request is larger than {largest} bytes"),
        )),
        Ok(Ok(())) => Ok(Request::from_parts(head, Body::from(read.freeze()))),
        Ok(Err(error)) => {
            Err(refuse(StatusCode::BAD_REQUEST, format!("the request cannot be read: {error}")))
        }
        Err(_) => Err(refuse(
            StatusCode::REQUEST_TIMEOUT,
            format!("the request did not arrive within {:?}", bounds.request),
        )),
    }
}

#[cfg(test)]
mod tests;
