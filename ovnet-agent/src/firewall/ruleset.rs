//! What the table `ip ovnet` holds. Pure: [`batch`] makes of [`Rules`] what the `nft` program reads.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::Ipv4Addr,
    ops::RangeInclusive,
};

use ipnet::Ipv4Net;
use nftables::{
    batch::Batch,
    schema::{Chain, NfListObject, NfObject, Nftables, Rule, Table},
    stmt::{Counter, NAT, Statement},
    types::{NfChainPolicy, NfChainType, NfFamily, NfHook},
};

use super::expression::{
    address, bits_are_not, daddr, destination_is_local, has, iifkind_is, iifname, in_net, is,
    is_not, l4proto, oifkind, oifname, payload, port, ports, skuid, source_is_elsewhere, text,
};
use crate::publish::Protocol;

/// Name of the table, of the family `ip`.
pub(super) const TABLE: &str = "ovnet";
/// What the name of the chain begins with that tells which rules the table holds.
pub(super) const DIGEST: &str = "rules-";

/// What is this host's own, whatever its addresses.
const LOOPBACK: Ipv4Net = Ipv4Net::new_assert(Ipv4Addr::new(127, 0, 0, 0), 8);

/// What the table is made of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rules {
    /// Names of the interfaces that other hosts are behind: the uplink, and each bridge with a port
    /// that leads out. Behind another bridge are somebody's containers or virtual machines.
    pub outward: Vec<String>,
    /// UDP port of VXLAN, which no masqueraded packet may go to.
    pub vxlan_port: u16,
    /// The sandboxes' way out, where they have one.
    pub egress: Option<Egress>,
    /// Published ports.
    pub mappings: Vec<Mapping>,
}

/// The sandboxes' way out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Egress {
    /// Name of the bridge.
    pub bridge: String,
    /// The sandboxes' addresses on it.
    pub subnet: Ipv4Net,
}

/// A published port. Ports are in host byte order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mapping {
    /// The protocol.
    pub protocol: Protocol,
    /// The address of this host it is published on; 0.0.0.0 is every one.
    pub host_address: Ipv4Addr,
    /// The port of this host.
    pub host_port: u16,
    /// The sandbox's address on the bridge.
    pub backend: Ipv4Addr,
    /// The port inside the sandbox.
    pub container_port: u16,
    /// Name of the bridge that the sandbox is on.
    pub bridge: String,
    /// Ours. False for Docker's, which has a DNAT of its own.
    pub own: bool,
}

/// Replaces the whole table in one transaction. What is translated already goes on: the kernel
/// keeps that with the connection, and asks the rules for new connections only.
pub fn batch(rules: &Rules) -> Nftables<'static> {
    let mut objects = chains();
    objects.extend(self::rules(rules));
    let digest = digest(&objects);
    let mut batch = Batch::new();
    // Added first, because deleting what is not there is an error.
    batch.add(table());
    batch.delete(table());
    batch.add(table());
    batch.add(NfListObject::Chain(Chain {
        family: NfFamily::IP,
        table: TABLE.into(),
        name: digest.into(),
        ..Chain::default()
    }));
    for object in objects {
        batch.add(object);
    }
    batch.to_nftables()
}

/// Deletes the table, which may be absent.
pub(super) fn removal() -> Nftables<'static> {
    let mut batch = Batch::new();
    batch.add(table());
    batch.delete(table());
    batch.to_nftables()
}

/// The chains that a batch adds, with how many rules each of them gets.
pub(super) fn shape(batch: &Nftables<'_>) -> BTreeMap<String, usize> {
    use nftables::schema::NfCmd::Add;
    let mut shape = BTreeMap::new();
    for object in batch.objects.iter() {
        match object {
            NfObject::CmdObject(Add(NfListObject::Chain(chain))) => {
                shape.entry(chain.name.to_string()).or_insert(0);
            }
            NfObject::CmdObject(Add(NfListObject::Rule(rule))) => {
                *shape.entry(rule.chain.to_string()).or_insert(0) += 1;
            }
            _ => {}
        }
    }
    shape
}

