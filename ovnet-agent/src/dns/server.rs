//! The sockets: UDP and TCP on port 53 of one address, which may come, change and go.
//!
//! hickory-server reads and writes the messages; its own listeners are not used. They take any
//! number of connections and tasks, drop answers beyond 32 that wait, and log each query twice.
//! Here everything a container can ask for is bounded: it must not harm the agent beside it.

use std::{
    net::{IpAddr, Ipv4Addr, SocketAddr, SocketAddrV4},
    os::fd::AsRawFd as _,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use anyhow::{Context as _, Result, anyhow, ensure};
use hickory_server::{net::xfer::Protocol, server::Request};
use nix::{
    errno::Errno,
    sys::socket::{
        AddressFamily, Backlog, SockFlag, SockType, SockaddrIn, bind, listen, setsockopt, socket,
        sockopt,
    },
};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream, UdpSocket},
    sync::{Semaphore, watch},
    task::{AbortHandle, JoinSet},
    time::{sleep, timeout},
};

use super::{
    message::{Incoming, read, reply},
    names::{Answer, Question},
};
use crate::consul::schema::NetworkRecord;

/// Between attempts to listen where the port is taken.
const RETRY: Duration = Duration::from_secs(2);
/// Pause after an error of a socket, as of too many open files: trying at once would only spin.
const PAUSE: Duration = Duration::from_millis(100);
/// Largest query read. Real ones have a hundred bytes.
const LARGEST_QUERY: usize = 4096;
/// Bytes of queries the kernel keeps while we are busy: a thousand queries at once.
const RECEIVE_BUFFER: usize = 1 << 20;
/// UDP queries whose asker is being looked for. More are dropped, and asked again by resolvers.
/// Askers that were known before have as many for themselves: anybody can forge new ones.
const LOOKING: usize = 256;
/// How long looking for an asker may take.
const LOOK: Duration = Duration::from_secs(2);
/// TCP connections in all and from one address; more are closed at once. One container cannot keep
/// the others away.
const CONNECTIONS: usize = 128;
const CONNECTIONS_FROM_ONE: usize = 8;
/// How long a TCP connection may wait for its next query, and how long it may last.
const IDLE: Duration = Duration::from_secs(5);
const CONNECTION: Duration = Duration::from_secs(30);

/// What the server asks of the rest of the agent.
pub trait Knowledge: Send + Sync + 'static {
    /// What is known of the container with this address at once: no I/O.
    fn known(&self, source: Ipv4Addr) -> Asker;
    /// Its networks, looking for it. No networks are those of a stranger.
    fn find(&self, source: Ipv4Addr) -> impl Future<Output = Networks> + Send;
    /// The answer to somebody on these networks; `turn` counts queries.
    fn answer(&self, networks: &[NetworkRecord], question: &Question, turn: usize) -> Answer;
}

/// The networks of an asker.
pub type Networks = Arc<[NetworkRecord]>;

/// What is known of an asker without looking.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Asker {
    /// Its networks, none of a stranger.
    Known(Networks),
    /// It was known, so it is no forged address, but too long ago.
    Familiar,
    /// It may be anybody.
    New,
}

/// Serves on the address while there is one, and moves when it changes. Ends when it is dropped.
pub async fn serve<K: Knowledge>(
    mut addresses: watch::Receiver<Option<Ipv4Addr>>,
    port: u16,
    knowledge: Arc<K>,
) {
    let mut complained = None;
    loop {
        let address = *addresses.borrow_and_update();
        let attempt = async {
            let Some(address) = address else { return std::future::pending().await };
            match Listeners::bind(SocketAddrV4::new(address, port)) {
                Ok(listeners) => {
                    tracing::info!(%address, "names are answered");
                    complained = None;
                    listeners.run(Arc::clone(&knowledge)).await;
                    tracing::warn!(%address, "answering names ended by itself; it is started anew");
                }
                Err(error) if complained != Some(address) => {
                    tracing::warn!("no names are answered: {error:#}");
                    complained = Some(address);
                }
                Err(_) => {}
            }
            sleep(RETRY).await;
        };
        tokio::select! {
            () = attempt => {}
            () = another(&mut addresses, address) => {}
        }
    }
}

/// Waits until there is another address: for ever where nobody is left to tell one.
async fn another(addresses: &mut watch::Receiver<Option<Ipv4Addr>>, than: Option<Ipv4Addr>) {
    if addresses.wait_for(|now| *now != than).await.is_err() {
        std::future::pending::<()>().await;
    }
}

