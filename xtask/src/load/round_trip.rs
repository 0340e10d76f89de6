//! Requests of one byte and answers of one byte, one after the other on one connection: what is
//! measured is how long the way there and back takes.

mod histogram;

use std::io::{self, ErrorKind, Read as _, Write as _};
use std::net::{SocketAddrV4, TcpListener, TcpStream, UdpSocket};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow, ensure};
use serde::{Deserialize, Serialize};

use self::histogram::Histogram;

/// How long an answer may take. A datagram that takes longer is lost.
const PATIENCE: Duration = Duration::from_millis(200);

/// What a client of round trips counted.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct RoundTrips {
    /// Requests that were answered.
    pub(crate) done: u64,
    /// Requests that were not.
    pub(crate) failed: u64,
    /// Answers in a second.
    pub(crate) rate: f64,
    /// Half of the round trips took no longer, in microseconds.
    pub(crate) p50: f64,
    /// 99 of 100 round trips took no longer.
    pub(crate) p99: f64,
}

/// Answers by TCP and by UDP until it is killed.
pub(super) fn serve(address: SocketAddrV4) -> Result<()> {
    let listener = TcpListener::bind(address).with_context(|| format!("listen on {address}"))?;
    let socket = UdpSocket::bind(address).with_context(|| format!("receive on {address}"))?;
    let datagrams = thread::spawn(move || answer_datagrams(&socket));
    for stream in listener.incoming() {
        let stream = stream.context("accept a connection")?;
        // Ends with its client, whose loss it is if that is an error.
        thread::spawn(move || answer(stream));
    }
    datagrams.join().map_err(|_| anyhow!("the server's thread panicked"))?
}

fn answer(mut stream: TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let mut byte = [0];
    while stream.read(&mut byte)? > 0 {
        stream.write_all(&byte)?;
    }
    Ok(())
}

fn answer_datagrams(socket: &UdpSocket) -> Result<()> {
    let mut byte = [0];
    loop {
        // Errors tell of clients that are gone, and are theirs.
        if let Ok((_, client)) = socket.recv_from(&mut byte) {
            let _ = socket.send_to(&byte, client);
        }
    }
}

/// Asks by TCP for a while.
pub(super) fn ask_by_tcp(server: SocketAddrV4, time: Duration) -> Result<RoundTrips> {
    let mut stream = TcpStream::connect(server).with_context(|| format!("connect to {server}"))?;
    stream.set_nodelay(true).context("have requests sent at once")?;
    stream.set_read_timeout(Some(PATIENCE * 10)).context("bound the wait for an answer")?;
    ask(time, |byte| {
        stream.write_all(&[byte])?;
        let mut answer = [0];
        stream.read_exact(&mut answer).map(|()| true)
    })
}

/// Asks by UDP for a while. A lost request or answer is a failure, and the next one is sent.
pub(super) fn ask_by_udp(server: SocketAddrV4, time: Duration) -> Result<RoundTrips> {
    let socket = UdpSocket::bind("0.0.0.0:0").context("make a socket")?;
    socket.connect(server).with_context(|| format!("send to {server}"))?;
    socket.set_read_timeout(Some(PATIENCE)).context("bound the wait for an answer")?;
    ask(time, |byte| {
        socket.send(&[byte])?;
        let mut answer = [0];
        loop {
            match socket.recv(&mut answer) {
                // One that came after its time is not the answer to this.
                Ok(_) if answer != [byte] => {}
                Ok(_) => return Ok(true),
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(false),
                Err(error) => return Err(error),
            }
        }
    })
}

fn ask(time: Duration, mut one: impl FnMut(u8) -> io::Result<bool>) -> Result<RoundTrips> {
    let mut histogram = Histogram::new();
    let mut failed = 0;
    let began = Instant::now();
    let mut sent = began;
    let mut byte = 0_u8;
    while sent - began < time {
        let answered = one(byte).context("ask")?;
        // One look at the clock for both ends: it takes part of what is measured.
        let now = Instant::now();
        if answered {
            histogram.add(now - sent);
        } else {
            failed += 1;
        }
        (sent, byte) = (now, byte.wrapping_add(1));
    }
    let done = histogram.count();
    ensure!(done > 0, "nothing was answered");
    #[allow(clippy::cast_precision_loss, reason = "a count of seconds is exact in an f64")]
    let rate = done as f64 / (sent - began).as_secs_f64();
    let [p50, p99] = [0.5, 0.99].map(|share| histogram.below(share).as_secs_f64() * 1e6);
    Ok(RoundTrips { done, failed, rate, p50, p99 })
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use super::*;

    #[test]
    fn answers_are_counted_and_timed() {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let address = SocketAddrV4::new(Ipv4Addr::LOCALHOST, listener.local_addr().unwrap().port());
        drop(listener);
        // Ends with the test's process.
        thread::spawn(move || serve(address));
        let time = Duration::from_millis(50);
        let deadline = Instant::now() + Duration::from_secs(5);
        let by_tcp = loop {
            match ask_by_tcp(address, time) {
                Ok(found) => break found,
                Err(error) => assert!(Instant::now() < deadline, "{error:#}"),
            }
        };
        let by_udp = ask_by_udp(address, time).unwrap();
        for found in [by_tcp, by_udp] {
            assert!(found.done > 0 && found.failed == 0, "{found:?}");
            assert!(found.p50 > 0.0 && found.p50 <= found.p99, "{found:?}");
        }
    }
}
