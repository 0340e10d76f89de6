//! Published ports: the layouts of their maps, and the rules of connection tracking.
//!
//! A flow of a published port is two entries of `CONNTRACK`, one per direction, each under the key
//! its packets have when they arrive. Either entry leads to the other (see [`FlowValue::other`]).
//! The layout rules are those of [`crate::abi`], whose version covers this module too.

use crate::abi::{Address, Mac};

/// Capacity of `PUBLISHED`: ports, once per address of the host for those published on every one.
pub const MAX_PUBLISHED: u32 = 65_536;
/// Capacity of `CONNTRACK` as the object has it; the agent sets another when it loads it.
pub const DEFAULT_CONNTRACK: u32 = 131_072;
/// Capacity of `FRAGMENTS`: fragmented datagrams under way at once.
pub const MAX_FRAGMENTS: u32 = 8192;

/// Key of `PUBLISHED`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(C)]
pub struct PublishedKey {
    /// An address of this host.
    pub address: Address,
    /// The published port, network byte order.
    pub port_be: u16,
    /// Protocol number of the IPv4 header.
    pub protocol: u8,
    /// Zero.
    pub reserved: u8,
}

/// Value of `PUBLISHED`: where a port of this host leads.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct PublishedValue {
    /// Address of the sandbox on its gwbridge.
    pub address: Address,
    /// The gwbridge's port that leads there: the end of the veth pair on the host.
    pub ifindex: u32,
    /// Port inside the sandbox, network byte order.
    pub port_be: u16,
    /// MAC of the sandbox's end.
    pub mac: Mac,
    /// MAC of the gwbridge, which packets come from.
    pub gateway_mac: Mac,
    /// MTU of the sandbox's end in bytes of IP packet, host byte order.
    pub mtu: u16,
    /// Bits of [`published_flags`], host byte order.
    pub flags: u32,
}

/// Bits of [`PublishedValue::flags`].
pub mod published_flags {
    /// The sandbox's end takes XDP frames: it has GRO on, without which veth drops every one.
    pub const XDP: u32 = 1;
}

/// Key of `CONNTRACK`: a packet as it arrives.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(C)]
pub struct FlowKey {
    /// Source address.
    pub source: Address,
    /// Destination address.
    pub destination: Address,
    /// Source port, network byte order.
    pub source_port_be: u16,
    /// Destination port, network byte order.
    pub destination_port_be: u16,
    /// Protocol number of the IPv4 header.
    pub protocol: u8,
    /// Zero.
    pub reserved: [u8; 3],
}

/// Value of `CONNTRACK`: what becomes of the packets of one direction of a flow.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct FlowValue {
    /// When the direction's last packet came, `bpf_ktime_get_coarse_ns()`; kept to a second.
    pub last_seen_ns: u64,
    /// Towards the container, the destination address to write: the container's. Back, the source
    /// address to write: the one the client sent to.
    pub address: Address,
    /// Interface to leave by: the gwbridge's port, or the one the client's packets came in by.
    pub ifindex: u32,
    /// Interface this direction's packets come in by. From another they are not this flow's.
    pub arrival_ifindex: u32,
    /// Towards the container, the destination port to write; back, the source port. Network byte
    /// order.
    pub port_be: u16,
    /// Towards the container, the source port to write, which is the client's own but where two
    /// flows would be alike inside; back, the destination port to write, the client's own. Network
    /// byte order.
    pub peer_port_be: u16,
    /// Destination MAC to write.
    pub destination_mac: Mac,
    /// Source MAC to write.
    pub source_mac: Mac,
    /// Source MAC of the last packet, towards the container: the next hop of the way back.
    pub arrival_mac: Mac,
    /// Destination MAC of the last packet, towards the container: the uplink's, which the way back
    /// comes from.
    pub uplink_mac: Mac,
    /// Bits of [`seen`], by [`Direction`].
    pub seen: [u8; 2],
    /// The [`Direction`] of this entry.
    pub direction: u8,
    /// Zero.
    pub reserved: u8,
}

/// Which way a packet of a flow goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Direction {
    /// From the client to the container.
    In = 0,
    /// From the container to the client.
    Back = 1,
}

