//! Who cannot be a client: this host itself, and whoever is behind another of its interfaces.
//!
//! What comes by the uplink in such a name is forged, and a container, or whatever trusts the host
//! there, would believe it.

use core::ffi::c_void;

use aya_ebpf::{
    bindings::{
        BPF_FIB_LKUP_RET_FRAG_NEEDED, BPF_FIB_LKUP_RET_FWD_DISABLED, BPF_FIB_LKUP_RET_NO_NEIGH,
        BPF_FIB_LKUP_RET_SUCCESS, bpf_fib_lookup as FibLookup,
    },
    helpers::generated::bpf_fib_lookup,
};
use ovnet_common::abi::unmapped;

use crate::maps::{self, Scratch};

/// Whether the sender of the packet whose key is in `scratch` is none the uplink leads to, as strict
/// reverse path filtering asks (RFC 3704 §2.2). The kernel then decides by its own `rp_filter`, which
/// may be loose where routes are asymmetric.
#[inline(always)]
pub(crate) fn is_martian(ctx: *mut c_void, scratch: &mut Scratch) -> bool {
    const AF_INET: u8 = 2;
    const SUCCESS: i64 = BPF_FIB_LKUP_RET_SUCCESS as i64;
    const NO_NEIGHBOUR: i64 = BPF_FIB_LKUP_RET_NO_NEIGH as i64;
    const TOO_LONG: i64 = BPF_FIB_LKUP_RET_FRAG_NEEDED as i64;
    const NOT_FORWARDING: i64 = BPF_FIB_LKUP_RET_FWD_DISABLED as i64;
    let Some(config) = maps::config() else { return true };
    let Scratch { key, fib, .. } = scratch;
    // The FIB of a host with a default route leads these out like anybody.
    if matches!(key.source[12], 0 | 127 | 224..) {
        return true;
    }
    // SAFETY: integers only, for which zeroes are a value.
    *fib = unsafe { core::mem::zeroed() };
    fib.family = AF_INET;
    fib.l4_protocol = key.protocol;
    fib.sport = key.destination_port_be;
    fib.dport = key.source_port_be;
    fib.ifindex = config.uplink_ifindex;
    fib.__bindgen_anon_3.ipv4_src = u32::from_ne_bytes(unmapped(&key.destination));
    fib.__bindgen_anon_4.ipv4_dst = u32::from_ne_bytes(unmapped(&key.source));
    // SAFETY: the context is the program's own, and the structure as large as we say.
    let answer = unsafe { bpf_fib_lookup(ctx, &raw mut *fib, size_of::<FibLookup>() as i32, 0) };
    match answer {
        SUCCESS | NO_NEIGHBOUR | TOO_LONG => fib.ifindex != config.uplink_ifindex,
        // Somebody turned forwarding off and the kernel would not look. The addresses that a port
        // is published on are at least known.
        NOT_FORWARDING => {
            scratch.published.address = scratch.key.source;
            maps::published(&scratch.published).is_some()
        }
        // Local, broadcast, or nowhere.
        _ => true,
    }
}
