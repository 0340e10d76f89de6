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
#[path = "net_datapath/packet.rs"]
mod packet;
#[path = "net_datapath/slow.rs"]
mod slow;
#[path = "net_datapath/traffic.rs"]
mod traffic;

use ovnet_tests::lab::{self, Steps};
use xtask::lab::Wire;

use delivery::Mesh;

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
