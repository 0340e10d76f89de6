//! Map names, pin layout, keys and values.
//!
//! Every type here is `repr(C)`, made of integers and byte arrays only, without implicit padding:
//! hash maps compare keys byte by byte, padding included. A change of any layout, name or meaning
//! raises [`ABI_VERSION`], which is part of the pin path, and the entry of each map it concerns in
//! [`map::since`]: the maps that two versions have alike they share, and no other.

/// Version of everything in this module. Maps are pinned under `<bpffs>/v<ABI_VERSION>/`.
pub const ABI_VERSION: u32 = 3;

/// An IP address as the maps hold it: 16 bytes in network byte order, IPv4 as `::ffff:a.b.c.d`
/// (RFC 4291 §2.5.5.2).
pub type Address = [u8; 16];

/// A MAC address in transmission order.
pub type Mac = [u8; 6];

/// Map names, as in the object file and under the pin folder.
pub mod map {
    /// See [`super::HostConfig`].
    pub const CONFIG: &str = "CONFIG";
    /// Known VTEPs: [`super::Address`] → [`super::HostValue`].
    pub const HOSTS: &str = "HOSTS";
    /// VNI (`u32`, host byte order) → [`super::NetworkValue`].
    pub const NETWORKS: &str = "NETWORKS";
    /// [`super::EndpointKey`] → [`super::EndpointValue`].
    pub const ENDPOINTS: &str = "ENDPOINTS";
    /// Host-side ifindex (`u32`) → [`super::PortValue`].
    pub const PORTS: &str = "PORTS";
    /// Host-side ifindex (`u32`) → [`super::PortCounters`], per CPU.
    pub const PORT_COUNTERS: &str = "PORT_COUNTERS";
    /// [`super::counter_index`] → [`super::Counter`], per CPU.
    pub const COUNTERS: &str = "COUNTERS";
    /// Ring buffer of [`super::DropEvent`].
    pub const EVENTS: &str = "EVENTS";
    /// [`super::counter_index`] → time of the last event (ns), per CPU: the sampling state.
    pub const EVENT_TIMES: &str = "EVENT_TIMES";
    /// [`crate::published::PublishedKey`] → [`crate::published::PublishedValue`].
    pub const PUBLISHED: &str = "PUBLISHED";
    /// [`crate::published::FlowKey`] → [`crate::published::FlowValue`], LRU.
    pub const CONNTRACK: &str = "CONNTRACK";
    /// [`crate::published::FragmentKey`] → [`crate::published::FragmentValue`], LRU.
    pub const FRAGMENTS: &str = "FRAGMENTS";
    /// Every pinned map, in the order they are opened.
    pub const ALL: [&str; 12] = [
        CONFIG,
        HOSTS,
        NETWORKS,
        ENDPOINTS,
        PORTS,
        PORT_COUNTERS,
        COUNTERS,
        EVENTS,
        EVENT_TIMES,
        PUBLISHED,
        CONNTRACK,
        FRAGMENTS,
    ];

    /// The [`super::ABI_VERSION`] that first had the map as it is now: its type, what its keys and
    /// values are made of, and what they mean. An agent that finds a map of another version takes it
    /// over where both name the same one here, so a change that is forgotten here has programs read
    /// garbage.
    pub const fn since(_name: &str) -> u32 {
        3
    }
}

/// Capacity of `HOSTS`.
pub const MAX_HOSTS: u32 = 4096;
/// Capacity of `NETWORKS`.
pub const MAX_NETWORKS: u32 = 4096;
/// Capacity of `ENDPOINTS`: local and remote endpoints of all networks used here.
pub const MAX_ENDPOINTS: u32 = 131_072;
/// Capacity of `PORTS` and `PORT_COUNTERS`: endpoints of this host.
pub const MAX_PORTS: u32 = 4096;
/// Size of `EVENTS` in bytes.
pub const EVENTS_BYTES: u32 = 256 * 1024;
/// At most one drop event per CPU, program and reason in this many nanoseconds.
pub const EVENT_INTERVAL_NS: u64 = 10_000_000;

/// The attach points, in the order their counters are numbered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
pub enum Program {
    /// TC ingress of a host-side veth: packets a container sends.
    FromContainer = 0,
    /// TC ingress of the uplink: packets the wire brings.
    FromUplink = 1,
    /// TC ingress of `ovnet-vx`: packets the kernel's vxlan device decapsulated.
    FromOverlay = 2,
    /// XDP on the uplink, before an skb exists.
    UplinkXdp = 3,
    /// TC ingress of a gwbridge's port: packets a container sends out of the overlay.
    FromGwbridge = 4,
}

