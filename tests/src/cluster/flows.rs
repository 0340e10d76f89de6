//! Traffic that goes on while a test does things to the agents.

use std::{
    collections::BTreeSet,
    io::{self, BufRead as _, BufReader, Read as _, Write as _},
    net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream},
    os::unix::process::CommandExt as _,
    process::{Child, Stdio},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread::{self, JoinHandle},
    time::Duration,
};

use nix::{
    sys::signal::{Signal, killpg},
    unistd::Pid,
};
use xtask::lab::Lab;

use super::until;

/// The port streams go to.
const PORT: u16 = 5201;
/// Bytes of a write of a stream.
const BLOCK: usize = 16 * 1024;
/// Pause between writes: a stream that took all of the machine would starve what is tested.
const PACE: Duration = Duration::from_millis(2);
/// Length of the pattern streams carry; odd, so that no block begins as the one before.
const PATTERN: usize = 251;

/// `ping` every millisecond. Ended when dropped.
pub struct Ping {
    child: Child,
    answered: Arc<Mutex<BTreeSet<u32>>>,
    /// Answers to what was answered already.
    duplicates: Arc<AtomicU64>,
    reader: Option<JoinHandle<()>>,
}

impl Ping {
    /// Starts it and waits for the first answer.
    pub fn start(lab: &Lab, from: &str, to: Ipv4Addr) -> Self {
        let to = to.to_string();
        // Its output would else come in blocks of many seconds.
        let argv = ["stdbuf", "-oL", "ping", "-n", "-i", "0.001", &to];
        let mut command = lab.command(from, &argv).unwrap();
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null());
        let mut child = command.process_group(0).spawn().unwrap();
        let output = BufReader::new(child.stdout.take().unwrap());
        let answered = Arc::new(Mutex::new(BTreeSet::new()));
        let duplicates = Arc::new(AtomicU64::new(0));
        let (seen, again) = (Arc::clone(&answered), Arc::clone(&duplicates));
        let reader = thread::spawn(move || {
            let mut last = 0;
            for line in output.lines().map_while(Result::ok) {
                let number = line.split("icmp_seq=").nth(1).and_then(|it| it.split(' ').next());
                // "From 10.0.0.2 icmp_seq=3 Destination Host Unreachable" is no answer.
                if let Some(number) = number.filter(|_| line.contains(" bytes from "))
                    && let Ok(number) = number.parse()
                {
                    let number = unwrapped(number, last);
                    last = last.max(number);
                    let is_new = seen.lock().unwrap_or_else(PoisonError::into_inner).insert(number);
                    again.fetch_add(u64::from(!is_new), Ordering::Relaxed);
                }
            }
        });
        let ping = Self { child, answered, duplicates, reader: Some(reader) };
        ping.goes_on(1);
        ping
    }

    /// How many were answered so far.
    pub fn answered(&self) -> usize {
        self.answered.lock().unwrap_or_else(PoisonError::into_inner).len()
    }

    /// Waits for this many further answers.
    pub fn goes_on(&self, count: usize) {
        let wanted = self.answered() + count;
        until("ping to go on", || (self.answered() >= wanted).then_some(()));
    }

    /// The numbers of the requests that were not answered although a later one was.
    pub fn lost(&self) -> Vec<u32> {
        let answered = self.answered.lock().unwrap_or_else(PoisonError::into_inner);
        let last = answered.last().copied().unwrap_or_default();
        (1..last).filter(|number| !answered.contains(number)).collect()
    }

    /// How many answers came to requests that were answered already.
    pub fn duplicates(&self) -> u64 {
        self.duplicates.load(Ordering::Relaxed)
    }

    /// Ends it; there must have been an answer to each request, and one only.
    pub fn must_have_lost_none(self, why: &str) {
        self.goes_on(5);
        let lost = self.lost();
        assert!(lost.is_empty(), "{why}: of {} pings these were lost: {lost:?}", self.answered());
        assert_eq!(self.duplicates(), 0, "{why}: answers that came twice");
    }
}

impl Drop for Ping {
    fn drop(&mut self) {
        if let Ok(pid) = i32::try_from(self.child.id()) {
            // It may have ended by itself.
            let _ = killpg(Pid::from_raw(pid), Signal::SIGKILL);
        }
        let _ = self.child.wait();
        if let Some(reader) = self.reader.take() {
            let _ = reader.join();
        }
    }
}

/// A TCP connection with data on its way all the time. Ended when dropped.
pub struct Stream {
    received: Arc<AtomicU64>,
    stop: Arc<AtomicBool>,
    broke: Arc<Mutex<Option<String>>>,
    ends: Vec<JoinHandle<u64>>,
}

impl Stream {
    /// Connects one place to another, whose address is `to`.
    pub fn start(lab: &Lab, from: &str, place: &str, to: Ipv4Addr) -> Self {
        Self::start_at(lab, from, place, SocketAddr::from((to, PORT)))
    }

    /// [`Stream::start`] with a port of its own.
    pub fn start_at(lab: &Lab, from: &str, place: &str, at: SocketAddr) -> Self {
        Self::start_published(lab, from, place, at, at)
    }

    /// [`Stream::start`] by way of a published port: `listen` in `place` is reached at `at`.
    pub fn start_published(
        lab: &Lab,
        from: &str,
        place: &str,
        listen: SocketAddr,
        at: SocketAddr,
    ) -> Self {
        let (client, server) = connect(lab, from, place, listen, at);
        Self::over(client, server)
    }

