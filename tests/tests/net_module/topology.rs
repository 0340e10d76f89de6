//! A host with two sandboxes behind its bridge, and somebody outside, for the firewall's tests.

use std::{
    io::{Read as _, Write as _},
    net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    process::Command,
    time::Duration,
};

use ovnet_agent::{
    firewall::{Egress, Firewall, Mapping, Rules},
    net::{GWBRIDGE, GatewaySpec, Net, SandboxOffloads, VethSpec},
    publish::Protocol,
    repairs::Repairs,
};

use super::{
    gateway::gateway_spec,
    host::{Sandbox, ip, on_a_host, skip},
};

/// The host's own address.
pub(crate) const HOST: Ipv4Addr = Ipv4Addr::new(192, 168, 1, 11);
/// Somebody else's.
pub(crate) const OUTSIDE: Ipv4Addr = Ipv4Addr::new(192, 168, 1, 50);
/// The sandboxes', and their gateway.
pub(crate) const FIRST: Ipv4Addr = Ipv4Addr::new(172, 18, 0, 2);
pub(crate) const SECOND: Ipv4Addr = Ipv4Addr::new(172, 18, 0, 3);
pub(crate) const GATEWAY: Ipv4Addr = Ipv4Addr::new(172, 18, 0, 1);
/// Enough for an answer that comes; what is dropped is waited for as long.
const PATIENCE: Duration = Duration::from_millis(700);

pub(crate) struct Topology {
    pub(crate) net: Net,
    pub(crate) firewall: Firewall,
    pub(crate) outside: Sandbox,
    pub(crate) first: Sandbox,
    pub(crate) second: Sandbox,
}

/// Runs a test on a host with two sandboxes, and without rules.
pub(crate) fn with_sandboxes(
    name: &'static str,
    test: impl AsyncFnOnce(&Topology) + Send + 'static,
) {
    if !Firewall::available() {
        return skip(name, "`nft` (nftables) is not installed");
    }
    on_a_host(name, async |net| test(&Topology::new(&net).await).await);
}

impl Topology {
    async fn new(net: &Net) -> Self {
        let (outside, first, second) = (Sandbox::new(), Sandbox::new(), Sandbox::new());
        let uplink = VethSpec {
            host_ifname: "uplink".into(),
            netns: outside.path().into(),
            ifname: None,
            mac: [0x02, 0, 0, 0, 0, 0x50],
            address: "192.168.1.50/24".parse().unwrap(),
            mtu: 1500,
            offloads: SandboxOffloads { gro: true, tx_checksum: true },
        };
        net.create_veth(&uplink).await.unwrap();
        ip("address add 192.168.1.11/24 dev uplink");
        net.forward_ipv4("uplink").await.unwrap();
        bridges_ask_iptables(false);
        net.ensure_gwbridge("172.18.0.0/16".parse().unwrap(), 1450, &mut Repairs::default())
            .await
            .unwrap();
        net.create_gateway_port(&gateway_spec(&first)).await.unwrap();
        let other = GatewaySpec {
            host_ifname: "ovnetgw000002".into(),
            mac: [0x02, 0x42, 172, 18, 0, 3],
            address: "172.18.0.3/16".parse().unwrap(),
            ..gateway_spec(&second)
        };
        net.create_gateway_port(&other).await.unwrap();
        net.route_loopback_to_gwbridge(true).await.unwrap();
        Self { net: net.clone(), firewall: Firewall::default(), outside, first, second }
    }
}

/// Whether what passes a bridge of the host is shown to the tables of IPv4 already there, by the
/// module br_netfilter; false where the machine has it not loaded, and so nothing to set.
pub(crate) fn bridges_ask_iptables(on: bool) -> bool {
    let setting = "/proc/sys/net/bridge/bridge-nf-call-iptables";
    std::fs::write(setting, if on { "1" } else { "0" }).is_ok()
}

/// Rules with these published ports of the first sandbox on every address of the host.
pub(crate) fn rules(ports: &[(Protocol, u16, u16)]) -> Rules {
    let mappings = ports.iter().map(|&(protocol, host_port, container_port)| Mapping {
        protocol,
        host_address: Ipv4Addr::UNSPECIFIED,
        host_port,
        backend: FIRST,
        container_port,
        bridge: GWBRIDGE.into(),
        own: true,
    });
    Rules {
        outward: vec!["uplink".into()],
        vxlan_port: 4789,
        egress: Some(Egress { bridge: GWBRIDGE.into(), subnet: "172.18.0.0/16".parse().unwrap() }),
        mappings: mappings.collect(),
    }
}

