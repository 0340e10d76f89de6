//! Wire → published port: the container's address and port in place of the host's.
//!
//! The client's address stays. What cannot be translated here is left, unmodified, to the kernel's
//! NAT, which has the same mapping (invariant 3).

use core::ffi::c_void;

use aya_ebpf::{bindings::__sk_buff, programs::TcContext};
use ovnet_common::{
    abi::mapped,
    headers::{ethernet, ipv4},
    published::{Direction, PublishedKey, PublishedValue},
    verdict::{DropReason, KernelReason, Verdict},
};

use crate::{
    conntrack, fragments, icmp_error,
    maps::{self, Scratch},
    parse::{Frame, Ipv4, Transport},
    translate::{self, Rewrite},
};

/// Decides about a packet of the uplink that is not VXLAN.
#[inline(always)]
pub(crate) fn from_uplink(ctx: &TcContext, ip: &Ipv4) -> Verdict {
    if ip.version_ihl != ipv4::NO_OPTIONS {
        return Verdict::Pass;
    }
    match ip.protocol {
        ipv4::TCP | ipv4::UDP if ip.is_later_fragment() => {
            fragments::later(ctx.skb.skb, Direction::In as u32).verdict()
        }
        ipv4::TCP | ipv4::UDP => translate::then(ctx.skb.skb, packet(ctx.skb.skb)).verdict(),
        ipv4::ICMP if !ip.is_fragment() => {
            let forged = icmp_error::is_forged(ctx.skb.skb);
            icmp_error::handle(ctx.skb.skb, Direction::In as u32, forged).verdict()
        }
        _ => Verdict::Pass,
    }
}

/// Decides about a packet with ports; what to make of it is in the scratch space.
#[inline(never)]
fn packet(skb: *mut __sk_buff) -> Outcome {
    let ctx = TcContext::new(skb);
    let Some(ip) = Ipv4::read_fields(&Frame::tc(&ctx), ethernet::LEN) else { return Outcome::PASS };
    let Some(frame) = Frame::tc_pulled(&ctx, Transport::end(ip.protocol)) else {
        return Outcome::PASS;
    };
    let Some(scratch) = maps::scratch() else { return Outcome::PASS };
    let Some((transport, to)) = find(scratch, &frame, &ip) else { return Outcome::PASS };
    if is_vxlan(ip.protocol, transport.source_be) {
        return Outcome::VXLAN_PORT;
    }
    // SAFETY: the context is the one the kernel gave us.
    let ifindex = unsafe { (*skb).ifindex };
    if let Err(reason) = decide(skb.cast(), scratch, &ip, &transport, to, ifindex) {
        return Outcome::kernel(reason);
    }
    if ip.is_fragment()
        && let Err(reason) = fragments::first(scratch, ip.id_be, ifindex)
    {
        return Outcome::kernel(reason);
    }
    Outcome::translated(&scratch.rewrite)
}

/// A published port's packet, and where it leads.
#[inline(always)]
pub(crate) fn find(
    scratch: &mut Scratch,
    frame: &Frame,
    ip: &Ipv4,
) -> Option<(Transport, &'static PublishedValue)> {
    let transport = Transport::read(frame, ip.protocol)?;
    scratch.published = PublishedKey {
        address: mapped(ip.destination),
        port_be: transport.destination_be,
        protocol: ip.protocol,
        reserved: 0,
    };
    let to = maps::published(&scratch.published)?;
    scratch.source_mac = frame.read(ethernet::SOURCE)?;
    scratch.destination_mac = frame.read(ethernet::DESTINATION)?;
    Some((transport, to))
}

/// Whether UDP from, or to, this port of somebody elsewhere is VXLAN to whoever has that port.
///
/// A sandbox's answers and its masqueraded packets leave under this host's address, which is a VTEP's:
/// sent to another host's VXLAN port they would pass every check there, with whatever network and
/// inner source the sandbox writes into them. The port is network byte order.
#[inline(always)]
pub(crate) fn is_vxlan(protocol: u8, port_be: u16) -> bool {
    protocol == ipv4::UDP && maps::config().is_some_and(|config| config.vxlan_port_be == port_be)
}

/// What to make of a published port's packet; it is in `scratch` afterwards. The context is that of
/// the program, of whichever type.
#[inline(always)]
pub(crate) fn decide(
    ctx: *mut c_void,
    scratch: &mut Scratch,
    ip: &Ipv4,
    transport: &Transport,
    to: &PublishedValue,
    ifindex: u32,
) -> Result<(), KernelReason> {
    if ip.ttl <= 1 {
        return Err(KernelReason::TimeExceeded);
    }
    scratch.key = conntrack::key(ip, transport);
    conntrack::towards_container(ctx, scratch, transport.flags, to, ifindex)
}

/// A [`Verdict`] in one register.
///
/// What decides about published ports are functions of their own in the object, each with a stack of
/// its own, for all of them on one are more than the kernel gives. They return no [`Verdict`]: of one
/// without an interface the compiler leaves the interface's half undefined, and the verifier does not
/// let a program touch what then happens to be there.
#[derive(Clone, Copy)]
#[repr(transparent)]
pub(crate) struct Outcome(u64);

impl Outcome {
    pub(crate) const PASS: Self = Self(0);
    /// The packet is half rewritten.
    pub(crate) const FAILED: Self = Self((DropReason::TranslateFailed as u64) << 32);
    /// See [`is_vxlan`].
    pub(crate) const VXLAN_PORT: Self = Self((DropReason::VxlanPort as u64) << 32);

    /// Whether the packet is to be translated.
    #[inline(always)]
    pub(crate) fn is_translated(self) -> bool {
        // Both codes, and only they, have an interface beside them.
        self.0 as u32 != 0
    }

    /// Left to the kernel's NAT.
    #[inline(always)]
    pub(crate) fn kernel(reason: KernelReason) -> Self {
        Self((reason as u64) << 32)
    }

    /// Translated.
    #[inline(always)]
    pub(crate) fn translated(rewrite: &Rewrite) -> Self {
        const PUBLISH: u64 = Verdict::Publish(0).code() as u64;
        const RETURN: u64 = Verdict::Return(0).code() as u64;
        let code = if rewrite.direction as u8 == Direction::In as u8 { PUBLISH } else { RETURN };
        Self(code << 32 | u64::from(rewrite.ifindex))
    }

    /// The verdict.
    #[inline(always)]
    pub(crate) fn verdict(self) -> Verdict {
        const PUBLISH: u8 = Verdict::Publish(0).code();
        const RETURN: u8 = Verdict::Return(0).code();
        const FAILED: u8 = DropReason::TranslateFailed as u8;
        const VXLAN_PORT: u8 = DropReason::VxlanPort as u8;
        match (self.0 >> 32) as u8 {
            PUBLISH => Verdict::Publish(self.0 as u32),
            RETURN => Verdict::Return(self.0 as u32),
            FAILED => Verdict::Drop(DropReason::TranslateFailed),
            VXLAN_PORT => Verdict::Drop(DropReason::VxlanPort),
            code => KernelReason::from_code(code).map_or(Verdict::Pass, Verdict::Kernel),
        }
    }
}
