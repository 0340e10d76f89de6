//! Endpoints whose state file is lost or damaged: held as the kernel has them, and recovered.
//!
//! Found once, at the start: host-side veths with an entry in the tables, or a file that was set
//! aside, and no endpoint. Nothing that the kernel has of them is taken away (invariant 7: absence is
//! not an order). What their files said is learned again: from the kernel the sandbox, its way out
//! and its published ports, from Consul the record and the network.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::Ipv4Addr,
    path::Path,
};

use anyhow::Result;
use ovnet_common::{
    abi::{mapped, unmapped},
    published::PublishedKey,
};

use super::Worker;
use crate::{
    consul::{
        Snapshot,
        schema::{EndpointRecord, EndpointState, NetworkRecord},
    },
    desired::Held,
    docker::{book::Book, daemon::GWBRIDGE as DOCKER_GWBRIDGE},
    net::{GWBRIDGE, Link},
    publish::{Protocol, PublishedPort},
    state::{DockerEndpoint, GatewayPort, LocalEndpoint},
};

/// Where Docker keeps the namespaces of its containers.
const DOCKER_NETNS: &str = "/run/docker/netns";

impl Worker {
    /// At the start: the names of host-side veths that nobody knows and somebody may use.
    pub(super) fn find_held(&mut self, links: &[Link]) -> Result<()> {
        self.tables = self.shared.datapath().maps().read()?;
        let aside = self.state.set_aside()?;
        let local = self.shared.view().local.clone();
        for link in links {
            let Some(digits) = digits(link) else { continue };
            let is_known = local.values().any(|it| it.host_ifname == link.name);
            let is_wired = self.tables.ports.get(&link.index).is_some_and(|port| port.vni != 0);
            let has_file = aside.iter().any(|id| id.starts_with(digits));
            if !is_known && (is_wired || has_file) {
                tracing::warn!(
                    interface = link.name,
                    "what this host remembers of an endpoint is lost: the kernel forwards on, and \
                     the rest is learned again from it and from Consul"
                );
                self.held.insert(link.name.clone());
            }
        }
        // Files of endpoints that are gone are of no use to anybody.
        for id in aside.iter().filter(|id| !links.iter().any(|it| is_of(it, id))) {
            self.state.remove(id)?;
        }
        self.show_held();
        Ok(())
    }

    /// Makes endpoints again of those that enough is known of by now, and tells of the others.
    pub(super) async fn recover(&mut self, links: &[Link], notes: &mut Vec<String>) {
        self.held.retain(|name| links.iter().any(|link| link.name == *name));
        let snapshot = self.shared.snapshots.borrow().clone();
        for name in self.held.clone() {
            let Some(link) = links.iter().find(|link| link.name == name) else { continue };
            let record = self.record_of(link, &snapshot);
            let found = match &record {
                Some(_) => self.net.find_sandbox(&name).await,
                None => Ok(None),
            };
            match (record, found) {
                (Some((record, network)), Ok(Some((netns, ifname)))) => {
                    let endpoint = self.learned(link, links, record, network, &netns, ifname).await;
                    if let Err(error) = self.state.store(&endpoint) {
                        // Recovered all the same: the next repair writes what is not on disk.
                        notes.push(format!("{error:#}"));
                    }
                    tracing::info!(
                        interface = name, network = endpoint.network.name,
                        address = %endpoint.record.address, netns = %netns.display(),
                        "an endpoint whose state was lost is recovered"
                    );
                    let id = endpoint.record.id.clone();
                    self.shared.view().local.insert(id, endpoint);
                    self.held.remove(&name);
                }
                (_, Err(error)) => notes.push(format!("{error:#}")),
                (None, _) => notes.push(format!(
                    "what this host remembers of the endpoint behind {name} is lost, and Consul has \
                     no record of it yet: it forwards on; `ip link del {name}` gives it up"
                )),
                (_, Ok(None)) => notes.push(format!(
                    "what this host remembers of the endpoint behind {name} is lost, and its \
                     sandbox is not found: it forwards on; `ip link del {name}` gives it up"
                )),
            }
        }
        self.show_held();
    }