/// A bound pair of sockets.
#[derive(Debug)]
pub struct Listeners {
    udp: UdpSocket,
    tcp: TcpListener,
}

impl Listeners {
    /// Binds both, also where no interface has the address yet. Port 0 is any, the same for both.
    pub fn bind(address: SocketAddrV4) -> Result<Self> {
        let told = |error| match error {
            Errno::EADDRINUSE => anyhow!(
                "port {} of {} is taken: `ss -lntup 'sport = :{0}'` shows by whom; keep that \
                 server off this address (dnsmasq: bind-interfaces and \
                 except-interface=docker_gwbridge), or give --dns another one",
                address.port(),
                address.ip()
            ),
            Errno::EACCES => anyhow!("listening on {address} needs root (CAP_NET_BIND_SERVICE)"),
            other => anyhow!(other).context(format!("listen on {address}")),
        };
        let make = || -> Result<Self, Errno> {
            let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
            let udp = socket(AddressFamily::Inet, SockType::Datagram, flags, None)?;
            setsockopt(&udp, sockopt::IpFreebind, &true)?;
            // Beyond the system's limit as root, up to it otherwise.
            if setsockopt(&udp, sockopt::RcvBufForce, &RECEIVE_BUFFER).is_err() {
                setsockopt(&udp, sockopt::RcvBuf, &RECEIVE_BUFFER)?;
            }
            bind(udp.as_raw_fd(), &SockaddrIn::from(address))?;
            let udp = UdpSocket::from_std(udp.into()).map_err(errno)?;
            let port = udp.local_addr().map_err(errno)?.port();

            let tcp = socket(AddressFamily::Inet, SockType::Stream, flags, None)?;
            setsockopt(&tcp, sockopt::IpFreebind, &true)?;
            // Connections of a server before us may still be in TIME_WAIT.
            setsockopt(&tcp, sockopt::ReuseAddr, &true)?;
            bind(tcp.as_raw_fd(), &SockaddrIn::from(SocketAddrV4::new(*address.ip(), port)))?;
            listen(&tcp, Backlog::new(128)?)?;
            Ok(Self { udp, tcp: TcpListener::from_std(tcp.into()).map_err(errno)? })
        };
        make().map_err(told)
    }

    /// Where it listens.
    pub fn address(&self) -> Result<SocketAddr> {
        self.udp.local_addr().context("ask for the DNS server's address")
    }

    /// Answers until one of the two loops ends, which only a panic makes them.
    pub async fn run<K: Knowledge>(self, knowledge: Arc<K>) {
        let service = Arc::new(Service { knowledge, turn: AtomicUsize::new(0) });
        let mut loops = JoinSet::new();
        loops.spawn(answer_udp(self.udp, Arc::clone(&service)));
        loops.spawn(answer_tcp(self.tcp, service));
        loops.join_next().await;
    }
}

fn errno(error: std::io::Error) -> Errno {
    error.raw_os_error().map_or(Errno::EIO, Errno::from_raw)
}

struct Service<K> {
    knowledge: Arc<K>,
    /// Counts queries.
    turn: AtomicUsize,
}

/// What to do with a message.
enum Step {
    Send(Vec<u8>),
    /// Look for the asker; with whether it was known before.
    Look(Box<Request>, Question, bool),
    Nothing,
}

impl<K: Knowledge> Service<K> {
    /// What can be said without waiting.
    fn at_once(&self, message: &[u8], from: SocketAddr, protocol: Protocol) -> Step {
        match read(message, from, protocol) {
            Incoming::Ignored => Step::Nothing,
            Incoming::Settled(bytes) => Step::Send(bytes),
            Incoming::Question(request, question) => match self.knowledge.known(v4(from)) {
                Asker::Known(networks) => {
                    self.reply(&request, &question, &networks).map_or(Step::Nothing, Step::Send)
                }
                Asker::Familiar => Step::Look(request, question, true),
                Asker::New => Step::Look(request, question, false),
            },
        }
    }

    /// What is said once it is clear who asks.
    async fn look(&self, request: &Request, question: &Question) -> Option<Vec<u8>> {
        let networks = timeout(LOOK, self.knowledge.find(v4(request.src()))).await.ok()?;
        self.reply(request, question, &networks)
    }

