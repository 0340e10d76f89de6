//! What can happen to a packet, each with a number that is its counter and never reused.
//!
//! | codes | meaning |
//! |---|---|
//! | 0–15 | handled: passed, delivered, encapsulated, answered, translated |
//! | 16–23 | [`SlowReason`]: handed, unmodified, to the kernel's own vxlan device |
//! | 24–31 | [`KernelReason`]: of a published port, left, unmodified, to the kernel's NAT |
//! | 32–127 | [`DropReason`]: dropped |

/// The outcome of one program for one packet. Only `finish` in the programs turns it into a kernel
/// action.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Not ours: the kernel goes on with it.
    Pass,
    /// Delivered into the sandbox behind this host-side ifindex.
    Deliver(u32),
    /// Encapsulated; leaves by this ifindex.
    Encapsulate(u32),
    /// Handed to the `external` vxlan device, this ifindex, for the reason given.
    Slow(SlowReason, u32),
    /// Turned into an answer that leaves the way it came, by this ifindex.
    Answer(Answer, u32),
    /// Translated to a published port's container, behind this port of its gwbridge.
    Publish(u32),
    /// Translated back to the address and port the client knows; leaves by this ifindex.
    Return(u32),
    /// Given to the gwbridge itself, this ifindex, for the host to route.
    Egress(u32),
    /// Of a published port, but left to the kernel's own NAT for the reason given.
    Kernel(KernelReason),
    /// Dropped.
    Drop(DropReason),
}

impl Verdict {
    /// The number this outcome is counted under.
    #[inline(always)]
    pub const fn code(self) -> u8 {
        match self {
            Self::Pass => 0,
            Self::Deliver(_) => 1,
            Self::Encapsulate(_) => 2,
            Self::Answer(answer, _) => answer as u8,
            Self::Publish(_) => 5,
            Self::Return(_) => 6,
            Self::Egress(_) => 7,
            Self::Kernel(reason) => reason as u8,
            Self::Slow(reason, _) => reason as u8,
            Self::Drop(reason) => reason as u8,
        }
    }
}