    /// What the kernel has of those not recovered yet, to be left as it is.
    pub(super) fn hold(&self, links: &[Link]) -> Held {
        if self.held.is_empty() {
            return Held::default();
        }
        let named = |wanted: &dyn Fn(&Link) -> bool| -> BTreeMap<u32, String> {
            let links = links.iter().filter(|link| wanted(link));
            links.map(|link| (link.index, link.name.clone())).collect()
        };
        let known: BTreeSet<String> = {
            let view = self.shared.view();
            let gateways = view.local.values().filter_map(|it| it.gateway.as_ref());
            gateways.map(|it| it.host_ifname.clone()).collect()
        };
        let veths = named(&|link| self.held.contains(&link.name));
        let others = named(&|link| digits(link).is_none() && !known.contains(&link.name));
        Held::of(&self.tables, &veths, &others)
    }

    /// Whether the kernel's rules may be made what is known: not before Consul was asked what is
    /// published here besides.
    pub(super) fn knows_mappings(&self, snapshot: &Snapshot) -> bool {
        self.held.is_empty() || snapshot.networks.is_some()
    }

    /// The networks that endpoints must be read of: any may have the one that is looked for.
    pub(super) fn searched(&self, snapshot: &Snapshot) -> Vec<String> {
        let networks = snapshot.networks.iter().filter(|_| !self.held.is_empty());
        networks.flat_map(BTreeMap::values).map(|network| network.id.clone()).collect()
    }

    /// Writes the files that somebody removed, or that there was no room for. Gives a line for each
    /// that cannot be.
    pub(super) fn keep_files(&self) -> Vec<String> {
        let files = match self.state.ids() {
            Ok(files) => files,
            Err(error) => return vec![format!("{error:#}")],
        };
        let local = self.shared.view().local.clone();
        let missing = local.values().filter(|it| !files.contains(&it.record.id));
        missing.filter_map(|it| Some(format!("{:#}", self.state.store(it).err()?))).collect()
    }

    fn show_held(&self) {
        let held = self.held.iter().filter_map(|name| name.strip_prefix("ovnet"));
        self.shared.view().held = held.map(str::to_owned).collect();
    }

    /// The record of the endpoint behind a veth, and its network.
    fn record_of(
        &self,
        link: &Link,
        snapshot: &Snapshot,
    ) -> Option<(EndpointRecord, NetworkRecord)> {
        let port = self.tables.ports.get(&link.index);
        let networks = snapshot.networks.as_ref()?.values();
        let records = networks.flat_map(|network| {
            let records = snapshot.endpoints.get(&network.id).into_iter();
            records.flat_map(BTreeMap::values).map(move |record| (record, network))
        });
        let mut ours = records.filter(|(record, network)| {
            let at = (network.vni, mapped(record.address.octets()));
            record.host == self.shared.options.node
                && record.state == EndpointState::Up
                && is_of(link, &record.id)
                && port.is_none_or(|port| (port.vni, port.address) == at)
        });
        ours.next().map(|(record, network)| (record.clone(), network.clone()))
    }

    /// The endpoint, as far as the kernel tells.
    async fn learned(
        &self,
        link: &Link,
        links: &[Link],
        record: EndpointRecord,
        network: NetworkRecord,
        netns: &Path,
        ifname: String,
    ) -> LocalEndpoint {
        let by_docker = netns.starts_with(DOCKER_NETNS);
        let bridge = if by_docker { DOCKER_GWBRIDGE } else { GWBRIDGE };
        let gateway = self.net.find_gateway_port(netns, bridge).await.ok().flatten();
        let ports = gateway.as_ref().map(|it| self.ports_of(it, links)).unwrap_or_default();
        let docker = by_docker.then(|| {
            let book = Book::open(&self.shared.options.state_dir).ok();
            let bound = book.and_then(|book| book.of_network(&network.id));
            Some(DockerEndpoint { network: bound?.docker, container: None })
        });
        LocalEndpoint {
            record,
            network,
            netns: netns.to_owned(),
            ifname,
            host_ifname: link.name.clone(),
            mtu: link.mtu,
            docker: docker.flatten(),
            gateway,
            ports,
        }
    }

