//! Clients that mean harm, and one that does not.

use std::path::Path;

use axum::routing::{get, post};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    task::JoinHandle,
};

use super::*;

/// How soon who behaves must have an answer, whatever the others do.
const SERVED: Duration = Duration::from_secs(2);
const REQUEST: Duration = Duration::from_millis(300);

fn refuse(status: StatusCode, line: &str) -> Response {
    let mut response = Response::new(Body::from(line.to_owned()));
    *response.status_mut() = status;
    response
}

/// A server with little room, in a folder of its own.
struct Served {
    folder: tempfile::TempDir,
    stop: watch::Sender<bool>,
    task: JoinHandle<()>,
}

impl Served {
    fn start() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let socket = Socket::bind(&folder.path().join("s"), None).unwrap();
        let router = Router::new()
            .route("/", get(|| async { "served" }))
            .route("/slow", get(|| async { std::future::pending::<&str>().await }))
            .route("/large", get(|| async { "x".repeat(1 << 22) }))
            .route("/", post(|body: String| async move { body }));
        let bounds = Bounds { connections: 8, body: 1024, request: REQUEST, refuse };
        let (stop, mut stopping) = watch::channel(false);
        let shutdown = async move { drop(stopping.wait_for(|it| *it).await) };
        let server = Server::new("the test's socket", router, bounds);
        let task = tokio::spawn(server.serve(socket, shutdown, Duration::from_secs(5)));
        Self { folder, stop, task }
    }

    fn path(&self) -> std::path::PathBuf {
        self.folder.path().join("s")
    }

    /// Sends bytes and reads all that is answered until the end; `None` where it does not end.
    async fn ask(&self, bytes: &[u8]) -> Option<String> {
        let mut stream = UnixStream::connect(self.path()).await.unwrap();
        // The server may have enough before all is sent.
        let _ = stream.write_all(bytes).await;
        let mut answer = Vec::new();
        let ended = timeout(REQUEST * 10, stream.read_to_end(&mut answer)).await.ok()?;
        // A connection that was reset has said what it had to say.
        drop(ended);
        Some(String::from_utf8_lossy(&answer).into_owned())
    }

    /// Somebody who behaves, and must be served.
    async fn is_served(&self) {
        let begun = Instant::now();
        loop {
            let asked = timeout(SERVED, self.ask(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")).await;
            if asked.ok().flatten().is_some_and(|it| it.ends_with("\r\n\r\nserved")) {
                return;
            }
            assert!(begun.elapsed() < SERVED, "who behaves is not served");
        }
    }
}

async fn connect(path: &Path) -> UnixStream {
    UnixStream::connect(path).await.unwrap()
}

#[tokio::test]
async fn who_never_ends_their_head_is_closed_and_keeps_nobody_away() {
    let served = Served::start();
    let mut open = Vec::new();
    for _ in 0..100 {
        let mut stream = connect(&served.path()).await;
        // Those that made room already are closed.
        let _ = stream.write_all(b"GET / HTTP/1.1\r\nHost: ").await;
        open.push(stream);
        if open.len() % 20 == 0 {
            served.is_served().await;
        }
    }
    for mut stream in open {
        let mut rest = Vec::new();
        let ended = timeout(REQUEST * 10, stream.read_to_end(&mut rest)).await;
        assert!(ended.is_ok(), "a connection without a request stays");
    }
}

#[tokio::test]
async fn a_head_that_comes_byte_by_byte_has_the_same_time() {
    let served = Served::start();
    let mut stream = connect(&served.path()).await;
    let begun = Instant::now();
    for byte in b"GET / HTTP/1.1\r\nX: ".iter().chain(std::iter::repeat(&b'a')) {
        if stream.write_all(&[*byte]).await.is_err() {
            break;
        }
        sleep(REQUEST / 10).await;
        assert!(begun.elapsed() < REQUEST * 10, "it may go on for ever");
    }
    served.is_served().await;
}

#[tokio::test]
async fn what_is_too_large_too_slow_or_no_http_is_refused() {
    let served = Served::start();
    let mut head = b"GET / HTTP/1.1\r\n".to_vec();
    for number in 0..100_000 {
        head.extend(format!("X-{number}: y\r\n").bytes());
    }
    let said = served.ask(&head).await.unwrap();
    assert!(said.is_empty() || said.starts_with("HTTP/1.1 431 "), "{said}");

    let post =
        |length: usize| format!("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: {length}\r\n\r\n");
    let said = served.ask(post(1 << 40).as_bytes()).await.unwrap();
    assert!(
        said.starts_with("HTTP/1.1 413 ") && said.ends_with("larger than 1024 bytes"),
        "{said}"
    );
    let said = served.ask(post(100).as_bytes()).await.unwrap();
    assert!(said.starts_with("HTTP/1.1 408 ") && said.ends_with("within 300ms"), "{said}");
    let whole = [post(4).as_bytes(), b"body"].concat();
    assert!(served.ask(&whole).await.unwrap().ends_with("\r\n\r\nbody"));

    let mut endless = b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n".to_vec();
    endless.extend(b"400\r\n".iter().chain(&[b'x'; 1024]).chain(b"\r\n").cycle().take(1 << 20));
    let said = served.ask(&endless).await.unwrap();
    assert!(said.is_empty() || said.starts_with("HTTP/1.1 413 "), "{said}");

    for garbage in [&[0_u8; 4096][..], b"\x16\x03\x01\x02\x00", b"GET\r\n\r\n", b"\r\n\r\n\r\n"] {
        let said = served.ask(garbage).await;
        assert!(said.is_some(), "{garbage:?} keeps a connection");
    }
    served.is_served().await;
}

#[tokio::test]
async fn who_does_not_take_their_answer_makes_room() {
    let served = Served::start();
    let mut open = Vec::new();
    for _ in 0..20 {
        let mut stream = connect(&served.path()).await;
        let _ = stream.write_all(b"GET /large HTTP/1.1\r\nHost: a\r\n\r\n").await;
        open.push(stream);
    }
    served.is_served().await;
}

#[tokio::test]
async fn what_is_worked_on_is_not_given_up_for_others_and_ends_with_the_server() {
    let served = Served::start();
    let mut slow = Vec::new();
    for _ in 0..8 {
        let mut stream = connect(&served.path()).await;
        stream.write_all(b"GET /slow HTTP/1.1\r\nHost: a\r\n\r\n").await.unwrap();
        slow.push(stream);
        // One after the other, so that none makes room before its request was read.
        served.is_served_unless(slow.len() == 8).await;
    }
    // There is no room for a ninth, which waits.
    assert_eq!(served.ask(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n").await, None);
    let mut byte = [0];
    for stream in &mut slow {
        assert!(timeout(REQUEST / 10, stream.read(&mut byte)).await.is_err(), "it was given up");
    }
    // One that ends leaves its place.
    drop(slow.pop());
    served.is_served().await;
    drop(slow);
    served.stop.send_replace(true);
    timeout(SERVED, served.task).await.unwrap().unwrap();
    assert!(!served.folder.path().join("s").exists());
}

impl Served {
    async fn is_served_unless(&self, full: bool) {
        if !full {
            self.is_served().await;
        } else {
            sleep(REQUEST / 3).await;
        }
    }
}

#[tokio::test]
async fn a_socket_whose_file_is_gone_is_made_again() {
    let served = Served::start();
    served.is_served().await;
    std::fs::remove_file(served.path()).unwrap();
    let again = async {
        while UnixStream::connect(served.path()).await.is_err() {
            sleep(REQUEST / 10).await;
        }
    };
    timeout(Duration::from_secs(10), again).await.unwrap();
    served.is_served().await;
}
