//! Delivery between hosts and on one host: everyone, bulk, the edge of the MTU.

use std::net::Ipv4Addr;

use ovnet_agent::consul::schema::{format_mac, mac_of};
use ovnet_tests::lab::{Counters, ping, ping_all, script, wait_for_ping};
use serde_json::Value;
use xtask::lab::Lab;

use crate::traffic::{self, Place};

/// The network every test has.
pub(crate) const NETWORK: &str = "ov_net1";

/// A network with `t1`, `t2` and `t3` on the three hosts, and `t4` beside `t1`.
pub(crate) struct Mesh {
    pub(crate) network: Network,
    pub(crate) members: Vec<Place>,
}

/// What tests must know of a network.
pub(crate) struct Network {
    pub(crate) id: String,
    pub(crate) vni: u32,
}

impl Network {
    pub(crate) fn create(lab: &Lab, host: &str, name: &str) -> Self {
        lab.exec(host, &["ovnet", "network", "create", name]).unwrap();
        let view = lab.ovnet_json(host, &["network", "inspect", name]).unwrap();
        // One network may be inspected as an array of one, as Docker does.
        let view: &Value = view.get(0).unwrap_or(&view);
        let vni = u32::try_from(view["vni"].as_u64().unwrap()).unwrap();
        Self { id: view["id"].as_str().unwrap().to_owned(), vni }
    }
}

impl Mesh {
    pub(crate) fn up(lab: &Lab) -> Self {
        let network = Network::create(lab, "docker02", NETWORK);
        let members: Vec<Place> =
            [("docker01", "t1"), ("docker02", "t2"), ("docker03", "t3"), ("docker01", "t4")]
                .into_iter()
                .map(|(host, name)| run(lab, host, name, NETWORK))
                .collect();
        for (from, to) in pairs(&members) {
            wait_for_ping(lab, &from.name, to.address);
        }
        Self { network, members }
    }

    /// `t1`, `t2`, `t3`: each on a host of its own.
    pub(crate) fn three(&self) -> [&Place; 3] {
        [&self.members[0], &self.members[1], &self.members[2]]
    }
}

/// Makes a sandbox in a network.
pub(crate) fn run(lab: &Lab, host: &str, name: &str, network: &str) -> Place {
    lab.run_sandbox(host, name, &["--network", network]).unwrap();
    let name = format!("{host}/{name}");
    let address = lab.sandbox_address(&name).unwrap();
    Place { name, address }
}

/// Every ordered pair.
pub(crate) fn pairs(members: &[Place]) -> impl Iterator<Item = (&Place, &Place)> {
    members
        .iter()
        .flat_map(move |from| members.iter().map(move |to| (from, to)))
        .filter(|(from, to)| from.address != to.address)
}

/// Ping, TCP and UDP between all, on the fast path alone: `program` delivers what the wire brings.
pub(crate) fn everyone(lab: &Lab, mesh: &Mesh, program: &str) {
    let counters = Counters::now(lab);
    for (from, to) in pairs(&mesh.members) {
        ping_all(lab, &from.name, to.address, &[]);
        traffic::tcp(lab, &from.name, to, 100_000);
        traffic::udp(lab, &from.name, to, &[0, 1, 1000, 1400]);
    }
    let counted = counters.since();
    counted.only_fast();
    for host in ["docker01", "docker02", "docker03"] {
        counted.at_least(host, "from_container", "encapsulate", 20);
        counted.at_least(host, program, "deliver", 20);
        // Generic XDP leaves merged packets to TC, which may get them without Ethernet header.
        if lab.options().xdp.as_deref() != Some("generic") {
            counted.none(host, "from_overlay", "deliver");
        }
    }
    counted.at_least("docker01", "from_container", "deliver", 20);
    counted.none("docker02", "from_container", "deliver");
    let gateway = Ipv4Addr::from(u32::from(mesh.members[0].address) & !0xff | 1);
    ping_all(lab, &mesh.members[0].name, gateway, &[]);
}

