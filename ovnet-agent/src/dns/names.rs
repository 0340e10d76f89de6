//! Which answer a question gets: records in, answer out, no I/O.
//!
//! Names are those of the endpoints' records (container name, short id, aliases) and each of them
//! with `.` and the network's name behind it. What a container called `web.prod` on a network
//! `a.b` is asked for may have dots anywhere, so names are compared whole, never label by label.

use std::{collections::BTreeSet, net::Ipv4Addr};

use crate::consul::schema::{EndpointRecord, EndpointState, NetworkRecord};

/// Under which the names of addresses are (RFC 1035, section 3.5).
const REVERSE: &str = ".in-addr.arpa";

/// What one asker may know: the networks it is on, and nothing else.
#[derive(Clone, Debug, Default)]
pub struct Directory<'a> {
    /// The asker's networks.
    pub networks: Vec<Network<'a>>,
    /// Hosts that count as there; `None` until Consul said so once, and then every host does.
    pub hosts: Option<&'a BTreeSet<String>>,
}

/// A network with everybody on it.
#[derive(Clone, Debug)]
pub struct Network<'a> {
    /// The network.
    pub record: &'a NetworkRecord,
    /// Its endpoints, on any host, in any state.
    pub endpoints: Vec<&'a EndpointRecord>,
}

/// What is asked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Question {
    /// The name as text, without the dot at its end, in lower case.
    pub name: String,
    /// The type of record.
    pub kind: Kind,
}

/// The types of record that make a difference.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A: the IPv4 addresses of a name.
    Address,
    /// PTR: the name of an address.
    Pointer,
    /// Any other; there is none of them here.
    Other,
}

/// What is answered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    /// The addresses of the name, at least one.
    Addresses(Vec<Ipv4Addr>),
    /// The name of the address, without the dot at its end.
    Name(String),
    /// The name exists, but not with a record of this type. So an application that asks for AAAA
    /// first goes on to A, instead of taking the name for one that does not exist.
    Empty,
    /// The address lies in one of the asker's networks, and nobody has a name there. Asking
    /// another server would only cost time, or bring up a name of another private network that
    /// happens to have the same subnet.
    Nobody,
    /// Nothing of ours: refused, so that the asker's resolver goes to its next server.
    Foreign,
}

/// The answer. `turn` counts queries: each begins with another of several addresses.
pub fn answer(directory: &Directory<'_>, question: &Question, turn: usize) -> Answer {
    if let Some(address) = reversed(&question.name) {
        return of_address(directory, address, question.kind);
    }
    let mut addresses = directory.addresses(&question.name);
    match (addresses.len(), question.kind) {
        (0, _) => Answer::Foreign,
        (several, Kind::Address) => {
            addresses.rotate_left(turn % several);
            Answer::Addresses(addresses)
        }
        _ => Answer::Empty,
    }
}

fn of_address(directory: &Directory<'_>, address: Ipv4Addr, kind: Kind) -> Answer {
    let on = directory.networks.iter().find(|it| it.record.subnet.contains(&address));
    let Some(network) = on else { return Answer::Foreign };
    let name = directory
        .present(network)
        .find(|endpoint| endpoint.address == address)
        .and_then(|endpoint| qualified(endpoint, network.record));
    match (name, kind) {
        (Some(name), Kind::Pointer) => Answer::Name(name),
        (Some(_), _) => Answer::Empty,
        (None, _) => Answer::Nobody,
    }
}

/// The first of its names that can be a domain name, with the network's, as Docker answers it.
fn qualified(endpoint: &EndpointRecord, network: &NetworkRecord) -> Option<String> {
    let names = endpoint.names.iter().map(|name| format!("{name}.{}", network.name));
    names.into_iter().find(|name| is_domain_name(name))
}

/// Whether the text can be sent as a domain name: labels of 1 to 63 bytes, 253 in all.
fn is_domain_name(text: &str) -> bool {
    text.len() <= 253 && text.split('.').all(|label| (1..=63).contains(&label.len()))
}

impl<'a> Directory<'a> {
    /// Every address that has the name on any of the networks, sorted. A name that is an
    /// endpoint's whole name hides the same text read as name and network, as in Docker.
    fn addresses(&self, asked: &str) -> Vec<Ipv4Addr> {
        let whole = |name: &str, _: &str| name.eq_ignore_ascii_case(asked);
        let mut addresses = self.select(whole);
        if addresses.is_empty() && asked.contains('.') {
            addresses = self.select(|name, network| is_name_on(asked, name, network));
        }
        addresses.sort();
        addresses.dedup();
        addresses
    }

    fn select(&self, matches: impl Fn(&str, &str) -> bool) -> Vec<Ipv4Addr> {
        let mut addresses = Vec::new();
        for network in &self.networks {
            let named = self
                .present(network)
                .filter(|it| it.names.iter().any(|name| matches(name, &network.record.name)));
            addresses.extend(named.map(|endpoint| endpoint.address));
        }
        addresses
    }

    /// The endpoints that exist, on hosts that are there: those the datapath forwards to.
    fn present<'b>(&'b self, network: &'b Network<'a>) -> impl Iterator<Item = &'a EndpointRecord> {
        let there = |host: &str| self.hosts.is_none_or(|hosts| hosts.contains(host));
        let endpoints = network.endpoints.iter().copied();
        endpoints.filter(move |it| it.state == EndpointState::Up && there(&it.host))
    }
}

/// Whether `asked` is `<name>.<network>`.
fn is_name_on(asked: &str, name: &str, network: &str) -> bool {
    asked.len() == name.len() + 1 + network.len()
        && asked.as_bytes()[name.len()] == b'.'
        && asked.as_bytes()[..name.len()].eq_ignore_ascii_case(name.as_bytes())
        && asked.as_bytes()[name.len() + 1..].eq_ignore_ascii_case(network.as_bytes())
}

/// The address whose name is asked for, from `2.0.0.10.in-addr.arpa`.
fn reversed(name: &str) -> Option<Ipv4Addr> {
    let backwards: Ipv4Addr = name.strip_suffix(REVERSE)?.parse().ok()?;
    Some(u32::from(backwards).swap_bytes().into())
}

#[cfg(test)]
mod tests;
