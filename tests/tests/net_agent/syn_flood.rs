//! A million spoofed SYNs at a published port, and who notices.

use std::{
    net::{Ipv4Addr, TcpStream},
    os::fd::{AsRawFd as _, OwnedFd},
    sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    time::{Duration, Instant},
};

use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, SockaddrIn, sendto, socket,
};
use ovnet_tests::{
    cluster::{Cluster, Steps, until},
    lab::Counters,
    packet,
    ports::{HOST, PORT, ask, connect, serve},
};
use serde_json::Value;
use xtask::lab::CLIENT;

const SYNS: u32 = 1_000_000;
/// Of each kind: those that go on talking, and those that are silent.
const CONNECTIONS: usize = 20;
/// How much more memory an agent may have afterwards, in KiB: what an allocator keeps.
const GROWTH: u64 = 4096;

#[test]
fn a_syn_flood_breaks_no_connection() {
    // A flood turns the small table over a hundred times. It turns the large one over five times
    // only, and the kernel's LRU keeps what was ever looked up for a while longer than the rest.
    let [all, some] = [CONNECTIONS as u64, 1];
    for (name, entries, forgotten) in [("syn-small", Some(16384), all), ("syn", None, some)] {
        let Some(cluster) = Cluster::up(name, |options| {
            options.hosts = 1;
            if let Some(entries) = entries {
                options.agent_args.extend(["--conntrack-max".into(), format!("{entries}")]);
            }
        }) else {
            return;
        };
        let steps = Steps::default();
        cluster.sh("docker01", "ovnet network create ov_net1");
        cluster.sandbox("docker01", "t1", "--network ov_net1 -p 90:80 -p 90:80/udp");
        serve(&cluster);
        // The way back to those who never asked: answers end at the client, which does not forward.
        cluster.sh("docker01", "ip route add 100.64.0.0/10 via 192.168.1.100");
        steps.begin(&format!("a flood with a table for {entries:?} flows"));
        flood_it(&cluster, forgotten);
        assert_eq!(cluster.status("docker01")["errors"], Value::Array(Vec::new()));
    }
}

/// Floods, and expects the table to have let go of so many connections at least.
fn flood_it(cluster: &Cluster, forgotten: u64) {
    let connected = || connect(cluster, CLIENT, HOST).unwrap();
    let mut talking: Vec<TcpStream> = (0..CONNECTIONS).map(|_| connected()).collect();
    let mut silent: Vec<TcpStream> = (0..CONNECTIONS).map(|_| connected()).collect();
    for stream in talking.iter_mut().chain(&mut silent) {
        assert_eq!(ask(stream).unwrap(), Ipv4Addr::new(192, 168, 1, 100));
    }
    let (memory, tracked) = (memory(cluster), tracked(cluster));
    let counters = Counters::now(&cluster.lab);

    let (over, asked, peak) = (AtomicBool::new(false), AtomicU64::new(0), AtomicU64::new(0));
    let began = Instant::now();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !over.load(Relaxed) {
                for (number, stream) in talking.iter_mut().enumerate() {
                    let answer = ask(stream);
                    answer.unwrap_or_else(|error| panic!("connection {number}: {error:#}"));
                    asked.fetch_add(1, Relaxed);
                }
                peak.fetch_max(self::memory(cluster), Relaxed);
                // The processor is for the flood: who talks now and then is who it could hurt.
                std::thread::sleep(Duration::from_millis(20));
            }
        });
        let flood = scope.spawn(|| flood(cluster));
        let flooded = flood.join();
        over.store(true, Relaxed);
        flooded.unwrap();
    });
    let (seconds, asked) = (began.elapsed().as_secs_f64(), asked.into_inner());

    let moved = counters.since();
    let count = |verdict| moved.packets("docker01", "from_uplink", verdict);
    let [published, full, others] =
        [count("publish"), count("kernel-conntrack-full"), count("kernel-no-flow")];
    let status = cluster.status("docker01");
    let answered = moved.packets("docker01", "from_gwbridge", "return");
    let after = self::memory(cluster).max(peak.into_inner());
    println!(
        "{SYNS} SYNs in {seconds:.1} s: {published} published, {full} with the table full, \
         {others} without a flow; {answered} answers; the table has {} of {} entries; the agent's \
         memory went from {memory} to {after} KiB at most; {asked} questions were answered meanwhile",
        status["flow_entries"], status["flow_capacity"],
    );
    assert!(asked >= CONNECTIONS as u64, "those that talk were answered {asked} times");
    // Nothing is lost on the way in, and nothing of it is the kernel's to remember. Each question is
    // a packet, and may be one more for the answer's acknowledgement.
    let arrived = (published + full).saturating_sub(2 * asked);
    assert!(arrived >= u64::from(SYNS) * 97 / 100, "{arrived} of {SYNS}");
    assert_eq!(full, 0, "an LRU makes room");
    let remembered = self::tracked(cluster);
    assert!(remembered <= tracked + 2 * CONNECTIONS as u64, "{tracked} became {remembered}");
    assert!(after < memory + GROWTH, "{memory} KiB became {after}");
    assert!(status["flow_entries"].as_u64() <= status["flow_capacity"].as_u64());

    for (number, stream) in silent.iter_mut().chain(&mut talking).enumerate() {
        let answer = ask(stream);
        answer.unwrap_or_else(|error| panic!("connection {number} afterwards: {error:#}"));
    }
    ask(&mut connected()).unwrap();
    let picked_up = counters.since().packets("docker01", "from_uplink", "kernel-no-flow");
    println!("{picked_up} packets of connections without entries went on by the kernel");
    assert!(picked_up >= forgotten, "the silent ones were to be pushed out");
}

/// Sends the SYNs, each in the name of another address and port.
fn flood(cluster: &Cluster) {
    let socket: OwnedFd = cluster
        .lab
        .inside(CLIENT, || {
            let raw = SockProtocol::Raw;
            Ok(socket(AddressFamily::Inet, SockType::Raw, SockFlag::SOCK_CLOEXEC, raw)?)
        })
        .unwrap();
    let to = SockaddrIn::from(std::net::SocketAddrV4::new(HOST, 0));
    for number in 0..SYNS {
        // The factor is odd, so each number has a source of its own; the same ones in every run.
        let mixed = number.wrapping_mul(0x9e37_79b1);
        let source = 0x6440_0000 | mixed >> 10;
        let port = 1024 + u16::try_from(mixed & 0x3ff).unwrap();
        let source = Ipv4Addr::from(source).octets();
        let segment = packet::segment(source, HOST.octets(), (port, PORT), 0x02, &[], &[]);
        let syn = packet::Ipv4::new(source, HOST.octets(), packet::TCP).build(&segment);
        loop {
            match sendto(socket.as_raw_fd(), &syn, &to, MsgFlags::empty()) {
                Ok(_) => break,
                Err(nix::errno::Errno::ENOBUFS) => std::thread::sleep(Duration::from_micros(100)),
                Err(error) => panic!("send SYN {number}: {error}"),
            }
        }
    }
}

/// Resident memory of the agent of docker01, in KiB.
fn memory(cluster: &Cluster) -> u64 {
    let pid = cluster.lab.agent("docker01").unwrap().pid;
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    line.trim().trim_end_matches(" kB").parse().unwrap()
}

/// How many connections the kernel of docker01 tracks.
fn tracked(cluster: &Cluster) -> u64 {
    until("the count of tracked connections", || {
        let count = cluster.sh("docker01", "cat /proc/sys/net/netfilter/nf_conntrack_count");
        count.trim().parse().ok()
    })
}