/// Many bytes: GSO packets stay whole from the sandbox to the wire.
pub(crate) fn bulk(lab: &Lab, mesh: &Mesh, mtu: usize) {
    const BYTES: usize = 16 << 20;
    let [one, two, _] = mesh.three();
    let counters = Counters::now(lab);
    traffic::tcp(lab, &one.name, two, BYTES);
    let counted = counters.since();
    counted.only_fast();
    let segments = u64::try_from(BYTES / (mtu - 52)).unwrap();
    let sent = counted.packets("docker01", "from_container", "encapsulate");
    assert!(sent < segments / 4, "{sent} packets for {segments} segments: GSO was lost");
    // Merged again (GRO), or never cut.
    let received = counted.packets("docker02", "from_uplink", "deliver");
    assert!(received < segments / 2, "{received} packets for {segments} segments: no GRO");

    let counters = Counters::now(lab);
    traffic::udp_segmented(lab, &one.name, two, 1400, 40);
    let counted = counters.since();
    counted.no_drops();
    assert_eq!(counted.packets("docker01", "from_container", "encapsulate"), 1, "{counted:?}");
    println!("    TCP: {sent} sent, {received} received of {segments}; UDP GSO: {counted:?}");
}

/// Many bytes where XDP is attached. Native XDP makes the wire carry packets of the MTU; generic XDP
/// meets merged ones, which it leaves to TC.
pub(crate) fn bulk_by_xdp(lab: &Lab, mesh: &Mesh, native: bool) {
    let [one, two, three] = mesh.three();
    let counters = Counters::now(lab);
    traffic::tcp(lab, &one.name, two, 4 << 20);
    traffic::tcp(lab, &two.name, three, 4 << 20);
    let counted = counters.since();
    println!("    TCP: {counted:?}");
    counted.no_drops();
    for host in ["docker02", "docker03"] {
        counted.at_least(host, "uplink_xdp", "deliver", 1);
        if native {
            counted.none(host, "from_uplink", "deliver");
        }
    }
    traffic::udp_segmented(lab, &one.name, two, 1400, 40);
    counters.since().no_drops();
}

/// A packet of the MTU passes, one byte more is refused by the sender's own interface.
pub(crate) fn mtu(lab: &Lab, mesh: &Mesh, mtu: u32) {
    let [one, two, _] = mesh.three();
    let neighbour = &mesh.members[3];
    for to in [two, neighbour] {
        let fits = (mtu - 28).to_string();
        let counters = Counters::now(lab);
        ping_all(lab, &one.name, to.address, &["-M", "do", "-s", &fits]);
        counters.since().only_fast();
        let too_long = (mtu - 27).to_string();
        let (_, received) = ping(
            lab,
            &one.name,
            to.address,
            &["-M", "do", "-s", &too_long, "-c", "1", "-W", "0.3"],
        );
        assert_eq!(received, 0, "{} bytes to {}", mtu + 1, to.name);
    }
}

/// What `ovnet endpoint ls` says was sent and received is what was.
pub(crate) fn endpoint_counters(lab: &Lab, mesh: &Mesh) {
    const COUNT: usize = 50;
    const BYTES: usize = 1000;
    let [one, two, _] = mesh.three();
    let neighbour = &mesh.members[3];
    for to in [two, neighbour] {
        // ARP is counted too; without it the numbers are exact.
        for (at, of) in [(one, to), (to, one)] {
            let (mac, address) = (format_mac(mac_of(of.address)), of.address.to_string());
            let fixed = "ip neigh replace $1 lladdr $2 nud permanent dev eth0";
            script(lab, &at.name, fixed, &[&address, &mac]);
        }
        let before = (read(lab, one), read(lab, to));
        traffic::udp(lab, &one.name, to, &[BYTES; COUNT]);
        let after = (read(lab, one), read(lab, to));
        let packets = u64::try_from(COUNT).unwrap();
        let bytes = u64::try_from(COUNT * (BYTES + 8 + 20 + 14)).unwrap();
        for (before, after, place) in [(before.0, after.0, one), (before.1, after.1, to)] {
            let counted: Vec<u64> = after.iter().zip(before).map(|(new, old)| new - old).collect();
            assert_eq!(
                counted,
                [packets, bytes, packets, bytes],
                "{} with {}",
                place.name,
                to.name
            );
        }
        for (at, of) in [(one, to), (to, one)] {
            script(lab, &at.name, "ip neigh del $1 dev eth0", &[&of.address.to_string()]);
        }
    }
}

/// Packets and bytes sent, packets and bytes received.
fn read(lab: &Lab, place: &Place) -> [u64; 4] {
    let (host, name) = place.name.split_once('/').unwrap();
    let endpoints = lab.ovnet_json(host, &["endpoint", "ls"]).unwrap();
    let own = endpoints.as_array().unwrap().iter().find(|it| it["names"][0] == name).unwrap();
    ["tx_packets", "tx_bytes", "rx_packets", "rx_bytes"]
        .map(|field| own["local"][field].as_u64().unwrap())
}
