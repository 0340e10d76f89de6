//! When programs take the places of a former agent's.
//!
//! Where the two share their tables that is at once, in the first pass. Where hosts or endpoints are
//! in other maps now, those are empty, and a program put in place would drop what the former one
//! forwards: it has to wait until Consul has told all of it, for as long as that takes.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::Ipv4Addr,
};

use super::Worker;
use crate::{
    consul::{
        Snapshot,
        schema::{EndpointRecord, EndpointState, HostRecord},
    },
    datapath::{Attachment, Datapath},
    diff::Op,
    net::Link,
    state::LocalEndpoint,
};

/// What the status says meanwhile.
const WAITING: &str = "the programs of the agent before go on, with what that one knew, \
    until the hosts and endpoints are read from Consul";

/// Which attachments wait, and whether anything of a former agent is left.
#[derive(Debug)]
pub(super) enum Handover {
    /// Before the first pass.
    Ahead,
    /// These wait. What is attached later has no program yet that could go on.
    Waiting(BTreeSet<Attachment>),
    /// Ours are in place, or about to be. What else there is goes after a pass without failures.
    Begun,
    /// Nothing is left.
    Done,
}

impl Handover {
    /// The steps of a pass without those that have to wait. `told` is whether the tables can be
    /// filled, and `is_behind` whether a program would take the place of one that knows more.
    pub(super) fn hold_back(
        &mut self,
        mut ops: Vec<Op>,
        told: bool,
        is_behind: impl Fn(&Attachment) -> bool,
        notes: &mut Vec<String>,
    ) -> Vec<Op> {
        if matches!(self, Self::Ahead) {
            let attach = ops.iter().filter_map(|op| match op {
                Op::Attach(attachment) => Some(attachment),
                _ => None,
            });
            *self = Self::Waiting(attach.filter(|it| is_behind(it)).cloned().collect());
        }
        if let Self::Waiting(waiting) = self {
            if told || waiting.is_empty() {
                *self = Self::Begun;
            } else {
                ops.retain(|op| !matches!(op, Op::Attach(it) if waiting.contains(it)));
                notes.push(WAITING.to_owned());
            }
        }
        ops
    }

    /// Removes what former agents left, on these interfaces and in their folders, where ours is in
    /// place: for after a pass without failures.
    pub(super) fn finish(
        &mut self,
        datapath: &mut Datapath,
        links: &[Link],
        notes: &mut Vec<String>,
    ) {
        if !matches!(self, Self::Begun) {
            return;
        }
        let interfaces = links.iter().map(|link| link.name.as_str());
        // Of an uplink there was before: no pin tells of clsact filters.
        let unhooked = datapath.unhook_others(interfaces);
        match unhooked.and_then(|()| datapath.remove_formers()) {
            Ok(versions) => {
                for version in versions {
                    tracing::info!(version, "an agent of another version is succeeded");
                }
                *self = Self::Done;
            }
            Err(error) => notes.push(format!("{error:#}")),
        }
    }
}

/// Whether Consul has told everything, see [`Worker::hosts_are_told`]: it was read,
/// and of no endpoint the host is unknown. A host that stopped and is about to come back, as all do
/// when a cluster is upgraded at once, has endpoints and no record; it counts as gone where it is
/// not back when the hosts are `settled`. Pure.
fn is_told<'a>(
    node: &str,
    mut networks: impl Iterator<Item = &'a str>,
    hosts: Option<&BTreeMap<String, HostRecord>>,
    endpoints: &BTreeMap<String, BTreeMap<Ipv4Addr, EndpointRecord>>,
    settled: bool,
) -> bool {
    let Some(hosts) = hosts else { return false };
    let is_known = |endpoint: &EndpointRecord| {
        settled
            || endpoint.state == EndpointState::Reserved
            || endpoint.host == node
            || hosts.contains_key(&endpoint.host)
    };
    networks.all(|id| endpoints.get(id).is_some_and(|records| records.values().all(is_known)))
}

impl Worker {
    /// Whether Consul has told everything that the programs need to know of other hosts.
    pub(super) fn hosts_are_told(
        &self,
        local: &[(LocalEndpoint, u32)],
        hosts: Option<&BTreeMap<String, HostRecord>>,
        snapshot: &Snapshot,
    ) -> bool {
        let networks = local.iter().map(|(it, _)| it.network.id.as_str());
        let (node, settled) = (&self.shared.options.node, self.hosts.settled());
        is_told(node, networks, hosts, &snapshot.endpoints, settled)
    }
}

