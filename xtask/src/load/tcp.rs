//! New connections: one request, one answer, and the end of it.
//!
//! The server closes first, as a web server does that keeps no connections. What waits out the time
//! after a connection (TIME_WAIT) is then on its side, and the client's ports are free again at
//! once: the client neither runs out of them nor has to end its connections with a reset, which
//! would spare the connection tracking on the way half of its work. Where a client's port comes
//! again while the server still waits, the newer timestamp lets it in.

use std::io::{ErrorKind, Read as _, Write as _};
use std::net::{SocketAddrV4, TcpListener, TcpStream};
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow};
use nix::errno::Errno;
use nix::libc;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::socket::sockopt::ReceiveTimeout;
use nix::sys::socket::{
    AddressFamily, SockFlag, SockType, SockaddrIn, connect, setsockopt, socket,
};
use nix::sys::time::TimeVal;
use nix::unistd::{read, write};

use super::{Count, PAYLOAD};

/// Threads of the server and of the client: as many as the machines we measure on have processors.
const THREADS: usize = 2;
/// How long the server waits for a request, in seconds: a client that was stopped sends none.
const PATIENCE: i32 = 1;
/// How many events the client takes at once.
const EVENTS: usize = 64;

/// Answers until it is killed.
pub(super) fn serve(address: SocketAddrV4) -> Result<()> {
    let listener = TcpListener::bind(address).with_context(|| format!("listen on {address}"))?;
    // A connection is handed over when its request is there, so that accepting and reading it
    // never wait for one another: one thread serves many, and needs no events for it.
    defer_accept(&listener).context("wait for requests before accepting")?;
    // Connections inherit it.
    setsockopt(&listener, ReceiveTimeout, &TimeVal::new(PATIENCE.into(), 0))
        .context("bound the wait for a request")?;
    thread::scope(|scope| {
        let threads: Vec<_> = (0..THREADS).map(|_| scope.spawn(|| accept(&listener))).collect();
        threads
            .into_iter()
            .try_for_each(|it| it.join().map_err(|_| anyhow!("a server's thread panicked"))?)
    })
}

fn accept(listener: &TcpListener) -> Result<()> {
    loop {
        match listener.accept() {
            // One that ends early is its client's loss.
            Ok((stream, _)) => drop(answer(stream)),
            Err(error) => match error.kind() {
                ErrorKind::WouldBlock | ErrorKind::ConnectionAborted | ErrorKind::Interrupted => {}
                _ => return Err(error).context("accept a connection"),
            },
        }
    }
}

fn answer(mut stream: TcpStream) -> std::io::Result<()> {
    let mut request = [0; PAYLOAD];
    stream.read_exact(&mut request)?;
    stream.write_all(&request)
}

fn defer_accept(listener: &TcpListener) -> std::io::Result<()> {
    let seconds = PATIENCE;
    let length = libc::socklen_t::try_from(size_of_val(&seconds)).map_err(std::io::Error::other)?;
    // SAFETY: the option's value is an int, which outlives the call; the socket is open.
    let done = unsafe {
        libc::setsockopt(
            listener.as_raw_fd(),
            libc::IPPROTO_TCP,
            libc::TCP_DEFER_ACCEPT,
            (&raw const seconds).cast(),
            length,
        )
    };
    if done == 0 { Ok(()) } else { Err(std::io::Error::last_os_error()) }
}

/// Makes connections for a while, so many at a time.
pub(super) fn ask(server: SocketAddrV4, connections: usize, time: Duration) -> Result<Count> {
    let started = Instant::now();
    let counts = thread::scope(|scope| {
        let share = connections.div_ceil(THREADS);
        let threads: Vec<_> = (0..THREADS)
            .map(|_| scope.spawn(move || Client::new(server, share)?.run(started + time)))
            .collect();
        let counts = threads
            .into_iter()
            .map(|it| it.join().map_err(|_| anyhow!("a client's thread panicked"))?);
        counts.collect::<Result<Vec<_>>>()
    })?;
    Ok(Count {
        done: counts.iter().map(|(done, _)| done).sum(),
        failed: counts.iter().map(|(_, failed)| failed).sum(),
        seconds: started.elapsed().as_secs_f64(),
    })
}

/// A thread's connections.
struct Client {
    server: SockaddrIn,
    epoll: Epoll,
    connections: Vec<Connection>,
}

struct Connection {
    socket: OwnedFd,
    asked: bool,
    received: usize,
}

/// How a connection is after an event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Progress {
    GoesOn,
    Answered,
    Failed,
}

