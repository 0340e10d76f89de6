//! Every map, and the only lookups.
//!
//! The agent is the writer of all tables and the programs of all counters; the agent's side is
//! `ovnet-agent/src/datapath/maps.rs`, the layouts are `ovnet_common::abi`.

use aya_ebpf::{
    bindings::{BPF_ANY, BPF_NOEXIST, bpf_fib_lookup as FibLookup},
    btf_maps::{Array, HashMap, LruHashMap, PerCpuArray, PerCpuHashMap, RingBuf},
    helpers::generated::bpf_ktime_get_coarse_ns,
    macros::btf_map,
};
use ovnet_common::abi::{
    Address, Counter, DropEvent, EVENT_INTERVAL_NS, EVENTS_BYTES, EndpointKey, EndpointValue,
    HostConfig, HostValue, MAX_COUNTERS, MAX_ENDPOINTS, MAX_HOSTS, MAX_NETWORKS, MAX_PORTS, Mac,
    NetworkValue, PortCounters, PortValue, Program, counter_index, mapped,
};
use ovnet_common::published::{
    DEFAULT_CONNTRACK, FlowKey, FlowValue, FragmentKey, FragmentValue, MAX_FRAGMENTS,
    MAX_PUBLISHED, PublishedKey, PublishedValue,
};

use crate::translate::Rewrite;

/// Key: 0. Value: what the programs know about their own host. Writer: agent. Size: one, because
/// there is one host. Full: cannot be.
#[btf_map]
static CONFIG: Array<HostConfig, 1> = Array::new();

/// Key: a VTEP address, IPv4-mapped, network byte order. Value: its VXLAN port. Writer: agent.
/// Reader: `trust.rs`. Full: the agent reports it; packets from hosts without an entry are dropped
/// as `unknown-vtep`.
#[btf_map]
static HOSTS: HashMap<Address, HostValue, { MAX_HOSTS as usize }> = HashMap::new();

/// Key: VNI, host byte order. Value: gateway and MTU. Writer: agent. Reader: `arp.rs`,
/// `gateway.rs`, `trust.rs`. Full: the agent reports it and the attach that needed it fails.
#[btf_map]
static NETWORKS: HashMap<u32, NetworkValue, { MAX_NETWORKS as usize }> = HashMap::new();

/// Key: VNI and address. Value: where the endpoint is. Writer: agent. Reader: every program.
/// Size: 128 Ki, about 10 MB, preallocated so that an insert never fails for memory in the middle
/// of an incident. Full: the agent reports it; packets to endpoints without an entry are dropped
/// as `no-endpoint`.
#[btf_map]
static ENDPOINTS: HashMap<EndpointKey, EndpointValue, { MAX_ENDPOINTS as usize }> = HashMap::new();

/// Key: ifindex of a host-side veth, in a network or on our gwbridge. Value: who is behind it.
/// Writer: agent. Reader: `from_container.rs`, `from_gwbridge.rs`. Full: the attach that needed an
/// entry fails.
#[btf_map]
static PORTS: HashMap<u32, PortValue, { MAX_PORTS as usize }> = HashMap::new();

/// Key: ifindex of a host-side veth. Value: traffic of its endpoint, per CPU. Writer: programs;
/// the agent makes and removes the entry. Full: as `PORTS`.
#[btf_map]
static PORT_COUNTERS: PerCpuHashMap<u32, PortCounters, { MAX_PORTS as usize }> =
    PerCpuHashMap::new();

/// Key: `abi::counter_index`. Value: packets and bytes, per CPU. Writer: `finish.rs`. Size: every
/// program times every verdict. Full: cannot be.
#[btf_map]
static COUNTERS: PerCpuArray<Counter, { MAX_COUNTERS as usize }> = PerCpuArray::new();

/// Sampled drops. Writer: `finish.rs`. Reader: agent. Full: the event is lost, its counter is not.
#[btf_map]
static EVENTS: RingBuf<DropEvent, { EVENTS_BYTES as usize }> = RingBuf::new();

/// Key: `abi::counter_index`. Value: when the last event of this kind was written, ns since boot,
/// per CPU. Writer and reader: `may_report`.
#[btf_map]
static EVENT_TIMES: PerCpuArray<u64, { MAX_COUNTERS as usize }> = PerCpuArray::new();

