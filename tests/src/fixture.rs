//! One packet, what must become of it, and the tables it meets.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "only tests call this, and a panic has a stack trace where an error has none"
)]

use ovnet_agent::datapath::Tables;
use ovnet_common::{
    abi::{
        Counter, EndpointKey, EndpointValue, HostConfig, HostValue, NetworkValue, PortCounters,
        PortValue, Program, mapped,
    },
    verdict::{Verdict, label},
};

use crate::{
    bpf::{
        Bench, Counters, EXTERNAL, Input, PORT_A1, PORT_A2, PORT_A3, PORT_A4, TunnelKey, UPLINK,
    },
    compare::difference,
    model,
    packet::{
        CONTAINER_A1, CONTAINER_A2, CONTAINER_A3, CONTAINER_A4, CONTAINER_B1, CONTAINER_B4,
        CONTAINER_C1, CONTAINER_D1, CONTAINER_E1, GATEWAY, GATEWAY_RED, HOST_A, HOST_B, HOST_C,
        HOST_D, HOST_E, OUTER, Party, VNI_BLUE, VNI_RED, VXLAN_PORT, fix_ipv4_checksum,
    },
};

/// First outer source port of the tables here; [`SOURCE_PORT_MAX`] is one past the last.
pub const SOURCE_PORT_MIN: u16 = 50_000;
/// See [`SOURCE_PORT_MIN`].
pub const SOURCE_PORT_MAX: u16 = 50_100;

/// A packet in, a verdict and a packet out.
#[derive(Clone, Debug)]
pub struct Fixture {
    /// States the behaviour.
    pub name: String,
    /// The tables.
    pub tables: Tables,
    /// The packet and how it arrives.
    pub input: Input,
    /// What must be decided.
    pub verdict: Verdict,
    /// The frame afterwards. Where the verdict is to encapsulate, the outer identification and
    /// source port are not compared, but checked on their own.
    pub output: Vec<u8>,
}

impl Fixture {
    /// A packet that comes in by `ifindex` and stays as it is.
    pub fn new(
        name: &str,
        program: Program,
        ifindex: u32,
        packet: Vec<u8>,
        verdict: Verdict,
    ) -> Self {
        let output = packet.clone();
        let input =
            Input { program, ifindex, gso_size: 0, tunnel_key: None, vlan: 0, packet, repeat: 1 };
        Self {
            name: format!("{}: {name}", program.name()),
            tables: world(),
            input,
            verdict,
            output,
        }
    }

    /// The same, with another packet afterwards.
    pub fn becomes(self, output: Vec<u8>) -> Self {
        Self { output, ..self }
    }

    /// The same as a GSO packet.
    pub fn gso(mut self, size: u32) -> Self {
        self.input.gso_size = size;
        self
    }

    /// The same with a VLAN tag.
    pub fn vlan(mut self, tag: u16) -> Self {
        self.input.vlan = tag;
        self
    }

    /// The same out of a tunnel.
    pub fn tunnel(mut self, vni: u32, remote: Party, local: Party) -> Self {
        self.input.tunnel_key =
            Some(TunnelKey { vni, remote: remote.address, local: local.address });
        self
    }

    /// The same with other tables.
    pub fn with(mut self, change: impl FnOnce(&mut Tables)) -> Self {
        change(&mut self.tables);
        self
    }

    /// Runs it, and panics with both packets where anything differs: the return code, the bytes,
    /// or which counters moved by how much.
    pub fn check(&self, bench: &mut Bench) {
        let Self { name, tables, input, verdict, output } = self;
        bench.set_tables(tables);
        let before = bench.counters();
        let (code, packet) = bench.run(input);
        let moved = moved(&before, &bench.counters());
        let wanted = movement(input, *verdict, tables);
        assert_eq!(describe(&moved), describe(&wanted), "{name}: counters");
        assert_eq!(code, return_code(input.program, *verdict), "{name}: return code");
        assert_same(name, *verdict, output, &packet);
        let predicted = model::predict(tables, input);
        assert_eq!(predicted.0, *verdict, "{name}: the model of the rules says otherwise");
        assert_same(&format!("{name} (model)"), *verdict, &predicted.1, &packet);
    }
}

