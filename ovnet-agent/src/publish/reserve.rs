//! Host ports are reserved by sockets that nothing is ever received on.
//!
//! What arrives for a published port is taken off before any socket is looked for. The socket is
//! there so that nobody else binds the port, `ss -lnt` shows it, and a port in use is an error when
//! it is asked for. A filter drops whatever reaches the socket all the same, so no connection is
//! ever accepted by it.

mod holder;
mod socket;

use std::{
    collections::BTreeMap,
    io,
    net::{Ipv4Addr, SocketAddrV4},
    os::fd::OwnedFd,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use anyhow::{Context as _, Result};

use super::{Protocol, PublishedPort, spec::PortRequest};
use crate::{service::Refusal, state::LocalEndpoint};

/// Whose ports are reserved.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Owner {
    /// Id of the endpoint.
    pub id: String,
    /// What users know it by: its name, or the start of its id.
    pub name: String,
}

impl Owner {
    /// An endpoint with these names.
    pub fn new(id: &str, names: &[String]) -> Self {
        let name = names.first().map_or_else(|| id.get(..12).unwrap_or(id), String::as_str);
        Self { id: id.to_owned(), name: name.to_owned() }
    }
}

/// The reserved ports of this host, in the network namespace of whoever calls. Clones share
/// everything; a port is reserved until it is released or the last clone is gone.
#[derive(Clone, Debug, Default)]
pub struct Reservations {
    held: Arc<Mutex<BTreeMap<Key, Held>>>,
    /// Taken while ports are bound: of two endpoints that want one port, the second is told of the
    /// first. Releasing does not wait for it.
    binding: Arc<Mutex<()>>,
}

/// Protocol, address and port of this host: what at most one socket has.
type Key = (Protocol, Ipv4Addr, u16);

#[derive(Debug)]
struct Held {
    owner: Owner,
    /// Closing it frees the port.
    _socket: OwnedFd,
}

impl Reservations {
    /// Reserves all that is asked for, or nothing. Returns it in the order asked.
    ///
    /// `local_addresses` are this host's own; another one is refused, and 127.0.0.0/8 never is. A
    /// port in use is a conflict that names whoever has it, where that can be found. Looks through
    /// `/proc` for that, so it may take a while on a busy host.
    pub fn reserve(
        &self,
        owner: &Owner,
        requests: &[PortRequest],
        local_addresses: &[Ipv4Addr],
    ) -> Result<Vec<PublishedPort>> {
        for address in requests.iter().filter_map(|it| it.host_address) {
            check_address(address, local_addresses)?;
        }
        let _alone = self.binding.lock().unwrap_or_else(PoisonError::into_inner);
        // Kept apart until all are there: dropped with an error, they are free again.
        let mut made: BTreeMap<usize, (PublishedPort, OwnedFd)> = BTreeMap::new();
        let mut order: Vec<_> = requests.iter().enumerate().collect();
        // What has no choice comes first, or a range would take its port.
        order.sort_by_key(|(_, it)| {
            it.host_ports.as_ref().map_or(usize::MAX, ExactSizeIterator::len)
        });
        for (index, request) in order {
            made.insert(index, self.bind_first(request)?);
        }
        let mut held = self.held();
        let mut ports = Vec::with_capacity(made.len());
        for (port, socket) in made.into_values() {
            ports.push(port);
            held.insert(key(&port), Held { owner: owner.clone(), _socket: socket });
        }
        Ok(ports)
    }

