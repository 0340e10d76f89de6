//! A proxy in front of a real Consul that fails in the ways a Consul, or what is between, can fail.
//!
//! It lives in a host's network namespace, takes one request at a time on each connection, as HTTP
//! clients send them, and asks Consul on a connection of its own for each. What it does to answers
//! can be changed while it runs.

#![allow(
    clippy::panic,
    clippy::unwrap_used,
    reason = "this is test code, and a panic names the line that failed"
)]

use std::{
    io::{self, BufRead as _, BufReader, Read as _, Write as _},
    net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    thread,
    time::Duration,
};

use xtask::lab::Lab;

/// How long Consul may take to answer: longer than any blocking query.
const ANSWER: Duration = Duration::from_secs(90);
/// Pause between looks for a new connection, and for the end of a fault.
const TICK: Duration = Duration::from_millis(5);
/// Step from one cut to the next; a prime, so that cuts fall everywhere.
const CUT_STEP: u64 = 37;

/// What happens to requests and answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// Nothing.
    None,
    /// Nobody listens, and the connections there were are closed.
    Refuse,
    /// Connections are taken, requests are read, nothing is answered. What waits when the fault
    /// ends is never answered either: its connection is closed.
    Hang,
    /// Consul is not asked, the answer is 500.
    Error500,
    /// Each answer comes so much later.
    Slow(Duration),
    /// Answers come in pieces of 16 bytes with this pause between.
    Drip(Duration),
    /// Each answer says a lower index than the one before.
    IndexBack,
    /// Consul does what was asked, the answer ends in its middle: each one at another byte.
    Cut,
    /// [`Self::Cut`] of the answers to transactions only.
    CutWrites,
    /// [`Self::Cut`] from the next transaction on, so that nobody can find out what became of it.
    CutFromWrite,
}

/// The proxy. Ended, with its connections, when dropped.
pub struct FaultProxy {
    shared: Arc<Shared>,
}

struct Shared {
    at: SocketAddr,
    consul: SocketAddr,
    state: Mutex<State>,
    /// Requests that met the present fault.
    met: AtomicU64,
    /// Requests in all.
    requests: AtomicU64,
}

struct State {
    fault: Fault,
    /// Counts changes of the fault.
    era: u64,
    /// What `IndexBack` said last.
    index: u64,
    /// Whether there was a transaction in this era.
    written: bool,
    ended: bool,
    connections: Vec<TcpStream>,
}

impl FaultProxy {
    /// Starts one on a host of a lab, at a port of its own in front of Consul's.
    pub fn start(lab: &Lab, host: &str, port: u16, consul: SocketAddr) -> Self {
        let at = SocketAddr::from((Ipv4Addr::UNSPECIFIED, port));
        let state = State {
            fault: Fault::None,
            era: 0,
            index: 0,
            written: false,
            ended: false,
            connections: Vec::new(),
        };
        let shared = Arc::new(Shared {
            at,
            consul,
            state: Mutex::new(state),
            met: AtomicU64::new(0),
            requests: AtomicU64::new(0),
        });
        let own = Arc::clone(&shared);
        // A thread is born into the network namespace of the one that makes it.
        lab.inside(host, move || {
            let listener = TcpListener::bind(at)?;
            thread::spawn(move || own.serve(listener));
            Ok(())
        })
        .unwrap_or_else(|error| panic!("the fault proxy: {error:#}"));
        Self { shared }
    }

    /// From now on this happens.
    pub fn set(&self, fault: Fault) {
        let mut state = self.shared.state();
        (state.fault, state.index, state.written) = (fault, 0, false);
        state.era += 1;
        self.shared.met.store(0, Ordering::Relaxed);
        if fault == Fault::Refuse {
            state.close();
        }
    }

    /// How many requests met the present fault.
    pub fn met(&self) -> u64 {
        self.shared.met.load(Ordering::Relaxed)
    }

    /// How many requests there were in all.
    pub fn requests(&self) -> u64 {
        self.shared.requests.load(Ordering::Relaxed)
    }
}

impl Drop for FaultProxy {
    fn drop(&mut self) {
        let mut state = self.shared.state();
        state.ended = true;
        state.close();
    }
}

impl State {
    fn close(&mut self) {
        for connection in self.connections.drain(..) {
            // It may be closed already.
            let _ = connection.shutdown(Shutdown::Both);
        }
    }
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn serve(self: Arc<Self>, listener: TcpListener) {
        let mut listener = Some(listener);
        while !self.state().ended {
            if self.state().fault == Fault::Refuse {
                listener = None;
                thread::sleep(TICK);
                continue;
            }
            if listener.is_none() {
                listener = TcpListener::bind(self.at).ok();
            }
            let Some(open) = &listener else { continue };
            let accepted = open.set_nonblocking(true).and_then(|()| open.accept());
            let Ok((connection, _)) = accepted else {
                thread::sleep(TICK);
                continue;
            };
            let Ok(copy) = connection.try_clone() else { continue };
            self.state().connections.push(copy);
            let shared = Arc::clone(&self);
            thread::spawn(move || {
                // A client that goes away, or a cut, is no failure of the proxy.
                let _ = shared.talk(&connection);
                let _ = connection.shutdown(Shutdown::Both);
            });
        }
    }

