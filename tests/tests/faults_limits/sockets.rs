//! The sockets of an agent under clients that are slow, endless, many, or no clients at all: who
//! behaves is served meanwhile, and the agent's memory and files stay bounded.

use std::{
    fs,
    io::{Read as _, Write as _},
    net::{Ipv4Addr, SocketAddr, TcpStream, UdpSocket},
    os::unix::{
        fs::{MetadataExt as _, PermissionsExt as _},
        net::UnixStream,
    },
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use nix::sys::signal::Signal;
use ovnet_tests::cluster::{Cluster, Ping, Steps, until};

/// How long `ovnet status` may take under each attack, the start of its process included.
const SERVED: Duration = Duration::from_secs(5);
/// Connections tried at once.
const CROWD: usize = 2000;
/// Files and memory the agent may have more of than before, in KiB, under all of it.
const FILES: usize = 1000;
const MEMORY: u64 = 100 * 1024;
/// The address names are answered on in this lab.
const DNS: Ipv4Addr = Ipv4Addr::new(192, 168, 1, 11);

/// What clients do, what they send first, and what over and over after that.
type Attack = (&'static str, &'static [u8], Option<&'static [u8]>);

#[test]
fn clients_that_mean_harm_keep_nobody_away() {
    let Some(cluster) = Cluster::up("sockets", |options| {
        options.hosts = 2;
        options.agent_args = ["--dns", &DNS.to_string()].map(str::to_owned).to_vec();
    }) else {
        return;
    };
    let steps = Steps::default();
    cluster.sh("docker02", "ovnet network create ov_net1");
    let t1 = cluster.sandbox("docker01", "t1", "--network ov_net1");
    cluster.sandbox("docker02", "t2", "--network ov_net1");
    cluster.wait_ping("docker02/t2", t1);
    let ping = Ping::start(&cluster.lab, "docker02/t2", t1);
    let root = cluster.lab.host("docker01").unwrap().root();
    let sockets = ["run/ovnet/ovnet.sock", "run/docker/plugins/ovnet.sock"].map(|it| root.join(it));
    for socket in &sockets {
        assert_eq!(fs::metadata(socket).unwrap().permissions().mode() & 0o777, 0o600);
    }
    let before = usage(&cluster);

    let attacks: [Attack; 5] = [
        ("say nothing", b"", None),
        ("never end their head", b"GET /v1/status HTTP/1.1\r\n", Some(b"X: y\r\n")),
        (
            "never end their body",
            b"POST /v1/endpoints HTTP/1.1\r\nHost: a\r\nContent-Length: 60000\r\n\r\n",
            Some(b"x"),
        ),
        (
            "send for ever",
            b"POST /v1/endpoints HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n",
            Some(b"4\r\nabcd\r\n"),
        ),
        ("speak no HTTP", b"\x16\x03\x01\x00\xff\x00\r\n\x00\x00", Some(b"\x00")),
    ];
    for (what, begin, then) in attacks {
        steps.begin(&format!("{CROWD} clients that {what}"));
        let stop = Arc::new(AtomicBool::new(false));
        let crowd: Vec<_> = sockets
            .iter()
            .map(|socket| crowd(socket.clone(), begin.to_vec(), then.map(<[u8]>::to_vec), &stop))
            .collect();
        for _ in 0..2 {
            let begun = Instant::now();
            cluster.status("docker01");
            println!("    `ovnet status` took {:?}", begun.elapsed());
            assert!(begun.elapsed() < SERVED, "it took {:?} while they {what}", begun.elapsed());
            plugin_answers(&sockets[1]);
        }
        bounded(&cluster, before, what);
        stop.store(true, Ordering::Relaxed);
        for crowd in crowd {
            crowd.join().unwrap();
        }
    }
    steps.begin("DNS: connections, garbage, and a name that is answered meanwhile");
    dns(&cluster);
    bounded(&cluster, before, "they ask for names");

    steps.begin("all of them are forgotten");
    until("the files of the agent to be as they were", || {
        (usage(&cluster).0 <= before.0 + 8).then_some(())
    });
    steps.begin("the socket is removed, with its folder");
    fs::remove_dir_all(root.join("run/ovnet")).unwrap();
    until("the socket to be made again", || {
        cluster.lab.exec("docker01", &["ovnet", "status"]).ok()
    });
    ping.must_have_lost_none("hostile clients");

    steps.begin("a group");
    cluster.stop_agent("docker01", Signal::SIGTERM);
    let argv = ["ovnet-agent", "--consul", "192.168.1.11:8500", "--advertise", "ens33"];
    let said = cluster.refused("docker01", &[&argv[..], &["--socket-group", "nobodys"]].concat());
    assert!(said.contains("there is no group nobodys: make it with `groupadd nobodys`"), "{said}");
    cluster.lab.start_agent("docker01", &["--socket-group", "4711"]).unwrap();
    let there = fs::metadata(&sockets[0]).unwrap();
    assert_eq!((there.permissions().mode() & 0o777, there.gid()), (0o660, 4711));
    assert_eq!(fs::metadata(&sockets[1]).unwrap().permissions().mode() & 0o777, 0o600);
    let as_nobody = |group: &str| {
        let argv = ["setpriv", "--reuid=65534", group, "--clear-groups", "ovnet", "status"];
        cluster.lab.exec("docker01", &argv)
    };
    as_nobody("--regid=4711").unwrap();
    as_nobody("--regid=4712").unwrap_err();
}

/// Keeps as many connections as there may be on a socket until it is told to stop. Those that the
/// agent closes come again.
fn crowd(
    socket: PathBuf,
    begin: Vec<u8>,
    then: Option<Vec<u8>>,
    stop: &Arc<AtomicBool>,
) -> thread::JoinHandle<()> {
    let stop = Arc::clone(stop);
    let connect = move || {
        let mut stream = UnixStream::connect(&socket).ok()?;
        stream.set_nonblocking(true).ok()?;
        // The agent may have closed it already.
        let _ = stream.write(&begin);
        Some(stream)
    };
    let ready = Arc::new(AtomicBool::new(false));
    let came = Arc::clone(&ready);
    let crowd = thread::spawn(move || {
        let mut open = Vec::new();
        while !stop.load(Ordering::Relaxed) {
            // Some at a time, so that two cores have time for the agent, too.
            open.extend((0..4).filter_map(|_| connect()));
            if open.len() > CROWD {
                came.store(true, Ordering::Relaxed);
                open.drain(..4);
            }
            let some = open.len() / 50 + 1;
            for stream in open.iter_mut().rev().take(some).filter(|_| then.is_some()) {
                let _ = stream.write(then.as_deref().unwrap_or_default());
            }
            thread::sleep(Duration::from_millis(5));
        }
    });
    until("the crowd to come", || ready.load(Ordering::Relaxed).then_some(()));
    crowd
}

/// Whether the plugin's socket serves somebody who behaves. One closed to make room asks again.
fn plugin_answers(socket: &PathBuf) {
    let ask = || {
        let mut stream = UnixStream::connect(socket).ok()?;
        stream.set_read_timeout(Some(SERVED)).ok()?;
        stream
            .write_all(b"POST /Plugin.Activate HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\n\r\n{}")
            .ok()?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).ok()?;
        answer.contains("IpamDriver").then_some(())
    };
    let begun = Instant::now();
    until("an answer to Docker", ask);
    println!("    Docker waited {:?}", begun.elapsed());
    assert!(begun.elapsed() < SERVED, "Docker waited {:?}", begun.elapsed());
}

fn dns(cluster: &Cluster) {
    let server = SocketAddr::from((DNS, 53));
    let held = cluster
        .lab
        .inside("docker01", move || {
            let connections = (0..500).filter_map(|_| {
                let mut stream = TcpStream::connect_timeout(&server, SERVED).ok()?;
                // A length, and never the query.
                let _ = stream.write(&[0xff, 0xff]);
                Some(stream)
            });
            let connections: Vec<_> = connections.collect();
            let socket = UdpSocket::bind("192.168.1.11:0")?;
            for length in 0..2000_usize {
                let garbage: Vec<u8> =
                    (0..length % 1400).map(|it| u8::try_from(it * length % 256).unwrap()).collect();
                let _ = socket.send_to(&garbage, server);
            }
            // The root's name servers: a whole query, which has an answer of some kind.
            let query = [0x12, 0x34, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 2, 0, 1];
            socket.set_read_timeout(Some(Duration::from_secs(1)))?;
            let mut buffer = [0; 512];
            let begun = Instant::now();
            while begun.elapsed() < SERVED {
                socket.send_to(&query, server)?;
                while let Ok((length, _)) = socket.recv_from(&mut buffer) {
                    if length >= 12 && buffer[..2] == query[..2] {
                        return Ok((connections, true));
                    }
                }
            }
            Ok((connections, false))
        })
        .unwrap();
    assert!(held.1, "a query has no answer beside {} connections", held.0.len());
}

/// Open files and resident memory of the agent of docker01, in KiB.
fn usage(cluster: &Cluster) -> (usize, u64) {
    let agent = PathBuf::from(format!("/proc/{}", cluster.lab.agent("docker01").unwrap().pid));
    let status = fs::read_to_string(agent.join("status")).unwrap();
    let resident = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    let resident = resident.split_whitespace().next().unwrap().parse().unwrap();
    (fs::read_dir(agent.join("fd")).unwrap().count(), resident)
}

fn bounded(cluster: &Cluster, before: (usize, u64), what: &str) {
    let (files, memory) = usage(cluster);
    println!("    {files} files, {memory} KiB while they {what}");
    assert!(files < before.0 + FILES, "{files} files, {before:?} before, while they {what}");
    assert!(memory < before.1 + MEMORY, "{memory} KiB, {before:?} before, while they {what}");
}
