//! What the fast path cannot carry arrives all the same (invariant 3).

use ovnet_tests::lab::{Counters, PutBack, ping_all, script};
use xtask::lab::Lab;

use crate::delivery::Mesh;
use crate::traffic;

/// Packets longer than the MTU: the sandbox's own kernel cuts them.
pub(crate) fn fragments(lab: &Lab, mesh: &Mesh, program: &str) {
    let [one, two, _] = mesh.three();
    let counters = Counters::now(lab);
    ping_all(lab, &one.name, two.address, &["-s", "4000"]);
    counters
        .since()
        .no_drops()
        .at_least("docker01", "from_container", "slow-fragment", 15)
        .at_least("docker02", "from_container", "slow-fragment", 15)
        .at_least("docker02", program, "deliver", 15);
    traffic::udp(lab, &one.name, two, &[1423, 5000, 60_000]);
    counters.since().no_drops();
}

/// Record route and time stamps.
pub(crate) fn ip_options(lab: &Lab, mesh: &Mesh) {
    let [one, two, _] = mesh.three();
    for option in [&["-R"][..], &["-T", "tsonly"]] {
        let counters = Counters::now(lab);
        ping_all(lab, &one.name, two.address, option);
        counters
            .since()
            .no_drops()
            .at_least("docker01", "from_container", "slow-ip-options", 5)
            .at_least("docker02", "from_container", "slow-ip-options", 5)
            .at_least("docker01", "from_uplink", "deliver", 5);
    }
}

/// The kernel resolves the neighbour that the FIB lacks, and the packet that asked is not lost.
pub(crate) fn no_neighbour(lab: &Lab, mesh: &Mesh) {
    // Neither is Consul's host, so that nobody else resolves it meanwhile.
    let [_, two, three] = mesh.three();
    let counters = Counters::now(lab);
    let forget = "ip neigh flush to 192.168.1.13 dev ens33; ip neigh del 192.168.1.13 dev ens33 2>/dev/null || true";
    script(lab, "docker02", forget, &[]);
    ping_all(lab, &two.name, three.address, &[]);
    counters
        .since()
        .no_drops()
        .at_least("docker02", "from_container", "slow-no-neighbour", 1)
        .at_least("docker02", "from_container", "encapsulate", 1);
}

/// A path that carries less than the uplink. The FIB minds the MTU of a route only where it is
/// locked, as the kernel does when it forwards. The outer packet is fragmented, reassembled by the
/// other host, and comes in by `ovnet-vx`.
pub(crate) fn route_mtu(lab: &Lab, mesh: &Mesh) {
    let [_, two, three] = mesh.three();
    let _put_back = PutBack { lab, place: "docker02", script: "ip route del 192.168.1.13/32" };
    script(lab, "docker02", "ip route replace 192.168.1.13/32 dev ens33 mtu lock 1300", &[]);
    let counters = Counters::now(lab);
    ping_all(lab, &two.name, three.address, &["-s", "1400"]);
    counters
        .since()
        .no_drops()
        .at_least("docker02", "from_container", "slow-fragmentation-needed", 5)
        .at_least("docker03", "from_overlay", "deliver", 5)
        .at_least("docker03", "from_container", "encapsulate", 5);
    // What fits goes fast.
    let counters = Counters::now(lab);
    ping_all(lab, &two.name, three.address, &["-s", "1200"]);
    counters.since().only_fast();
    let counters = Counters::now(lab);
    traffic::tcp(lab, &two.name, three, 1 << 20);
    traffic::udp(lab, &two.name, three, &[1400, 5000]);
    let counted = counters.since();
    counted.no_drops().at_least("docker02", "from_container", "slow-fragmentation-needed", 1);
    println!("    TCP and UDP: {counted:?}");
}

/// A FIB that refuses to look up for the veth, as it does where forwarding is off.
pub(crate) fn fib(lab: &Lab, mesh: &Mesh) {
    let [one, two, _] = mesh.three();
    let endpoints = lab.ovnet_json("docker01", &["endpoint", "ls"]).unwrap();
    let ours = endpoints.as_array().unwrap().iter().find(|it| it["names"][0] == "t1").unwrap();
    let veth = ours["local"]["host_ifname"].as_str().unwrap();
    let on = format!("echo 1 > /proc/sys/net/ipv4/conf/{veth}/forwarding");
    let _put_back = PutBack { lab, place: "docker01", script: &on };
    script(lab, "docker01", "echo 0 > /proc/sys/net/ipv4/conf/$1/forwarding", &[veth]);
    let counters = Counters::now(lab);
    ping_all(lab, &one.name, two.address, &[]);
    traffic::tcp(lab, &one.name, two, 1 << 20);
    traffic::udp(lab, &one.name, two, &[1, 1400]);
    counters
        .since()
        .no_drops()
        .none("docker01", "from_container", "encapsulate")
        .at_least("docker01", "from_container", "slow-fib", 20)
        .at_least("docker02", "from_uplink", "deliver", 20);
}