/// Key: an address of this host, port and protocol. Value: the container behind. Writer: agent.
/// Reader: `published.rs`. Full: the agent reports it; the port works through the kernel's NAT.
#[btf_map]
static PUBLISHED: HashMap<PublishedKey, PublishedValue, { MAX_PUBLISHED as usize }> =
    HashMap::new();

/// Key: a packet's addresses and ports as it arrives. Value: what becomes of it. Writer and reader:
/// `conntrack.rs`; the agent removes what is over. Size: by the machine's memory, or
/// `--conntrack-max`. Full: the least recently used entries make room, and what is left of their
/// flows goes through the kernel's NAT.
#[btf_map]
static CONNTRACK: LruHashMap<FlowKey, FlowValue, { DEFAULT_CONNTRACK as usize }> =
    LruHashMap::new();

/// Key: what a datagram's fragments share. Value: what becomes of them. Writer and reader:
/// `fragments.rs`. Full: the oldest make room, and the rest of their datagrams is lost.
#[btf_map]
static FRAGMENTS: LruHashMap<FragmentKey, FragmentValue, { MAX_FRAGMENTS as usize }> =
    LruHashMap::new();

/// Keys and values under construction.
#[repr(C)]
pub(crate) struct Scratch {
    pub(crate) key: FlowKey,
    pub(crate) back_key: FlowKey,
    pub(crate) other: FlowKey,
    pub(crate) published: PublishedKey,
    /// What to make of the packet.
    pub(crate) rewrite: Rewrite,
    /// The packet's source MAC.
    pub(crate) source_mac: Mac,
    /// The packet's destination MAC.
    pub(crate) destination_mac: Mac,
    pub(crate) flow: FlowValue,
    pub(crate) fib: FibLookup,
    pub(crate) fragment_key: FragmentKey,
    pub(crate) fragment: FragmentValue,
}

/// Key: 0. Value: room for what would not fit the stack, per CPU. Writer and reader: whoever decides
/// about a published port's packet, within one run. Not pinned: nothing lasts. Full: cannot be.
#[btf_map]
static SCRATCH: PerCpuArray<Scratch, 1> = PerCpuArray::new();

/// Room for keys and values, with whatever the last packet left in it.
#[inline(always)]
pub(crate) fn scratch() -> Option<&'static mut Scratch> {
    // SAFETY: the slot is this CPU's own; programs at TC ingress and XDP run in softirq, one after
    // the other, and each asks once per packet.
    unsafe { SCRATCH.get_ptr_mut(0)?.as_mut() }
}

/// A key on the stack that the compiler may write eight bytes at a time. The verifier wants such
/// writes aligned there, and the compiler, which may misalign them for the sake of packets, would not
/// care.
#[repr(C, align(8))]
struct Aligned<T>(T);

/// A key of `ENDPOINTS` with its address on such a boundary.
#[repr(C, align(8))]
struct AlignedEndpointKey {
    before: u32,
    key: EndpointKey,
}

/// What the agent told us of our own host.
#[inline(always)]
pub(crate) fn config() -> Option<&'static HostConfig> {
    CONFIG.get(0)
}

/// Whether the address is a known VTEP.
#[inline(always)]
pub(crate) fn is_host(vtep: [u8; 4]) -> bool {
    // By reference: the map's own copy would be where the compiler likes.
    let key: &Address = &Aligned(mapped(vtep)).0;
    HOSTS.get_ptr(key).is_some()
}

/// The network with this VNI.
#[inline(always)]
pub(crate) fn network(vni: u32) -> Option<NetworkValue> {
    // SAFETY: the agent may replace the entry under us, and a preallocated map gives its memory to
    // the next one entered, so what is read can be a mix, or another key's. It is copied at once:
    // for one packet it may be wrong, but it does not change in the middle of it.
    unsafe { NETWORKS.get(vni) }.copied()
}

/// The endpoint with this address in this network.
#[inline(always)]
pub(crate) fn endpoint(vni: u32, address: [u8; 4]) -> Option<EndpointValue> {
    let key = EndpointKey { vni, address: mapped(address) };
    let key: &EndpointKey = &AlignedEndpointKey { before: 0, key }.key;
    // SAFETY: as in `network`.
    unsafe { ENDPOINTS.get(key) }.copied()
}