macro_rules! numbered {
    ($(#[$meta:meta])* $name:ident { $($(#[$doc:meta])* $variant:ident = $code:literal, $label:literal;)* }) => {
        $(#[$meta])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
        #[repr(u8)]
        pub enum $name { $($(#[$doc])* $variant = $code,)* }

        impl $name {
            /// Every value, in number order.
            pub const ALL: &'static [Self] = &[$(Self::$variant,)*];

            /// The name counters, events and metrics show.
            pub const fn label(self) -> &'static str {
                match self { $(Self::$variant => $label,)* }
            }
        }
    };
}

numbered! {
    /// What was answered in place.
    Answer {
        /// An ARP request for an endpoint or the gateway.
        Arp = 3, "answer-arp";
        /// An ICMP echo request to the gateway.
        Echo = 4, "answer-echo";
        /// A peer's probe of the path between the two hosts.
        Probe = 8, "answer-probe";
    }
}

numbered! {
    /// Why the fast path left a packet to the kernel's vxlan device (invariant 3).
    SlowReason {
        /// An inner IPv4 fragment: its ports, and so its flow, are not known.
        Fragment = 16, "slow-fragment";
        /// An inner IPv4 header with options.
        IpOptions = 17, "slow-ip-options";
        /// `bpf_skb_adjust_room` refused with -EALREADY: the packet was decapsulated before and
        /// the container forwards it.
        AlreadyEncapsulated = 18, "slow-already-encapsulated";
        /// `bpf_skb_adjust_room` refused for another reason (no memory, a GSO type it cannot carry).
        NoRoom = 19, "slow-no-room";
        /// The FIB has the route but not the neighbour yet; the kernel resolves it.
        NoNeighbour = 20, "slow-no-neighbour";
        /// A segment does not fit the route's MTU; the kernel fragments the outer packet.
        FragmentationNeeded = 21, "slow-fragmentation-needed";
        /// Any other answer of `bpf_fib_lookup`: no route, unreachable, forwarding off, lwtunnel.
        Fib = 22, "slow-fib";
        /// The headers are not in the linear part and could not be pulled there.
        NotLinear = 23, "slow-not-linear";
    }
}

numbered! {
    /// Why a packet of a published port was left to the kernel's NAT (invariant 3): nftables, or
    /// Docker's rules.
    KernelReason {
        /// Neither begins a flow nor belongs to one that is known: begun before the agent, by the
        /// kernel, or forgotten. The kernel's connection tracking takes it up in the middle.
        NoFlow = 24, "kernel-no-flow";
        /// `CONNTRACK` took no entry: no memory, or contention in two attempts.
        ConntrackFull = 25, "kernel-conntrack-full";
        /// A fragment that came before the first one, or the rest of such a datagram.
        Fragment = 26, "kernel-fragment";
        /// Longer than what it would leave by takes; the kernel fragments it or says so.
        TooLong = 27, "kernel-too-long";
        /// Its time to live ends here; the kernel says so to the sender (RFC 792).
        TimeExceeded = 28, "kernel-time-exceeded";
        /// Its flow would look like another one inside, and no free source port was found.
        PortsClash = 29, "kernel-ports-clash";
        /// From an address of this very host, or of a loopback: forged, and the kernel, which would
        /// have dropped it as a martian source, still does (RFC 1812 §5.3.7).
        Martian = 30, "kernel-martian";
    }
}

numbered! {
    /// Why a packet was dropped. The comment says what the operator should look at.
    DropReason {
        /// The packet ends inside a header: a broken or hostile sender.
        Truncated = 32, "truncated";
        /// The host-side veth belongs to no endpoint: an agent that died in an attach, repaired on
        /// its next start.
        UnknownPort = 33, "unknown-port";
        /// A container sent from a MAC that is not its endpoint's: spoofing, or a bridge inside.
        SpoofedMac = 34, "spoofed-mac";
        /// A container sent from an address that is not its endpoint's: spoofing, or routing inside.
        SpoofedAddress = 35, "spoofed-address";
        /// Neither IPv4 nor ARP, or with a VLAN tag. IPv6 inside networks is not there yet.
        EtherType = 36, "ethertype";
        /// Not IPv4 after an IPv4 ethertype, or a header length under 20 bytes.
        BadIpHeader = 37, "bad-ip-header";
        /// Broadcast or multicast: networks carry unicast.
        Multicast = 38, "multicast";
        /// No endpoint of the network has the destination address: nobody is there, or Consul has
        /// not told us yet.
        NoEndpoint = 39, "no-endpoint";
        /// An ARP request for an address nobody has, or an ARP packet that is no request.
        ArpUnanswered = 40, "arp-unanswered";
        /// For the gateway address, and not an echo request: the gateway is no host.
        ToGateway = 41, "to-gateway";
        /// No `CONFIG` yet, no VTEP address, or no external device: the agent never finished.
        NotConfigured = 42, "not-configured";
        /// VXLAN from an address that is no known VTEP: an intruder, or a host whose record is gone.
        UnknownVtep = 48, "unknown-vtep";
        /// VXLAN flags or reserved bits other than RFC 7348's: another protocol on the port.
        VxlanFlags = 49, "vxlan-flags";
        /// A VNI no endpoint of this host is in.
        UnknownVni = 50, "unknown-vni";
        /// The inner source is not an endpoint of the VTEP that sent it: forged, or just moved.
        ForgedSource = 51, "forged-source";
        /// The inner destination is not an endpoint of this host.
        NotLocal = 52, "not-local";
        /// The outer IPv4 header checksum is wrong: a broken wire.
        OuterChecksum = 53, "outer-checksum";
        /// CE on the outside of a Not-ECT packet, which RFC 6040 §4.2 says to drop.
        EcnInvalid = 54, "ecn-invalid";
        /// `bpf_skb_adjust_room` or `bpf_xdp_adjust_head` failed on decapsulation.
        DecapFailed = 55, "decap-failed";
        /// The outer destination the kernel's vxlan device saw is not our VTEP address.
        WrongDestination = 56, "wrong-destination";
        /// The tunnel key of a packet from `ovnet-vx` could not be read or set.
        TunnelKey = 57, "tunnel-key";
        /// A packet of a published port could not be rewritten to its end: no memory.
        TranslateFailed = 58, "translate-failed";
        /// A sandbox sent to 127.0.0.0/8 by its way out: the host's own loopback is not its.
        HostLoopback = 59, "host-loopback";
        /// UDP between a sandbox's way out or published port and the port of VXLAN: it would leave in
        /// this host's name, and the other side would take it for VXLAN of this host.
        VxlanPort = 60, "vxlan-port";
        /// VXLAN with the VNI of probes that is no question of the host that sent it: forged, or an
        /// answer that did not go to the port of who asked.
        NotAProbe = 61, "not-a-probe";
        /// A sandbox left a checksum to be written over a header that was checked: forging, by a
        /// packet socket.
        ForgedChecksum = 62, "forged-checksum";
    }
}

impl KernelReason {
    /// The reason with this code.
    #[inline(always)]
    pub const fn from_code(code: u8) -> Option<Self> {
        match code {
            24 => Some(Self::NoFlow),
            25 => Some(Self::ConntrackFull),
            26 => Some(Self::Fragment),
            27 => Some(Self::TooLong),
            28 => Some(Self::TimeExceeded),
            29 => Some(Self::PortsClash),
            30 => Some(Self::Martian),
            _ => None,
        }
    }
}

impl DropReason {
    /// The reason with this code, as a [`crate::abi::DropEvent`] holds it.
    pub fn from_code(code: u8) -> Option<Self> {
        Self::ALL.iter().copied().find(|reason| *reason as u8 == code)
    }
}

/// The label of any code of [`Verdict::code`], `None` for a number nothing uses.
pub fn label(code: u8) -> Option<&'static str> {
    match code {
        0 => Some("pass"),
        1 => Some("deliver"),
        2 => Some("encapsulate"),
        5 => Some("publish"),
        6 => Some("return"),
        7 => Some("egress"),
        _ => {
            let answers = Answer::ALL.iter().map(|it| (*it as u8, it.label()));
            let slow = SlowReason::ALL.iter().map(|it| (*it as u8, it.label()));
            let kernel = KernelReason::ALL.iter().map(|it| (*it as u8, it.label()));
            let drops = DropReason::ALL.iter().map(|it| (*it as u8, it.label()));
            answers
                .chain(slow)
                .chain(kernel)
                .chain(drops)
                .find(|(number, _)| *number == code)
                .map(|it| it.1)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_stay_in_their_ranges() {
        assert!(Answer::ALL.iter().all(|it| (3..16).contains(&(*it as u8))));
        assert!(SlowReason::ALL.iter().all(|it| (16..24).contains(&(*it as u8))));
        assert!(KernelReason::ALL.iter().all(|it| (24..32).contains(&(*it as u8))));
        assert!(DropReason::ALL.iter().all(|it| (32..128).contains(&(*it as u8))));
    }

    #[test]
    fn every_verdict_has_a_label() {
        for reason in DropReason::ALL {
            assert_eq!(label(Verdict::Drop(*reason).code()), Some(reason.label()));
            assert_eq!(DropReason::from_code(*reason as u8), Some(*reason));
        }
        for reason in SlowReason::ALL {
            assert_eq!(label(Verdict::Slow(*reason, 7).code()), Some(reason.label()));
        }
        for reason in KernelReason::ALL {
            assert_eq!(label(Verdict::Kernel(*reason).code()), Some(reason.label()));
            assert_eq!(KernelReason::from_code(*reason as u8), Some(*reason));
        }
        assert_eq!(label(Verdict::Pass.code()), Some("pass"));
        assert_eq!(label(Verdict::Publish(7).code()), Some("publish"));
        assert_eq!(label(Verdict::Return(7).code()), Some("return"));
        assert_eq!(label(127), None);
    }
}
