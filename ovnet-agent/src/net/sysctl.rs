//! Settings under `/proc/sys/net`.
//!
//! These files show the namespace of the thread that opens them, so each is opened on a thread
//! inside the namespace meant.

use std::{fs, io, path::PathBuf};

use anyhow::{Context as _, Result};

use super::netns::{Namespace, Space};

/// The local ports of this namespace as `(min, max)`, both as in `net.ipv4.ip_local_port_range`.
///
/// The kernel's `udp_flow_src_port` (include/net/udp.h) takes them unchanged from
/// `inet_get_local_port_range` and scales the hash by `max - min`, so there `max` is never
/// reached: give them to `ovnet_common::flow::source_port` as they are. What cannot be read counts as the
/// kernel's default. Shows the namespace of the calling thread.
pub fn port_range() -> (u16, u16) {
    fs::read_to_string("/proc/sys/net/ipv4/ip_local_port_range")
        .ok()
        .and_then(|text| parse_range(&text))
        .unwrap_or((32768, 60999))
}

fn parse_range(text: &str) -> Option<(u16, u16)> {
    let mut numbers = text.split_whitespace();
    let range = (numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?);
    (range.0 < range.1).then_some(range)
}

/// What a missing file means.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Missing {
    /// An error: the setting is needed.
    Fails,
    /// Fine: the kernel lacks the whole feature, as IPv6 disabled at boot.
    IsFine,
}

/// Sets `net/<family>/conf/<interface>/<key>` where it differs, and says whether it did. Writing
/// what is already there is avoided because some of these settings flush the route cache each time.
pub(super) fn ensure(
    family: &str,
    interface: &str,
    key: &str,
    value: &str,
    missing: Missing,
) -> Result<bool> {
    let path: PathBuf = ["/proc/sys/net", family, "conf", interface, key].iter().collect();
    let current = match fs::read_to_string(&path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound && missing == Missing::IsFine => {
            return Ok(false);
        }
        other => other.with_context(|| format!("read {}", path.display()))?,
    };
    if current.trim() == value {
        return Ok(false);
    }
    fs::write(&path, value)
        .with_context(|| format!("set {} to {value} (is /proc/sys read-only?)", path.display()))?;
    Ok(true)
}

impl Space {
    /// Makes the interface forward IPv4 (`bpf_fib_lookup` refuses to look up for one that does
    /// not) and speak no IPv6 (it would otherwise send router solicitations into the overlay);
    /// whether that had to be changed, here and below.
    pub(super) async fn forward_ipv4_only(&self, interface: &str) -> Result<bool> {
        let name = interface.to_owned();
        self.namespace
            .inside(move || {
                let forwarding = ensure("ipv4", &name, "forwarding", "1", Missing::Fails)?;
                let ipv6 = ensure("ipv6", &name, "disable_ipv6", "1", Missing::IsFine)?;
                Ok(forwarding || ipv6)
            })
            .await
    }

    /// Makes the interface forward the IPv4 packets that come by it.
    pub(super) async fn forward_ipv4(&self, interface: &str) -> Result<bool> {
        let name = interface.to_owned();
        self.namespace
            .inside(move || ensure("ipv4", &name, "forwarding", "1", Missing::Fails))
            .await
    }

    /// Has the kernel broadcast an ARP for its addresses when the interface's MAC changes or it
    /// comes up, which it else leaves to its neighbours to find out.
    pub(super) async fn notify_neighbours(&self, interface: &str) -> Result<bool> {
        let name = interface.to_owned();
        self.namespace
            .inside(move || ensure("ipv4", &name, "arp_notify", "1", Missing::Fails))
            .await
    }

    /// Whether packets from and to 127.0.0.0/8 may pass the interface.
    pub(super) async fn route_loopback(&self, interface: &str, allowed: bool) -> Result<bool> {
        let name = interface.to_owned();
        let value = if allowed { "1" } else { "0" };
        self.namespace
            .inside(move || ensure("ipv4", &name, "route_localnet", value, Missing::Fails))
            .await
    }

    /// Makes the interface speak no IPv6.
    pub(super) async fn disable_ipv6(&self, interface: &str) -> Result<bool> {
        let name = interface.to_owned();
        self.namespace
            .inside(move || ensure("ipv6", &name, "disable_ipv6", "1", Missing::IsFine))
            .await
    }
}

impl Namespace {
    /// A file below `/proc/sys/net` of this namespace, trimmed; absent where it cannot be read.
    pub(super) async fn sysctl(&self, below: String) -> Option<String> {
        self.inside(move || {
            Ok(fs::read_to_string(format!("/proc/sys/net/{below}"))?.trim().to_owned())
        })
        .await
        .ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_port_range_is_two_ports_in_order() {
        assert_eq!(parse_range("32768\t60999\n"), Some((32768, 60999)));
        for wrong in ["", "1", "5 5", "9 3", "1 65536", "a b"] {
            assert_eq!(parse_range(wrong), None, "{wrong:?}");
        }
        assert!(port_range().0 < port_range().1);
    }
}
