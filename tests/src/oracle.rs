//! What must never happen to a packet, whatever the rules in detail: told from the packet, the tables
//! and what came out alone, without the model's reasoning.
//!
//! Nothing is delivered to an endpoint of another network, nor from a VTEP that does not own the inner
//! source; nothing leaves under a source that is not the sandbox's; a published port leads to what the
//! table says and its answers come from there; and what is passed, left or dropped is unchanged.

use ovnet_agent::datapath::Tables;
use ovnet_common::{
    abi::{Address as Mapped, EndpointKey, EndpointValue, Program, mapped},
    published::PublishedKey,
    verdict::Verdict,
    vxlan::PROBE_VNI,
};

use crate::{
    bpf::{Input, UPLINK},
    fixture::return_code,
    packet::{Address, ICMP, OUTER, TCP, UDP},
};

/// Ingress of the interface (`BPF_F_INGRESS`).
const INGRESS: u64 = 1;

/// The helper that sends a packet elsewhere.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Helper {
    /// `bpf_redirect` of a TC program: out of the interface, or in by it.
    Redirect,
    /// `bpf_redirect_peer`: into the sandbox behind the interface.
    Peer,
    /// `bpf_redirect` of an XDP program.
    Xdp,
}

/// Where a packet is sent. A test run does not carry that out, and its return code says no more than
/// that there is one; of sandboxes the counters say which, see [`redirection`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Redirection {
    /// The helper.
    pub helper: Helper,
    /// The interface it is given.
    pub ifindex: u32,
    /// The flags it is given.
    pub flags: u64,
}

/// What a program asks of the kernel for a verdict: `finish.rs`, said again.
pub fn redirection(program: Program, verdict: Verdict) -> Option<Redirection> {
    let (helper, ifindex, flags) = match verdict {
        Verdict::Deliver(to) | Verdict::Publish(to) => (Helper::Peer, to, 0),
        Verdict::Encapsulate(to)
        | Verdict::Slow(_, to)
        | Verdict::Answer(_, to)
        | Verdict::Return(to) => (Helper::Redirect, to, 0),
        Verdict::Egress(to) => (Helper::Redirect, to, INGRESS),
        Verdict::Pass | Verdict::Kernel(_) | Verdict::Drop(_) => return None,
    };
    let helper = if program == Program::UplinkXdp { Helper::Xdp } else { helper };
    Some(Redirection { helper, ifindex, flags })
}

/// What a program did.
#[derive(Clone, Copy, Debug)]
pub struct Outcome<'a> {
    /// The kernel's return code.
    pub code: u32,
    /// The frame afterwards.
    pub frame: &'a [u8],
    /// Where it was redirected to.
    pub to: Option<Redirection>,
}

/// Says what is wrong with what a program did, or nothing.
pub fn judge(tables: &Tables, input: &Input, outcome: &Outcome<'_>) -> Result<(), String> {
    let (packet, frame) = (&input.packet[..], outcome.frame);
    let Some(to) = outcome.to else {
        let redirected = return_code(input.program, Verdict::Return(0));
        ensure(outcome.code != redirected, "a redirection to nowhere")?;
        ensure(frame == packet, "changed, and yet not sent anywhere")?;
        let passed = outcome.code == return_code(input.program, Verdict::Pass);
        let trusted = match input.program {
            Program::FromContainer | Program::FromOverlay => !passed,
            Program::FromGwbridge => !passed || speaks_for_itself(tables, input),
            Program::FromUplink | Program::UplinkXdp => true,
        };
        return ensure(trusted, "passed, which must not be");
    };
    ensure(outcome.code == return_code(input.program, Verdict::Return(0)), "not redirected")?;
    match input.program {
        Program::FromContainer => from_container(tables, input, frame, to),
        Program::FromUplink | Program::UplinkXdp | Program::FromOverlay => {
            inwards(tables, input, frame, to)
        }
        Program::FromGwbridge => from_gwbridge(tables, input, frame, to),
    }
}