    /// Serves one connection until either side ends it.
    fn talk(&self, client: &TcpStream) -> io::Result<()> {
        client.set_nonblocking(false)?;
        client.set_nodelay(true)?;
        let mut requests = BufReader::new(client.try_clone()?);
        while let Some(request) = read_request(&mut requests)? {
            self.requests.fetch_add(1, Ordering::Relaxed);
            let (fault, era) = self.fault();
            if fault == Fault::Hang {
                return self.hang(era);
            }
            let answer = match fault {
                Fault::Error500 => {
                    Answer { head: "HTTP/1.1 500 Oh No".into(), body: b"broken by a test".into() }
                }
                _ => ask(self.consul, &request)?,
            };
            let writes = request.starts_with(b"PUT /v1/txn");
            self.state().written |= writes;
            self.answer(client, answer, writes)?;
        }
        Ok(())
    }

    /// The present fault, which a request has met.
    fn fault(&self) -> (Fault, u64) {
        let state = self.state();
        if state.fault != Fault::None {
            self.met.fetch_add(1, Ordering::Relaxed);
        }
        (state.fault, state.era)
    }

    /// Waits until the fault is over, without an answer.
    fn hang(&self, era: u64) -> io::Result<()> {
        while self.state().era == era && !self.state().ended {
            thread::sleep(TICK);
        }
        Err(io::ErrorKind::ConnectionReset.into())
    }

    /// Answers as the fault that there is by now will have it: a blocking query may have waited
    /// since before it.
    fn answer(&self, mut client: &TcpStream, mut answer: Answer, writes: bool) -> io::Result<()> {
        let (fault, era) = self.fault();
        match fault {
            Fault::CutWrites if !writes => client.write_all(&answer.bytes()),
            Fault::CutFromWrite if !self.state().written => client.write_all(&answer.bytes()),
            Fault::None | Fault::Error500 => client.write_all(&answer.bytes()),
            Fault::Refuse => Err(io::ErrorKind::ConnectionReset.into()),
            Fault::Hang => self.hang(era),
            Fault::Slow(delay) => {
                thread::sleep(delay);
                client.write_all(&answer.bytes())
            }
            Fault::Drip(pause) => answer.bytes().chunks(16).try_for_each(|piece| {
                thread::sleep(pause);
                client.write_all(piece)
            }),
            Fault::IndexBack => {
                answer.set_index(&mut self.state().index);
                client.write_all(&answer.bytes())
            }
            Fault::Cut | Fault::CutWrites | Fault::CutFromWrite => {
                let bytes = answer.bytes();
                let cut = self.met.load(Ordering::Relaxed) * CUT_STEP;
                let cut = usize::try_from(cut).unwrap_or(0) % bytes.len();
                client.write_all(&bytes[..cut])?;
                Err(io::ErrorKind::ConnectionReset.into())
            }
        }
    }
}

/// An answer of Consul's: status line and headers without those of the connection, body whole.
struct Answer {
    head: String,
    body: Vec<u8>,
}

impl Answer {
    fn bytes(&self) -> Vec<u8> {
        let head = format!("{}\r\nContent-Length: {}\r\n\r\n", self.head, self.body.len());
        [head.as_bytes(), &self.body].concat()
    }

    /// Makes the index one lower than `last`, which it then is.
    fn set_index(&mut self, last: &mut u64) {
        let lines = self.head.lines().map(|line| match line.split_once(": ") {
            Some((name, value)) if name.eq_ignore_ascii_case("x-consul-index") => {
                let real: u64 = value.parse().unwrap_or(2);
                *last = if *last == 0 { real } else { *last }.saturating_sub(1).max(1);
                format!("{name}: {last}")
            }
            _ => line.to_owned(),
        });
        self.head = lines.collect::<Vec<_>>().join("\r\n");
    }
}

/// Reads a request: its head, as one that asks for the connection to be closed, and its body.
/// `None` where the client is done.
fn read_request(from: &mut BufReader<TcpStream>) -> io::Result<Option<Vec<u8>>> {
    let mut line = String::new();
    if from.read_line(&mut line)? == 0 {
        return Ok(None);
    }
    // In answer to an older version Consul sends no chunks and closes at the end.
    let mut request = line.replace("HTTP/1.1", "HTTP/1.0");
    let mut length = 0;
    loop {
        line.clear();
        from.read_line(&mut line)?;
        let header = line.to_ascii_lowercase();
        if let Some(value) = header.strip_prefix("content-length:") {
            length = value.trim().parse().map_err(|_| io::ErrorKind::InvalidData)?;
        }
        if !header.starts_with("connection:") {
            request.push_str(&line);
        }
        if line.trim_end().is_empty() {
            break;
        }
    }
    let mut request = request.into_bytes();
    let head = request.len();
    request.resize(head + length, 0);
    from.read_exact(&mut request[head..])?;
    Ok(Some(request))
}

/// Asks Consul.
fn ask(consul: SocketAddr, request: &[u8]) -> io::Result<Answer> {
    let mut stream = TcpStream::connect_timeout(&consul, Duration::from_secs(3))?;
    stream.set_read_timeout(Some(ANSWER))?;
    stream.write_all(request)?;
    let mut bytes = Vec::new();
    stream.read_to_end(&mut bytes)?;
    let end = bytes.windows(4).position(|window| window == b"\r\n\r\n");
    let end = end.ok_or(io::ErrorKind::UnexpectedEof)?;
    let head = String::from_utf8_lossy(&bytes[..end]).replacen("HTTP/1.0", "HTTP/1.1", 1);
    let of_connection = ["connection:", "content-length:", "transfer-encoding:"];
    let kept = head.lines().filter(|line| {
        let line = line.to_ascii_lowercase();
        !of_connection.iter().any(|name| line.starts_with(name))
    });
    let head = kept.collect::<Vec<_>>().join("\r\n");
    Ok(Answer { head, body: bytes.split_off(end + 4) })
}
