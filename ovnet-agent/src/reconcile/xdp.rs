//! Whether XDP is attached, and what sandboxes need for it.

use crate::{
    config::Xdp,
    datapath::XdpMode,
    net::{self, Link, SandboxOffloads},
};

/// A sandbox's offloads while no XDP program redirects into it.
pub(super) const WITHOUT_XDP: SandboxOffloads = SandboxOffloads { gro: false, tx_checksum: true };

/// The mode to attach in, and what `ovnet status` says of it.
pub(super) fn decide(option: Xdp, uplink: &Link) -> (Option<XdpMode>, String) {
    let driver = uplink.driver.as_deref().unwrap_or("unknown");
    match option {
        Xdp::Off => (None, "off".into()),
        Xdp::Native => (Some(XdpMode::Native), format!("native on {driver}")),
        Xdp::Generic => (Some(XdpMode::Generic), format!("generic on {driver}")),
        Xdp::Auto if net::native_xdp_keeps_offloads(uplink.driver.as_deref()) => {
            (Some(XdpMode::Native), format!("native on {driver}"))
        }
        Xdp::Auto => (None, format!("off: {driver} loses offloads with native XDP")),
    }
}

/// What sandboxes need. A redirect into a veth wants GRO on its far end; and where the uplink is
/// itself a veth, frames come with half a checksum unless their sender computed it, so senders do.
pub(super) fn sandbox_offloads(mode: Option<XdpMode>, uplink: &Link) -> SandboxOffloads {
    match mode {
        Some(XdpMode::Native) => {
            SandboxOffloads { gro: true, tx_checksum: uplink.kind.as_deref() != Some("veth") }
        }
        _ => WITHOUT_XDP,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn link(driver: &str) -> Link {
        Link { kind: Some(driver.into()), driver: Some(driver.into()), ..Link::default() }
    }

    #[test]
    fn auto_is_native_only_where_it_costs_nothing() {
        assert_eq!(decide(Xdp::Auto, &link("ice")).0, Some(XdpMode::Native));
        for driver in ["veth", "virtio_net", "ena", "hv_netvsc"] {
            assert_eq!(decide(Xdp::Auto, &link(driver)).0, None, "{driver}");
        }
        assert_eq!(decide(Xdp::Native, &link("veth")).0, Some(XdpMode::Native));
        assert_eq!(decide(Xdp::Off, &link("ice")).0, None);
    }

    #[test]
    fn senders_compute_checksums_only_on_a_veth_wire_with_native_xdp() {
        let native = Some(XdpMode::Native);
        assert!(!sandbox_offloads(native, &link("veth")).tx_checksum);
        assert!(sandbox_offloads(native, &link("ice")).tx_checksum);
        assert!(sandbox_offloads(native, &link("ice")).gro);
        assert_eq!(sandbox_offloads(Some(XdpMode::Generic), &link("veth")), WITHOUT_XDP);
        assert_eq!(sandbox_offloads(None, &link("veth")), WITHOUT_XDP);
    }
}