impl Program {
    /// How many there are.
    pub const COUNT: u32 = 5;
    /// Every program, in number order.
    pub const ALL: [Self; Self::COUNT as usize] = [
        Self::FromContainer,
        Self::FromUplink,
        Self::FromOverlay,
        Self::UplinkXdp,
        Self::FromGwbridge,
    ];

    /// The program's name: of its function in the object, its file, its pins.
    pub const fn name(self) -> &'static str {
        match self {
            Self::FromContainer => "from_container",
            Self::FromUplink => "from_uplink",
            Self::FromOverlay => "from_overlay",
            Self::UplinkXdp => "uplink_xdp",
            Self::FromGwbridge => "from_gwbridge",
        }
    }

    /// The program with the number `number`, as a [`DropEvent`] holds it.
    pub const fn from_number(number: u8) -> Option<Self> {
        match number {
            0 => Some(Self::FromContainer),
            1 => Some(Self::FromUplink),
            2 => Some(Self::FromOverlay),
            3 => Some(Self::UplinkXdp),
            4 => Some(Self::FromGwbridge),
            _ => None,
        }
    }
}

/// Counters per program: one for each code of [`crate::verdict`].
pub const CODES_PER_PROGRAM: u32 = 128;
/// Capacity of `COUNTERS` and `EVENT_TIMES`.
pub const MAX_COUNTERS: u32 = CODES_PER_PROGRAM * Program::COUNT;

/// Index into `COUNTERS` for what `program` decided, `code` being a number of
/// [`crate::verdict::Verdict::code`]; codes past the table share its last slot.
pub const fn counter_index(program: Program, code: u8) -> u32 {
    let code = code as u32;
    let slot = if code < CODES_PER_PROGRAM { code } else { CODES_PER_PROGRAM - 1 };
    program as u32 * CODES_PER_PROGRAM + slot
}

/// What the programs know about their own host: the only element of `CONFIG`.
///
/// It is a map and not a load-time constant because the address can change while pinned programs
/// run without an agent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct HostConfig {
    /// Our VTEP address; all zero while there is none, and then nothing is encapsulated.
    pub vtep: Address,
    /// ifindex of the `external` vxlan device, 0 while there is none.
    pub external_ifindex: u32,
    /// UDP port VXLAN is received on, network byte order.
    pub vxlan_port_be: u16,
    /// First outer UDP source port, host byte order (`net.ipv4.ip_local_port_range`).
    pub source_port_min: u16,
    /// One past the last outer UDP source port, host byte order, as in `udp_flow_src_port()`.
    pub source_port_max: u16,
    /// Whether any port is published: 1, or 0, and then nothing is looked up for one.
    pub published: u16,
    /// ifindex of `ovnet_gwbridge`, 0 while there is none.
    pub gwbridge_ifindex: u32,
    /// Its MAC.
    pub gwbridge_mac: Mac,
    /// MAC of the uplink. All zero while it is not known, and then XDP takes nothing.
    pub uplink_mac: Mac,
    /// ifindex of the uplink, 0 while it is not known.
    pub uplink_ifindex: u32,
}

/// Value of `HOSTS`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct HostValue {
    /// UDP port that VTEP receives VXLAN on, network byte order.
    pub vxlan_port_be: u16,
    /// Zero.
    pub reserved: u16,
}

/// Value of `NETWORKS`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct NetworkValue {
    /// The network's gateway address; ARP for it is answered, and so is an echo request.
    pub gateway: Address,
    /// MAC answered for the gateway address.
    pub gateway_mac: Mac,
    /// MTU of the network's endpoints in bytes of IP packet, host byte order.
    pub mtu: u16,
    /// Bits of [`network_flags`], host byte order.
    pub flags: u32,
}

/// Bits of [`NetworkValue::flags`].
pub mod network_flags {
    /// No egress and no published ports.
    pub const INTERNAL: u32 = 1;
}

/// Key of `ENDPOINTS`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(C)]
pub struct EndpointKey {
    /// VNI, host byte order.
    pub vni: u32,
    /// The endpoint's address.
    pub address: Address,
}