#[cfg(test)]
mod tests {
    use ovnet_common::abi::Program;

    use super::*;
    use crate::{consul::schema::VERSION, service::fake};

    fn steps(ifindices: &[u32]) -> Vec<Op> {
        let attach = |ifindex: &u32| {
            let interface = format!("ovnet{ifindex}");
            let program = Program::FromContainer;
            Op::Attach(Attachment { program, ifindex: *ifindex, interface, xdp: None })
        };
        [Op::RemovePort(9)].into_iter().chain(ifindices.iter().map(attach)).collect()
    }

    #[test]
    fn programs_wait_where_the_former_ones_know_more_until_all_is_told() {
        let mut handover = Handover::Ahead;
        let mut pass = |ops, told| {
            let mut notes = Vec::new();
            let ops = handover.hold_back(ops, told, |it| it.ifindex < 3, &mut notes);
            (ops, !notes.is_empty(), matches!(handover, Handover::Begun))
        };
        assert_eq!(pass(steps(&[1, 2, 3]), false), (steps(&[3]), true, false));
        // What came later takes nobody's place, whatever its interface's number.
        assert_eq!(pass(steps(&[0, 1, 2]), false), (steps(&[0]), true, false));
        assert_eq!(pass(steps(&[1, 2]), true), (steps(&[1, 2]), false, true));
        assert_eq!(pass(steps(&[1, 2]), false), (steps(&[1, 2]), false, true), "for good");
    }

    #[test]
    fn programs_that_know_as_much_wait_for_nothing() {
        let (mut handover, mut notes) = (Handover::Ahead, Vec::new());
        let ops = handover.hold_back(steps(&[1, 2]), false, |_| false, &mut notes);
        assert_eq!((ops, notes.len()), (steps(&[1, 2]), 0));
        assert!(matches!(handover, Handover::Begun));
    }

    #[test]
    fn everything_is_told_when_each_endpoint_has_a_host() {
        let host = |node: &str| HostRecord {
            v: VERSION,
            node: node.into(),
            vtep: [192, 168, 1, 12].into(),
            port: 4789,
            mtu: 1500,
            agent: "0.1.0".into(),
        };
        let endpoint = |host: &str, state| {
            let record = fake::local_endpoint().record;
            EndpointRecord { host: host.into(), state, ..record }
        };
        let up = EndpointState::Up;
        let all = |read: &[(&str, &[(&str, EndpointState)])]| {
            let records = |list: &[(&str, EndpointState)]| {
                let addresses = (2..).map(|last| Ipv4Addr::new(10, 0, 0, last));
                addresses.zip(list.iter().map(|(host, state)| endpoint(host, *state))).collect()
            };
            let read = read.iter().map(|(id, list)| ((*id).to_owned(), records(list)));
            read.collect::<BTreeMap<String, BTreeMap<Ipv4Addr, EndpointRecord>>>()
        };
        let hosts = BTreeMap::from([("docker02".to_owned(), host("docker02"))]);
        let told = |networks: &[&str], hosts, endpoints: &BTreeMap<_, _>, settled| {
            is_told("docker01", networks.iter().copied(), hosts, endpoints, settled)
        };
        assert!(!told(&[], None, &all(&[]), false), "the hosts were not read");
        assert!(told(&[], Some(&hosts), &all(&[]), false), "no network is used here");
        assert!(!told(&["a"], Some(&hosts), &all(&[]), false), "its endpoints were not read");
        assert!(!told(&["a"], Some(&hosts), &all(&[]), true), "nor are they for waiting");
        let read = all(&[("a", &[("docker02", up), ("docker01", up)]), ("b", &[])]);
        assert!(told(&["a", "b"], Some(&hosts), &read, false));
        assert!(!told(&["a", "c"], Some(&hosts), &read, false));
        let read = all(&[("a", &[("docker02", up), ("docker03", up)])]);
        assert!(!told(&["a"], Some(&hosts), &read, false), "docker03 may come back");
        assert!(told(&["a"], Some(&hosts), &read, true), "it did not");
        let read = all(&[("a", &[("docker03", EndpointState::Reserved)])]);
        assert!(told(&["a"], Some(&hosts), &read, false), "nothing is there yet");
    }
}