impl Direction {
    /// The other one.
    #[inline(always)]
    pub const fn other(self) -> Self {
        match self {
            Self::In => Self::Back,
            Self::Back => Self::In,
        }
    }
}

/// Bits of [`FlowValue::seen`]: what has been seen in one direction.
pub mod seen {
    /// A packet.
    pub const ANY: u8 = 1;
    /// A TCP FIN.
    pub const FIN: u8 = 2;
    /// A TCP RST.
    pub const RST: u8 = 4;
}

/// Key of `FRAGMENTS`: what all fragments of a datagram share (RFC 791 §3.2).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(C)]
pub struct FragmentKey {
    /// Source address.
    pub source: Address,
    /// Destination address.
    pub destination: Address,
    /// Identification, network byte order.
    pub id_be: u16,
    /// Protocol number of the IPv4 header.
    pub protocol: u8,
    /// Zero.
    pub reserved: u8,
}

/// Value of `FRAGMENTS`: what becomes of a datagram's fragments, as its first one decided.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct FragmentValue {
    /// When the entry was made, `bpf_ktime_get_coarse_ns()`. Identifications come again; after
    /// [`timeout::FRAGMENTS_NS`] this is another datagram's.
    pub made_ns: u64,
    /// As [`FlowValue::address`].
    pub address: Address,
    /// Interface to leave by.
    pub ifindex: u32,
    /// Interface the first fragment came in by.
    pub arrival_ifindex: u32,
    /// Destination MAC to write.
    pub destination_mac: Mac,
    /// Source MAC to write.
    pub source_mac: Mac,
    /// The [`Direction`].
    pub direction: u8,
    /// One of [`fate`].
    pub fate: u8,
    /// Zero.
    pub reserved: [u8; 2],
}

/// Values of [`FragmentValue::fate`].
pub mod fate {
    /// Translated, as the first fragment was.
    pub const TRANSLATE: u8 = 0;
    /// Left to the kernel, all of them: a later fragment came before the first, so the kernel has
    /// it, and only whoever has all can put them together.
    pub const KERNEL: u8 = 1;
}

/// How long a flow may be silent before it is forgotten, in seconds.
pub mod timeout {
    /// TCP until both sides have spoken.
    pub const TCP_OPENING: u64 = 60;
    /// TCP after that, and with one side closed.
    pub const TCP_ESTABLISHED: u64 = 8000;
    /// TCP after a RST, or FINs of both sides.
    pub const TCP_CLOSING: u64 = 30;
    /// UDP until both sides have spoken.
    pub const UDP_ONE_WAY: u64 = 60;
    /// UDP after that.
    pub const UDP: u64 = 120;
    /// A datagram's fragments, in nanoseconds: how long the kernel, too, waits for all of them
    /// (`net.ipv4.ipfrag_time`).
    pub const FRAGMENTS_NS: u64 = 30_000_000_000;
}

impl FlowValue {
    /// The key of the other direction's entry, this one having `key`.
    #[inline(always)]
    pub fn other(&self, key: &FlowKey) -> FlowKey {
        let (protocol, reserved) = (key.protocol, [0; 3]);
        if self.direction == Direction::In as u8 {
            FlowKey {
                source: self.address,
                destination: key.source,
                source_port_be: self.port_be,
                destination_port_be: self.peer_port_be,
                protocol,
                reserved,
            }
        } else {
            FlowKey {
                source: key.destination,
                destination: self.address,
                source_port_be: self.peer_port_be,
                destination_port_be: self.port_be,
                protocol,
                reserved,
            }
        }
    }

    /// Whether a TCP flow is over: reset, or closed by both sides. A SYN then begins another.
    #[inline(always)]
    pub const fn is_over(&self) -> bool {
        let [client, container] = self.seen;
        (client | container) & seen::RST != 0 || client & container & seen::FIN != 0
    }

    /// How long the flow may be silent, in nanoseconds.
    #[inline(always)]
    pub const fn patience_ns(&self, protocol: u8) -> u64 {
        let [client, container] = self.seen;
        let both = client & container & seen::ANY != 0;
        let seconds = match (protocol == crate::headers::ipv4::TCP, both) {
            (true, _) if self.is_over() => timeout::TCP_CLOSING,
            (true, true) => timeout::TCP_ESTABLISHED,
            (true, false) => timeout::TCP_OPENING,
            (false, true) => timeout::UDP,
            (false, false) => timeout::UDP_ONE_WAY,
        };
        seconds * 1_000_000_000
    }

