//! Header layouts as named offsets and sizes, in bytes. Multi-byte fields are in network byte
//! order on the wire.

/// Ethernet (IEEE 802.3), without VLAN tag.
pub mod ethernet {
    /// Length of the header.
    pub const LEN: usize = 14;
    /// Destination MAC.
    pub const DESTINATION: usize = 0;
    /// Source MAC.
    pub const SOURCE: usize = 6;
    /// EtherType.
    pub const TYPE: usize = 12;
    /// EtherType of IPv4, host byte order.
    pub const IPV4: u16 = 0x0800;
    /// EtherType of ARP, host byte order.
    pub const ARP: u16 = 0x0806;
}

/// ARP for IPv4 over Ethernet (RFC 826).
pub mod arp {
    /// Length of the packet.
    pub const LEN: usize = 28;
    /// Operation.
    pub const OPERATION: usize = 6;
    /// Sender MAC.
    pub const SENDER_MAC: usize = 8;
    /// Sender address.
    pub const SENDER_ADDRESS: usize = 14;
    /// Target address.
    pub const TARGET_ADDRESS: usize = 24;
    /// The first six bytes of every Ethernet and IPv4 ARP packet: types and lengths.
    pub const PREFIX: [u8; 6] = [0, 1, 8, 0, 6, 4];
    /// Operation of a request, host byte order.
    pub const REQUEST: u16 = 1;
    /// Operation of a reply, host byte order.
    pub const REPLY: u16 = 2;
}

/// IPv4 (RFC 791).
pub mod ipv4 {
    /// Length of a header without options.
    pub const LEN: usize = 20;
    /// Version and header length, one byte.
    pub const VERSION_IHL: usize = 0;
    /// DSCP and ECN, one byte.
    pub const TOS: usize = 1;
    /// Total length.
    pub const TOTAL_LENGTH: usize = 2;
    /// Identification.
    pub const ID: usize = 4;
    /// Flags and fragment offset.
    pub const FRAGMENT: usize = 6;
    /// Time to live, one byte.
    pub const TTL: usize = 8;
    /// Protocol.
    pub const PROTOCOL: usize = 9;
    /// Header checksum.
    pub const CHECKSUM: usize = 10;
    /// Source address.
    pub const SOURCE: usize = 12;
    /// Destination address.
    pub const DESTINATION: usize = 16;
    /// Version 4 and five words of header: no options.
    pub const NO_OPTIONS: u8 = 0x45;
    /// Flags and offset of a fragment: More Fragments, or any offset. Host byte order.
    pub const FRAGMENT_MASK: u16 = 0x3fff;
    /// The offset of a fragment, in units of eight bytes. Host byte order.
    pub const OFFSET_MASK: u16 = 0x1fff;
    /// Protocol ICMP.
    pub const ICMP: u8 = 1;
    /// Protocol TCP.
    pub const TCP: u8 = 6;
    /// Protocol UDP.
    pub const UDP: u8 = 17;
}

/// ICMP (RFC 792).
pub mod icmp {
    /// Length of the fixed part.
    pub const LEN: usize = 8;
    /// Type, one byte.
    pub const TYPE: usize = 0;
    /// Checksum.
    pub const CHECKSUM: usize = 2;
    /// Type of "destination unreachable", "fragmentation needed" among them.
    pub const UNREACHABLE: u8 = 3;
    /// Type of "time exceeded".
    pub const TIME_EXCEEDED: u8 = 11;
    /// Type of "parameter problem".
    pub const PARAMETER_PROBLEM: u8 = 12;
    /// Type of an echo reply.
    pub const ECHO_REPLY: u8 = 0;
    /// Type of an echo request.
    pub const ECHO_REQUEST: u8 = 8;
}

/// TCP (RFC 9293).
pub mod tcp {
    /// Length of a header without options.
    pub const LEN: usize = 20;
    /// Flags, one byte.
    pub const FLAGS: usize = 13;
    /// Checksum.
    pub const CHECKSUM: usize = 16;
    /// The sender is done.
    pub const FIN: u8 = 1;
    /// Begins a connection.
    pub const SYN: u8 = 2;
    /// Ends a connection at once.
    pub const RST: u8 = 4;
    /// The acknowledgement number counts.
    pub const ACK: u8 = 16;
}

/// UDP (RFC 768).
pub mod udp {
    /// Length of the header.
    pub const LEN: usize = 8;
    /// Source port.
    pub const SOURCE: usize = 0;
    /// Destination port.
    pub const DESTINATION: usize = 2;
    /// Checksum; zero is none.
    pub const CHECKSUM: usize = 6;
}

/// VXLAN (RFC 7348 §5).
pub mod vxlan {
    /// Length of the header.
    pub const LEN: usize = 8;
    /// The first four bytes of a valid header: the I flag and nothing else. Host byte order.
    pub const VALID_VNI: u32 = 0x0800_0000;
    /// UDP port of IANA, host byte order.
    pub const PORT: u16 = 4789;
}