impl Client {
    fn new(server: SocketAddrV4, connections: usize) -> Result<Self> {
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).context("make an epoll")?;
        let mut client = Self { server: SockaddrIn::from(server), epoll, connections: Vec::new() };
        for number in 0..connections {
            let connection = client.connect(number)?;
            client.connections.push(connection);
        }
        Ok(client)
    }

    /// Begins a connection whose events bear this number.
    fn connect(&self, number: usize) -> Result<Connection> {
        let flags = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
        let socket =
            socket(AddressFamily::Inet, SockType::Stream, flags, None).context("make a socket")?;
        match connect(socket.as_raw_fd(), &self.server) {
            // What becomes of it is told by an event.
            Ok(()) | Err(Errno::EINPROGRESS) => {}
            Err(error) => return Err(error).with_context(|| format!("connect to {}", self.server)),
        }
        // Each change is told once, so that nothing is to be set again on the way.
        let events = EpollFlags::EPOLLIN
            | EpollFlags::EPOLLOUT
            | EpollFlags::EPOLLRDHUP
            | EpollFlags::EPOLLET;
        let number = u64::try_from(number).context("number of a connection")?;
        self.epoll.add(&socket, EpollEvent::new(events, number)).context("wait for a socket")?;
        Ok(Connection { socket, asked: false, received: 0 })
    }

    /// Goes on until the deadline; gives how many were answered and how many failed.
    fn run(mut self, deadline: Instant) -> Result<(u64, u64)> {
        let (mut answered, mut failed) = (0, 0);
        let mut events = [EpollEvent::empty(); EVENTS];
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok((answered, failed));
            }
            let wait = EpollTimeout::try_from(left.min(Duration::from_millis(100)))?;
            let count = match self.epoll.wait(&mut events, wait) {
                Err(Errno::EINTR) => 0,
                other => other.context("wait for sockets")?,
            };
            for event in events.iter().take(count) {
                let number = usize::try_from(event.data()).context("number of a connection")?;
                let Some(connection) = self.connections.get_mut(number) else { continue };
                match connection.progress(event.events()) {
                    Progress::GoesOn => continue,
                    Progress::Answered => answered += 1,
                    Progress::Failed => failed += 1,
                }
                let next = self.connect(number)?;
                if let Some(connection) = self.connections.get_mut(number) {
                    // The old socket is closed by this.
                    *connection = next;
                }
            }
        }
    }
}

impl Connection {
    fn progress(&mut self, events: EpollFlags) -> Progress {
        if !self.asked && events.contains(EpollFlags::EPOLLOUT) {
            match write(&self.socket, &[b'x'; PAYLOAD]) {
                Ok(PAYLOAD) => self.asked = true,
                _ => return Progress::Failed,
            }
        }
        if events.intersects(EpollFlags::EPOLLERR | EpollFlags::EPOLLHUP) && !self.asked {
            return Progress::Failed;
        }
        if !events.intersects(EpollFlags::EPOLLIN | EpollFlags::EPOLLRDHUP) {
            return Progress::GoesOn;
        }
        let mut buffer = [0; 2 * PAYLOAD];
        match read(&self.socket, &mut buffer) {
            Ok(count) => self.received += count,
            Err(Errno::EAGAIN) => return Progress::GoesOn,
            Err(_) => return Progress::Failed,
        }
        let ended = events.contains(EpollFlags::EPOLLRDHUP);
        match (ended, self.received) {
            // It is over when the server's end of it is, not with the last byte.
            (true, PAYLOAD) => Progress::Answered,
            (true, _) => Progress::Failed,
            (false, _) => Progress::GoesOn,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use super::*;

    fn somewhere() -> (TcpListener, SocketAddrV4) {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let port = listener.local_addr().unwrap().port();
        (listener, SocketAddrV4::new(Ipv4Addr::LOCALHOST, port))
    }

    #[test]
    fn connections_that_are_answered_count() {
        let (listener, address) = somewhere();
        defer_accept(&listener).unwrap();
        // Ends with the test's process.
        thread::spawn(move || accept(&listener));
        let count = ask(address, 4, Duration::from_millis(50)).unwrap();
        assert!(count.done > 0 && count.failed == 0, "{count:?}");
    }

    #[test]
    fn connections_that_nobody_takes_or_answers_are_failures() {
        let (listener, address) = somewhere();
        drop(listener);
        let count = ask(address, 2, Duration::from_millis(20)).unwrap();
        assert!(count.done == 0 && count.failed > 0, "{count:?}");

        let (listener, address) = somewhere();
        thread::spawn(move || {
            while let Ok((mut stream, _)) = listener.accept() {
                let mut half = [0; PAYLOAD];
                let _ = stream.read_exact(&mut half);
                let _ = stream.write_all(&half[..PAYLOAD / 2]);
            }
        });
        let count = ask(address, 2, Duration::from_millis(20)).unwrap();
        assert!(count.done == 0 && count.failed > 0, "{count:?}");
    }
}
