//! The TC and XDP programs of ovnet: entry points only, one line each.
//!
//! A packet's way: `from_container.rs` → the wire → `from_uplink.rs` (or `uplink_xdp.rs`, or, by
//! the kernel's vxlan device, `from_overlay.rs`) → the container. A published port's: the wire →
//! `published.rs` → the container → `from_gwbridge.rs` → the wire. `parse.rs` is the only place that
//! touches packet memory, `maps.rs` the only one that touches a map, `finish.rs` the only one that
//! returns an action.
#![cfg_attr(target_arch = "bpf", no_std, no_main)]
#![allow(
    clippy::cast_possible_truncation,
    reason = "packet pointers are 32-bit context fields and lengths are bounded by the packet; a \
              checked conversion would be a branch the verifier walks for nothing"
)]

#[cfg(target_arch = "bpf")]
mod arp;
#[cfg(target_arch = "bpf")]
mod conntrack;
#[cfg(target_arch = "bpf")]
mod encapsulate;
#[cfg(target_arch = "bpf")]
mod finish;
#[cfg(target_arch = "bpf")]
mod fragments;
#[cfg(target_arch = "bpf")]
mod from_container;
#[cfg(target_arch = "bpf")]
mod from_gwbridge;
#[cfg(target_arch = "bpf")]
mod from_overlay;
#[cfg(target_arch = "bpf")]
mod from_uplink;
#[cfg(target_arch = "bpf")]
mod gateway;
#[cfg(target_arch = "bpf")]
mod icmp_error;
#[cfg(target_arch = "bpf")]
mod maps;
#[cfg(target_arch = "bpf")]
mod martian;
#[cfg(target_arch = "bpf")]
mod parse;
#[cfg(target_arch = "bpf")]
mod partial;
#[cfg(target_arch = "bpf")]
mod probe;
#[cfg(target_arch = "bpf")]
mod published;
#[cfg(target_arch = "bpf")]
mod translate;
#[cfg(target_arch = "bpf")]
mod trust;
#[cfg(target_arch = "bpf")]
mod uplink_xdp;

#[cfg(target_arch = "bpf")]
mod entry {
    use aya_ebpf::{
        macros::{classifier, xdp},
        programs::{TcContext, XdpContext},
    };
    use ovnet_common::abi::Program;

    use crate::{finish, from_container, from_gwbridge, from_overlay, from_uplink, uplink_xdp};

    /// TC ingress of a host-side veth.
    #[classifier]
    pub(crate) fn from_container(ctx: TcContext) -> i32 {
        finish::tc(&ctx, Program::FromContainer, from_container::handle)
    }

    /// TC ingress of the uplink.
    #[classifier]
    pub(crate) fn from_uplink(ctx: TcContext) -> i32 {
        finish::tc(&ctx, Program::FromUplink, from_uplink::handle)
    }

    /// TC ingress of `ovnet-vx`.
    #[classifier]
    pub(crate) fn from_overlay(ctx: TcContext) -> i32 {
        finish::tc(&ctx, Program::FromOverlay, from_overlay::handle)
    }

    /// TC ingress of a gwbridge's port.
    #[classifier]
    pub(crate) fn from_gwbridge(ctx: TcContext) -> i32 {
        finish::tc(&ctx, Program::FromGwbridge, from_gwbridge::handle)
    }

    /// XDP on the uplink. `frags`: jumbo frames come in several buffers, the headers always in the
    /// first.
    #[xdp(frags)]
    pub(crate) fn uplink_xdp(ctx: XdpContext) -> u32 {
        finish::xdp(&ctx, Program::UplinkXdp, uplink_xdp::handle)
    }

    #[panic_handler]
    fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
        loop {}
    }

    /// The kernel refuses GPL-only helpers to a program without this section.
    #[unsafe(link_section = "license")]
    #[unsafe(no_mangle)]
    static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
}

#[cfg(not(target_arch = "bpf"))]
fn main() {}
