//! What a driver's name tells about XDP.

/// Drivers whose native XDP leaves segmentation, checksums and merging of the card as they are.
/// Others, above all veth and virtio_net, turn offloads off while a native program is attached
/// (`veth_xdp_set`, `virtnet_xdp_set` in drivers/net), which costs TCP far more than XDP saves.
const KEEPS_OFFLOADS: [&str; 4] = ["i40e", "ice", "ixgbe", "mlx5_core"];

/// Whether `--xdp auto` attaches to an uplink of that driver: `true` only where it is known that
/// native XDP costs container traffic nothing.
pub fn native_xdp_keeps_offloads(driver: Option<&str>) -> bool {
    driver.is_some_and(|driver| KEEPS_OFFLOADS.contains(&driver))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_known_drivers_get_xdp_by_themselves() {
        assert!(native_xdp_keeps_offloads(Some("mlx5_core")));
        for driver in [Some("veth"), Some("virtio_net"), Some("new_one"), None] {
            assert!(!native_xdp_keeps_offloads(driver), "{driver:?}");
        }
    }
}