/// A name for exactly these rules. Another build of the agent may give another one, which costs
/// replacing the table once.
fn digest(objects: &[NfListObject<'_>]) -> String {
    use std::hash::{DefaultHasher, Hash as _, Hasher as _};
    let mut hasher = DefaultHasher::new();
    for object in objects {
        let mut object = serde_json::to_value(object).unwrap_or_default();
        sort(&mut object);
        object.to_string().hash(&mut hasher);
    }
    format!("{DIGEST}{:016x}", hasher.finish())
}

/// Puts the lists of flags in one order: the crate has sets for them, which have another each time.
fn sort(value: &mut serde_json::Value) {
    use serde_json::Value::{Array, Object};
    match value {
        Array(items) => items.iter_mut().for_each(sort),
        Object(fields) => {
            for (name, field) in fields {
                sort(field);
                if let ("flags", Array(flags)) = (name.as_str(), field) {
                    flags.sort_by_key(ToString::to_string);
                }
            }
        }
        _ => {}
    }
}

fn table() -> NfListObject<'static> {
    NfListObject::Table(Table { family: NfFamily::IP, name: TABLE.into(), handle: None })
}

fn chains() -> Vec<NfListObject<'static>> {
    use NfChainType::{Filter, NAT};
    let chain = |name: &'static str, kind, hook, priority| {
        NfListObject::Chain(Chain {
            family: NfFamily::IP,
            table: TABLE.into(),
            name: name.into(),
            _type: Some(kind),
            hook: Some(hook),
            prio: Some(priority),
            policy: Some(NfChainPolicy::Accept),
            ..Chain::default()
        })
    };
    vec![
        chain("raw", Filter, NfHook::Prerouting, -300),
        chain("prerouting", NAT, NfHook::Prerouting, -100),
        chain("output", NAT, NfHook::Output, -100),
        chain("forward", Filter, NfHook::Forward, 0),
        // Before Docker's, which has 100: the first that translates a connection decides.
        chain("postrouting", NAT, NfHook::Postrouting, 99),
        // After every translation.
        chain("guard", Filter, NfHook::Postrouting, 150),
    ]
}

fn rules(rules: &Rules) -> Vec<NfListObject<'static>> {
    let mut all = Vec::new();
    for mapping in &rules.mappings {
        if mapping.own {
            all.extend(translate_to(mapping));
        }
        all.extend(keep_host_port(mapping));
    }
    if let Some(egress) = &rules.egress {
        all.extend(way_in(egress));
        all.extend(forwarding(egress, &rules.outward));
        all.extend(masquerading(egress, unpublished_ports(&rules.mappings).as_ref()));
    }
    let inward = rules.outward.iter().map(|name| is_not(iifname(), text(name)));
    // What containers and virtual machines are connected by.
    let of_guests = iifkind_is(&["bridge", "veth", "tun"]);
    let forged =
        [of_guests, is(payload("udp", "dport"), port(rules.vxlan_port)), source_is_elsewhere()];
    all.push(rule(
        "raw",
        "VXLAN in another host's name, where rp_filter is not strict",
        inward.chain(forged),
        Statement::Drop(None),
    ));
    all.extend(guard(rules));
    all
}

/// Who may not speak VXLAN as this host, whose word other hosts take for its endpoints'.
fn guard(rules: &Rules) -> Vec<NfListObject<'static>> {
    let to_vxlan = || is(payload("udp", "dport"), port(rules.vxlan_port));
    let drop = || Statement::Drop(None);
    let answers = rules.outward.iter().map(|name| {
        rule(
            "guard",
            "an answer of a published port, to a client that asks from the port of VXLAN",
            [has("status", &["dnat"]), is(oifname(), text(name)), to_vxlan()],
            drop(),
        )
    });
    let sandboxes = rule(
        "guard",
        "masqueraded, a sandbox would speak VXLAN as this host",
        [has("status", &["snat"]), to_vxlan()],
        drop(),
    );
    // A tunnel device's own packets have no socket of this host, or one of root's.
    let users = rule(
        "guard",
        "VXLAN by a user of this host",
        [is_not(skuid(), port(0)), to_vxlan()],
        drop(),
    );
    [sandboxes, users].into_iter().chain(answers).collect()
}