fn from_container(
    tables: &Tables,
    input: &Input,
    frame: &[u8],
    to: Redirection,
) -> Result<(), String> {
    let packet = &input.packet[..];
    let port = tables.ports.get(&input.ifindex).ok_or("sent by nobody")?;
    ensure(input.vlan == 0, "a tag left")?;
    ensure(packet.get(6..12) == Some(&port.mac[..]), "another MAC left")?;
    let source: Address = match word(packet, 12) {
        Some(0x0800) => at(packet, 26).ok_or("cut off")?,
        Some(0x0806) => {
            ensure(packet.get(22..28) == Some(&port.mac[..]), "another MAC in ARP")?;
            at(packet, 28).ok_or("cut off")?
        }
        _ => return Err("neither IPv4 nor ARP left".to_owned()),
    };
    let probe = word(packet, 12) == Some(0x0806) && source == [0; 4];
    ensure(probe || mapped(source) == port.address, "another address left")?;
    if to.ifindex == input.ifindex && to.helper == Helper::Redirect {
        ensure(frame.get(..6) == Some(&port.mac[..]), "an answer to another")?;
        return ensure(to.flags == 0, "an answer the wrong way");
    }
    let destination: Address = at(packet, 30).ok_or("cut off")?;
    let endpoint = endpoint(tables, port.vni, destination).ok_or("to nobody of its network")?;
    match (to.helper, to.ifindex) {
        (Helper::Peer, ifindex) => delivered(tables, port.vni, destination, ifindex, frame, packet),
        (_, ifindex) if ifindex == tables.config.external_ifindex => {
            ensure(frame == packet, "changed on its way to the kernel's device")
        }
        (Helper::Redirect, UPLINK) => {
            let header = frame.get(..OUTER).ok_or("no room for the outer headers")?;
            ensure(endpoint.ifindex == 0, "encapsulated for an endpoint of this host")?;
            let said = vni(header);
            ensure(said == port.vni, &format!("left its network {} for {said}", port.vni))?;
            ensure(
                mapped(at(header, 26).unwrap_or_default()) == tables.config.vtep,
                "outer source",
            )?;
            ensure(mapped(at(header, 30).unwrap_or_default()) == endpoint.vtep, "wrong VTEP")?;
            let inner = &frame[OUTER..];
            ensure(inner.get(..6) == Some(&endpoint.mac[..]), "inner destination MAC")?;
            ensure(inner.get(6..) == packet.get(6..), "the inner packet is another one")
        }
        _ => Err(format!("out by an interface of no business here, {to:?}")),
    }
}

/// A packet of the wire, by any program.
fn inwards(tables: &Tables, input: &Input, frame: &[u8], to: Redirection) -> Result<(), String> {
    let packet = &input.packet[..];
    let peer = matches!((to.helper, input.program), (Helper::Xdp, Program::UplinkXdp))
        || to.helper == Helper::Peer;
    let (network, vtep, inner) = match input.tunnel_key {
        Some(key) if input.program == Program::FromOverlay => (key.vni, key.remote, packet),
        _ if input.program == Program::FromOverlay => return Err("taken without a key".to_owned()),
        _ => match packet.get(OUTER..) {
            Some(inner) => (vni(packet), at(packet, 26).unwrap_or_default(), inner),
            None => (0, [0; 4], packet),
        },
    };
    if input.program == Program::FromOverlay && !peer {
        let sender: Address = at(packet, 28).ok_or("cut off")?;
        ensure(to.ifindex == input.ifindex && to.flags == 0, "an answer the wrong way")?;
        ensure(word(packet, 12) == Some(0x0806), "an answer to what is no ARP")?;
        return owned(tables, network, vtep, sender);
    }
    if input.program == Program::FromUplink && to.helper == Helper::Redirect {
        return answered(tables, packet, frame, to);
    }
    ensure(peer, "not into a sandbox")?;
    if tables.ports.get(&to.ifindex).is_some_and(|port| port.vni != 0) {
        ensure(input.vlan == 0, "out of a VLAN")?;
        if input.program != Program::FromOverlay {
            ensure(is_vxlan(tables, packet), "what is no VXLAN to us was taken for it")?;
        }
        ensure(word(inner, 12) == Some(0x0800), "not IPv4")?;
        owned(tables, network, vtep, at(inner, 26).unwrap_or_default())?;
        let destination = at(inner, 30).unwrap_or_default();
        return delivered(tables, network, destination, to.ifindex, frame, inner);
    }
    ensure(input.program != Program::FromOverlay, "out of the overlay into a gwbridge")?;
    published(tables, packet, frame, to.ifindex)
}

