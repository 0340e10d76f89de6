//! The datapath under real traffic: three hosts, agents, sandboxes, and counters that show by
//! which way a packet went.
//!
//! Each test has a lab of its own, named by what differs in it: the wire, the MTU, the way programs
//! are attached. What does not depend on these shares the first one, as steps of one test.

#![allow(
    clippy::panic,
    clippy::unwrap_used,
    reason = "a test panics with what it found; the lint knows #[test] functions, not helpers"
)]

#[path = "net_datapath/delivery.rs"]
mod delivery;
#[path = "net_datapath/ecn.rs"]
mod ecn;
#[path = "net_datapath/hostile.rs"]
mod hostile;
#[path = "net_datapath/kernel_peer.rs"]
mod kernel_peer;
#[path = "net_datapath/packet.rs"]
mod packet;
#[path = "net_datapath/several_ways.rs"]
mod several_ways;
#[path = "net_datapath/slow.rs"]
mod slow;
#[path = "net_datapath/traffic.rs"]
mod traffic;
#[path = "net_datapath/two_networks.rs"]
mod two_networks;

use aya::programs::{SchedClassifier, TcAttachType};
use ovnet_tests::lab::{self, Steps, script};
use xtask::lab::{Lab, Options, Wire};

use delivery::Mesh;
use kernel_peer::Kind;
use two_networks::Second;

/// What brings packets from the wire to the sandboxes.
const TC: &str = "from_uplink";
const XDP: &str = "uplink_xdp";

#[test]
fn whole_packets_on_the_wire() {
    let Some(lab) = lab::start("net-gso", |_| {}) else { return };
    let mesh = Mesh::up(&lab);
    let mut steps = Steps::default();
    steps.step("everyone reaches everyone", || delivery::everyone(&lab, &mesh, TC));
    steps.step("MTU", || delivery::mtu(&lab, &mesh, 1450));
    steps.step("bulk", || delivery::bulk(&lab, &mesh, 1450));
    steps.step("slow: fragments", || slow::fragments(&lab, &mesh, TC));
    steps.step("slow: IP options", || slow::ip_options(&lab, &mesh));
    steps.step("slow: no neighbour", || slow::no_neighbour(&lab, &mesh));
    steps.step("slow: a smaller route MTU", || slow::route_mtu(&lab, &mesh));
    steps.step("slow: the FIB refuses", || slow::fib(&lab, &mesh));
    let second = Second::up(&lab);
    steps.step("two networks: apart", || two_networks::isolated(&lab, &mesh, &second));
    steps.step("two networks: both", || two_networks::two_endpoints(&lab, &mesh, &second));
    steps.step("two networks: forwarded", || two_networks::forwarded(&lab, &mesh, &second));
    steps.step("two networks: detached", || two_networks::detached(&lab, &mesh, &second));
    for (name, kind) in [("learning", Kind::Learning), ("static", Kind::Static)] {
        steps.step(&format!("plain kernel vxlan, {name}"), || {
            kernel_peer::plain_vxlan(&lab, &mesh, kind, TC);
        });
    }
    steps.step("hostile: a sandbox", || hostile::from_a_sandbox(&lab, &mesh));
    steps.step("hostile: the wire", || hostile::from_the_wire(&lab, &mesh, TC));
    steps.step("hostile: a checksum", || hostile::checksums(&lab, &mesh));
    steps.step("hostile: another VLAN", || hostile::in_a_vlan(&lab, &mesh));
    steps.step("ECN inwards", || ecn::inwards(&lab, &mesh, TC));
    steps.step("ECN outwards", || ecn::outwards(&lab, &mesh));
    steps.step("several ways", || several_ways::routed(&lab, &mesh));
    steps.step("attached by TCX", || attached(&lab, Hook::Tcx));
    steps.step("endpoint counters", || delivery::endpoint_counters(&lab, &mesh));
    steps.finish();
}

#[test]
fn packets_of_the_mtu_on_the_wire() {
    let Some(lab) = lab::start("net-mtu", |options| options.wire = Wire::Mtu) else { return };
    let mesh = Mesh::up(&lab);
    let mut steps = Steps::default();
    steps.step("everyone reaches everyone", || delivery::everyone(&lab, &mesh, TC));
    steps.step("bulk", || delivery::bulk(&lab, &mesh, 1450));
    steps.step("slow: fragments", || slow::fragments(&lab, &mesh, TC));
    steps.step("slow: a smaller route MTU", || slow::route_mtu(&lab, &mesh));
    steps.finish();
}

