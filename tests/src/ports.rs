//! Published ports, asked for from everywhere: servers that say who asks, and the ways there are.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "only tests call this, and a panic has a stack trace where an error has none"
)]

use std::{
    io::{Read as _, Write as _},
    net::{Ipv4Addr, SocketAddr, SocketAddrV4, TcpListener, TcpStream, UdpSocket},
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result, bail, ensure};
use xtask::lab::{CLIENT, patience};

use crate::{cluster::Cluster, lab::Counters};

/// The host that publishes.
pub const HOST: Ipv4Addr = Ipv4Addr::new(192, 168, 1, 11);
/// The port it publishes, by TCP and UDP, which leads to port 80 of `docker01/t1`.
pub const PORT: u16 = 90;
/// How long an answer may take.
const PATIENCE: Duration = Duration::from_secs(5);

/// What carries a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Path {
    /// The programs.
    Bpf,
    /// The kernel's NAT, or docker-proxy.
    Kernel,
}

/// A way of asking.
pub struct Way {
    /// What a table calls it.
    pub label: &'static str,
    /// The place that asks.
    pub from: &'static str,
    /// The address that is asked.
    pub to: Ipv4Addr,
    /// The client's address as the sandbox sees it.
    pub seen: Ipv4Addr,
    /// What carries it.
    pub path: Path,
}

/// Every way a Docker user expects to work, `gateway` being the address of the gwbridge.
pub fn ways(gateway: Ipv4Addr) -> [Way; 7] {
    let other = Ipv4Addr::new(192, 168, 1, 12);
    let way = |label, from, to, seen, path| Way { label, from, to, seen, path };
    let outside = Ipv4Addr::new(192, 168, 1, 100);
    [
        way("outside client", CLIENT, HOST, outside, Path::Bpf),
        way("other host", "docker02", HOST, other, Path::Bpf),
        way("container elsewhere", "docker02/t3", HOST, other, Path::Bpf),
        way("container here", "docker01/t2", HOST, gateway, Path::Kernel),
        way("itself", "docker01/t1", HOST, gateway, Path::Kernel),
        way("host address", "docker01", HOST, HOST, Path::Kernel),
        way("localhost", "docker01", Ipv4Addr::LOCALHOST, gateway, Path::Kernel),
    ]
}

/// Servers in the sandbox that say who asks, and how much was asked.
pub fn serve(cluster: &Cluster) {
    let listener = cluster.lab.inside("docker01/t1", || Ok(TcpListener::bind("0.0.0.0:80")?));
    let listener = listener.unwrap();
    thread::spawn(move || {
        for stream in listener.incoming().map_while(Result::ok) {
            thread::spawn(move || answer(stream));
        }
    });
    let socket = cluster.lab.inside("docker01/t1", || Ok(UdpSocket::bind("0.0.0.0:80")?)).unwrap();
    thread::spawn(move || {
        let mut buffer = [0; 1 << 16];
        while let Ok((length, peer)) = socket.recv_from(&mut buffer) {
            // As long as the question, so that both are fragmented or neither.
            let mut answer = peer.ip().to_string().into_bytes();
            answer.resize(length.max(answer.len()), b' ');
            let _ = socket.send_to(&answer, peer);
        }
    });
}

/// Says to each line who asked.
fn answer(mut stream: TcpStream) -> Result<()> {
    let SocketAddr::V4(peer) = stream.peer_addr()? else { bail!("not IPv4") };
    let mut byte = [0];
    while stream.read(&mut byte)? == 1 {
        if byte == *b"\n" {
            stream.write_all(format!("{:>15}", peer.ip()).as_bytes())?;
        }
    }
    Ok(())
}

/// A question on an open connection, and who asked by the answer.
pub fn ask(stream: &mut TcpStream) -> Result<Ipv4Addr> {
    stream.write_all(b"who am I?\n")?;
    let mut text = [0; 15];
    stream.read_exact(&mut text)?;
    Ok(std::str::from_utf8(&text)?.trim().parse()?)
}

/// Connects from a place of the lab.
pub fn connect(cluster: &Cluster, from: &str, to: Ipv4Addr) -> Result<TcpStream> {
    cluster.lab.inside(from, move || {
        let to = SocketAddr::V4(SocketAddrV4::new(to, PORT));
        let stream = TcpStream::connect_timeout(&to, patience(PATIENCE))?;
        stream.set_read_timeout(Some(patience(PATIENCE)))?;
        Ok(stream)
    })
}

/// A datagram of so many bytes, and who asked by the answer, which is as long.
pub fn ask_by_datagram(
    cluster: &Cluster,
    from: &str,
    to: Ipv4Addr,
    bytes: usize,
) -> Result<Ipv4Addr> {
    let socket = cluster.lab.inside(from, move || Ok(UdpSocket::bind("0.0.0.0:0")?))?;
    socket.set_read_timeout(Some(patience(PATIENCE)))?;
    socket.send_to(&vec![b'?'; bytes], (to, PORT))?;
    let mut buffer = [0; 1 << 16];
    let (length, peer) = socket.recv_from(&mut buffer).context("wait for the answer")?;
    ensure!(peer == SocketAddr::V4(SocketAddrV4::new(to, PORT)), "{peer} answered");
    ensure!(length == bytes.max(7), "{length} bytes came back of {bytes}");
    let text = buffer.get(..length).unwrap_or_default();
    Ok(std::str::from_utf8(text)?.trim().parse()?)
}

/// Asks, and looks at who the server says asked, and at the counters of what carried it.
pub fn check(cluster: &Cluster, way: &Way, protocol: &str, xdp: bool) {
    let counters = Counters::now(&cluster.lab);
    let seen = match protocol {
        "tcp" => connect(cluster, way.from, way.to).and_then(|mut stream| ask(&mut stream)),
        _ => ask_by_datagram(cluster, way.from, way.to, 20),
    };
    let label = way.label;
    let seen = seen.unwrap_or_else(|error| panic!("{label}, {protocol}: {error:#}"));
    assert_eq!(seen, way.seen, "{label}, {protocol}: the client's address");
    let moved = counters.since();
    let count = |program, verdict| moved.packets("docker01", program, verdict);
    let by_tc = count("from_uplink", "publish");
    let by_xdp = count("uplink_xdp", "publish");
    let back = count("from_gwbridge", "return");
    match way.path {
        Path::Kernel => assert_eq!((by_tc, by_xdp, back), (0, 0, 0), "{label}, {protocol}"),
        Path::Bpf if xdp => assert!(by_xdp > 0 && by_tc == 0 && back > 0, "{label}: {by_tc}"),
        Path::Bpf => assert!(by_tc > 0 && back > 0, "{label}: {by_tc} in, {back} back"),
    }
    println!("{label} | {protocol} | XDP {xdp} | {seen} | {:?}", way.path);
}
