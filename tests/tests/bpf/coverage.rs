//! Which test covers which reason. Runs without root: the tables are run by their own tests, and
//! what a table says is what was asserted.

use std::collections::BTreeMap;

use ovnet_common::{
    abi::Program,
    verdict::{Answer, DropReason, KernelReason, SlowReason, Verdict, label},
};

/// What only a test of its own can bring about.
const ELSEWHERE: [(Program, u8, &str); 5] = [
    // A test run's packets have no checksum left to be written.
    (
        Program::FromContainer,
        DropReason::ForgedChecksum as u8,
        "whole_packets_on_the_wire (net_datapath), step hostile: a checksum",
    ),
    (
        Program::FromContainer,
        SlowReason::AlreadyEncapsulated as u8,
        "a_packet_encapsulated_before_goes_to_the_kernel_unmodified",
    ),
    (
        Program::FromUplink,
        KernelReason::PortsClash as u8,
        "a_flow_for_which_there_is_no_port_left_is_the_kernels",
    ),
    (
        Program::FromUplink,
        KernelReason::ConntrackFull as u8,
        "where_no_flow_can_be_remembered_the_kernel_has_it",
    ),
    (
        Program::FromGwbridge,
        Verdict::Egress(0).code(),
        "what_is_for_the_bridge_to_route_is_given_to_it",
    ),
];

/// What no test brings about yet, and what stands in for one.
const UNTRIED: [(Program, u8, &str); 1] = [(
    Program::FromGwbridge,
    DropReason::ForgedChecksum as u8,
    "nothing: it is the function that from_container calls, which is tested",
)];

/// What no test can bring about, and why.
const NEVER: [(DropReason, &str); 1] = [(
    DropReason::TranslateFailed,
    "every byte that is written was read before, within the same bounds, and the one helper that can \
     fail, bpf_l4_csum_replace, does so where the packet ends before the checksum, which was read, or \
     where there is no memory to have the header for itself",
)];

/// What each program can give at all, by reading it: a reason that is not here and shows up, or is
/// here and does not, means that this list or a table is behind the program.
pub(super) fn possible(program: Program) -> Vec<u8> {
    use DropReason::*;
    let drops: &[DropReason] = match program {
        Program::FromContainer => &[
            Truncated,
            UnknownPort,
            SpoofedMac,
            SpoofedAddress,
            EtherType,
            BadIpHeader,
            Multicast,
            NoEndpoint,
            ArpUnanswered,
            ToGateway,
            NotConfigured,
            ForgedChecksum,
        ],
        Program::FromUplink => &[
            Truncated,
            EtherType,
            BadIpHeader,
            Multicast,
            UnknownVtep,
            VxlanFlags,
            UnknownVni,
            ForgedSource,
            NotLocal,
            OuterChecksum,
            EcnInvalid,
            DecapFailed,
            VxlanPort,
            NotAProbe,
        ],
        Program::FromOverlay => &[
            Truncated,
            EtherType,
            BadIpHeader,
            Multicast,
            ArpUnanswered,
            UnknownVtep,
            UnknownVni,
            ForgedSource,
            NotLocal,
            WrongDestination,
            TunnelKey,
        ],
        // bpf_xdp_adjust_head cannot fail here: more than it takes away was read before.
        Program::UplinkXdp => &[
            Truncated,
            EtherType,
            BadIpHeader,
            Multicast,
            UnknownVtep,
            VxlanFlags,
            UnknownVni,
            ForgedSource,
            NotLocal,
            OuterChecksum,
            EcnInvalid,
            VxlanPort,
        ],
        Program::FromGwbridge => &[
            Truncated,
            SpoofedMac,
            SpoofedAddress,
            EtherType,
            HostLoopback,
            VxlanPort,
            ForgedChecksum,
        ],
    };
    let deliver = Verdict::Deliver(0).code();
    let others: Vec<u8> = match program {
        Program::FromContainer => {
            let slow = SlowReason::ALL.iter().map(|it| *it as u8);
            let more =
                [deliver, Verdict::Encapsulate(0).code(), Answer::Arp as u8, Answer::Echo as u8];
            slow.chain(more).collect()
        }
        Program::FromOverlay => vec![deliver, Answer::Arp as u8],
        Program::FromUplink => {
            use KernelReason::*;
            let kernel = [NoFlow, ConntrackFull, Fragment, TimeExceeded, PortsClash, Martian]
                .map(|it| it as u8);
            let more =
                [deliver, Verdict::Pass.code(), Verdict::Publish(0).code(), Answer::Probe as u8];
            kernel.into_iter().chain(more).collect()
        }
        Program::UplinkXdp => {
            vec![deliver, Verdict::Pass.code(), Verdict::Publish(0).code()]
        }
        Program::FromGwbridge => {
            use KernelReason::*;
            let kernel = [Fragment, TimeExceeded, TooLong].map(|it| it as u8);
            let more = [Verdict::Pass.code(), Verdict::Return(0).code(), Verdict::Egress(0).code()];
            kernel.into_iter().chain(more).collect()
        }
    };
    let mut codes: Vec<u8> = drops.iter().map(|it| *it as u8).chain(others).collect();
    codes.sort_unstable();
    codes
}

#[test]
fn every_outcome_of_every_program_is_covered() {
    let mut covered: BTreeMap<(Program, u8), Vec<String>> = BTreeMap::new();
    let tables = [
        super::from_container::fixtures(),
        super::receive::fixtures(),
        super::from_overlay::fixtures(),
    ];
    for fixture in tables.into_iter().flatten() {
        let key = (fixture.input.program, fixture.verdict.code());
        covered.entry(key).or_default().push(fixture.name);
    }
    for (program, reason, test) in ELSEWHERE.into_iter().chain(UNTRIED) {
        covered.entry((program, reason)).or_default().push(test.to_owned());
    }
    for scenario in super::published::scenarios() {
        for step in scenario.steps {
            let key = (step.program, step.verdict.code());
            covered.entry(key).or_default().push(scenario.name.to_owned());
        }
    }
    for ((program, code), tests) in &covered {
        let (label, first) = (label(*code).unwrap_or("?"), &tests[0]);
        println!("{:15} {label:28} {:3} × e.g. {first}", program.name(), tests.len());
    }
    for program in Program::ALL {
        let found: Vec<u8> =
            covered.keys().filter(|it| it.0 == program).map(|(_, code)| *code).collect();
        let names = |codes: &[u8]| codes.iter().map(|it| label(*it)).collect::<Vec<_>>();
        assert_eq!(names(&found), names(&possible(program)), "{}", program.name());
    }
    let any = |code: u8| covered.keys().any(|(_, found)| *found == code);
    for reason in DropReason::ALL {
        let code = *reason as u8;
        let covered = any(code) || NEVER.iter().any(|(never, _)| never == reason);
        assert!(covered, "no test covers the drop reason {}", reason.label());
    }
    for reason in KernelReason::ALL {
        assert!(any(*reason as u8), "no test covers the kernel reason {}", reason.label());
    }
    for reason in SlowReason::ALL {
        assert!(any(*reason as u8), "no test covers the slow reason {}", reason.label());
    }
}

/// A failure names its fixture, so no two may have one name.
#[test]
fn names_are_unique() {
    let mut names: Vec<String> = [
        super::from_container::fixtures(),
        super::receive::fixtures(),
        super::from_overlay::fixtures(),
    ]
    .into_iter()
    .flatten()
    .map(|fixture| fixture.name)
    .collect();
    names.sort_unstable();
    for pair in names.windows(2) {
        assert_ne!(pair[0], pair[1]);
    }
}