/// The endpoint behind a host-side veth.
#[inline(always)]
pub(crate) fn port(ifindex: u32) -> Option<PortValue> {
    // SAFETY: as in `network`.
    unsafe { PORTS.get(ifindex) }.copied()
}

/// What a port of this host leads to.
#[inline(always)]
pub(crate) fn published(key: &PublishedKey) -> Option<&'static PublishedValue> {
    // SAFETY: as in `network`, but not copied, for want of stack: each field is read once.
    unsafe { PUBLISHED.get(key) }
}

/// The entry of a flow's direction. Other processors may write it at the same time: each field
/// stands for itself.
#[inline(always)]
pub(crate) fn flow(key: &FlowKey) -> Option<*mut FlowValue> {
    CONNTRACK.get_ptr_mut(key)
}

/// Enters a flow's direction where there is none under this key. `Err(-EEXIST)` where there is.
#[inline(always)]
pub(crate) fn add_flow(key: &FlowKey, value: &FlowValue) -> Result<(), i32> {
    CONNTRACK.insert(key, value, u64::from(BPF_NOEXIST))
}

/// Enters a flow's direction, replacing what is there.
#[inline(always)]
pub(crate) fn set_flow(key: &FlowKey, value: &FlowValue) -> Result<(), i32> {
    CONNTRACK.insert(key, value, u64::from(BPF_ANY))
}

/// Removes a flow's direction.
#[inline(always)]
pub(crate) fn remove_flow(key: &FlowKey) {
    // One that is gone is as good.
    let _ = CONNTRACK.remove(key);
}

/// What becomes of a datagram's fragments.
#[inline(always)]
pub(crate) fn fragment(key: &FragmentKey) -> Option<&'static FragmentValue> {
    // SAFETY: as in `published`.
    unsafe { FRAGMENTS.get(key) }
}

/// Decides what becomes of a datagram's fragments.
#[inline(always)]
pub(crate) fn set_fragment(key: &FragmentKey, value: &FragmentValue) -> Result<(), i32> {
    FRAGMENTS.insert(key, value, u64::from(BPF_ANY))
}

/// Counts a verdict.
#[inline(always)]
pub(crate) fn count(program: Program, code: u8, bytes: u32) {
    if let Some(counter) = COUNTERS.get_ptr_mut(counter_index(program, code)) {
        // SAFETY: the slot is this CPU's own, and a program is not interrupted by another one of
        // the same context; an XDP and a TC program never share an index.
        unsafe {
            (*counter).packets += 1;
            (*counter).bytes += u64::from(bytes);
        }
    }
}

/// Counts a packet the endpoint behind this veth sent.
#[inline(always)]
pub(crate) fn count_sent(ifindex: u32, bytes: u32) {
    if let Some(counters) = PORT_COUNTERS.get_ptr_mut(ifindex) {
        // SAFETY: as in `count`.
        unsafe {
            (*counters).tx_packets += 1;
            (*counters).tx_bytes += u64::from(bytes);
        }
    }
}

/// Counts a packet delivered to the endpoint behind this veth.
#[inline(always)]
pub(crate) fn count_received(ifindex: u32, bytes: u32) {
    if let Some(counters) = PORT_COUNTERS.get_ptr_mut(ifindex) {
        // SAFETY: as in `count`.
        unsafe {
            (*counters).rx_packets += 1;
            (*counters).rx_bytes += u64::from(bytes);
        }
    }
}

/// The time, where an event of this kind is due; `None` where the last one is too recent. A flood
/// of drops so costs a look at the clock of the last tick per packet, and no copy.
#[inline(always)]
pub(crate) fn may_report(program: Program, code: u8) -> Option<u64> {
    let last = EVENT_TIMES.get_ptr_mut(counter_index(program, code))?;
    // SAFETY: a helper without arguments.
    let now = unsafe { bpf_ktime_get_coarse_ns() };
    // SAFETY: the slot is this CPU's own, as in `count`.
    unsafe {
        if *last != 0 && now - *last < EVENT_INTERVAL_NS {
            return None;
        }
        *last = now;
    }
    Some(now)
}

/// Hands `fill` an event to complete; nothing where the ring is full.
#[inline(always)]
pub(crate) fn report(fill: impl FnOnce(*mut DropEvent)) {
    if let Some(mut entry) = EVENTS.reserve(0) {
        fill(entry.as_mut_ptr());
        entry.submit(0);
    }
}
