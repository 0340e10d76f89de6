//! Names are answered to whoever is on the network, wherever the endpoint is, and to nobody else.

use std::{collections::BTreeSet, net::Ipv4Addr, net::UdpSocket, time::Duration};

use nix::sys::signal::Signal;
use ovnet_tests::cluster::{Cluster, Steps, until};

/// As docker_gwbridge, over which a container's queries come.
const BRIDGE: Ipv4Addr = Ipv4Addr::new(172, 18, 0, 1);
const A: u16 = 1;
const PTR: u16 = 12;
const AAAA: u16 = 28;

#[test]
fn names_are_answered_to_those_on_the_network() {
    let Some(cluster) = Cluster::up("names", |options| {
        let arguments = ["--dns", "172.18.0.1", "--host-grace", "1", "--egress", "off"];
        options.agent_args = arguments.map(str::to_owned).to_vec();
    }) else {
        return;
    };
    let steps = Steps::default();
    cluster.sh("docker02", "ovnet network create ov_net1");
    cluster.sh("docker02", "ovnet network create ov_net2");
    // It is listened on before it is there.
    for host in ["docker01", "docker02"] {
        // With a MAC of its own, as Docker does it: it would change with every port otherwise.
        cluster.sh(host, "ip link add docker_gwbridge address 02:42:ac:12:00:01 type bridge");
        cluster.sh(host, "ip address add 172.18.0.1/16 dev docker_gwbridge");
        cluster.sh(host, "ip link set docker_gwbridge up");
    }
    cluster.sandbox("docker01", "t1", "--network ov_net1");
    let t2 = cluster.sandbox("docker02", "t2", "--network ov_net1");
    let web = cluster.sandbox("docker02", "web", "--network ov_net1 --name web_1.prod");
    let other = cluster.sandbox("docker01", "other", "--network ov_net2");
    for (name, last) in [("t1", 5), ("other", 6)] {
        gateway("docker01", name, last, &cluster);
    }

    steps.begin("a name of another host");
    until("t2 to be known on docker01", || {
        (addresses(&cluster, "docker01/t1", "t2") == [t2]).then_some(())
    });
    assert_eq!(addresses(&cluster, "docker01/t1", "T2.ov_net1"), [t2]);
    for name in ["web_1.prod", "Web_1.Prod.ov_net1"] {
        assert_eq!(addresses(&cluster, "docker01/t1", name), [web], "{name}");
    }
    assert_eq!(ask(&cluster, "docker01/t1", "t2", AAAA), (0, 0, vec![]));
    let [a, b, c, d] = t2.octets();
    let (code, answers, bytes) =
        ask(&cluster, "docker01/t1", &format!("{d}.{c}.{b}.{a}.in-addr.arpa"), PTR);
    assert_eq!((code, answers), (0, 1));
    assert!(bytes.windows(11).any(|it| it == b"\x02t2\x07ov_net1"), "{bytes:?}");

    steps.begin("what others ask is refused");
    assert_eq!(ask(&cluster, "docker01/t1", "example.org", A).0, 5);
    assert_eq!(ask(&cluster, "docker01/other", "t2", A).0, 5, "it is on another network");
    assert_eq!(ask(&cluster, "docker01", "t2", A).0, 5, "the host is on none");
    assert_eq!(addresses(&cluster, "docker01/other", "other"), [other]);

    steps.begin("another network, connected and disconnected");
    cluster.sh("docker01", "ovnet attach --netns other --network ov_net1 --name other");
    until("it to hear names of ov_net1", || {
        (addresses(&cluster, "docker01/other", "t2") == [t2]).then_some(())
    });
    cluster.sh("docker01", "ovnet detach --netns other --network ov_net1");
    until("it to hear them no more", || {
        (ask(&cluster, "docker01/other", "t2", A).0 == 5).then_some(())
    });

    steps.begin("one name on two hosts");
    let second = cluster.sandbox("docker03", "t2b", "--network ov_net1 --name t2");
    let both = BTreeSet::from([t2, second]);
    until("both to be known", || {
        (addresses(&cluster, "docker01/t1", "t2").len() == 2).then_some(())
    });
    let mut first = BTreeSet::new();
    for _ in 0..4 {
        let found = addresses(&cluster, "docker01/t1", "t2");
        first.insert(found[0]);
        assert_eq!(BTreeSet::from_iter(found), both);
    }
    assert_eq!(first, both, "each comes first in turn");

    steps.begin("an address that another container gets");
    cluster.lab.stop_sandbox("docker01", "other").unwrap();
    cluster.sandbox("docker01", "late", "--network ov_net1");
    gateway("docker01", "late", 6, &cluster);
    until("the new one to hear its own network's names", || {
        (addresses(&cluster, "docker01/late", "t2").len() == 2).then_some(())
    });
    assert_eq!(ask(&cluster, "docker01/late", "other", A).0, 5);

    steps.begin("the agent is killed and started");
    cluster.stop_agent("docker01", Signal::SIGKILL);
    cluster.start_agent("docker01");
    until("names to be answered again", || {
        (try_ask(&cluster, "docker01/t1", "t2", A)?.1 == 2).then_some(())
    });
}

/// What Docker does: a second interface, on the bridge.
fn gateway(host: &str, name: &str, last: u8, cluster: &Cluster) {
    cluster.sh(host, &format!("ip link add gw{last} type veth peer name eth1 netns {name}"));
    cluster.sh(host, &format!("ip link set gw{last} master docker_gwbridge up"));
    cluster.sh(host, &format!("ip -n {name} address add 172.18.0.{last}/16 dev eth1"));
    cluster.sh(host, &format!("ip -n {name} link set eth1 up"));
}

fn addresses(cluster: &Cluster, place: &str, name: &str) -> Vec<Ipv4Addr> {
    let (_, answers, bytes) = ask(cluster, place, name, A);
    // Each is 16 bytes at the end: a pointer to the name, 10 bytes, the address.
    let records = bytes[bytes.len() - answers * 16..].chunks(16);
    records.map(|it| Ipv4Addr::new(it[12], it[13], it[14], it[15])).collect()
}

/// Code, number of answers, and from those on the bytes.
fn ask(cluster: &Cluster, place: &str, name: &str, kind: u16) -> (u8, usize, Vec<u8>) {
    until(&format!("an answer for {name} in {place}"), || try_ask(cluster, place, name, kind))
}

fn try_ask(cluster: &Cluster, place: &str, name: &str, kind: u16) -> Option<(u8, usize, Vec<u8>)> {
    let mut query = vec![0, 7, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0];
    for label in name.split('.') {
        query.push(u8::try_from(label.len()).unwrap());
        query.extend(label.as_bytes());
    }
    query.push(0);
    query.extend(kind.to_be_bytes());
    query.extend([0, 1]);
    let length = query.len();
    let answer = cluster.lab.inside(place, move || {
        let socket = UdpSocket::bind(("0.0.0.0", 0))?;
        socket.set_read_timeout(Some(Duration::from_secs(1)))?;
        socket.connect((BRIDGE, 53))?;
        socket.send(&query)?;
        let mut answer = [0; 512];
        let length = socket.recv(&mut answer)?;
        Ok(answer[..length].to_vec())
    });
    let answer = answer.ok()?;
    let count = usize::from(u16::from_be_bytes([answer[6], answer[7]]));
    Some((answer[3] & 15, count, answer[length..].to_vec()))
}