/// DNAT of what comes from elsewhere, and of what this host itself sends.
fn translate_to(mapping: &Mapping) -> Vec<NfListObject<'static>> {
    let Mapping { protocol, host_address, host_port, backend, container_port, .. } = mapping;
    let comment = format!("{protocol} {host_address}:{host_port} to {backend}:{container_port}");
    let matches = |on_loopback: bool| {
        let mut matches = vec![destination_is_local()];
        if !host_address.is_unspecified() {
            matches.push(is(daddr(), address(*host_address)));
        } else if !on_loopback {
            // Nobody else may come to 127.0.0.1, whatever leads there.
            matches.push(is_not(daddr(), in_net(LOOPBACK)));
        }
        matches.push(is(payload(name(*protocol), "dport"), port(*host_port)));
        matches
    };
    let to = || {
        Statement::DNAT(Some(NAT {
            addr: Some(address(*backend)),
            family: None,
            port: Some(port(*container_port)),
            flags: None,
        }))
    };
    let mut both = vec![rule("output", &comment, matches(true), to())];
    if !host_address.is_loopback() {
        both.push(rule("prerouting", &comment, matches(false), to()));
    }
    both
}

/// Keeps a mapped connection on its host port whose first packet that the kernel's connection
/// tracking sees is an answer: all before went by the programs. Without this it would be
/// masqueraded to any port, and the client would not know it.
fn keep_host_port(mapping: &Mapping) -> Option<NfListObject<'static>> {
    let Mapping { protocol, host_address, host_port, backend, container_port, bridge, .. } =
        mapping;
    if host_address.is_loopback() {
        return None;
    }
    let mut matches = vec![
        is(payload("ip", "saddr"), address(*backend)),
        is(payload(name(*protocol), "sport"), port(*container_port)),
        is_not(oifname(), text(bridge)),
    ];
    if *protocol == Protocol::Tcp {
        // A SYN alone is a connection that the sandbox opens, from whatever port.
        matches.push(bits_are_not(payload("tcp", "flags"), ["syn", "ack"], "syn"));
    }
    let to = NAT {
        addr: (!host_address.is_unspecified()).then(|| address(*host_address)),
        family: None,
        port: Some(port(*host_port)),
        flags: None,
    };
    let translate =
        if to.addr.is_some() { Statement::SNAT(Some(to)) } else { Statement::Masquerade(Some(to)) };
    let comment = format!("answers of {backend}:{container_port} stay on {host_port}");
    Some(rule("postrouting", &comment, matches, translate))
}

/// What of the sandboxes' packets is not looked at any further.
fn way_in(Egress { bridge, subnet, .. }: &Egress) -> Vec<NfListObject<'static>> {
    let comes = || is(iifname(), text(bridge));
    vec![
        rule(
            "raw",
            "route_localnet is for this host, not for sandboxes",
            [comes(), is(daddr(), in_net(LOOPBACK))],
            Statement::Drop(None),
        ),
        rule(
            "raw",
            "spoofed source",
            [comes(), is_not(payload("ip", "saddr"), in_net(*subnet))],
            Statement::Drop(None),
        ),
        rule(
            "raw",
            "a sandbox's address, from elsewhere",
            [
                is_not(iifname(), text(bridge)),
                // This host itself, which has the first address of the subnet.
                is_not(iifname(), text("lo")),
                is(payload("ip", "saddr"), in_net(*subnet)),
            ],
            Statement::Drop(None),
        ),
    ]
}

