//! The rows of the table about the uplink and the kernel's network settings.

use anyhow::{Context as _, Result};

use super::{Row, fail, ok, warn};
use crate::net::{EXTERNAL, Net, Uplink, native_xdp_keeps_offloads};

/// Bytes that the overlay adds in front of a packet of a container.
const OVERHEAD: u32 = 50;

pub(super) async fn uplink_rows(net: &Net, uplink: &Uplink, rows: &mut Vec<Row>) {
    let link = &uplink.link;
    let name = &link.name;
    let endpoints = link.mtu.saturating_sub(OVERHEAD);
    let value = format!("{} (endpoints get {endpoints})", link.mtu);
    rows.push(match endpoints {
        0..68 => fail("uplink MTU", value, "no IPv4 packet fits: raise the MTU of the uplink"),
        68..1280 => warn("uplink MTU", value, "some programs expect 1280 at least: raise the MTU"),
        _ => ok("uplink MTU", value),
    });

    match net.offloads(name).context("cannot be read") {
        Ok(offloads) => {
            let state = |on: bool| if on { "on" } else { "off" };
            let row = |item, on: bool, good: bool, advice: String| {
                if on == good { ok(item, state(on)) } else { warn(item, state(on), advice) }
            };
            rows.push(row(
                "uplink GRO",
                offloads.gro,
                true,
                format!("TCP is received packet by packet: ethtool -K {name} gro on"),
            ));
            rows.push(row(
                "uplink LRO",
                offloads.lro,
                false,
                format!("packets merged so must not be passed on: ethtool -K {name} lro off"),
            ));
            rows.push(row(
                "tunnel segmentation",
                offloads.tx_udp_tunnel_segmentation,
                true,
                format!(
                    "the kernel segments in software; where the card can: ethtool -K {name} \
                     tx-udp_tnl-segmentation on"
                ),
            ));
        }
        Err(error) => rows.push(warn("uplink offloads", "unknown", format!("{error:#}"))),
    }

    let driver = link.driver.as_deref();
    let keeps = native_xdp_keeps_offloads(driver);
    let decision = if keeps { "native" } else { "off" };
    let driver = driver.unwrap_or("unknown driver");
    rows.push(ok("XDP (auto)", format!("{decision}, {driver}")));
    rows.push(rp_filter(net, name).await);
}

async fn rp_filter(net: &Net, uplink: &str) -> Row {
    const ITEM: &str = "rp_filter";
    let mut strictest = None;
    // The kernel takes the larger number of the two (IN_DEV_RPFILTER).
    for of in ["all", uplink] {
        let value = net.sysctl(&format!("ipv4/conf/{of}/rp_filter")).await;
        strictest = strictest.max(value.and_then(|value| value.parse::<u8>().ok()));
    }
    match strictest {
        Some(1) => warn(
            ITEM,
            "strict",
            format!(
                "drops what the kernel's path carries where routes differ by direction: sysctl -w \
                 net.ipv4.conf.{uplink}.rp_filter=2"
            ),
        ),
        Some(0) => ok(ITEM, "off"),
        Some(_) => ok(ITEM, "loose"),
        None => warn(ITEM, "unknown", "/proc/sys cannot be read"),
    }
}

pub(super) async fn vxlan_port(net: &Net, port: u16) -> Result<Row> {
    const ITEM: &str = "VXLAN port";
    const ADVICE: &str = "or give all hosts another with --vxlan-port";
    if let Some(other) = net.vxlan_devices(port).await?.first() {
        let value = format!("{port}, taken by {other}");
        return Ok(fail(ITEM, value, format!("ip link delete {other}, {ADVICE}")));
    }
    if net.link(EXTERNAL).await?.is_some() {
        return Ok(ok(ITEM, format!("{port}, {EXTERNAL} is there")));
    }
    if net.udp_port_is_bound(port).await.unwrap_or(false) {
        let advice = format!("stop what `ss -ulpn 'sport = :{port}'` shows, {ADVICE}");
        return Ok(fail(ITEM, format!("{port}, taken"), advice));
    }
    Ok(ok(ITEM, format!("{port}, free")))
}

pub(super) async fn forwarding(net: &Net) -> Row {
    const ITEM: &str = "IPv4 forwarding";
    match net.sysctl("ipv4/ip_forward").await.as_deref() {
        Some("0") => ok(ITEM, "off; the agent turns it on for its own interfaces only"),
        Some(_) => ok(ITEM, "on"),
        None => warn(ITEM, "unknown", "/proc/sys cannot be read"),
    }
}

/// Whether the kernel takes up a connection in its middle, as it must for one of a published port
/// that the programs began and pass on, because its state was lost or an address changed.
pub(super) async fn picks_up_connections(net: &Net) -> Row {
    const ITEM: &str = "connection pickup";
    match net.sysctl("netfilter/nf_conntrack_tcp_loose").await.as_deref() {
        Some("0") => warn(
            ITEM,
            "off",
            "connections of published ports break where BPF passes them on in their middle: \
             sysctl -w net.netfilter.nf_conntrack_tcp_loose=1",
        ),
        Some(_) => ok(ITEM, "on"),
        // The module is loaded with the first rule that needs it, and on is its default.
        None => ok(ITEM, "on once connections are tracked"),
    }
}
