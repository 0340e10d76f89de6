//! What Docker tells, in types of our own.

use std::{collections::BTreeMap, net::Ipv4Addr};

use ipnet::Ipv4Net;

use super::{DRIVER, ID_OPTION};
use crate::publish::PublishedPort;

/// A network as Docker describes it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DockerNetwork {
    /// Docker's id of it, 64 hexadecimal digits, another one on each host.
    pub id: String,
    /// Its name.
    pub name: String,
    /// Name of its driver, ours or another one.
    pub driver: String,
    /// Driver options, `-o`.
    pub options: BTreeMap<String, String>,
    /// Labels.
    pub labels: BTreeMap<String, String>,
    /// Its first IPv4 subnet.
    pub subnet: Option<Ipv4Net>,
    /// The gateway's address in that subnet.
    pub gateway: Option<Ipv4Addr>,
    /// Part of the subnet that addresses are chosen from.
    pub ip_range: Option<Ipv4Net>,
    /// Named addresses that belong to the network.
    pub aux: BTreeMap<String, Ipv4Addr>,
    /// When it was made: RFC 3339 text, as Docker wrote it.
    pub created: String,
}

impl DockerNetwork {
    /// Whether our driver has it.
    pub fn is_ours(&self) -> bool {
        self.driver == DRIVER
    }

    /// The id of the network it was made to stand for, where the agent made it.
    pub fn stands_for(&self) -> Option<&str> {
        self.options.get(ID_OPTION).map(String::as_str)
    }
}

/// What a container is called, its endpoints, and the ports that lead to it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ContainerNames {
    /// Docker's id of it.
    pub id: String,
    /// Its name, without the slash Docker puts before it.
    pub name: String,
    /// Its endpoints.
    pub endpoints: Vec<EndpointNames>,
    /// Its ports that are published over IPv4 as Docker has them now, those it chose itself too;
    /// sorted. None while the container does not run.
    pub ports: Vec<PublishedPort>,
}

/// What a container is called in one network.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct EndpointNames {
    /// Docker's id of the endpoint.
    pub endpoint: String,
    /// Aliases, and the other names Docker's own DNS server has for it.
    pub aliases: Vec<String>,
}

/// Something that happened in Docker.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// A network, of any driver, was made.
    NetworkCreated,
    /// A network, of any driver, was removed.
    NetworkDestroyed {
        /// Docker's id of it.
        id: String,
    },
    /// A container got or lost an endpoint, started or has another name.
    ContainerChanged {
        /// Docker's id of it.
        id: String,
    },
}