    /// Reserves again what an endpoint has published, after the agent was away. Returns one line
    /// for each port that cannot be had, because somebody else took it meanwhile. Idempotent: what
    /// is reserved stays so, and what was taken is tried again. Docker reserves its endpoints'
    /// ports itself.
    pub fn hold(&self, endpoint: &LocalEndpoint) -> Vec<String> {
        if endpoint.docker.is_some() {
            return Vec::new();
        }
        let owner = Owner::new(&endpoint.record.id, &endpoint.record.names);
        let _alone = self.binding.lock().unwrap_or_else(PoisonError::into_inner);
        let mut lines = Vec::new();
        for port in &endpoint.ports {
            if self.held().get(&key(port)).is_some_and(|it| it.owner.id == owner.id) {
                continue;
            }
            match socket::bind(port.protocol, address_of(port)) {
                Ok((socket, _)) => {
                    let held = Held { owner: owner.clone(), _socket: socket };
                    self.held().insert(key(port), held);
                }
                Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
                    let other = self.endpoint_of(key(port)).map(|name| format!("endpoint {name}"));
                    let other = other.or_else(|| holder::find(key(port)));
                    lines.push(format!(
                        "{} is published by endpoint {} and in use by {}, too: stop one of them",
                        shown(key(port)),
                        owner.name,
                        other.unwrap_or_else(|| "somebody else".into())
                    ));
                }
                Err(error) => lines.push(format!(
                    "{} of endpoint {} cannot be reserved: {error}",
                    shown(key(port)),
                    owner.name
                )),
            }
        }
        lines
    }

    /// Frees whatever is reserved for an endpoint; nothing is no error.
    pub fn release(&self, endpoint_id: &str) {
        self.held().retain(|_, held| held.owner.id != endpoint_id);
    }

    /// How many ports are reserved.
    pub fn count(&self) -> usize {
        self.held().len()
    }

    /// Binds the first port of a request that can be had.
    fn bind_first(&self, request: &PortRequest) -> Result<(PublishedPort, OwnedFd)> {
        let host_address = request.host_address.unwrap_or(Ipv4Addr::UNSPECIFIED);
        let port = |host_port| PublishedPort {
            protocol: request.protocol,
            host_address,
            host_port,
            container_port: request.container_port,
        };
        // Port 0 is any free one of the ephemeral range.
        let candidates = request.host_ports.clone().unwrap_or(0..=0);
        for candidate in candidates.clone() {
            let wanted = (request.protocol, host_address, candidate);
            match socket::bind(request.protocol, SocketAddrV4::new(host_address, candidate)) {
                Ok((socket, bound)) => return Ok((port(bound), socket)),
                Err(error) if error.kind() != io::ErrorKind::AddrInUse => {
                    return Err(error).with_context(|| format!("reserve {}", shown(wanted)));
                }
                Err(_) if candidate != *candidates.end() => {}
                Err(_) if candidate == 0 => {
                    return Err(Refusal::conflict(format!(
                        "no {} port of {host_address} is free: stop what has them",
                        request.protocol
                    )));
                }
                Err(_) if candidates.len() == 1 => return Err(self.conflict(wanted)),
                Err(_) => break,
            }
        }
        Err(Refusal::conflict(format!(
            "ports {}-{}/{} of {host_address} are all in use: choose others",
            candidates.start(),
            candidates.end(),
            request.protocol
        )))
    }

    fn conflict(&self, wanted: Key) -> anyhow::Error {
        let port = shown(wanted);
        Refusal::conflict(match self.endpoint_of(wanted) {
            Some(name) => {
                format!("{port} is in use by endpoint {name}: choose another, or detach it")
            }
            None => match holder::find(wanted) {
                Some(user) => format!("{port} is in use by {user}: choose another, or stop it"),
                None => format!("{port} is in use: choose another"),
            },
        })
    }

    /// Name of the endpoint that has a port.
    fn endpoint_of(&self, (protocol, address, port): Key) -> Option<String> {
        let overlaps = |other: Ipv4Addr| {
            other == address || other.is_unspecified() || address.is_unspecified()
        };
        let held = self.held();
        let mut all = held.iter();
        all.find(|((a, b, c), _)| *a == protocol && *c == port && overlaps(*b))
            .map(|(_, held)| held.owner.name.clone())
    }

    fn held(&self) -> MutexGuard<'_, BTreeMap<Key, Held>> {
        // Every change of the map is whole, so a panic elsewhere does not make it wrong.
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn check_address(address: Ipv4Addr, local_addresses: &[Ipv4Addr]) -> Result<()> {
    if address.is_loopback() || local_addresses.contains(&address) {
        return Ok(());
    }
    let own: Vec<_> = local_addresses.iter().map(ToString::to_string).collect();
    let own = if own.is_empty() { "only 127.0.0.1".to_owned() } else { own.join(", ") };
    Err(Refusal::invalid(format!(
        "{address} is not an address of this host, which has {own}: publish on one of them, or on \
         all by naming none"
    )))
}

fn key(port: &PublishedPort) -> Key {
    (port.protocol, port.host_address, port.host_port)
}

fn address_of(port: &PublishedPort) -> SocketAddrV4 {
    SocketAddrV4::new(port.host_address, port.host_port)
}

fn shown((protocol, address, port): Key) -> String {
    format!("port {port}/{protocol} of {address}")
}

#[cfg(test)]
mod tests;
