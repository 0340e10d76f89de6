//! Datagrams, many with one call into the kernel.

use std::io;
use std::net::{SocketAddrV4, UdpSocket};
use std::os::fd::AsRawFd as _;
use std::ptr;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use nix::libc::{self, c_uint, iovec, mmsghdr};
use nix::sys::socket::setsockopt;
use nix::sys::socket::sockopt::RcvBufForce;

use super::Count;

/// Datagrams with one call.
const BATCH: u8 = 64;
/// No datagram is longer.
const LONGEST: usize = 65_535;
/// Bytes of the receiver's queue: what it holds is as many packets as come while others run.
const QUEUE: usize = 4 << 20;
/// How long the receiver waits for the first datagram.
const PATIENCE: Duration = Duration::from_secs(10);
/// How long the receiver rests when its queue is empty, which is a fraction of what the queue holds.
/// Were it waiting, each packet would wake it, and what is measured would be the waking.
const REST: Duration = Duration::from_micros(500);

/// Counts what comes within this time after the first datagram.
pub(super) fn count(address: SocketAddrV4, time: Duration) -> Result<Count> {
    let socket = UdpSocket::bind(address).with_context(|| format!("receive on {address}"))?;
    // More than the system's limit, as root may.
    setsockopt(&socket, RcvBufForce, &QUEUE).context("make the queue longer")?;
    receive(&socket, time)
}

fn receive(socket: &UdpSocket, time: Duration) -> Result<Count> {
    let mut batch = Batch::new(LONGEST);
    let began = Instant::now();
    let mut first = None;
    let mut done = 0;
    loop {
        let count = batch.receive(socket).context("receive")?;
        let now = Instant::now();
        if count > 0 {
            first.get_or_insert(now);
        } else {
            thread::sleep(REST);
        }
        done += count;
        match first {
            Some(first) if now - first >= time => {
                return Ok(Count { done, failed: 0, seconds: (now - first).as_secs_f64() });
            }
            None => ensure!(now - began < PATIENCE, "nothing came for {} s", PATIENCE.as_secs()),
            _ => {}
        }
    }
}

/// Sends datagrams of this size for this time.
pub(super) fn send(server: SocketAddrV4, size: usize, time: Duration) -> Result<Count> {
    let socket = UdpSocket::bind("0.0.0.0:0").context("make a socket")?;
    socket.connect(server).with_context(|| format!("send to {server}"))?;
    let mut batch = Batch::new(size);
    let began = Instant::now();
    let mut count = Count::default();
    while began.elapsed() < time {
        match batch.send(&socket) {
            Ok(sent) => count.done += sent,
            // Full queues, and the news that nobody received what was sent before.
            Err(_) => count.failed += 1,
        }
    }
    count.seconds = began.elapsed().as_secs_f64();
    Ok(count)
}

/// Room for a batch. All datagrams share one payload: nobody reads it.
struct Batch {
    payload: Vec<u8>,
}

impl Batch {
    fn new(size: usize) -> Self {
        Self { payload: vec![0; size] }
    }

    fn send(&mut self, socket: &UdpSocket) -> io::Result<u64> {
        self.call(|messages, count| {
            // SAFETY: the messages and what they point to outlive the call; the socket is open.
            unsafe { libc::sendmmsg(socket.as_raw_fd(), messages, count, 0) }
        })
    }

    /// How many have come.
    fn receive(&mut self, socket: &UdpSocket) -> io::Result<u64> {
        let received = self.call(|messages, count| {
            let flags = libc::MSG_DONTWAIT;
            // SAFETY: as above; the payload is written to, which is borrowed for it.
            unsafe { libc::recvmmsg(socket.as_raw_fd(), messages, count, flags, ptr::null_mut()) }
        });
        match received {
            Err(error)
                if matches!(
                    error.kind(),
                    io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted
                ) =>
            {
                Ok(0)
            }
            other => other,
        }
    }

    fn call(&mut self, call: impl FnOnce(*mut mmsghdr, c_uint) -> i32) -> io::Result<u64> {
        let mut part =
            iovec { iov_base: self.payload.as_mut_ptr().cast(), iov_len: self.payload.len() };
        // SAFETY: a message header of zeroes is one without address, parts and control data.
        let mut message: mmsghdr = unsafe { std::mem::zeroed() };
        message.msg_hdr.msg_iov = &raw mut part;
        message.msg_hdr.msg_iovlen = 1;
        let mut messages = [message; BATCH as usize];
        let done = call(messages.as_mut_ptr(), BATCH.into());
        u64::try_from(done).map_err(|_| io::Error::last_os_error())
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use super::*;

    #[test]
    fn what_is_sent_is_counted() {
        let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let address = SocketAddrV4::new(Ipv4Addr::LOCALHOST, socket.local_addr().unwrap().port());
        let receiver = thread::spawn(move || receive(&socket, Duration::from_millis(20)));
        let sent = send(address, 64, Duration::from_millis(60)).unwrap();
        let received = receiver.join().unwrap().unwrap();
        assert!(received.done > 0 && received.done <= sent.done, "{received:?} of {sent:?}");
        assert!(received.seconds >= 0.02 && received.seconds < sent.seconds);
    }
}