    /// Whether a flow of which this entry's direction was last heard of when it says is forgotten.
    #[inline(always)]
    pub const fn is_stale(&self, protocol: u8, now_ns: u64) -> bool {
        // The clocks of two processors may differ by a tick.
        now_ns > self.last_seen_ns && now_ns - self.last_seen_ns > self.patience_ns(protocol)
    }
}

const _: () = {
    use core::mem::size_of;
    assert!(size_of::<PublishedKey>() == 20);
    assert!(size_of::<PublishedValue>() == 40);
    assert!(size_of::<FlowKey>() == 40);
    assert!(size_of::<FlowValue>() == 64);
    assert!(size_of::<FragmentKey>() == 36);
    assert!(size_of::<FragmentValue>() == 48);
};

#[cfg(feature = "user")]
mod pod {
    use super::*;
    macro_rules! pod {
        ($($type:ty),*) => {$(
            // SAFETY: `repr(C)`, integers and byte arrays only, no padding (sizes asserted above),
            // so every byte pattern is a value and every value has all its bytes initialised.
            unsafe impl aya::Pod for $type {}
        )*};
    }
    pod!(PublishedKey, PublishedValue, FlowKey, FlowValue, FragmentKey, FragmentValue);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        abi::mapped,
        headers::ipv4::{TCP, UDP},
    };

    fn flow() -> (FlowKey, FlowValue) {
        let key = FlowKey {
            source: mapped([192, 168, 1, 100]),
            destination: mapped([192, 168, 1, 11]),
            source_port_be: 40_000u16.to_be(),
            destination_port_be: 90u16.to_be(),
            protocol: TCP,
            reserved: [0; 3],
        };
        let value = FlowValue {
            address: mapped([172, 18, 0, 2]),
            port_be: 80u16.to_be(),
            peer_port_be: 50_000u16.to_be(),
            direction: Direction::In as u8,
            ..FlowValue::default()
        };
        (key, value)
    }

    #[test]
    fn each_entry_leads_to_the_other() {
        let (key, value) = flow();
        let back = value.other(&key);
        assert_eq!((back.source, back.source_port_be), (value.address, value.port_be));
        assert_eq!((back.destination, back.destination_port_be), (key.source, value.peer_port_be));
        let reverse = FlowValue {
            address: key.destination,
            port_be: key.destination_port_be,
            peer_port_be: key.source_port_be,
            direction: Direction::Back as u8,
            ..FlowValue::default()
        };
        assert_eq!(reverse.other(&back), key);
    }

    #[test]
    fn patience_follows_what_was_seen() {
        let with = |client, container| FlowValue { seen: [client, container], ..flow().1 };
        let seconds = |value: FlowValue, protocol| value.patience_ns(protocol) / 1_000_000_000;
        let (any, fin, rst) = (seen::ANY, seen::ANY | seen::FIN, seen::ANY | seen::RST);
        assert_eq!(seconds(with(any, 0), TCP), timeout::TCP_OPENING);
        assert_eq!(seconds(with(any, any), TCP), timeout::TCP_ESTABLISHED);
        assert_eq!(seconds(with(fin, any), TCP), timeout::TCP_ESTABLISHED);
        assert_eq!(seconds(with(fin, fin), TCP), timeout::TCP_CLOSING);
        assert_eq!(seconds(with(rst, 0), TCP), timeout::TCP_CLOSING);
        assert_eq!(seconds(with(any, 0), UDP), timeout::UDP_ONE_WAY);
        assert_eq!(seconds(with(any, any), UDP), timeout::UDP);
    }

    #[test]
    fn a_flow_is_stale_after_its_patience_and_never_before_its_time() {
        let value = FlowValue { last_seen_ns: 5, seen: [seen::ANY, 0], ..flow().1 };
        let limit = 5 + timeout::UDP_ONE_WAY * 1_000_000_000;
        assert!(!value.is_stale(UDP, limit) && value.is_stale(UDP, limit + 1));
        assert!(!value.is_stale(UDP, 0));
    }
}
