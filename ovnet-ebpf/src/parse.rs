//! The only place that touches packet memory.
//!
//! Every access goes through [`Frame::read`] or [`Frame::write`], which hold the bounds check the
//! verifier asks for. A helper that may move the packet (pull, adjust, store) makes a `Frame`
//! invalid; take a new one after it.

use aya_ebpf::{
    helpers::generated::bpf_skb_pull_data,
    programs::{TcContext, XdpContext},
};
use ovnet_common::headers::{ethernet, ipv4, tcp, udp};

/// The linear part of a packet: from its first byte to the end of what can be read directly.
#[derive(Clone, Copy)]
pub(crate) struct Frame {
    start: usize,
    end: usize,
}

impl Frame {
    /// The linear part of an skb as it is now.
    #[inline(always)]
    pub(crate) fn tc(ctx: &TcContext) -> Self {
        Self { start: ctx.data(), end: ctx.data_end() }
    }

    /// The linear part of an skb after pulling `length` bytes into it, where they are not there
    /// yet. `None` for a packet shorter than that. TCP and GRO packets often have nothing but
    /// their headers there, a packet from a raw socket not even these.
    #[inline(always)]
    pub(crate) fn tc_pulled(ctx: &TcContext, length: usize) -> Option<Self> {
        let frame = Self::tc(ctx);
        if frame.start + length <= frame.end {
            return Some(frame);
        }
        // SAFETY: the context is the one the kernel gave us; the helper checks the length.
        if unsafe { bpf_skb_pull_data(ctx.skb.skb, length as u32) } != 0 {
            return None;
        }
        Some(Self::tc(ctx))
    }

    /// The first buffer of an XDP packet.
    #[inline(always)]
    pub(crate) fn xdp(ctx: &XdpContext) -> Self {
        Self { start: ctx.data(), end: ctx.data_end() }
    }

    /// Length of the linear part in bytes.
    #[inline(always)]
    pub(crate) fn length(&self) -> u32 {
        (self.end - self.start) as u32
    }

    /// The `N` bytes at `offset`, `None` where the linear part ends before. Call it with constants:
    /// the verifier follows those through every kernel we support.
    #[inline(always)]
    pub(crate) fn read<const N: usize>(&self, offset: usize) -> Option<[u8; N]> {
        if self.start + offset + N > self.end {
            return None;
        }
        // SAFETY: the bytes lie between start and end, any bytes are a [u8; N], its alignment is 1.
        Some(unsafe { *((self.start + offset) as *const [u8; N]) })
    }

    /// Overwrites the bytes at `offset`; `None`, with nothing written, where they do not fit.
    #[inline(always)]
    pub(crate) fn write<const N: usize>(&self, offset: usize, bytes: &[u8; N]) -> Option<()> {
        if self.start + offset + N > self.end {
            return None;
        }
        // SAFETY: as in `read`; the verifier made the packet writable before the program ran.
        unsafe { *((self.start + offset) as *mut [u8; N]) = *bytes };
        Some(())
    }
}

/// Whether the packet has a VLAN tag, which is no part of its bytes: the kernel takes an 802.1Q
/// header off before TC ingress and keeps the tag beside the packet, where it survives every
/// redirection and is put back on the way out.
#[inline(always)]
pub(crate) fn is_tagged(ctx: &TcContext) -> bool {
    // SAFETY: the context is the one the kernel gave us.
    unsafe { (*ctx.skb.skb).vlan_present != 0 }
}

/// The ports of a TCP or UDP header, and TCP's flags.
#[derive(Clone, Copy)]
pub(crate) struct Transport {
    /// Network byte order.
    pub(crate) source_be: u16,
    /// Network byte order.
    pub(crate) destination_be: u16,
    /// Bits of `headers::tcp`; 0 for UDP.
    pub(crate) flags: u8,
}

impl Transport {
    /// Length of frame, IPv4 header without options and the whole header of `protocol`.
    #[inline(always)]
    pub(crate) const fn end(protocol: u8) -> usize {
        let header = if protocol == ipv4::TCP { tcp::LEN } else { udp::LEN };
        ethernet::LEN + ipv4::LEN + header
    }

