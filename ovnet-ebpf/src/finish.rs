//! The single exit: a verdict becomes an action, a counter, and for a drop a sampled event.

use aya_ebpf::{
    EbpfContext as _,
    bindings::{BPF_F_INGRESS, TC_ACT_SHOT, TC_ACT_UNSPEC, xdp_action},
    helpers::generated::{
        bpf_redirect, bpf_redirect_peer, bpf_skb_change_type, bpf_skb_load_bytes,
    },
    programs::{TcContext, XdpContext},
};
use aya_log_ebpf::{debug, info};
use ovnet_common::{
    abi::{DropEvent, EVENT_DATA, Program},
    verdict::{DropReason, Verdict},
    vxlan,
};

use crate::{maps, parse::Frame};

/// `PACKET_HOST` of `linux/if_packet.h`: addressed to us.
pub(crate) const PACKET_HOST: u32 = 0;

/// Runs a TC program and carries out its verdict.
#[inline(always)]
pub(crate) fn tc(ctx: &TcContext, program: Program, handle: fn(&TcContext) -> Verdict) -> i32 {
    let length = ctx.len();
    // SAFETY: the context is the one the kernel gave us.
    let ifindex = unsafe { (*ctx.skb.skb).ifindex };
    let verdict = handle(ctx);
    maps::count(program, verdict.code(), length);
    debug!(ctx, "{} on {}: {} bytes, verdict {}", program.name(), ifindex, length, verdict.code());
    if matches!(program, Program::FromContainer) && !matches!(verdict, Verdict::Drop(_)) {
        maps::count_sent(ifindex, length);
    }
    match verdict {
        // Not TC_ACT_OK: other programs on the same hook have their say too.
        Verdict::Pass | Verdict::Kernel(_) => TC_ACT_UNSPEC,
        Verdict::Deliver(to) | Verdict::Publish(to) => {
            if matches!(verdict, Verdict::Deliver(_)) {
                let inner = match program {
                    Program::FromUplink => length - vxlan::OVERHEAD as u32,
                    _ => length,
                };
                maps::count_received(to, inner);
            }
            // Before 6.15 bpf_redirect_peer keeps the packet type, and a packet addressed to the
            // container's MAC is PACKET_OTHERHOST to the host's side, which IP would drop.
            // SAFETY: as above; and redirect_peer only notes the target for after our return.
            unsafe {
                if (*ctx.skb.skb).pkt_type != PACKET_HOST {
                    bpf_skb_change_type(ctx.skb.skb, PACKET_HOST);
                }
                bpf_redirect_peer(to, 0) as i32
            }
        }
        Verdict::Encapsulate(to)
        | Verdict::Slow(_, to)
        | Verdict::Answer(_, to)
        | Verdict::Return(to) => {
            // SAFETY: the helper only notes the target for after our return.
            unsafe { bpf_redirect(to, 0) as i32 }
        }
        Verdict::Egress(to) => {
            // SAFETY: as above.
            unsafe { bpf_redirect(to, u64::from(BPF_F_INGRESS)) as i32 }
        }
        Verdict::Drop(reason) => {
            info!(ctx, "{} on {}: dropped, reason {}", program.name(), ifindex, reason as u8);
            if let Some(now) = maps::may_report(program, reason as u8) {
                maps::report(|event| {
                    let header = Header { now, ifindex, length, program, reason };
                    // SAFETY: the ring buffer gave us the whole event.
                    unsafe { header.store(event, copy_skb(ctx, event)) };
                });
            }
            TC_ACT_SHOT
        }
    }
}

/// Runs an XDP program and carries out its verdict.
#[inline(always)]
pub(crate) fn xdp(ctx: &XdpContext, program: Program, handle: fn(&XdpContext) -> Verdict) -> u32 {
    // The first buffer's length: the whole frame but for jumbo frames in several buffers.
    let length = Frame::xdp(ctx).length();
    let verdict = handle(ctx);
    maps::count(program, verdict.code(), length);
    debug!(ctx, "{}: {} bytes, verdict {}", program.name(), length, verdict.code());
    match verdict {
        Verdict::Deliver(to) | Verdict::Publish(to) => {
            if matches!(verdict, Verdict::Deliver(_)) {
                maps::count_received(to, length - vxlan::OVERHEAD as u32);
            }
            // SAFETY: the helper only notes the target for after our return.
            unsafe { bpf_redirect(to, 0) as u32 }
        }
        Verdict::Drop(reason) => {
            info!(ctx, "{}: dropped, reason {}", program.name(), reason as u8);
            if let Some(now) = maps::may_report(program, reason as u8) {
                maps::report(|event| {
                    let ifindex = ctx.ingress_ifindex() as u32;
                    let header = Header { now, ifindex, length, program, reason };
                    // SAFETY: the ring buffer gave us the whole event.
                    unsafe { header.store(event, copy_frame(&Frame::xdp(ctx), event)) };
                });
            }
            xdp_action::XDP_DROP
        }
        Verdict::Answer(..) => xdp_action::XDP_TX,
        // XDP hands nothing to a device of its own; what it does not deliver or drop goes on to TC.
        Verdict::Pass
        | Verdict::Kernel(_)
        | Verdict::Encapsulate(_)
        | Verdict::Slow(..)
        | Verdict::Return(_)
        | Verdict::Egress(_) => xdp_action::XDP_PASS,
    }
}

/// Everything of an event but the packet.
struct Header {
    now: u64,
    ifindex: u32,
    length: u32,
    program: Program,
    reason: DropReason,
}

impl Header {
    /// # Safety
    /// `event` must be valid for writes.
    #[inline(always)]
    unsafe fn store(&self, event: *mut DropEvent, captured: u16) {
        // SAFETY: the caller's promise.
        unsafe {
            (*event).timestamp_ns = self.now;
            (*event).ifindex = self.ifindex;
            (*event).length = self.length;
            (*event).program = self.program as u8;
            (*event).reason = self.reason as u8;
            (*event).captured = captured;
            (*event).reserved = 0;
        }
    }
}

/// Copies the start of a packet into an event: the longest of a few constant lengths that is
/// there, since verifiers before 5.18 do not take a computed one.
///
/// # Safety
/// `event` must be valid for writes.
#[inline(always)]
unsafe fn copy_skb(ctx: &TcContext, event: *mut DropEvent) -> u16 {
    for length in [EVENT_DATA, 84, 64, 42, 34, 14] {
        // SAFETY: the caller's promise; the helper fails where the packet is shorter.
        let result = unsafe {
            let data = (&raw mut (*event).data).cast();
            bpf_skb_load_bytes(ctx.as_ptr(), 0, data, length as u32)
        };
        if result == 0 {
            return length as u16;
        }
    }
    0
}

/// As [`copy_skb`], for XDP, whose load helper is only in 5.18.
///
/// # Safety
/// `event` must be valid for writes.
#[inline(always)]
unsafe fn copy_frame(frame: &Frame, event: *mut DropEvent) -> u16 {
    macro_rules! copy {
        ($($length:literal),*) => {$(
            if let Some(bytes) = frame.read::<$length>(0) {
                // SAFETY: the caller's promise, and no length is more than EVENT_DATA.
                unsafe { *(&raw mut (*event).data).cast::<[u8; $length]>() = bytes };
                return $length;
            }
        )*};
    }
    copy!(96, 84, 64, 42, 34, 14);
    0
}
