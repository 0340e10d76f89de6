//! From what is to what should be, as a list of steps. Pure; every step may be repeated.

use std::{collections::BTreeSet, path::PathBuf};

use ovnet_common::{
    abi::{
        Address, EndpointKey, EndpointValue, HostConfig, HostValue, NetworkValue, PortValue,
        Program,
    },
    published::{PublishedKey, PublishedValue},
};

use crate::{
    datapath::{Attachment, Tables},
    desired::Desired,
};

/// What the kernel holds.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Actual {
    /// The tables.
    pub tables: Tables,
    /// Attachments of this process that are in force.
    pub attached: BTreeSet<Attachment>,
    /// Pinned links that no desired attachment has the name of.
    pub stale_links: Vec<PathBuf>,
}

/// One step.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Op {
    /// Replace what the programs know of their host.
    SetConfig(HostConfig),
    /// Enter or replace a VTEP.
    SetHost(Address, HostValue),
    /// Enter or replace a network.
    SetNetwork(u32, NetworkValue),
    /// Enter or replace an endpoint.
    SetEndpoint(EndpointKey, EndpointValue),
    /// Enter or replace a local endpoint's veth.
    SetPort(u32, PortValue),
    /// Enter or replace a published port.
    SetPublished(PublishedKey, PublishedValue),
    /// Attach a program or take it over.
    Attach(Attachment),
    /// Detach a program of this process.
    Detach(Attachment),
    /// Remove a pinned link.
    RemoveLink(PathBuf),
    /// Remove a published port.
    RemovePublished(PublishedKey),
    /// Remove an endpoint.
    RemoveEndpoint(EndpointKey),
    /// Remove a local endpoint's veth.
    RemovePort(u32),
    /// Remove a network.
    RemoveNetwork(u32),
    /// Remove a VTEP.
    RemoveHost(Address),
}

/// The steps from `actual` to `desired`, additions before removals: tables before the programs
/// that read them, programs before the links they replace. A published port is the exception: what
/// translates its answers is there before the first question, and as long as one can come.
pub fn diff(desired: &Desired, actual: &Actual) -> Vec<Op> {
    let (want, have) = (&desired.tables, &actual.tables);
    let mut ops = Vec::new();
    if want.config != have.config {
        ops.push(Op::SetConfig(want.config));
    }
    ops.extend(changed(&want.hosts, &have.hosts).map(|(key, value)| Op::SetHost(key, value)));
    ops.extend(changed(&want.networks, &have.networks).map(|(k, v)| Op::SetNetwork(k, v)));
    ops.extend(changed(&want.endpoints, &have.endpoints).map(|(k, v)| Op::SetEndpoint(k, v)));
    ops.extend(changed(&want.ports, &have.ports).map(|(key, value)| Op::SetPort(key, value)));
    let mut attach: Vec<_> = desired.attachments.difference(&actual.attached).cloned().collect();
    attach.sort_by_key(|it| it.program != Program::FromGwbridge);
    let answers = attach.iter().take_while(|it| it.program == Program::FromGwbridge).count();
    let others = attach.split_off(answers);
    ops.extend(attach.into_iter().map(Op::Attach));
    ops.extend(changed(&want.published, &have.published).map(|(k, v)| Op::SetPublished(k, v)));
    ops.extend(others.into_iter().map(Op::Attach));

    let unpublished = have.published.keys().filter(|key| !want.published.contains_key(*key));
    ops.extend(unpublished.copied().map(Op::RemovePublished));
    ops.extend(actual.attached.difference(&desired.attachments).cloned().map(Op::Detach));
    ops.extend(actual.stale_links.iter().cloned().map(Op::RemoveLink));
    ops.extend(removed_endpoints(desired, have).map(Op::RemoveEndpoint));
    let ports = have.ports.keys().filter(|ifindex| !want.ports.contains_key(*ifindex));
    ops.extend(ports.copied().map(Op::RemovePort));
    let networks = have.networks.keys().filter(|vni| !want.networks.contains_key(*vni));
    ops.extend(networks.copied().map(Op::RemoveNetwork));
    if desired.authority.hosts && desired.authority.settled {
        let hosts = have.hosts.keys().filter(|vtep| !want.hosts.contains_key(*vtep));
        ops.extend(hosts.copied().map(Op::RemoveHost));
    }
    ops
}

/// Endpoints to remove. Those of a network nobody here is in, and local ones, are this host's own
/// business. All others go with their host, or, while that is there, with their own record, and
/// either must have been read (invariant 7).
fn removed_endpoints<'a>(
    desired: &'a Desired,
    have: &'a Tables,
) -> impl Iterator<Item = EndpointKey> + 'a {
    have.endpoints.iter().filter_map(move |(key, value)| {
        let in_use = desired.tables.networks.contains_key(&key.vni);
        let read = match desired.tables.hosts.contains_key(&value.vtep) {
            true => desired.authority.endpoints.contains(&key.vni),
            false => desired.authority.hosts && desired.authority.settled,
        };
        let ours = value.ifindex != 0;
        let wanted = desired.tables.endpoints.contains_key(key);
        (!wanted && (!in_use || read || ours)).then_some(*key)
    })
}

fn changed<'a, K: Copy + Ord, V: Copy + PartialEq>(
    want: &'a std::collections::BTreeMap<K, V>,
    have: &'a std::collections::BTreeMap<K, V>,
) -> impl Iterator<Item = (K, V)> + 'a {
    want.iter().filter(|(key, value)| have.get(key) != Some(value)).map(|(k, v)| (*k, *v))
}

#[cfg(test)]
mod tests;
