//! Published ports of sandboxes, asked for from everywhere, under real traffic.

use std::{
    io::{Read as _, Write as _},
    net::{Ipv4Addr, SocketAddr, SocketAddrV4, TcpListener, TcpStream, UdpSocket},
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result, bail, ensure};
use nix::sys::signal::Signal;
use ovnet_tests::{
    cluster::{Cluster, Steps, until},
    lab::Counters,
};
use serde_json::Value;
use xtask::lab::CLIENT;

const HOST: Ipv4Addr = Ipv4Addr::new(192, 168, 1, 11);
const PORT: u16 = 90;
/// How long an answer may take.
const PATIENCE: Duration = Duration::from_secs(5);

/// What carries a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Path {
    Bpf,
    Kernel,
}

/// A way of asking.
struct Way {
    label: &'static str,
    from: &'static str,
    to: Ipv4Addr,
    /// The client's address as the sandbox sees it.
    seen: Ipv4Addr,
    path: Path,
}

/// Every way a Docker user expects to work.
fn ways(gateway: Ipv4Addr) -> [Way; 7] {
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

#[test]
fn published_ports_are_reached_from_everywhere() {
    for xdp in [None, Some("native")] {
        let name = if xdp.is_some() { "ports-xdp" } else { "ports" };
        let Some(cluster) = Cluster::up(name, |options| {
            options.hosts = 2;
            options.xdp = xdp.map(str::to_owned);
        }) else {
            return;
        };
        let steps = Steps::default();
        cluster.sh("docker02", "ovnet network create ov_net1");
        cluster.sandbox("docker01", "t1", "--network ov_net1 -p 90:80 -p 90:80/udp");
        cluster.sandbox("docker01", "t2", "--network ov_net1");
        cluster.sandbox("docker02", "t3", "--network ov_net1");
        serve(&cluster);
        let gateway = cluster.sh("docker01", "ip -4 -o address show dev ovnet_gwbridge");
        let gateway = gateway.split_whitespace().nth(3).unwrap().split('/').next().unwrap();
        for way in ways(gateway.parse().unwrap()) {
            for protocol in ["tcp", "udp"] {
                steps.begin(&format!("{}, {protocol}, XDP {xdp:?}", way.label));
                check(&cluster, &way, protocol, xdp.is_some());
            }
        }
        large_datagrams(&cluster, &steps);
        if xdp.is_none() {
            egress_is_kept_apart(&cluster, &steps);
            wrong_input(&cluster, &steps);
            connections_outlive_the_agent(&cluster, &steps);
            a_port_that_is_removed(&cluster, &steps);
        }
        assert_eq!(cluster.status("docker01")["errors"], Value::Array(Vec::new()));
    }
}

/// Servers in the sandbox that say who asks, and how much was asked.
fn serve(cluster: &Cluster) {
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
fn ask(stream: &mut TcpStream) -> Result<Ipv4Addr> {
    stream.write_all(b"who am I?\n")?;
    let mut text = [0; 15];
    stream.read_exact(&mut text)?;
    Ok(std::str::from_utf8(&text)?.trim().parse()?)
}

fn connect(cluster: &Cluster, from: &str, to: Ipv4Addr) -> Result<TcpStream> {
    cluster.lab.inside(from, move || {
        let to = SocketAddr::V4(SocketAddrV4::new(to, PORT));
        let stream = TcpStream::connect_timeout(&to, PATIENCE)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        Ok(stream)
    })
}

/// A datagram of so many bytes, and who asked by the answer, which is as long.
fn ask_by_datagram(cluster: &Cluster, from: &str, to: Ipv4Addr, bytes: usize) -> Result<Ipv4Addr> {
    let socket = cluster.lab.inside(from, move || Ok(UdpSocket::bind("0.0.0.0:0")?))?;
    socket.set_read_timeout(Some(PATIENCE))?;
    socket.send_to(&vec![b'?'; bytes], (to, PORT))?;
    let mut buffer = [0; 1 << 16];
    let (length, peer) = socket.recv_from(&mut buffer).context("wait for the answer")?;
    ensure!(peer == SocketAddr::V4(SocketAddrV4::new(to, PORT)), "{peer} answered");
    ensure!(length == bytes.max(7), "{length} bytes came back of {bytes}");
    let text = buffer.get(..length).unwrap_or_default();
    Ok(std::str::from_utf8(text)?.trim().parse()?)
}

fn check(cluster: &Cluster, way: &Way, protocol: &str, xdp: bool) {
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

/// Three fragments each way.
fn large_datagrams(cluster: &Cluster, steps: &Steps) {
    steps.begin("fragmented datagrams");
    for from in [CLIENT, "docker02", "docker02/t3", "docker01/t2", "docker01"] {
        let seen = ask_by_datagram(cluster, from, HOST, 4000);
        seen.unwrap_or_else(|error| panic!("from {from}: {error:#}"));
    }
}

fn egress_is_kept_apart(cluster: &Cluster, steps: &Steps) {
    steps.begin("out, but not to the neighbour, and no VXLAN in the host's name");
    let outside = cluster.lab.address(CLIENT).unwrap();
    cluster.wait_ping("docker01/t2", outside);
    let gateway = |name: &str| {
        let local = cluster.json("docker01", "endpoint ls --local");
        let of = |it: &&Value| it["names"][0] == name;
        let endpoint = local.as_array().unwrap().iter().find(of).unwrap();
        endpoint["local"]["gateway"]["address"].as_str().unwrap().to_owned()
    };
    let to = gateway("t1");
    let ping = ["ping", "-c", "1", "-W", "1", to.as_str()];
    let output = cluster.lab.output("docker01/t2", &ping, Duration::from_secs(10)).unwrap();
    assert!(!output.status.success(), "t2 reached {to} across the bridge");
    let socket = cluster.lab.inside("docker01/t2", || Ok(UdpSocket::bind("0.0.0.0:0")?)).unwrap();
    socket.send_to(b"vxlan", "192.168.1.12:4789").unwrap();
    until("the packet to be counted as dropped", || {
        let rules = cluster.sh("docker01", "nft list chain ip ovnet guard");
        rules.contains("counter packets 1 ").then_some(())
    });
}

/// What cannot be published, and one line that says why. Nothing changes.
fn wrong_input(cluster: &Cluster, steps: &Steps) {
    steps.begin("wrong input");
    cluster.sh("docker01", "ip netns add wrong");
    let before = (cluster.footprint("docker01"), cluster.records());
    let mut ports = String::new();
    for (specs, expected) in [
        ("-p 90:80", "in use by endpoint t1"),
        ("-p 8500:80", "in use by consul"),
        ("-p 0:80", "0"),
        ("-p 91:0", "0"),
        ("-p 91:80/sctp", "sctp"),
        ("-p 91:80/icmp", "icmp"),
        ("-p 192.168.1.99:91:80", "192.168.1.99"),
        ("-p 91-93:80-81", "91-93"),
        ("-p 91:80 -p 91:81", "91"),
        ("-p 70000:80", "70000"),
    ] {
        let line = format!("ovnet attach --network ov_net1 --netns wrong --name wrong {specs}");
        let argv: Vec<&str> = line.split(' ').collect();
        let said = cluster.refused("docker01", &argv);
        assert!(said.contains(expected), "{specs}: {said}");
        ports += &said;
    }
    println!("{ports}");
    assert_eq!((cluster.footprint("docker01"), cluster.records()), before);
    cluster.sh("docker01", "ip netns del wrong");
}

fn connections_outlive_the_agent(cluster: &Cluster, steps: &Steps) {
    steps.begin("the agent is killed and started again under an open connection");
    let mut stream = connect(cluster, CLIENT, HOST).unwrap();
    ask(&mut stream).unwrap();
    let counters = Counters::now(&cluster.lab);
    cluster.stop_agent("docker01", Signal::SIGKILL);
    ask(&mut stream).unwrap();
    ask(&mut connect(cluster, CLIENT, HOST).unwrap()).unwrap();
    cluster.start_agent("docker01");
    cluster.wait_connected("docker01");
    ask(&mut stream).unwrap();
    let moved = counters.since();
    assert!(moved.packets("docker01", "from_gwbridge", "return") > 0);
    let no_flow = moved.packets("docker01", "from_uplink", "kernel-no-flow");
    assert_eq!(no_flow, 0, "the connection went on as one that is known");
    let listening = cluster.sh("docker01", "ss -lnt");
    assert!(listening.contains("0.0.0.0:90 "), "{listening}");
}

fn a_port_that_is_removed(cluster: &Cluster, steps: &Steps) {
    steps.begin("a port that is removed ends its connections");
    let shown = cluster.sh("docker01", "ovnet port t1");
    assert_eq!(shown.trim(), "80/tcp -> 0.0.0.0:90\n80/udp -> 0.0.0.0:90");
    let mut stream = connect(cluster, CLIENT, HOST).unwrap();
    ask(&mut stream).unwrap();
    cluster.sh("docker01", "ovnet detach t1");
    // The host says at once that there is nobody: no waiting for a timeout.
    let error = ask(&mut stream).unwrap_err();
    let kind = error.downcast_ref::<std::io::Error>().map(std::io::Error::kind);
    assert_eq!(kind, Some(std::io::ErrorKind::ConnectionReset), "{error:#}");
    let error = connect(cluster, CLIENT, HOST).unwrap_err();
    let kind = error.downcast_ref::<std::io::Error>().map(std::io::Error::kind);
    assert_eq!(kind, Some(std::io::ErrorKind::ConnectionRefused), "{error:#}");
    until("its flows to be forgotten", || {
        let status = cluster.status("docker01");
        (status["flow_entries"] == 0 && status["published_ports"] == 0).then_some(())
    });
    let rules = cluster.sh("docker01", "nft list table ip ovnet");
    assert!(!rules.contains("dnat to"), "{rules}");
}