#[test]
fn jumbo_frames() {
    let Some(lab) = lab::start("net-jumbo", |options| options.mtu = 9000) else { return };
    let mesh = Mesh::up(&lab);
    let mut steps = Steps::default();
    steps.step("everyone reaches everyone", || delivery::everyone(&lab, &mesh, TC));
    steps.step("MTU", || delivery::mtu(&lab, &mesh, 8950));
    steps.step("bulk", || delivery::bulk(&lab, &mesh, 8950));
    steps.step("slow: fragments", || {
        traffic::udp(&lab, &mesh.members[0].name, &mesh.members[1], &[8922, 8923, 60_000]);
    });
    steps.finish();
}

#[test]
fn clsact_instead_of_tcx() {
    let clsact = |options: &mut Options| options.agent_args.push("--force-clsact".into());
    let Some(lab) = lab::start("net-clsact", clsact) else { return };
    let mesh = Mesh::up(&lab);
    let mut steps = Steps::default();
    steps.step("everyone reaches everyone", || delivery::everyone(&lab, &mesh, TC));
    steps.step("attached by clsact", || attached(&lab, Hook::Clsact));
    steps.step("slow: fragments", || slow::fragments(&lab, &mesh, TC));
    steps.step("slow: a smaller route MTU", || slow::route_mtu(&lab, &mesh));
    steps.finish();
}

#[test]
fn native_xdp() {
    xdp("native", 1500);
}

#[test]
fn native_xdp_with_jumbo_frames() {
    xdp("native", 9000);
}

#[test]
fn generic_xdp() {
    xdp("generic", 1500);
}

fn xdp(mode: &str, mtu: u32) {
    let change = |options: &mut Options| {
        options.xdp = Some(mode.into());
        options.mtu = mtu;
    };
    let Some(lab) = lab::start(&format!("net-{mode}-{mtu}"), change) else { return };
    let mesh = Mesh::up(&lab);
    let mut steps = Steps::default();
    let kind = if mode == "native" { "xdp" } else { "xdpgeneric" };
    steps.step("attached", || {
        let shown = script(&lab, "docker02", "ip -d link show ens33", &[]);
        assert!(shown.contains(&format!("{kind} ")) && shown.contains("prog/xdp"), "{shown}");
        let status = lab.ovnet_json("docker02", &["status"]).unwrap();
        assert!(status["xdp"].as_str().unwrap().starts_with(mode), "{status}");
    });
    steps.step("everyone reaches everyone", || delivery::everyone(&lab, &mesh, XDP));
    steps.step("MTU", || delivery::mtu(&lab, &mesh, mtu - 50));
    steps.step("bulk", || delivery::bulk_by_xdp(&lab, &mesh, mode == "native"));
    if mtu == 1500 {
        steps.step("slow: fragments", || slow::fragments(&lab, &mesh, XDP));
        steps.step("slow: a smaller route MTU", || slow::route_mtu(&lab, &mesh));
        for (name, kind) in [("learning", Kind::Learning), ("static", Kind::Static)] {
            steps.step(&format!("plain kernel vxlan, {name}"), || {
                kernel_peer::plain_vxlan(&lab, &mesh, kind, XDP);
            });
        }
        steps.step("hostile: the wire", || hostile::from_the_wire(&lab, &mesh, XDP));
        steps.step("ECN inwards", || ecn::inwards(&lab, &mesh, XDP));
    }
    steps.finish();
}

/// How TC programs are attached.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Hook {
    Tcx,
    Clsact,
}

/// The kernel itself shows the programs where they should be, and nowhere else.
fn attached(lab: &Lab, hook: Hook) {
    let name = if hook == Hook::Tcx { "tcx" } else { "clsact" };
    let status = lab.ovnet_json("docker01", &["status"]).unwrap();
    assert_eq!(status["tc"], name, "{status}");
    let endpoints = lab.ovnet_json("docker01", &["endpoint", "ls"]).unwrap();
    let veth = endpoints[0]["local"]["host_ifname"].as_str().unwrap();
    let interfaces =
        [("ens33", "from_uplink"), ("ovnet-vx", "from_overlay"), (veth, "from_container")];
    for (interface, program) in interfaces {
        let filters = script(lab, "docker01", "tc filter show dev $1 ingress", &[interface]);
        let name = interface.to_owned();
        let query = move || Ok(SchedClassifier::query_tcx(name.as_str(), TcAttachType::Ingress)?.1);
        let tcx = lab.inside("docker01", query).unwrap();
        let tcx: Vec<&str> = tcx.iter().filter_map(|program| program.name_as_str()).collect();
        let expected = match hook {
            Hook::Tcx => (vec![program], false),
            Hook::Clsact => (vec![], true),
        };
        assert_eq!((tcx, filters.contains(program)), expected, "{interface}: {filters}");
    }
}
