//! ARP (RFC 826), answered in place: the agent knows every address, so no request crosses the wire.

use aya_ebpf::programs::TcContext;
use ovnet_common::{
    abi::{PortValue, mapped, unmapped},
    headers::{arp, ethernet},
    verdict::{Answer, DropReason, Verdict},
};

use crate::{maps, parse::Frame};

/// A request, as far as it concerns us.
pub(crate) struct Request {
    frame: Frame,
    pub(crate) sender_mac: [u8; 6],
    pub(crate) sender: [u8; 4],
    pub(crate) target: [u8; 4],
}

impl Request {
    /// The request in this packet, or why it is none.
    #[inline(always)]
    pub(crate) fn read(ctx: &TcContext) -> Result<Self, DropReason> {
        const AT: usize = ethernet::LEN;
        let frame = Frame::tc_pulled(ctx, AT + arp::LEN).ok_or(DropReason::Truncated)?;
        let packet: [u8; arp::LEN] = frame.read(AT).ok_or(DropReason::Truncated)?;
        let [
            p0,
            p1,
            p2,
            p3,
            p4,
            p5,
            o0,
            o1,
            m0,
            m1,
            m2,
            m3,
            m4,
            m5,
            s0,
            s1,
            s2,
            s3,
            _,
            _,
            _,
            _,
            _,
            _,
            t0,
            t1,
            t2,
            t3,
        ] = packet;
        let request = u16::from_be_bytes([o0, o1]) == arp::REQUEST;
        if [p0, p1, p2, p3, p4, p5] != arp::PREFIX || !request {
            return Err(DropReason::ArpUnanswered);
        }
        Ok(Self {
            frame,
            sender_mac: [m0, m1, m2, m3, m4, m5],
            sender: [s0, s1, s2, s3],
            target: [t0, t1, t2, t3],
        })
    }

    /// Turns the packet into the reply that `mac` has the target address.
    #[inline(always)]
    pub(crate) fn reply(&self, mac: [u8; 6]) -> Result<(), DropReason> {
        let [m0, m1, m2, m3, m4, m5] = mac;
        let [r0, r1, r2, r3, r4, r5] = self.sender_mac;
        let [s0, s1, s2, s3] = self.sender;
        let [t0, t1, t2, t3] = self.target;
        #[rustfmt::skip]
        let bytes = [
            r0, r1, r2, r3, r4, r5, m0, m1, m2, m3, m4, m5, 0x08, 0x06,
            0, 1, 8, 0, 6, 4, 0, 2,
            m0, m1, m2, m3, m4, m5, t0, t1, t2, t3,
            r0, r1, r2, r3, r4, r5, s0, s1, s2, s3,
        ];
        self.frame.write(0, &bytes).ok_or(DropReason::Truncated)
    }
}

/// Answers a container's request for an endpoint of its network or the gateway.
#[inline(always)]
pub(crate) fn from_container(
    ctx: &TcContext,
    ifindex: u32,
    port: &PortValue,
    source: [u8; 6],
) -> Verdict {
    let request = match Request::read(ctx) {
        Ok(request) => request,
        Err(reason) => return Verdict::Drop(reason),
    };
    if request.sender_mac != source {
        return Verdict::Drop(DropReason::SpoofedMac);
    }
    let own = unmapped(&port.address);
    // All zero is the sender of an address probe (RFC 5227 §2.1.1), which claims nothing.
    if request.sender != own && request.sender != [0; 4] {
        return Verdict::Drop(DropReason::SpoofedAddress);
    }
    // An answer to a probe or an announcement of its own address would tell it of a conflict.
    if request.target == own {
        return Verdict::Drop(DropReason::ArpUnanswered);
    }
    let mac = match maps::endpoint(port.vni, request.target) {
        Some(endpoint) => endpoint.mac,
        None => match maps::network(port.vni) {
            Some(network) if network.gateway == mapped(request.target) => network.gateway_mac,
            _ => return Verdict::Drop(DropReason::ArpUnanswered),
        },
    };
    match request.reply(mac) {
        Ok(()) => Verdict::Answer(Answer::Arp, ifindex),
        Err(reason) => Verdict::Drop(reason),
    }
}

/// Whether a request or an answer is in the name of who is behind this port.
#[inline(always)]
pub(crate) fn is_by(ctx: &TcContext, port: &PortValue) -> Result<(), DropReason> {
    const AT: usize = ethernet::LEN;
    let frame = Frame::tc_pulled(ctx, AT + arp::LEN).ok_or(DropReason::Truncated)?;
    let mac: [u8; 6] = frame.read(AT + arp::SENDER_MAC).ok_or(DropReason::Truncated)?;
    let address: [u8; 4] = frame.read(AT + arp::SENDER_ADDRESS).ok_or(DropReason::Truncated)?;
    if mac != port.mac {
        return Err(DropReason::SpoofedMac);
    }
    // All zero as in `from_container`.
    if address != [0; 4] && mapped(address) != port.address {
        return Err(DropReason::SpoofedAddress);
    }
    Ok(())
}