/// A server that tells everybody the address they come from, and then repeats what they say. It
/// ends with the test's process.
pub(crate) fn serve_tcp(place: Option<&Sandbox>, address: &'static str) {
    let listener = at(place, move || TcpListener::bind(address).unwrap());
    std::thread::spawn(move || {
        while let Ok((mut stream, peer)) = listener.accept() {
            std::thread::spawn(move || {
                stream.write_all(format!("{}\n", peer.ip()).as_bytes())?;
                let mut copy = stream.try_clone()?;
                std::io::copy(&mut copy, &mut stream)
            });
        }
    });
}

/// As [`serve_tcp`], by UDP: each datagram is answered with the sender's address.
pub(crate) fn serve_udp(place: Option<&Sandbox>, address: &'static str) {
    let socket = at(place, move || UdpSocket::bind(address).unwrap());
    std::thread::spawn(move || {
        let mut buffer = [0; 100];
        while let Ok((_, peer)) = socket.recv_from(&mut buffer) {
            let _ = socket.send_to(peer.ip().to_string().as_bytes(), peer);
        }
    });
}

/// Asks a server from somewhere: the address it says one comes from, or nothing where there is no
/// answer.
pub(crate) fn ask(
    place: Option<&Sandbox>,
    protocol: Protocol,
    to: impl Into<Ipv4Addr>,
    port: u16,
) -> Option<Ipv4Addr> {
    let to = SocketAddr::from((to.into(), port));
    let text = at(place, move || match protocol {
        Protocol::Tcp => connect(to).map(|(_, greeting)| greeting),
        Protocol::Udp => {
            let socket = UdpSocket::bind("0.0.0.0:0").ok()?;
            socket.connect(to).ok()?;
            socket.set_read_timeout(Some(PATIENCE)).ok()?;
            socket.send(b"who am I").ok()?;
            let mut buffer = [0; 100];
            let length = socket.recv(&mut buffer).ok()?;
            String::from_utf8(buffer[..length].to_vec()).ok()
        }
    });
    Some(text?.trim().parse().unwrap())
}

/// A connection to [`serve_tcp`], with its first line.
pub(crate) fn connect(to: SocketAddr) -> Option<(TcpStream, String)> {
    let mut stream = TcpStream::connect_timeout(&to, PATIENCE).ok()?;
    stream.set_read_timeout(Some(PATIENCE)).ok()?;
    let mut greeting = String::new();
    let mut byte = [0];
    while byte != [b'\n'] {
        stream.read_exact(&mut byte).ok()?;
        greeting.push(byte[0].into());
    }
    Some((stream, greeting))
}

/// Whether what is said on a connection comes back.
pub(crate) fn echoes(stream: &mut TcpStream) -> bool {
    let mut back = [0; 5];
    stream.write_all(b"hello").is_ok() && stream.read_exact(&mut back).is_ok() && back == *b"hello"
}

/// Packets counted by the rules of the table whose comment begins so.
pub(crate) fn counted(comment: &str) -> u64 {
    let listed = nft("-j list table ip ovnet");
    let listed: serde_json::Value = serde_json::from_str(&listed).unwrap();
    let rules = listed["nftables"].as_array().unwrap().iter().map(|object| &object["rule"]);
    let ours: Vec<_> = rules
        .filter(|rule| rule["comment"].as_str().is_some_and(|text| text.starts_with(comment)))
        .collect();
    assert!(!ours.is_empty(), "there is no rule {comment}: {listed}");
    let expressions = ours.iter().flat_map(|rule| rule["expr"].as_array().unwrap());
    expressions.filter_map(|expression| expression["counter"]["packets"].as_u64()).sum()
}

/// Runs `nft` in the calling thread's namespace; what it printed.
pub(crate) fn nft(arguments: &str) -> String {
    program("nft", arguments)
}

/// Runs a program in the calling thread's namespace; what it printed.
pub(crate) fn program(program: &str, arguments: &str) -> String {
    let output = Command::new(program).args(arguments.split(' ')).output().unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {arguments}: {errors}");
    String::from_utf8(output.stdout).unwrap()
}

/// Inside a sandbox, or on the host itself.
pub(crate) fn at<T: Send + 'static>(
    place: Option<&Sandbox>,
    work: impl FnOnce() -> T + Send + 'static,
) -> T {
    match place {
        Some(sandbox) => sandbox.run(work),
        None => work(),
    }
}