/// The answer to a probe: to a host that is known, no longer than what it asked, and no question.
fn answered(tables: &Tables, packet: &[u8], frame: &[u8], to: Redirection) -> Result<(), String> {
    ensure(to.ifindex == UPLINK && to.flags == 0, "an answer the wrong way")?;
    ensure(is_vxlan(tables, packet) && vni(packet) == PROBE_VNI, "an answer to what is no probe")?;
    let asker: Address = at(packet, 26).ok_or("cut off")?;
    ensure(tables.hosts.contains_key(&mapped(asker)), "an answer to a stranger")?;
    ensure(at(frame, 30) == Some(asker), "an answer to somebody else")?;
    ensure(
        mapped(at(frame, 26).unwrap_or_default()) == tables.config.vtep,
        "another outer source",
    )?;
    ensure(frame.len() == packet.len(), "an answer of another length")?;
    ensure(frame.get(84) == Some(&0), "an answer that is a question")
}

/// Into a sandbox of this network, to the endpoint with that address; but for MAC, TOS and what
/// follows from it the same.
fn delivered(
    tables: &Tables,
    network: u32,
    destination: Address,
    ifindex: u32,
    frame: &[u8],
    packet: &[u8],
) -> Result<(), String> {
    let port = tables.ports.get(&ifindex).ok_or("to a veth of nobody")?;
    ensure(port.vni == network, &format!("crossed from network {network} to {}", port.vni))?;
    ensure(port.address == mapped(destination), "to another address than its own")?;
    ensure(frame.get(..6) == Some(&port.mac[..]), "under another MAC than its own")?;
    ensure(frame.len() == packet.len(), "of another length")?;
    let same = |from: usize, to: usize| frame.get(from..to) == packet.get(from..to);
    let whole = same(6, 15) && same(16, 24) && same(26, frame.len());
    ensure(whole, "changed where nothing is to be changed")
}

/// Only who has the endpoint speaks for it.
fn owned(tables: &Tables, network: u32, vtep: Address, source: Address) -> Result<(), String> {
    let endpoint = endpoint(tables, network, source);
    let owner: Option<Mapped> = endpoint.filter(|it| it.ifindex == 0).map(|it| it.vtep);
    ensure(owner == Some(mapped(vtep)), "in the name of an endpoint that is not its own")?;
    ensure(tables.hosts.contains_key(&mapped(vtep)), "from an unknown VTEP")
}

fn published(tables: &Tables, packet: &[u8], frame: &[u8], ifindex: u32) -> Result<(), String> {
    let (was, is): (Address, Address) =
        (at(packet, 30).unwrap_or_default(), at(frame, 30).unwrap_or_default());
    let (protocol, port) = (packet.get(23).copied().unwrap_or(0), word(packet, 36).unwrap_or(0));
    ensure(at::<4>(packet, 26) == at::<4>(frame, 26), "the client became another")?;
    let leads = |key: &PublishedKey| {
        let to = tables.published.get(key)?;
        let there = to.ifindex == ifindex && to.address == mapped(is);
        (there && frame.get(..6) == Some(&to.mac[..])).then_some(to.port_be)
    };
    let is_whole = word(packet, 20).unwrap_or(0) & 0x1fff == 0;
    if matches!(protocol, TCP | UDP) && is_whole {
        let key =
            PublishedKey { address: mapped(was), port_be: port.to_be(), protocol, reserved: 0 };
        let port = leads(&key).ok_or("to what nobody published there")?;
        let client = word(packet, 34).unwrap_or(0).to_be();
        let safe = protocol != UDP || client != tables.config.vxlan_port_be;
        ensure(safe, "answers to this client would be VXLAN of this host")?;
        return ensure(word(frame, 36) == Some(u16::from_be(port)), "to another port");
    }
    // Of a fragment or an error one can tell the address, which must be published for something.
    ensure(matches!(protocol, TCP | UDP | ICMP), "of no protocol with ports")?;
    let any = tables.published.keys().any(|key| key.address == mapped(was) && leads(key).is_some());
    ensure(any, "to what nobody published on that address")
}

