//! A peer that is a plain kernel vxlan device on a host without an agent, announced by hand.

use std::net::Ipv4Addr;

use ovnet_agent::consul::schema::{format_mac, mac_of};
use ovnet_tests::lab::{Counters, PutBack, kv_delete, kv_put, ping_all, script, wait_for_ping};
use serde_json::json;
use xtask::lab::{CLIENT, Lab};

use crate::delivery::Mesh;
use crate::traffic::{self, Place};

/// An address that the client has besides its own, so that its own stays an unknown one.
const VTEP: &str = "192.168.1.50";

/// How the peer finds out who is where, and what it makes of UDP checksums.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// As `ip link add type vxlan` makes it: it asks everybody and learns from what comes, and its
    /// checksums lead by `ovnet-vx`.
    Learning,
    /// Static entries, and no checksums, which the programs take themselves.
    Static,
}

/// Joins, talks in both directions, leaves.
pub(crate) fn plain_vxlan(lab: &Lab, mesh: &Mesh, kind: Kind, fast: &str) {
    let address = Ipv4Addr::from(u32::from(mesh.members[0].address) & !0xff | 200);
    let peer = Place { name: CLIENT.into(), address };
    let remove = "ip link del vx0; ip addr del 192.168.1.50/24 dev ens33";
    let _put_back = PutBack { lab, place: CLIENT, script: remove };
    let make = r#"
        ip address add "$1/24" dev ens33
        ip link add vx0 address 02:42:0a:00:00:c8 mtu 1450 \
            type vxlan id "$2" dstport 4789 local "$1" $4
        ip address add "$3/24" dev vx0
        ip link set vx0 up
    "#;
    let vni = mesh.network.vni.to_string();
    let options = if kind == Kind::Static { "nolearning noudpcsum" } else { "" };
    script(lab, CLIENT, make, &[VTEP, &vni, &address.to_string(), options]);
    if fast == "uplink_xdp" {
        // As the agent does in sandboxes: half a checksum does not survive native XDP on a veth
        // wire, on which the peer can be only here.
        script(lab, CLIENT, "ethtool -K vx0 tx off", &[]);
    }
    for place in mesh.three() {
        let node = place.name.split('/').next().unwrap();
        let vtep = lab.address(node).unwrap().to_string();
        let (mac, address) = (format_mac(mac_of(place.address)), place.address.to_string());
        let known = r#"
            bridge fdb append "$2" dev vx0 dst "$1"
            ip neigh replace "$3" lladdr "$2" dev vx0 nud permanent
        "#;
        match kind {
            // Whom it does not know it asks: all hosts get what is for everybody.
            Kind::Learning => {
                let all = "bridge fdb append 00:00:00:00:00:00 dev vx0 dst $1";
                script(lab, CLIENT, all, &[&vtep])
            }
            Kind::Static => script(lab, CLIENT, known, &[&vtep, &mac, &address]),
        };
    }

    let host = "hosts/plain";
    let endpoint = format!("endpoints/{}/{address}", mesh.network.id);
    kv_put(lab, host, &json!({"v": 1, "node": "plain", "vtep": VTEP}));
    let record = json!({
        "v": 1, "id": "by-hand", "address": address, "mac": "02:42:0a:00:00:c8", "host": "plain"
    });
    kv_put(lab, &endpoint, &record);
    for place in mesh.three() {
        wait_for_ping(lab, &place.name, address);
    }

    // It learned who we are from our packets; it must ask again. Only what it learned goes.
    let forget = "ip neigh flush dev vx0; for mac in $(bridge fdb show dev vx0 | \
                  grep -o '^02[^ ]*'); do bridge fdb del $mac dev vx0 self || true; done";
    if kind == Kind::Learning {
        script(lab, CLIENT, forget, &[]);
    }
    let counters = Counters::now(lab);
    for place in mesh.three() {
        ping_all(lab, CLIENT, place.address, &[]);
        let node = place.name.split('/').next().unwrap();
        let counted = counters.since();
        counted.at_least(node, "from_container", "encapsulate", 5);
        match kind {
            Kind::Learning => counted.at_least(node, "from_overlay", "answer-arp", 1).at_least(
                node,
                "from_overlay",
                "deliver",
                5,
            ),
            Kind::Static => {
                counted.none(node, "from_overlay", "answer-arp").at_least(node, fast, "deliver", 5)
            }
        };
    }
    for place in mesh.three() {
        ping_all(lab, &place.name, address, &[]);
        traffic::tcp(lab, CLIENT, place, 1 << 20);
        traffic::tcp(lab, &place.name, &peer, 1 << 20);
        traffic::udp(lab, CLIENT, place, &[1, 1400, 5000]);
    }
    println!("    {:?}", counters.since());
    // What it asks of everybody, those drop whom it does not concern; nothing else is lost.
    for reason in ["unknown-vtep", "forged-source", "not-local", "unknown-vni"] {
        for node in lab.nodes() {
            counters.since().none(&node, "from_uplink", reason).none(&node, "from_overlay", reason);
        }
    }
    kv_delete(lab, &endpoint);
    kv_delete(lab, host);
}