    /// The header behind an IPv4 header without options, whole.
    #[inline(always)]
    pub(crate) fn read(frame: &Frame, protocol: u8) -> Option<Self> {
        const AT: usize = ethernet::LEN + ipv4::LEN;
        let [s0, s1, d0, d1]: [u8; 4] = frame.read(AT)?;
        let flags = if protocol == ipv4::TCP {
            let header: [u8; tcp::LEN] = frame.read(AT)?;
            header[tcp::FLAGS]
        } else {
            frame.read::<{ udp::LEN }>(AT)?;
            0
        };
        Some(Self {
            source_be: u16::from_ne_bytes([s0, s1]),
            destination_be: u16::from_ne_bytes([d0, d1]),
            flags,
        })
    }
}

/// An Ethernet header.
#[derive(Clone, Copy)]
pub(crate) struct Ethernet {
    pub(crate) destination: [u8; 6],
    pub(crate) source: [u8; 6],
    /// EtherType, host byte order.
    pub(crate) ethertype: u16,
}

impl Ethernet {
    /// The header at `offset`.
    #[inline(always)]
    pub(crate) fn read(frame: &Frame, offset: usize) -> Option<Self> {
        Some(Self {
            destination: frame.read(offset + ethernet::DESTINATION)?,
            source: frame.read(offset + ethernet::SOURCE)?,
            ethertype: u16::from_be_bytes(frame.read(offset + ethernet::TYPE)?),
        })
    }
}

/// The fields of an IPv4 header the programs look at.
#[derive(Clone, Copy)]
pub(crate) struct Ipv4 {
    pub(crate) version_ihl: u8,
    pub(crate) tos: u8,
    /// Identification, network byte order.
    pub(crate) id_be: u16,
    pub(crate) ttl: u8,
    /// Flags and offset, host byte order.
    pub(crate) fragment: u16,
    pub(crate) protocol: u8,
    pub(crate) source: [u8; 4],
    pub(crate) destination: [u8; 4],
}

impl Ipv4 {
    /// The header at `offset`.
    #[inline(always)]
    pub(crate) fn read(frame: &Frame, offset: usize) -> Option<Self> {
        let header: [u8; ipv4::LEN] = frame.read(offset)?;
        Some(Self::parse(&header))
    }

    /// As [`Self::read`], field by field: of a header read whole the compiler keeps each byte in a
    /// place of its own, for which deeper functions have no stack.
    #[inline(always)]
    pub(crate) fn read_fields(frame: &Frame, offset: usize) -> Option<Self> {
        let [version_ihl, tos]: [u8; 2] = frame.read(offset)?;
        let [ttl, protocol]: [u8; 2] = frame.read(offset + ipv4::TTL)?;
        Some(Self {
            version_ihl,
            tos,
            id_be: u16::from_ne_bytes(frame.read(offset + ipv4::ID)?),
            ttl,
            fragment: u16::from_be_bytes(frame.read(offset + ipv4::FRAGMENT)?),
            protocol,
            source: u32::from_ne_bytes(frame.read(offset + ipv4::SOURCE)?).to_ne_bytes(),
            destination: u32::from_ne_bytes(frame.read(offset + ipv4::DESTINATION)?).to_ne_bytes(),
        })
    }

    /// The header in these bytes.
    #[inline(always)]
    pub(crate) fn parse(header: &[u8; ipv4::LEN]) -> Self {
        let [
            version_ihl,
            tos,
            _,
            _,
            i0,
            i1,
            f0,
            f1,
            ttl,
            protocol,
            _,
            _,
            s0,
            s1,
            s2,
            s3,
            d0,
            d1,
            d2,
            d3,
        ] = *header;
        Self {
            version_ihl,
            tos,
            id_be: u16::from_ne_bytes([i0, i1]),
            ttl,
            fragment: u16::from_be_bytes([f0, f1]),
            protocol,
            source: [s0, s1, s2, s3],
            destination: [d0, d1, d2, d3],
        }
    }

    /// Whether it is IPv4 with a header length of at least five words.
    #[inline(always)]
    pub(crate) fn is_valid(&self) -> bool {
        self.version_ihl >= ipv4::NO_OPTIONS && self.version_ihl <= 0x4f
    }

    /// Whether it is a fragment, first or later.
    #[inline(always)]
    pub(crate) fn is_fragment(&self) -> bool {
        self.fragment & ipv4::FRAGMENT_MASK != 0
    }

    /// Whether it is a fragment without the ports, which only the first one has.
    #[inline(always)]
    pub(crate) fn is_later_fragment(&self) -> bool {
        self.fragment & ipv4::OFFSET_MASK != 0
    }
}