/// Runs every fixture; the names of all that fail are in the panic.
pub fn check_all(bench: &mut Bench, fixtures: &[Fixture]) {
    let mut failed = Vec::new();
    for fixture in fixtures {
        let check = std::panic::AssertUnwindSafe(|| fixture.check(bench));
        if std::panic::catch_unwind(check).is_err() {
            failed.push(fixture.name.as_str());
        }
    }
    assert!(failed.is_empty(), "{} of {} failed: {failed:#?}", failed.len(), fixtures.len());
}

/// The tables of HOST_A with everybody in them.
pub fn world() -> Tables {
    let port_be = VXLAN_PORT.to_be();
    let mut tables = Tables {
        config: HostConfig {
            vtep: mapped(HOST_A.address),
            external_ifindex: EXTERNAL,
            vxlan_port_be: port_be,
            source_port_min: SOURCE_PORT_MIN,
            source_port_max: SOURCE_PORT_MAX,
            published: 0,
            gwbridge_ifindex: 0,
            gwbridge_mac: [0; 6],
            uplink_mac: HOST_A.mac,
            uplink_ifindex: UPLINK,
        },
        ..Tables::default()
    };
    for host in [HOST_A, HOST_B, HOST_C, HOST_D, HOST_E] {
        let value = HostValue { vxlan_port_be: port_be, reserved: 0 };
        tables.hosts.insert(mapped(host.address), value);
    }
    for (vni, gateway) in [(VNI_BLUE, GATEWAY), (VNI_RED, GATEWAY_RED)] {
        let value = NetworkValue {
            gateway: mapped(gateway.address),
            gateway_mac: gateway.mac,
            mtu: 1450,
            flags: 0,
        };
        tables.networks.insert(vni, value);
    }
    for (vni, party, host) in [
        (VNI_BLUE, CONTAINER_B1, HOST_B),
        (VNI_RED, CONTAINER_B4, HOST_B),
        (VNI_BLUE, CONTAINER_C1, HOST_C),
        (VNI_BLUE, CONTAINER_D1, HOST_D),
        (VNI_BLUE, CONTAINER_E1, HOST_E),
    ] {
        remote(&mut tables, vni, party, host);
    }
    for (vni, party, ifindex) in [
        (VNI_BLUE, CONTAINER_A1, PORT_A1),
        (VNI_BLUE, CONTAINER_A2, PORT_A2),
        (VNI_BLUE, CONTAINER_A3, PORT_A3),
        (VNI_RED, CONTAINER_A4, PORT_A4),
    ] {
        let key = EndpointKey { vni, address: mapped(party.address) };
        let value = EndpointValue { ifindex, mac: party.mac, ..EndpointValue::default() };
        tables.endpoints.insert(key, value);
        let address = mapped(party.address);
        tables.ports.insert(ifindex, PortValue { vni, address, mac: party.mac, reserved: 0 });
    }
    tables
}

/// Enters an endpoint of another host.
pub fn remote(tables: &mut Tables, vni: u32, party: Party, host: Party) {
    let key = EndpointKey { vni, address: mapped(party.address) };
    let value = EndpointValue {
        vtep: mapped(host.address),
        ifindex: 0,
        mac: party.mac,
        vxlan_port_be: VXLAN_PORT.to_be(),
    };
    tables.endpoints.insert(key, value);
}

/// What the kernel gets for a verdict.
pub fn return_code(program: Program, verdict: Verdict) -> u32 {
    const TC_ACT_UNSPEC: u32 = u32::MAX;
    const TC_ACT_SHOT: u32 = 2;
    const TC_ACT_REDIRECT: u32 = 7;
    const XDP_DROP: u32 = 1;
    const XDP_PASS: u32 = 2;
    const XDP_TX: u32 = 3;
    const XDP_REDIRECT: u32 = 4;
    let (pass, drop, redirect) = match program {
        Program::UplinkXdp => (XDP_PASS, XDP_DROP, XDP_REDIRECT),
        _ => (TC_ACT_UNSPEC, TC_ACT_SHOT, TC_ACT_REDIRECT),
    };
    match verdict {
        Verdict::Pass | Verdict::Kernel(_) => pass,
        Verdict::Drop(_) => drop,
        Verdict::Answer(..) if program == Program::UplinkXdp => XDP_TX,
        _ => redirect,
    }
}

