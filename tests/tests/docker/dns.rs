//! Questions to a name server, and a name server to be asked: the messages of RFC 1035.

use std::{
    net::{IpAddr, Ipv4Addr, SocketAddr, UdpSocket},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::Duration,
};

use anyhow::{Context as _, Result};
use ovnet_tests::cluster::Cluster;

/// Types of records.
pub(crate) const A: u16 = 1;
pub(crate) const PTR: u16 = 12;
pub(crate) const AAAA: u16 = 28;
/// Response codes.
pub(crate) const NOERROR: u8 = 0;
pub(crate) const REFUSED: u8 = 5;

/// How long an answer may take.
const LIMIT: Duration = Duration::from_secs(5);
/// Length of a message's header.
const HEADER: usize = 12;

/// What a server answered: the response code, and the answers as text.
pub(crate) type Answer = (u8, Vec<String>);

/// Asks a server from inside a container.
pub(crate) fn ask(cluster: &Cluster, place: &str, server: IpAddr, name: &str, kind: u16) -> Answer {
    let (asked, name) = (question(name, kind), name.to_owned());
    let answer = cluster.lab.inside(place, move || {
        let socket = UdpSocket::bind("0.0.0.0:0")?;
        socket.set_read_timeout(Some(LIMIT))?;
        socket.send_to(&asked, SocketAddr::from((server, 53)))?;
        let mut buffer = [0; 4096];
        let length = socket.recv(&mut buffer).with_context(|| format!("no answer for {name}"))?;
        read(&buffer[..length]).with_context(|| format!("the answer for {name}"))
    });
    answer.unwrap_or_else(|error| panic!("{error:#}"))
}

/// A message that asks one thing.
fn question(name: &str, kind: u16) -> Vec<u8> {
    // Id 7, recursion desired, one question.
    let mut message = vec![0, 7, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0];
    for label in name.split('.') {
        message.push(u8::try_from(label.len()).unwrap());
        message.extend(label.as_bytes());
    }
    message.push(0);
    message.extend(kind.to_be_bytes());
    message.extend([0, 1]);
    message
}

/// Response code and answers of a message.
fn read(message: &[u8]) -> Result<Answer> {
    let word = |at: usize| Some(u16::from_be_bytes([*message.get(at)?, *message.get(at + 1)?]));
    let code = message.get(3).context("no header")? & 0x0f;
    let (questions, answers) = (word(4).context("no header")?, word(6).context("no header")?);
    let mut at = HEADER;
    for _ in 0..questions {
        at = name_at(message, at).context("the question")?.1 + 4;
    }
    let mut found = Vec::new();
    for _ in 0..answers {
        let start = name_at(message, at).context("an answer's name")?.1;
        let kind = word(start).context("an answer's type")?;
        let length = usize::from(word(start + 8).context("an answer's length")?);
        let data = start + 10;
        at = data + length;
        let bytes = message.get(data..at).context("an answer's data")?;
        found.push(match (kind, bytes) {
            (A, &[a, b, c, d]) => Ipv4Addr::new(a, b, c, d).to_string(),
            (PTR, _) => name_at(message, data).context("a name")?.0,
            (kind, bytes) => format!("type {kind}: {bytes:?}"),
        });
    }
    Ok((code, found))
}

/// A name in a message, and where it ends.
fn name_at(message: &[u8], mut at: usize) -> Option<(String, usize)> {
    let (mut labels, mut end) = (Vec::new(), None);
    loop {
        match *message.get(at)? {
            0 => break,
            // The rest of it is elsewhere.
            high @ 0xc0.. => {
                end.get_or_insert(at + 2);
                at = usize::from(high & 0x3f) << 8 | usize::from(*message.get(at + 1)?);
            }
            length => {
                let label = message.get(at + 1..=at + usize::from(length))?;
                labels.push(String::from_utf8_lossy(label).into_owned());
                at += 1 + usize::from(length);
            }
        }
    }
    Some((labels.join("."), end.unwrap_or(at + 1)))
}

/// A name server on a host that has one address for every name. Ended when dropped.
pub(crate) struct OneAnswer {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl OneAnswer {
    pub(crate) fn start(cluster: &Cluster, host: &str, address: Ipv4Addr) -> Self {
        let socket = cluster.lab.inside(host, || Ok(UdpSocket::bind("0.0.0.0:53")?)).unwrap();
        socket.set_read_timeout(Some(Duration::from_millis(50))).unwrap();
        let stop = Arc::new(AtomicBool::new(false));
        let stopping = Arc::clone(&stop);
        let thread = thread::spawn(move || {
            let mut buffer = [0; 512];
            while !stopping.load(Ordering::Relaxed) {
                let Ok((length, from)) = socket.recv_from(&mut buffer) else { continue };
                if let Some(answer) = answer(&buffer[..length], address) {
                    // Who asked may be gone.
                    let _ = socket.send_to(&answer, from);
                }
            }
        });
        Self { stop, thread: Some(thread) }
    }
}

impl Drop for OneAnswer {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// The question with the address as its answer, or with none where another type is asked for.
fn answer(asked: &[u8], address: Ipv4Addr) -> Option<Vec<u8>> {
    let end = name_at(asked, HEADER)?.1 + 4;
    let is_a = *asked.get(end - 3)? == u8::try_from(A).ok()?;
    let mut message = asked.get(..end)?.to_vec();
    message[2..HEADER].copy_from_slice(&[0x81, 0x80, 0, 1, 0, u8::from(is_a), 0, 0, 0, 0]);
    if is_a {
        // Its name is the question's; type A, class IN, no time to live, four bytes.
        message.extend([0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 0, 0, 4]);
        message.extend(address.octets());
    }
    Some(message)
}