fn from_gwbridge(
    tables: &Tables,
    input: &Input,
    frame: &[u8],
    to: Redirection,
) -> Result<(), String> {
    let packet = &input.packet[..];
    ensure(to.helper == Helper::Redirect && input.vlan == 0, "the wrong way out")?;
    if to.flags == INGRESS {
        ensure(to.ifindex == tables.config.gwbridge_ifindex, "into another bridge")?;
        ensure(frame == packet, "changed for the bridge")?;
        return ensure(speaks_for_itself(tables, input), "in another's name to the bridge");
    }
    ensure([UPLINK, 1].contains(&to.ifindex), "out where no client is")?;
    let (was, is): (Address, Address) =
        (at(packet, 26).unwrap_or_default(), at(frame, 26).unwrap_or_default());
    ensure(at::<4>(packet, 30) == at::<4>(frame, 30), "the client became another")?;
    let is_whole = word(packet, 20).unwrap_or(0) & 0x1fff == 0;
    let (protocol, port) = (packet.get(23).copied().unwrap_or(0), word(frame, 34).unwrap_or(0));
    let with_ports = matches!(protocol, TCP | UDP) && is_whole;
    let leads_here = tables.published.iter().any(|(key, to)| {
        let whole = !with_ports || (u16::from_be(key.port_be), key.protocol) == (port, protocol);
        (key.address, to.address, to.ifindex) == (mapped(is), mapped(was), input.ifindex) && whole
    });
    ensure(leads_here, "an answer of what is not published, or of another sandbox")?;
    let vxlan =
        protocol == UDP && word(frame, 36).map(u16::to_be) == Some(tables.config.vxlan_port_be);
    ensure(!(with_ports && vxlan), "VXLAN of this host, made by a sandbox")
}

/// Whether a sandbox of ours, which is known by its port, sends under its own MAC and address.
fn speaks_for_itself(tables: &Tables, input: &Input) -> bool {
    let Some(port) = tables.ports.get(&input.ifindex) else { return true };
    let packet = &input.packet[..];
    let source = match word(packet, 12) {
        Some(0x0800) => at(packet, 26),
        Some(0x0806) => at(packet, 28).map(|it| if it == [0; 4] { own(port) } else { it }),
        _ => Some(own(port)),
    };
    packet.get(6..12) == Some(&port.mac[..]) && source == Some(own(port)) && input.vlan == 0
}

fn own(port: &ovnet_common::abi::PortValue) -> Address {
    [port.address[12], port.address[13], port.address[14], port.address[15]]
}

/// IPv4 without options or fragments, UDP to our VTEP's port, and the one flag of VXLAN.
fn is_vxlan(tables: &Tables, packet: &[u8]) -> bool {
    let to_us = at(packet, 30).map(mapped) == Some(tables.config.vtep)
        && word(packet, 36).map(u16::to_be) == Some(tables.config.vxlan_port_be);
    let plain = word(packet, 12) == Some(0x0800) && packet.get(14) == Some(&0x45);
    let whole = word(packet, 20).unwrap_or(0) & 0x3fff == 0 && packet.get(23) == Some(&UDP);
    to_us && plain && whole && packet.get(42..46) == Some(&[8, 0, 0, 0])
}

fn vni(outer: &[u8]) -> u32 {
    let [a, b, c] = at(outer, 46).unwrap_or_default();
    u32::from_be_bytes([0, a, b, c])
}

fn endpoint(tables: &Tables, vni: u32, address: Address) -> Option<&EndpointValue> {
    tables.endpoints.get(&EndpointKey { vni, address: mapped(address) })
}

fn at<const N: usize>(frame: &[u8], offset: usize) -> Option<[u8; N]> {
    frame.get(offset..offset + N)?.try_into().ok()
}

fn word(frame: &[u8], offset: usize) -> Option<u16> {
    at(frame, offset).map(u16::from_be_bytes)
}

fn ensure(holds: bool, otherwise: &str) -> Result<(), String> {
    if holds { Ok(()) } else { Err(otherwise.to_owned()) }
}