/// Who may speak with whom by way of this host.
fn forwarding(Egress { bridge, .. }: &Egress, outward: &[String]) -> Vec<NfListObject<'static>> {
    let comes = || is(iifname(), text(bridge));
    let goes = || is(oifname(), text(bridge));
    let translated = || has("status", &["dnat"]);
    let accept = || Statement::Accept(None);
    let drop = || Statement::Drop(None);
    let inward = outward.iter().map(|name| is_not(oifname(), text(name)));
    let to_others = || [comes(), is(oifkind(), text("bridge"))];
    vec![
        rule(
            "forward",
            "a published port of a sandbox of this host",
            [comes(), goes(), translated()],
            accept(),
        ),
        rule("forward", "sandbox to sandbox", [comes(), goes()], drop()),
        rule(
            "forward",
            "a published port of another bridge's container",
            to_others().into_iter().chain([translated()]),
            accept(),
        ),
        // Docker's own rules would say so, too, but are not asked once `docker.rs` accepted. Without
        // a word about connections: what belongs to none is meant, too.
        rule(
            "forward",
            "other bridges' containers: by published ports only",
            to_others().into_iter().chain(inward),
            drop(),
        ),
        rule("forward", "answers", [goes(), has("state", &["established", "related"])], accept()),
        rule("forward", "published ports", [goes(), translated()], accept()),
        rule("forward", "nothing else comes in", [goes()], drop()),
    ]
}

/// Under which address, and by UDP under which ports, sandboxes' packets leave.
fn masquerading(
    Egress { bridge, subnet, .. }: &Egress,
    unpublished: Option<&RangeInclusive<u16>>,
) -> Vec<NfListObject<'static>> {
    let goes = || is(oifname(), text(bridge));
    let from = |net| is(payload("ip", "saddr"), in_net(net));
    let whose: [(&str, Vec<Statement<'static>>); 3] = [
        ("out", vec![from(*subnet), is_not(oifname(), text(bridge))]),
        (
            "a sandbox's own published port, and its neighbour's",
            vec![from(*subnet), goes(), has("status", &["dnat"])],
        ),
        ("from this host's loopback", vec![from(LOOPBACK), goes()]),
    ];
    let mut all = Vec::new();
    for (comment, matches) in whose {
        if let Some(range) = unpublished {
            let to = NAT { addr: None, family: None, port: Some(ports(range)), flags: None };
            let by_udp = matches.iter().cloned().chain([is(l4proto(), text("udp"))]);
            all.push(rule("postrouting", comment, by_udp, Statement::Masquerade(Some(to))));
        }
        all.push(rule("postrouting", comment, matches, Statement::Masquerade(None)));
    }
    all
}

/// The most ports in a row that nothing is published on by UDP; `None` where nothing is published
/// by UDP at all, so that any port will do.
///
/// By TCP an answer is told from a new connection by its flags. By UDP nothing tells them apart: an
/// answer to a published port would go into the container that published it.
fn unpublished_ports(mappings: &[Mapping]) -> Option<RangeInclusive<u16>> {
    let udp = mappings.iter().filter(|it| it.protocol == Protocol::Udp);
    let published: BTreeSet<u16> = udp.map(|it| it.host_port).collect();
    if published.is_empty() {
        return None;
    }
    // Below are those that some services trust, because only root may have them.
    let mut free = 1024_u32;
    let mut best = free..free;
    let ends = published.into_iter().map(u32::from).filter(|port| *port >= 1024).chain([65536]);
    for end in ends {
        if end - free > best.end - best.start {
            best = free..end;
        }
        free = end + 1;
    }
    let (first, last) = (u16::try_from(best.start).ok()?, u16::try_from(best.end - 1).ok()?);
    (first <= last).then_some(first..=last)
}

fn rule(
    chain: &'static str,
    comment: &str,
    matches: impl IntoIterator<Item = Statement<'static>>,
    verdict: Statement<'static>,
) -> NfListObject<'static> {
    let mut statements: Vec<Statement<'static>> = matches.into_iter().collect();
    statements.extend([Statement::Counter(Counter::Anonymous(None)), verdict]);
    NfListObject::Rule(Rule {
        family: NfFamily::IP,
        table: TABLE.into(),
        chain: chain.into(),
        expr: statements.into(),
        comment: Some(comment.to_owned().into()),
        ..Rule::default()
    })
}

fn name(protocol: Protocol) -> &'static str {
    match protocol {
        Protocol::Tcp => "tcp",
        Protocol::Udp => "udp",
    }
}

#[cfg(test)]
mod tests;