    /// The ports of this host that lead to a sandbox by its way out.
    fn ports_of(&self, gateway: &GatewayPort, links: &[Link]) -> Vec<PublishedPort> {
        let Some(link) = links.iter().find(|it| it.name == gateway.host_ifname) else {
            return Vec::new();
        };
        let own: BTreeSet<Ipv4Addr> = links
            .iter()
            .filter(|link| !link.loopback)
            .flat_map(|link| link.addresses.iter().map(|it| it.addr()))
            .collect();
        let to = self.tables.published.iter().filter(|(_, to)| to.ifindex == link.index);
        published(to.map(|(key, to)| (*key, to.port_be)), &own)
    }
}

/// What was published, from what it became in the tables: a port on every address of this host was
/// published on 0.0.0.0. Pure.
fn published(
    entries: impl Iterator<Item = (PublishedKey, u16)>,
    own: &BTreeSet<Ipv4Addr>,
) -> Vec<PublishedPort> {
    let mut addresses: BTreeMap<(Protocol, u16, u16), BTreeSet<Ipv4Addr>> = BTreeMap::new();
    for (key, container_port_be) in entries {
        let protocols = [Protocol::Tcp, Protocol::Udp];
        let protocol = protocols.into_iter().find(|it| it.number() == key.protocol);
        let Some(protocol) = protocol else { continue };
        let port = (protocol, u16::from_be(key.port_be), u16::from_be(container_port_be));
        addresses.entry(port).or_default().insert(unmapped(&key.address).into());
    }
    let ports = addresses.into_iter().flat_map(|((protocol, host_port, container_port), on)| {
        let on = if on == *own { BTreeSet::from([Ipv4Addr::UNSPECIFIED]) } else { on };
        on.into_iter().map(move |host_address| PublishedPort {
            protocol,
            host_address,
            host_port,
            container_port,
        })
    });
    let mut ports: Vec<PublishedPort> = ports.collect();
    ports.sort();
    ports
}

/// The digits in the name of a host-side veth of ours.
fn digits(link: &Link) -> Option<&str> {
    let digits =
        link.name.strip_prefix("ovnet").filter(|_| link.kind.as_deref() == Some("veth"))?;
    (digits.len() == 8 && digits.bytes().all(|it| it.is_ascii_hexdigit())).then_some(digits)
}

/// Whether a host-side veth is that of the endpoint.
fn is_of(link: &Link, id: &str) -> bool {
    digits(link).is_some_and(|digits| id.get(..8).is_some_and(|it| it.eq_ignore_ascii_case(digits)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_are_told_as_they_were_published() {
        let own = BTreeSet::from([Ipv4Addr::new(192, 168, 1, 11), Ipv4Addr::new(10, 9, 9, 9)]);
        let entry = |address: [u8; 4], host: u16, container: u16, protocol| {
            let key = PublishedKey {
                address: mapped(address),
                port_be: host.to_be(),
                protocol,
                reserved: 0,
            };
            (key, container.to_be())
        };
        let entries = [
            entry([192, 168, 1, 11], 90, 80, 6),
            entry([10, 9, 9, 9], 90, 80, 6),
            entry([10, 9, 9, 9], 53, 53, 17),
            entry([10, 9, 9, 9], 1, 1, 99),
        ];
        let port = |protocol, address: [u8; 4], host_port, container_port| PublishedPort {
            protocol,
            host_address: address.into(),
            host_port,
            container_port,
        };
        let expected =
            [port(Protocol::Tcp, [0; 4], 90, 80), port(Protocol::Udp, [10, 9, 9, 9], 53, 53)];
        assert_eq!(published(entries.into_iter(), &own), expected);
    }

    #[test]
    fn a_veth_is_known_by_the_digits_of_its_endpoint() {
        let link = |name: &str, kind: &str| Link {
            name: name.into(),
            kind: Some(kind.into()),
            ..Link::default()
        };
        assert!(is_of(&link("ovnet0123abcd", "veth"), "0123abcd99"));
        assert!(!is_of(&link("ovnet0123abcd", "veth"), "0123abce99"));
        assert!(!is_of(&link("ovnet0123abcd", "veth"), "0123"));
        for (name, kind) in
            [("ovnetg0123abcd", "veth"), ("ovnet0123abcd", "bridge"), ("eth0", "veth")]
        {
            assert_eq!(digits(&link(name, kind)), None, "{name}");
        }
    }
}
