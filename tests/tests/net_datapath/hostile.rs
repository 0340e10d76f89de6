//! What must not get through, in both directions (invariant 4), and that it is seen (invariant 5).

use std::{fs, net::Ipv4Addr, time::Duration};

use nix::libc;
use ovnet_agent::consul::schema::mac_of;
use ovnet_tests::lab::{Counters, SOON, ping_all, script};
use xtask::lab::{CLIENT, Lab, wait_until};

use crate::delivery::Mesh;
use crate::packet::{ARP, IPV4, Mac, Wire, arp, ethernet, holds, udp, vxlan};
use crate::traffic::{set, udp_socket};

/// Nobody may see a frame that holds this.
const MARK: &[u8] = b"this must not arrive";
/// What a sandbox can say it is.
const OTHER_MAC: Mac = [2, 0x42, 9, 9, 9, 9];
/// `SO_NO_CHECK`: a UDP checksum of zero.
pub(crate) const NO_CHECK: i32 = 11;

/// Frames that a sandbox makes itself.
pub(crate) fn from_a_sandbox(lab: &Lab, mesh: &Mesh) {
    let [one, two, _] = mesh.three();
    let neighbour = &mesh.members[3];
    let (own, mac) = (one.address, mac_of(one.address));
    let (other, to) = (neighbour.address, two.address);
    let gateway = Ipv4Addr::from(u32::from(own) & !0xff | 1);
    let packet = |from, to| udp(from, to, 0, (7, 7), MARK);
    let frame = |from, payload: &[u8]| ethernet(mac_of(to), from, IPV4, payload);
    let question =
        |mac, from| ethernet([0xff; 6], mac_of(own), ARP, &arp(1, (mac, from), ([0; 6], to)));
    let claim = arp(2, (mac, gateway), (mac_of(to), to));
    let inner = ethernet(mac_of(to), mac_of(other), IPV4, &packet(other, to));
    let raw = vxlan(mesh.network.vni, &inner);
    let vtep = lab.address("docker02").unwrap();
    let mut not_ip = packet(own, to);
    not_ip[0] = 0x65;

    let cases: Vec<(&str, &str, Vec<u8>)> = vec![
        ("another MAC", "spoofed-mac", frame(OTHER_MAC, &packet(own, to))),
        ("its neighbour's address", "spoofed-address", frame(mac, &packet(other, to))),
        ("the gateway's address", "spoofed-address", frame(mac, &packet(gateway, to))),
        ("an address of no network", "spoofed-address", frame(mac, &packet([8; 4].into(), to))),
        ("ARP with another MAC inside", "spoofed-mac", question(OTHER_MAC, own)),
        ("ARP in its neighbour's name", "spoofed-address", question(mac, other)),
        ("ARP in the gateway's name", "spoofed-address", question(mac, gateway)),
        ("an ARP reply", "arp-unanswered", ethernet(mac_of(to), mac, ARP, &claim)),
        ("VXLAN to a VTEP", "no-endpoint", frame(mac, &udp(own, vtep, 0, (7, 4789), &raw))),
        ("the network's broadcast", "no-endpoint", {
            frame(mac, &packet(own, Ipv4Addr::from(u32::from(own) | 0xff)))
        }),
        ("everybody", "multicast", frame(mac, &packet(own, Ipv4Addr::BROADCAST))),
        ("a group", "multicast", frame(mac, &packet(own, [239, 1, 1, 1].into()))),
        ("a service of the gateway", "to-gateway", frame(mac, &packet(own, gateway))),
        ("IPv6", "ethertype", ethernet(mac_of(to), mac, 0x86dd, MARK)),
        ("no IPv4 after all", "bad-ip-header", frame(mac, &not_ip)),
        ("half a header", "truncated", frame(mac, &packet(own, to)[..10])),
        // An 802.1Q tag would otherwise end up on the uplink: a way into other VLANs.
        ("a VLAN tag", "ethertype", {
            let tagged = [&[0, 5, 8, 0], &packet(own, to)[..]].concat();
            ethernet(mac_of(to), mac, 0x8100, &tagged)
        }),
        ("a VLAN tag, to its own host", "ethertype", {
            let tagged = [&[0, 5, 8, 0], &packet(own, other)[..]].concat();
            ethernet(mac_of(other), mac, 0x8100, &tagged)
        }),
    ];

    let _monitor =
        lab.spawn("docker01", &["ovnet", "monitor", "--json"], Some("monitor-1")).unwrap();
    let seen_elsewhere = [
        Wire::open(lab, &two.name, "eth0"),
        Wire::open(lab, &neighbour.name, "eth0"),
        Wire::open(lab, "docker02", "ens33"),
    ];
    let sender = Wire::open(lab, &one.name, "eth0");
    let mut wrong = Vec::new();
    for (what, reason, frame) in &cases {
        let counters = Counters::now(lab);
        for _ in 0..3 {
            sender.send(frame);
        }
        // The sender's own CPU carries a frame through the veth, so the counters are there.
        let counted = counters.since();
        if counted.packets("docker01", "from_container", reason) < 3 {
            wrong.push(format!("{what} is not counted as {reason}: {counted:?}"));
        }
    }
    for wire in seen_elsewhere {
        let found = wire.find(Duration::from_millis(200), |frame| holds(frame, MARK));
        if let Some(frame) = found {
            wrong.push(format!("it arrived: {frame:02x?}"));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    for (_, reason, _) in &cases {
        monitored(lab, "monitor-1", "from_container", reason, &sender, &cases);
    }
    ping_all(lab, &one.name, to, &[]);
}

/// Frames whose checksum a sandbox leaves to be written: where it belongs, and over what was checked.
/// The uplink computes none itself, so the kernel writes them after the programs.
pub(crate) fn checksums(lab: &Lab, mesh: &Mesh) {
    let [one, two, _] = mesh.three();
    let (own, to) = (one.address, two.address);
    let frame = ethernet(mac_of(to), mac_of(own), IPV4, &udp(own, to, 0, (7, 7), MARK));
    // struct virtio_net_hdr: VIRTIO_NET_HDR_F_NEEDS_CSUM, no GSO, where to begin and what to write.
    let left = |begin: u16, field: u16| {
        let mut header = vec![1, 0, 0, 0, 0, 0];
        header.extend(begin.to_ne_bytes());
        header.extend(field.to_ne_bytes());
        [&header[..], &frame].concat()
    };
    script(lab, "docker01", "ethtool -K ens33 tx off", &[]);
    let inside = Wire::open(lab, &two.name, "eth0");
    let wire = Wire::open(lab, "docker02", "ens33");
    let sender = Wire::open(lab, &one.name, "eth0").with_header();
    // Over the source address, the destination address, and the ports.
    for (begin, field) in [(20, 6), (20, 8), (20, 12), (34, 0), (34, 2)] {
        let counters = Counters::now(lab);
        sender.send(&left(begin, field));
        let counted = counters.since().packets("docker01", "from_container", "forged-checksum");
        assert_eq!(counted, 1, "at {begin} + {field}");
    }
    let found = wire.find(Duration::from_millis(200), |frame| holds(frame, MARK));
    assert!(found.is_none(), "it left: {found:02x?}");
    sender.send(&left(34, 6));
    let found = inside.find(SOON, |frame| holds(frame, MARK)).unwrap();
    assert_ne!(found[40..42], [0, 0], "its checksum was written");
    script(lab, "docker01", "ethtool -K ens33 tx on", &[]);
    ping_all(lab, &one.name, to, &[]);
}

/// Waits for a line of `ovnet monitor`; since drops are sampled, frames are sent again meanwhile.
fn monitored(
    lab: &Lab,
    log: &str,
    program: &str,
    reason: &str,
    sender: &Wire,
    cases: &[(&str, &str, Vec<u8>)],
) {
    let what = || format!("a line of ovnet monitor about {program} {reason}");
    wait_until(SOON, what, || {
        let found = has_line(lab, log, program, reason);
        if !found {
            cases.iter().filter(|case| case.1 == reason).for_each(|case| sender.send(&case.2));
        }
        Ok(found.then_some(()))
    })
    .unwrap();
}

fn has_line(lab: &Lab, log: &str, program: &str, reason: &str) -> bool {
    let text = fs::read_to_string(lab.folder().join(log)).unwrap_or_default();
    text.lines().filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok()).any(
        |line| line["program"] == program && line["reason"] == reason && line["length"].is_u64(),
    )
}

/// VXLAN that other machines make themselves: one that is no host, and a host that oversteps.
pub(crate) fn from_the_wire(lab: &Lab, mesh: &Mesh, fast: &str) {
    let [one, two, three] = mesh.three();
    let vni = mesh.network.vni;
    let mac = |place: &crate::traffic::Place| mac_of(place.address);
    let packet = |from, to| udp(from, to, 0, (7, 7), MARK);
    let from_one = ethernet(mac(two), mac(one), IPV4, &packet(one.address, two.address));
    let from_three = ethernet(mac(two), mac(three), IPV4, &packet(three.address, two.address));
    let to_one = ethernet(mac(one), mac(three), IPV4, &packet(three.address, one.address));
    let question = arp(1, (mac(one), one.address), ([0; 6], two.address));
    let question = ethernet([0xff; 6], mac(one), ARP, &question);
    let mut flags = vxlan(vni, &from_three);
    flags[0] = 0x0c;
    let known = "docker03";
    let cases = [
        ("an unknown host", CLIENT, "unknown-vtep", vxlan(vni, &from_one)),
        ("an unknown host, of its own", CLIENT, "unknown-vtep", vxlan(vni, &from_three)),
        ("another host's endpoint", known, "forged-source", vxlan(vni, &from_one)),
        ("a network we are not in", known, "unknown-vni", vxlan(vni + 1000, &from_three)),
        ("for an endpoint elsewhere", known, "not-local", vxlan(vni, &to_one)),
        ("half a frame", known, "truncated", vxlan(vni, &from_three[..20])),
        ("other flags", known, "vxlan-flags", flags),
        ("ARP of an unknown host", CLIENT, "unknown-vtep", vxlan(vni, &question)),
        ("ARP in another's name", known, "forged-source", vxlan(vni, &question)),
    ];
    let target = (lab.address("docker02").unwrap(), 4789);
    let _monitor =
        lab.spawn("docker02", &["ovnet", "monitor", "--json"], Some("monitor-2")).unwrap();
    let inside = Wire::open(lab, &two.name, "eth0");
    let mut wrong = Vec::new();
    for (what, from, reason, payload) in &cases {
        for checksum in [false, true] {
            let socket = udp_socket(lab, from, Ipv4Addr::UNSPECIFIED);
            set(&socket, libc::SOL_SOCKET, NO_CHECK, i32::from(!checksum));
            // A checksum is for the kernel to verify, and ARP for the kernel's device: both come
            // in by `ovnet-vx`, where the kernel itself already refuses other flags.
            let kernel = checksum || holds(payload, &question);
            let program = if kernel { "from_overlay" } else { fast };
            if kernel && matches!(*reason, "vxlan-flags" | "truncated") {
                continue;
            }
            let counters = Counters::now(lab);
            let told = wait_until(
                SOON,
                || format!("{program} {reason}"),
                || {
                    socket.send_to(payload, target)?;
                    let counted = counters.since();
                    let seen = counted.packets("docker02", program, reason) > 0
                        && has_line(lab, "monitor-2", program, reason);
                    Ok(seen.then_some(()))
                },
            );
            if told.is_err() {
                wrong.push(format!("{what}: no {program} {reason}: {:?}", counters.since()));
            }
        }
    }
    let found = inside.find(Duration::from_millis(200), |frame| holds(frame, MARK));
    assert!(found.is_none(), "it arrived: {found:02x?}");
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    ping_all(lab, &one.name, two.address, &[]);
}

/// VXLAN in a VLAN that the host has no interface in is not ours, whoever it says it is from. XDP
/// cannot tell where the tag was taken off the frame before, so this is for TC only.
pub(crate) fn in_a_vlan(lab: &Lab, mesh: &Mesh) {
    let [_, two, three] = mesh.three();
    let vni = mesh.network.vni;
    let inner = udp(three.address, two.address, 0, (7, 7), MARK);
    let inner = ethernet(mac_of(two.address), mac_of(three.address), IPV4, &inner);
    let (from, to) = (lab.address("docker03").unwrap(), lab.address("docker02").unwrap());
    let outer = udp(from, to, 0, (7777, 4789), &vxlan(vni, &inner));
    let mac = |host: &str| -> Mac {
        let text = script(lab, host, "cat /sys/class/net/ens33/address", &[]);
        ovnet_agent::consul::schema::parse_mac(&text).unwrap()
    };
    let tagged = [&[0, 5, 8, 0], &outer[..]].concat();
    let frame = ethernet(mac("docker02"), mac("docker03"), 0x8100, &tagged);
    let sender = Wire::open(lab, "docker03", "ens33");
    let inside = Wire::open(lab, &two.name, "eth0");
    let counters = Counters::now(lab);
    for _ in 0..3 {
        sender.send(&frame);
    }
    let found = inside.find(Duration::from_millis(200), |frame| holds(frame, MARK));
    assert!(found.is_none(), "it arrived: {found:02x?}");
    counters.since().none("docker02", "from_uplink", "deliver").no_drops();
}
