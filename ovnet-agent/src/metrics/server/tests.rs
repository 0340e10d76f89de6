use std::{
    net::{Ipv4Addr, SocketAddr},
    sync::atomic::{AtomicUsize, Ordering},
};

use anyhow::bail;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use super::*;

/// A server of a page that says how often it was made, and the count.
fn serving() -> (SocketAddr, Arc<AtomicUsize>) {
    let made = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&made);
    let page = move || {
        let before = count.fetch_add(1, Ordering::Relaxed);
        Ok(format!("page {before}\n"))
    };
    (start(page), made)
}

fn start(page: impl Source) -> SocketAddr {
    let listener = Listener::bind(SocketAddrV4::new(Ipv4Addr::LOCALHOST, 0)).unwrap();
    let address = listener.address().unwrap();
    tokio::spawn(listener.run(Arc::new(page)));
    address
}

/// Sends this and reads until the server ends the connection.
async fn ask(address: SocketAddr, request: &str) -> String {
    let mut stream = TcpStream::connect(address).await.unwrap();
    // It may be refused before all of it was sent.
    let _ = stream.write_all(request.as_bytes()).await;
    ended(&mut stream).await
}

/// What comes until the connection ends, which it must.
async fn ended(stream: &mut TcpStream) -> String {
    let mut answer = Vec::new();
    let end = stream.read_to_end(&mut answer);
    // A reset is an end, too: of a connection with something unread.
    let _ = timeout(CONNECTION * 2, end).await.expect("the connection never ends");
    String::from_utf8_lossy(&answer).into_owned()
}

const GET: &str = "GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n";

#[tokio::test]
async fn the_page_is_served_and_made_once_a_second_at_most() {
    let (address, made) = serving();
    let answer = ask(address, GET).await;
    assert!(answer.starts_with("HTTP/1.1 200 OK\r\n"), "{answer}");
    assert!(answer.to_lowercase().contains("content-type: text/plain; version=0.0.4"), "{answer}");
    assert!(answer.ends_with("\r\n\r\npage 0\n"), "{answer}");
    for _ in 0..50 {
        ask(address, GET).await;
    }
    assert!(made.load(Ordering::Relaxed) <= 10, "{made:?} times for 50 requests");
}

#[tokio::test]
async fn anything_else_is_refused() {
    let (address, made) = serving();
    for (request, code) in [
        ("GET /other HTTP/1.1\r\nHost: x\r\n\r\n", "404"),
        ("POST /metrics HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\nhello", "405"),
        ("nonsense\r\n\r\n", "400"),
        (&format!("GET /{} HTTP/1.1\r\nHost: x\r\n\r\n", "a".repeat(20_000)), "4"),
        (&format!("GET / HTTP/1.1\r\nX: {}\r\n\r\n", "a".repeat(100_000)), "4"),
    ] {
        let answer = ask(address, request).await;
        let start = format!("HTTP/1.1 {code}");
        // A head that is too long may be reset before its answer is read.
        assert!(answer.starts_with(&start) || (answer.is_empty() && code == "4"), "{answer}");
    }
    assert_eq!(made.load(Ordering::Relaxed), 0);
}

#[tokio::test]
async fn a_page_that_cannot_be_made_says_why() {
    let answer = ask(start(|| bail!("no maps")), GET).await;
    assert!(answer.starts_with("HTTP/1.1 500") && answer.ends_with("no maps\n"), "{answer}");
}

/// Clients that send byte by byte, nothing, or read nothing hold their connections for a bounded time,
/// and only so many of them.
#[tokio::test]
async fn slow_and_endless_clients_are_ended_and_others_served_again() {
    let (address, _) = serving();
    let mut slow = Vec::new();
    for _ in 0..CONNECTIONS {
        slow.push(TcpStream::connect(address).await.unwrap());
    }
    // All places are taken: one more is closed at once, without an answer.
    let mut refused = TcpStream::connect(address).await.unwrap();
    let told = timeout(HEAD / 2, ended(&mut refused)).await;
    assert_eq!(told.expect("it is left waiting"), "");
    let begun = Instant::now();
    let ends = slow.into_iter().enumerate().map(|(number, mut stream)| {
        tokio::spawn(async move {
            // Some say nothing, the others go on for ever.
            let drip = async {
                while number % 2 == 0 && stream.write_all(b"G").await.is_ok() {
                    sleep(Duration::from_millis(200)).await;
                }
                ended(&mut stream).await;
            };
            timeout(CONNECTION + HEAD, drip).await.expect("a slow client is kept");
        })
    });
    for end in ends.collect::<Vec<_>>() {
        end.await.unwrap();
    }
    assert!(begun.elapsed() >= HEAD / 2, "ended before their time");
    assert!(ask(address, GET).await.starts_with("HTTP/1.1 200"), "and others are served");
}

#[tokio::test]
async fn a_client_that_does_not_read_is_ended() {
    // More than the sockets' buffers take.
    let address = start(|| Ok("x".repeat(64 << 20)));
    let mut stream = TcpStream::connect(address).await.unwrap();
    stream.write_all(GET.as_bytes()).await.unwrap();
    sleep(CONNECTION + Duration::from_secs(1)).await;
    let read = ended(&mut stream).await.len();
    assert!(read < 64 << 20, "it was served to its end all the same");
}

#[tokio::test]
async fn a_port_that_is_taken_is_told() {
    let (address, _) = serving();
    let SocketAddr::V4(address) = address else { panic!("{address}") };
    let error = format!("{:#}", Listener::bind(address).unwrap_err());
    assert!(error.contains("is taken") && error.contains("--metrics"), "{error}");
}