    /// [`Stream::start_published`], but the data flows from the published port to whoever asked.
    pub fn start_answers(
        lab: &Lab,
        from: &str,
        place: &str,
        listen: SocketAddr,
        at: SocketAddr,
    ) -> Self {
        let (client, server) = connect(lab, from, place, listen, at);
        Self::over(server, client)
    }

    fn over(client: TcpStream, server: TcpStream) -> Self {
        let (received, stop) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicBool::new(false)));
        let broke = Arc::new(Mutex::new(None));
        let told = |result: Result<u64, String>, broke: &Mutex<Option<String>>| {
            result.unwrap_or_else(|why| {
                broke.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(why);
                0
            })
        };
        let sends = {
            let (stop, broke) = (Arc::clone(&stop), Arc::clone(&broke));
            thread::spawn(move || told(send(client, &stop), &broke))
        };
        let receives = {
            let (received, broke) = (Arc::clone(&received), Arc::clone(&broke));
            thread::spawn(move || told(receive(server, &received), &broke))
        };
        let stream = Self { received, stop, broke, ends: vec![sends, receives] };
        stream.goes_on();
        stream
    }

    /// Waits until more came through.
    pub fn goes_on(&self) {
        let wanted = self.received.load(Ordering::Relaxed) + 4 * BLOCK as u64;
        until("the TCP stream to go on", || {
            let broke = self.broke.lock().unwrap_or_else(PoisonError::into_inner).clone();
            assert_eq!(broke, None, "the TCP connection broke");
            (self.received.load(Ordering::Relaxed) >= wanted).then_some(())
        });
    }

    /// Ends it; all that was sent must have come.
    pub fn must_be_whole(mut self) {
        self.goes_on();
        self.stop.store(true, Ordering::Relaxed);
        let counts: Vec<u64> = self.ends.drain(..).map(|end| end.join().unwrap()).collect();
        assert_eq!(*self.broke.lock().unwrap(), None, "the TCP connection broke");
        assert_eq!(counts[0], counts[1], "bytes sent, and received");
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        // Both ends notice: the sender by this, the receiver by the sender's end.
        self.stop.store(true, Ordering::Relaxed);
    }
}

/// Both ends of a connection that `from` opens to `at`, and `place` accepts at `listen`.
fn connect(
    lab: &Lab,
    from: &str,
    place: &str,
    listen: SocketAddr,
    at: SocketAddr,
) -> (TcpStream, TcpStream) {
    let listener = lab.inside(place, move || Ok(TcpListener::bind(listen)?)).unwrap();
    let connect = move || Ok(TcpStream::connect_timeout(&at, Duration::from_secs(5))?);
    let client = lab.inside(from, connect).unwrap();
    (client, listener.accept().unwrap().0)
}

/// The number of a request of which ping says the lower 16 bits, which come round after a minute of a
/// ping per millisecond. An answer may be late by so many that it is no new round.
fn unwrapped(number: u16, last: u32) -> u32 {
    const LATE: u32 = 4096;
    let round = 1 << 16;
    let number = last / round * round + u32::from(number);
    match number {
        _ if number + LATE < last => number + round,
        _ if number > last + round - LATE && number >= round => number - round,
        _ => number,
    }
}

fn send(mut stream: TcpStream, stop: &AtomicBool) -> Result<u64, String> {
    let pattern = pattern();
    let mut sent = 0;
    // One that cannot move for this long is lost; the kernel itself would go on for minutes.
    stream.set_write_timeout(Some(super::LIMIT)).map_err(|error| error.to_string())?;
    while !stop.load(Ordering::Relaxed) {
        let start = sent % PATTERN;
        stream.write_all(&pattern[start..start + BLOCK]).map_err(|it| format!("send: {it}"))?;
        sent += BLOCK;
        thread::sleep(PACE);
    }
    Ok(sent as u64)
}

fn receive(mut stream: TcpStream, received: &AtomicU64) -> Result<u64, String> {
    let pattern = pattern();
    let mut count = 0;
    let mut buffer = vec![0; BLOCK];
    stream.set_read_timeout(Some(super::LIMIT)).map_err(|error| error.to_string())?;
    loop {
        let length = match stream.read(&mut buffer) {
            // A read with a time limit is not begun again by itself after a signal.
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            result => result.map_err(|error| format!("receive: {error}"))?,
        };
        if length == 0 {
            return Ok(count as u64);
        }
        let start = count % PATTERN;
        if buffer[..length] != pattern[start..start + length] {
            return Err(format!("not what was sent, after {count} bytes"));
        }
        count += length;
        received.store(count as u64, Ordering::Relaxed);
    }
}

/// A block of the pattern from wherever in it.
fn pattern() -> Vec<u8> {
    (0..PATTERN).cycle().take(PATTERN + BLOCK).map(|it| u8::try_from(it).unwrap_or(0)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_go_on_where_ping_begins_anew() {
        for (said, last, meant) in [
            (1, 0, 1),
            (65_535, 65_534, 65_535),
            (0, 65_535, 65_536),
            (5, 65_530, 65_541),
            (65_530, 65_541, 65_530),
            (9, 131_073, 131_081),
            (40_000, 131_073, 171_072),
            (100, 2_000, 100),
        ] {
            assert_eq!(unwrapped(said, last), meant, "{said} after {last}");
        }
    }
}
