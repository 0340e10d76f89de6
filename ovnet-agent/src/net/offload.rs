//! Offload settings of interfaces, by the ethtool ioctls.
//!
//! The `ethtool` crate (0.3) reads features over generic netlink but cannot change them, so both
//! directions go by `SIOCETHTOOL` (include/uapi/linux/ethtool.h): one mechanism, synchronous, and
//! it works from any thread because the namespace is that of the socket. Every request is a row of
//! 32-bit words in host byte order.

use std::{
    collections::BTreeMap,
    io,
    os::fd::{AsRawFd as _, OwnedFd},
};

use anyhow::{Context as _, Result};

const ETHTOOL_GDRVINFO: u32 = 0x3;
const ETHTOOL_STXCSUM: u32 = 0x17;
const ETHTOOL_GSTRINGS: u32 = 0x1b;
const ETHTOOL_SGRO: u32 = 0x2c;
const ETHTOOL_GSSET_INFO: u32 = 0x37;
const ETHTOOL_GFEATURES: u32 = 0x3a;
const ETH_SS_FEATURES: u32 = 4;
/// Bytes of a feature's name, zeros included.
const STRING: usize = 32;

/// What the agent looks at of an interface's offloads.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Offloads {
    /// `rx-gro`: received packets are merged.
    pub gro: bool,
    /// `rx-lro`: merged by the card in a way that must not be forwarded.
    pub lro: bool,
    /// Any of the transmit checksum features: packets may leave with CHECKSUM_PARTIAL.
    pub tx_checksum: bool,
    /// `tx-tcp-segmentation`.
    pub tso: bool,
    /// `tx-udp_tnl-segmentation`: TCP inside VXLAN is segmented by the card.
    pub tx_udp_tunnel_segmentation: bool,
}

/// An offload the agent changes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Offload {
    /// Merging of received packets. On a veth it also starts the NAPI that XDP redirects need.
    Gro,
    /// Transmit checksums; off makes the sender compute them, as native XDP on a veth needs.
    TxChecksum,
}

/// Reads an interface's offloads.
pub(super) fn read(control: &OwnedFd, interface: &str) -> Result<Offloads> {
    let features = features(control, interface)
        .with_context(|| format!("read the offloads of interface {interface}"))?;
    let on = |name: &str| features.get(name).copied().unwrap_or(false);
    Ok(Offloads {
        gro: on("rx-gro"),
        lro: on("rx-lro"),
        tx_checksum: ["ip-generic", "ipv4", "ipv6"]
            .iter()
            .any(|kind| on(&format!("tx-checksum-{kind}"))),
        tso: on("tx-tcp-segmentation"),
        tx_udp_tunnel_segmentation: on("tx-udp_tnl-segmentation"),
    })
}

/// Sets one offload; setting what is already so is no error.
pub(super) fn set(control: &OwnedFd, interface: &str, offload: Offload, on: bool) -> Result<()> {
    let (command, name) = match offload {
        Offload::Gro => (ETHTOOL_SGRO, "gro"),
        Offload::TxChecksum => (ETHTOOL_STXCSUM, "tx"),
    };
    request(control, interface, &mut [command, u32::from(on)]).with_context(|| {
        let value = if on { "on" } else { "off" };
        format!("set an offload of an interface (as `ethtool -K {interface} {name} {value}` does)")
    })
}

/// Name of the driver; absent where the interface has none that tells, as `lo`.
pub(super) fn driver(control: &OwnedFd, interface: &str) -> Option<String> {
    // struct ethtool_drvinfo: command, 5 strings of 32 bytes, 12 spare bytes, 5 numbers.
    let mut words = [0; 49];
    words[0] = ETHTOOL_GDRVINFO;
    request(control, interface, &mut words).ok()?;
    Some(string_at(&words[1..9])).filter(|name| !name.is_empty())
}

