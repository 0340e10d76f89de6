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
#[path = "net_datapath/slow.rs"]
mod slow;
#[path = "net_datapath/traffic.rs"]
mod traffic;
#[path = "net_datapath/two_networks.rs"]
mod two_networks;

use ovnet_tests::lab::{self, Steps};
use xtask::lab::Wire;

use delivery::Mesh;
use kernel_peer::Kind;
use two_networks::Second;

#[test]
fn whole_packets_on_the_wire() {
    let Some(lab) = lab::start("net-gso", |_| {}) else { return };
    let mesh = Mesh::up(&lab);
    let mut steps = Steps::default();
    steps.step("everyone reaches everyone", || delivery::everyone(&lab, &mesh));
    steps.step("MTU", || delivery::mtu(&lab, &mesh, 1450));
    steps.step("bulk", || delivery::bulk(&lab, &mesh));
    steps.step("slow: fragments", || slow::fragments(&lab, &mesh));
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
            kernel_peer::plain_vxlan(&lab, &mesh, kind);
        });
    }
    steps.step("hostile: a sandbox", || hostile::from_a_sandbox(&lab, &mesh));
    steps.step("hostile: the wire", || hostile::from_the_wire(&lab, &mesh));
    steps.step("hostile: another VLAN", || hostile::in_a_vlan(&lab, &mesh));
    steps.step("ECN inwards", || ecn::inwards(&lab, &mesh));
    steps.step("ECN outwards", || ecn::outwards(&lab, &mesh));
    steps.step("endpoint counters", || delivery::endpoint_counters(&lab, &mesh));
    steps.finish();
}

#[test]
fn packets_of_the_mtu_on_the_wire() {
    let Some(lab) = lab::start("net-mtu", |options| options.wire = Wire::Mtu) else { return };
    let mesh = Mesh::up(&lab);
    let mut steps = Steps::default();
    steps.step("everyone reaches everyone", || delivery::everyone(&lab, &mesh));
    steps.step("bulk", || delivery::bulk(&lab, &mesh));
    steps.step("slow: fragments", || slow::fragments(&lab, &mesh));
    steps.step("slow: a smaller route MTU", || slow::route_mtu(&lab, &mesh));
    steps.finish();
}