/// The counters a verdict moves.
pub fn movement(input: &Input, verdict: Verdict, tables: &Tables) -> Counters {
    let Input { program, ifindex, packet, .. } = input;
    let bytes = packet.len() as u64;
    let mut counters = Counters::default();
    counters.verdicts.insert((*program, verdict.code()), Counter { packets: 1, bytes });
    let sent = *program == Program::FromContainer && !matches!(verdict, Verdict::Drop(_));
    if sent {
        counters.ports.entry(*ifindex).or_default().tx_packets = 1;
        counters.ports.entry(*ifindex).or_default().tx_bytes = bytes;
    }
    if let Verdict::Deliver(to) = verdict {
        let outer = match program {
            Program::FromUplink | Program::UplinkXdp => OUTER as u64,
            _ => 0,
        };
        counters.ports.entry(to).or_default().rx_packets = 1;
        counters.ports.entry(to).or_default().rx_bytes = bytes - outer;
    }
    counters.ports.retain(|port, _| tables.ports.contains_key(port));
    counters
}

/// The difference between two readings.
pub fn moved(before: &Counters, after: &Counters) -> Counters {
    let mut moved = Counters::default();
    for (key, now) in &after.verdicts {
        let then = before.verdicts.get(key).copied().unwrap_or_default();
        if *now != then {
            let packets = now.packets - then.packets;
            moved.verdicts.insert(*key, Counter { packets, bytes: now.bytes - then.bytes });
        }
    }
    for (port, now) in &after.ports {
        let then = before.ports.get(port).copied().unwrap_or_default();
        if *now != then {
            let difference = PortCounters {
                tx_packets: now.tx_packets - then.tx_packets,
                tx_bytes: now.tx_bytes - then.tx_bytes,
                rx_packets: now.rx_packets - then.rx_packets,
                rx_bytes: now.rx_bytes - then.rx_bytes,
            };
            moved.ports.insert(*port, difference);
        }
    }
    moved
}

/// Counters as lines a reader understands.
pub fn describe(counters: &Counters) -> Vec<String> {
    let verdicts = counters.verdicts.iter().map(|((program, code), counter)| {
        let Counter { packets, bytes } = counter;
        let label = label(*code).unwrap_or("a code nothing uses");
        format!("{} {label}: {packets} packets, {bytes} bytes", program.name())
    });
    let ports = counters.ports.iter().map(|(port, counter)| format!("port {port}: {counter:?}"));
    verdicts.chain(ports).collect()
}

/// Compares frames; see [`Fixture::output`].
pub fn assert_same(name: &str, verdict: Verdict, expected: &[u8], found: &[u8]) {
    let mut expected = expected.to_vec();
    if matches!(verdict, Verdict::Encapsulate(_)) && found.len() >= OUTER + 14 {
        const ID: std::ops::Range<usize> = 18..20;
        const SOURCE_PORT: std::ops::Range<usize> = 34..36;
        expected[ID].copy_from_slice(&found[ID]);
        expected[SOURCE_PORT].copy_from_slice(&found[SOURCE_PORT]);
        fix_ipv4_checksum(&mut expected, 14);
        let port = u16::from_be_bytes([found[34], found[35]]);
        assert!((SOURCE_PORT_MIN..SOURCE_PORT_MAX).contains(&port), "{name}: source port {port}");
    }
    assert!(expected == found, "{name}: {}", difference(name, &expected, found));
}

/// An input by the uplink, as from_uplink and uplink_xdp get it.
pub fn from_wire(program: Program, packet: Vec<u8>) -> Input {
    Input { program, ifindex: UPLINK, gso_size: 0, tunnel_key: None, vlan: 0, packet, repeat: 1 }
}