/// Every feature by name and whether it is active.
fn features(control: &OwnedFd, interface: &str) -> io::Result<BTreeMap<String, bool>> {
    // struct ethtool_sset_info: command, reserved, a 64-bit mask, then one count per bit set.
    let mut words = [ETHTOOL_GSSET_INFO, 0, 0, 0, 0];
    let mask = 1_u64 << ETH_SS_FEATURES;
    for (word, bytes) in words[2..4].iter_mut().zip(mask.to_ne_bytes().chunks_exact(4)) {
        *word = u32::from_ne_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
    }
    request(control, interface, &mut words)?;
    let count = words[4];
    let features = usize::try_from(count).map_err(io::Error::other)?;

    // struct ethtool_gstrings: command, set, count, then the strings.
    let mut strings = vec![0; 3 + features * STRING / 4];
    strings[..3].copy_from_slice(&[ETHTOOL_GSTRINGS, ETH_SS_FEATURES, count]);
    request(control, interface, &mut strings)?;

    // struct ethtool_gfeatures: command, count of blocks, then per 32 features the words
    // available, requested, active, never changed.
    let blocks = count.div_ceil(32);
    let mut bits = vec![0; 2 + features.div_ceil(32) * 4];
    bits[..2].copy_from_slice(&[ETHTOOL_GFEATURES, blocks]);
    request(control, interface, &mut bits)?;

    Ok((0..features)
        .map(|feature| {
            let start = 3 + feature * STRING / 4;
            let active = bits[2 + feature / 32 * 4 + 2] & (1 << (feature % 32)) != 0;
            (string_at(&strings[start..start + STRING / 4]), active)
        })
        .collect())
}

fn string_at(words: &[u32]) -> String {
    let bytes: Vec<u8> =
        words.iter().flat_map(|word| word.to_ne_bytes()).take_while(|&byte| byte != 0).collect();
    String::from_utf8_lossy(&bytes).into_owned()
}

/// One `SIOCETHTOOL`. The kernel writes within the size that the request itself announces: `words`
/// must be as long as its command and its counts say.
fn request(control: &OwnedFd, interface: &str, words: &mut [u32]) -> io::Result<()> {
    // SAFETY: all bytes zero is a valid `ifreq`: integers, arrays and a null pointer.
    let mut ifreq: libc::ifreq = unsafe { std::mem::zeroed() };
    if interface.len() >= ifreq.ifr_name.len() {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    for (to, from) in ifreq.ifr_name.iter_mut().zip(interface.bytes()) {
        *to = libc::c_char::from_ne_bytes([from]);
    }
    ifreq.ifr_ifru.ifru_data = words.as_mut_ptr().cast();
    // SAFETY: the descriptor is an open socket, `ifreq` holds a terminated name and a pointer to
    // `words`, which outlives the call and is as long as the command says; the callers of this
    // private function size it from the structures of ethtool.h.
    let result = unsafe { libc::ioctl(control.as_raw_fd(), libc::SIOCETHTOOL, &raw mut ifreq) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};

    use super::*;

    #[test]
    fn the_loopback_device_tells_its_features() {
        let control =
            socket(AddressFamily::Inet, SockType::Datagram, SockFlag::empty(), None).unwrap();
        let features = features(&control, "lo").unwrap();
        assert!(features.contains_key("rx-gro"), "{features:?}");
        assert!(features.contains_key("tx-udp_tnl-segmentation"), "{features:?}");
        assert!(read(&control, "lo").unwrap().tx_checksum);
        assert_eq!(driver(&control, "lo"), None);
    }

    #[test]
    fn an_unknown_or_overlong_interface_is_an_error_that_names_it() {
        let control =
            socket(AddressFamily::Inet, SockType::Datagram, SockFlag::empty(), None).unwrap();
        for name in ["ovnet-none", "a-name-of-far-too-many-bytes"] {
            let error = format!("{:#}", read(&control, name).unwrap_err());
            assert!(error.contains(name), "{error}");
        }
    }
}