    fn reply(
        &self,
        request: &Request,
        question: &Question,
        networks: &[NetworkRecord],
    ) -> Option<Vec<u8>> {
        let turn = self.turn.fetch_add(1, Ordering::Relaxed);
        let answer = self.knowledge.answer(networks, question, turn);
        tracing::debug!(asker = %request.src(), name = question.name, ?answer, "asked for a name");
        let bytes = reply(request, &answer);
        bytes.inspect_err(|error| tracing::debug!("{error:#}")).ok()
    }
}

fn v4(from: SocketAddr) -> Ipv4Addr {
    match from.ip() {
        IpAddr::V4(address) => address,
        // The sockets are IPv4's; nobody has this address.
        IpAddr::V6(_) => Ipv4Addr::UNSPECIFIED,
    }
}

async fn answer_udp<K: Knowledge>(socket: UdpSocket, service: Arc<Service<K>>) {
    let socket = Arc::new(socket);
    let familiar = Arc::new(Semaphore::new(LOOKING));
    let new = Arc::new(Semaphore::new(LOOKING));
    let mut buffer = vec![0; LARGEST_QUERY];
    // try_send_to() sends nothing before the runtime has seen once that it can.
    let _ = socket.writable().await;
    loop {
        let (length, from) = match socket.recv_from(&mut buffer).await {
            Ok(received) => received,
            Err(error) => {
                tracing::debug!(%error, "receive a DNS query");
                sleep(PAUSE).await;
                continue;
            }
        };
        match service.at_once(&buffer[..length], from, Protocol::Udp) {
            Step::Nothing => {}
            Step::Send(bytes) => send(&socket, &bytes, from),
            Step::Look(request, question, known_before) => {
                let permits = if known_before { &familiar } else { &new };
                let Ok(permit) = Arc::clone(permits).try_acquire_owned() else { continue };
                let (socket, service) = (Arc::clone(&socket), Arc::clone(&service));
                tokio::spawn(async move {
                    if let Some(bytes) = service.look(&request, &question).await {
                        send(&socket, &bytes, from);
                    }
                    drop(permit);
                });
            }
        }
    }
}

/// Sends, or drops where the kernel's buffer is full of answers to askers that are not there.
fn send(socket: &UdpSocket, bytes: &[u8], to: SocketAddr) {
    if let Err(error) = socket.try_send_to(bytes, to) {
        tracing::debug!(%error, %to, "send a DNS answer");
    }
}

async fn answer_tcp<K: Knowledge>(listener: TcpListener, service: Arc<Service<K>>) {
    let mut tasks = JoinSet::new();
    let mut open: Vec<(IpAddr, AbortHandle)> = Vec::new();
    loop {
        let (stream, from) = match listener.accept().await {
            Ok(accepted) => accepted,
            Err(error) => {
                tracing::debug!(%error, "accept a DNS connection");
                sleep(PAUSE).await;
                continue;
            }
        };
        while tasks.try_join_next().is_some() {}
        open.retain(|(_, task)| !task.is_finished());
        let from_one = open.iter().filter(|(ip, _)| *ip == from.ip()).count();
        if open.len() >= CONNECTIONS || from_one >= CONNECTIONS_FROM_ONE {
            continue;
        }
        let service = Arc::clone(&service);
        let task = tasks.spawn(async move {
            let ended = timeout(CONNECTION, converse(stream, from, &service)).await;
            if let Ok(Err(error)) = ended {
                tracing::debug!(%from, "a DNS connection ended: {error:#}");
            }
        });
        open.push((from.ip(), task));
    }
}

/// Answers query after query, each behind its length (RFC 1035, section 4.2.2).
async fn converse<K: Knowledge>(
    mut stream: TcpStream,
    from: SocketAddr,
    service: &Service<K>,
) -> Result<()> {
    loop {
        let read = async {
            let length = usize::from(stream.read_u16().await?);
            ensure!(length <= LARGEST_QUERY, "a query of {length} bytes");
            let mut message = vec![0; length];
            stream.read_exact(&mut message).await?;
            anyhow::Ok(message)
        };
        let message = timeout(IDLE, read).await.context("no query in time")??;
        let reply = match service.at_once(&message, from, Protocol::Tcp) {
            Step::Send(bytes) => Some(bytes),
            Step::Look(request, question, _) => service.look(&request, &question).await,
            Step::Nothing => None,
        };
        let reply = reply.context("nothing to answer")?;
        let mut framed = u16::try_from(reply.len())?.to_be_bytes().to_vec();
        framed.extend(reply);
        stream.write_all(&framed).await?;
    }
}

#[cfg(test)]
mod tests;