/// Value of `ENDPOINTS`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct EndpointValue {
    /// VTEP address of the host the endpoint is on; all zero for a local endpoint.
    pub vtep: Address,
    /// Host-side ifindex of a local endpoint; 0 for a remote one.
    pub ifindex: u32,
    /// The endpoint's MAC address.
    pub mac: Mac,
    /// UDP port of the endpoint's host, network byte order; unused for a local endpoint.
    pub vxlan_port_be: u16,
}

/// Value of `PORTS`: who is behind a host-side veth, for the source check.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct PortValue {
    /// VNI of the endpoint's network, host byte order. 0 on the gwbridge.
    pub vni: u32,
    /// The only source address the endpoint may send from.
    pub address: Address,
    /// The only source MAC the endpoint may send from.
    pub mac: Mac,
    /// Zero.
    pub reserved: u16,
}

/// Value of `PORT_COUNTERS`: packets and bytes of one endpoint, from the container's view. Bytes
/// are those of the inner frame; a GSO packet counts as one packet with all its bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct PortCounters {
    /// Packets the container sent that were not dropped, those answered in place among them.
    pub tx_packets: u64,
    /// Their bytes.
    pub tx_bytes: u64,
    /// Packets delivered to the container.
    pub rx_packets: u64,
    /// Their bytes.
    pub rx_bytes: u64,
}

/// Value of `COUNTERS`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Counter {
    /// Packets; a GSO or GRO packet counts as one.
    pub packets: u64,
    /// Bytes of frame as the program found it.
    pub bytes: u64,
}

/// Bytes of packet a [`DropEvent`] carries: the outer headers, the inner ones and some payload.
pub const EVENT_DATA: usize = 96;

/// A sampled drop, in `EVENTS`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct DropEvent {
    /// `bpf_ktime_get_coarse_ns()`: nanoseconds since boot, without suspend, at the last tick.
    pub timestamp_ns: u64,
    /// Interface the packet came in by.
    pub ifindex: u32,
    /// Length of the frame in bytes.
    pub length: u32,
    /// Number of the [`Program`].
    pub program: u8,
    /// Code of the [`crate::verdict::DropReason`].
    pub reason: u8,
    /// Bytes of `data` that are valid.
    pub captured: u16,
    /// Zero.
    pub reserved: u32,
    /// The start of the frame as the program found it.
    pub data: [u8; EVENT_DATA],
}

/// The IPv4-mapped form of an IPv4 address given in network byte order.
#[inline(always)]
pub const fn mapped(v4: [u8; 4]) -> Address {
    // As one number: an array whose bytes are cleared one after the other is, in a BPF program, a
    // call to a loop, for each lookup of each packet.
    let v4 = u32::from_le_bytes(v4) as u128;
    (0xffff << 80 | v4 << 96).to_le_bytes()
}

/// The IPv4 address, in network byte order, inside an IPv4-mapped one.
#[inline(always)]
pub const fn unmapped(address: &Address) -> [u8; 4] {
    [address[12], address[13], address[14], address[15]]
}

const _: () = {
    use core::mem::size_of;
    assert!(size_of::<HostConfig>() == 48);
    assert!(size_of::<HostValue>() == 4);
    assert!(size_of::<NetworkValue>() == 28);
    assert!(size_of::<EndpointKey>() == 20);
    assert!(size_of::<EndpointValue>() == 28);
    assert!(size_of::<PortValue>() == 28);
    assert!(size_of::<PortCounters>() == 32);
    assert!(size_of::<Counter>() == 16);
    assert!(size_of::<DropEvent>() == 24 + EVENT_DATA);
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
    pod!(
        HostConfig,
        HostValue,
        NetworkValue,
        EndpointKey,
        EndpointValue,
        PortValue,
        PortCounters,
        Counter,
        DropEvent
    );
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mapping_is_reversible() {
        assert_eq!(unmapped(&mapped([10, 0, 0, 2])), [10, 0, 0, 2]);
        assert_eq!(mapped([10, 0, 0, 2])[10..12], [0xff, 0xff]);
    }

    #[test]
    fn counters_of_two_programs_never_share_a_slot() {
        let last = counter_index(Program::FromContainer, u8::MAX);
        assert_eq!(last + 1, counter_index(Program::FromUplink, 0));
        assert_eq!(counter_index(Program::FromGwbridge, u8::MAX) + 1, MAX_COUNTERS);
    }

    #[test]
    fn program_numbers_are_reversible() {
        for program in Program::ALL {
            assert_eq!(Program::from_number(program as u8), Some(program));
        }
        assert_eq!(Program::from_number(5), None);
    }
}
