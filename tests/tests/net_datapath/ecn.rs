//! ECN across the tunnel (RFC 6040), and DSCP which is not.

use std::{net::Ipv4Addr, time::Duration};

use nix::libc;
use ovnet_agent::consul::schema::mac_of;
use ovnet_tests::lab::{Counters, ping_all};
use xtask::lab::Lab;

use crate::delivery::Mesh;
use crate::hostile::NO_CHECK;
use crate::packet::{IPV4, Wire, ethernet, holds, udp, vxlan};
use crate::traffic::{set, udp_socket};

/// DSCP EF, with ECT(0).
const EF_ECT0: u8 = 0xba;
const ETHERNET: usize = 14;

/// Congestion on the way is told to the receiver; where it cannot be told the packet is dropped.
pub(crate) fn inwards(lab: &Lab, mesh: &Mesh, fast: &str) {
    let [_, two, three] = mesh.three();
    let mark = b"congestion experienced";
    // Not what the receiver's kernel answers, which quotes it.
    let arrived = |frame: &[u8]| holds(frame, mark) && frame[ETHERNET + 9] == 17;
    let target = (lab.address("docker02").unwrap(), 4789);
    let inside = Wire::open(lab, &two.name, "eth0");
    // A checksum leads by the kernel's device, which merges by itself.
    for (checksum, program) in [(false, fast), (true, "from_overlay")] {
        let send = |tos| {
            let inner = udp(three.address, two.address, tos, (7, 7), mark);
            let inner = ethernet(mac_of(two.address), mac_of(three.address), IPV4, &inner);
            let socket = udp_socket(lab, "docker03", Ipv4Addr::UNSPECIFIED);
            set(&socket, libc::SOL_SOCKET, NO_CHECK, i32::from(!checksum));
            set(&socket, libc::IPPROTO_IP, libc::IP_TOS, 3);
            socket.send_to(&vxlan(mesh.network.vni, &inner), target).unwrap();
        };
        let counters = Counters::now(lab);
        send(EF_ECT0);
        counters.wait("docker02", program, "deliver", 1);
        let frame = inside.find(Duration::from_secs(2), arrived).unwrap();
        assert_eq!(frame[ETHERNET + 1], 0xbb, "{program}: EF and CE: {frame:02x?}");
        let header = frame[ETHERNET..ETHERNET + 20].try_into().unwrap();
        assert!(ovnet_common::checksum::ipv4_valid(header), "{program}: {header:02x?}");

        send(0);
        if !checksum {
            counters.wait("docker02", program, "ecn-invalid", 1);
        }
        let found = inside.find(Duration::from_millis(200), arrived);
        assert!(found.is_none(), "{program}: CE around Not-ECT arrived: {found:02x?}");
    }
}

/// ECN is copied to the outside, DSCP is not: on the fast path and on the kernel's.
pub(crate) fn outwards(lab: &Lab, mesh: &Mesh) {
    let [_, two, three] = mesh.three();
    for (option, verdict) in [(&[][..], "encapsulate"), (&["-R"], "slow-ip-options")] {
        for (tos, outer) in [("0xba", 2), ("0xb9", 1), ("0xb8", 0)] {
            let wire = Wire::open(lab, "docker03", "ens33");
            let counters = Counters::now(lab);
            // What is in every packet, so that no other is taken for it.
            let pattern = ["-c", "1", "-Q", tos, "-p", "c0ffee00", "-s", "64"];
            ping_all(lab, &two.name, three.address, &[&pattern, option].concat());
            counters.since().at_least("docker02", "from_container", verdict, 1);
            let to = three.address.octets();
            let request = |frame: &[u8]| {
                holds(frame, &[0xc0, 0xff, 0xee, 0, 0xc0, 0xff, 0xee])
                    && frame[ETHERNET + 16..ETHERNET + 20] == [192, 168, 1, 13]
                    && holds(frame, &to)
            };
            let frame = wire.find(Duration::from_secs(2), request).unwrap();
            assert_eq!(frame[ETHERNET + 1], outer, "{verdict} of {tos}: {frame:02x?}");
            assert_eq!(frame[ETHERNET + 8], 64, "{verdict}: TTL: {frame:02x?}");
        }
    }
}
