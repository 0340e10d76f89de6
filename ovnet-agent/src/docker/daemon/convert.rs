//! Between bollard's types and ours. Pure. What Docker leaves out, or writes in a form we do not
//! know, becomes empty: one odd network must not hide the others.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    net::Ipv4Addr,
};

use bollard::models::{
    ContainerInspectResponse, EventMessage, EventMessageTypeEnum, Ipam, IpamConfig, Network,
    NetworkCreateRequest, NetworkInspect, PortBinding, PortMap,
};

use super::{
    ContainerNames, DRIVER, DockerNetwork, EndpointNames, Event, GWBRIDGE, ID_OPTION, MTU_OPTION,
};
use crate::{consul::schema::NetworkRecord, publish::PublishedPort};

/// A network out of the list of them.
pub(super) fn listed(network: Network) -> Option<DockerNetwork> {
    let Network { name, id, created, driver, ipam, options, labels, .. } = network;
    Some(DockerNetwork {
        id: id?,
        name: name?,
        driver: driver.unwrap_or_default(),
        options: options.into_iter().flatten().collect(),
        labels: labels.into_iter().flatten().collect(),
        created: created.unwrap_or_default(),
        ..addresses(ipam)
    })
}

/// A network asked for by itself.
pub(super) fn inspected(network: &NetworkInspect) -> Option<DockerNetwork> {
    let NetworkInspect { name, id, created, driver, ipam, options, labels, .. } = network.clone();
    listed(Network { name, id, created, driver, ipam, options, labels, ..<_>::default() })
}

/// The endpoints in a network and their containers. Docker's key for one is the id of its container, or `ep-` and the
/// endpoint's own id while Docker does not know the container yet.
pub(super) fn endpoints(network: NetworkInspect) -> BTreeMap<String, Option<String>> {
    let containers = network.containers.into_iter().flatten();
    containers
        .filter_map(|(key, endpoint)| {
            let container = (!key.starts_with("ep-")).then_some(key);
            Some((endpoint.endpoint_id?, container))
        })
        .collect()
}

/// What a container is called, and its ports.
pub(super) fn names(container: ContainerInspectResponse) -> ContainerNames {
    let name = container.name.unwrap_or_default();
    let settings = container.network_settings.unwrap_or_default();
    let endpoints = settings.networks.into_iter().flatten().filter_map(|(_, settings)| {
        let aliases = settings.aliases.into_iter().flatten();
        Some(EndpointNames {
            endpoint: settings.endpoint_id.filter(|id| !id.is_empty())?,
            aliases: aliases.chain(settings.dns_names.into_iter().flatten()).collect(),
        })
    });
    ContainerNames {
        id: container.id.unwrap_or_default(),
        name: name.trim_start_matches('/').to_owned(),
        endpoints: endpoints.collect(),
        ports: ports(settings.ports.unwrap_or_default()),
    }
}

/// The ports that are published, by container port and protocol (`80/tcp`); one that is only exposed
/// has no bindings. What we do not carry is left out: IPv6, and protocols but TCP and UDP.
fn ports(map: PortMap) -> Vec<PublishedPort> {
    let published = |port: &str, bindings: Option<Vec<PortBinding>>| {
        let (port, protocol) = port.split_once('/').unwrap_or((port, "tcp"));
        let (container_port, protocol) = (port.parse().ok()?, protocol.parse().ok()?);
        let bindings = bindings.into_iter().flatten().filter_map(move |binding| {
            // Docker writes every address as one of these two.
            let host_address = match binding.host_ip.as_deref().unwrap_or_default() {
                "" => Ipv4Addr::UNSPECIFIED,
                address => address.parse().ok()?,
            };
            let host_port = binding.host_port?.parse().ok().filter(|port| *port != 0)?;
            Some(PublishedPort { protocol, host_address, host_port, container_port })
        });
        Some(bindings)
    };
    let all = map.into_iter().filter_map(|(port, bindings)| published(&port, bindings)).flatten();
    // Sorted, and each once: an address of IPv6 left out may leave two that are the same.
    all.collect::<BTreeSet<_>>().into_iter().collect()
}

/// The request for this host's Docker network of a network. Both drivers are told which network
/// it stands for: neither hears its name.
pub(super) fn create_request(network: &NetworkRecord) -> NetworkCreateRequest {
    let id = (ID_OPTION.to_owned(), network.id.clone());
    let mtu = network.mtu.map(|mtu| (MTU_OPTION.to_owned(), mtu.to_string()));
    let options = network.options.clone().into_iter().chain(mtu).chain([id.clone()]);
    let aux = network.aux.iter().map(|(name, address)| (name.clone(), address.to_string()));
    let config = IpamConfig {
        subnet: Some(network.subnet.to_string()),
        gateway: Some(network.gateway.to_string()),
        ip_range: network.ip_range.map(|range| range.to_string()),
        auxiliary_addresses: (!network.aux.is_empty()).then(|| aux.collect()),
    };
    NetworkCreateRequest {
        name: network.name.clone(),
        driver: Some(DRIVER.to_owned()),
        internal: Some(network.internal),
        attachable: Some(true),
        ipam: Some(Ipam {
            driver: Some(DRIVER.to_owned()),
            config: Some(vec![config]),
            options: Some(HashMap::from([id])),
        }),
        options: Some(options.collect()),
        labels: Some(network.labels.clone().into_iter().collect()),
        ..Default::default()
    }
}

/// The request for `docker_gwbridge`, as Docker itself makes it for the first container that needs
/// one (libnetwork, default_gateway_linux.go). Docker chooses the subnet. Unlike that one, it would
/// follow the daemon's `default-network-opts` where the request does not say what it has;
/// `says_ipv4` where Docker understands that.
pub(super) fn gwbridge_request(says_ipv4: bool) -> NetworkCreateRequest {
    let options = [("name", GWBRIDGE), ("enable_icc", "false"), ("enable_ip_masquerade", "true")];
    let options =
        options.map(|(key, value)| (format!("com.docker.network.bridge.{key}"), value.to_owned()));
    NetworkCreateRequest {
        name: GWBRIDGE.to_owned(),
        driver: Some("bridge".to_owned()),
        enable_ipv4: says_ipv4.then_some(true),
        enable_ipv6: Some(false),
        options: Some(HashMap::from(options)),
        ..Default::default()
    }
}

/// The events asked for.
pub(super) fn event_filters() -> HashMap<String, Vec<String>> {
    let events = ["create", "destroy", "connect", "disconnect", "rename", "start"];
    HashMap::from([
        ("type".to_owned(), vec!["network".to_owned(), "container".to_owned()]),
        ("event".to_owned(), events.map(str::to_owned).to_vec()),
    ])
}

/// An event; `None` for those that mean nothing to us.
pub(super) fn event(message: EventMessage) -> Option<Event> {
    let actor = message.actor?;
    let id = actor.id?;
    let action = message.action?;
    Some(match (message.typ?, action.as_str()) {
        (EventMessageTypeEnum::NETWORK, "create") => Event::NetworkCreated,
        (EventMessageTypeEnum::NETWORK, "destroy") => Event::NetworkDestroyed { id },
        // Either may move its ports to another network: Docker then chooses free ones anew.
        (EventMessageTypeEnum::NETWORK, "connect" | "disconnect") => {
            Event::ContainerChanged { id: actor.attributes?.remove("container")? }
        }
        (EventMessageTypeEnum::CONTAINER, "rename" | "start") => Event::ContainerChanged { id },
        _ => return None,
    })
}

/// The first IPv4 subnet and what belongs to it; the rest of the network is left empty. Docker
/// writes addresses with and without a prefix length.
fn addresses(ipam: Option<Ipam>) -> DockerNetwork {
    let configs = ipam.and_then(|ipam| ipam.config).into_iter().flatten();
    for config in configs {
        let Some(subnet) = config.subnet.and_then(|subnet| subnet.parse().ok()) else { continue };
        let address = |text: &str| text.split('/').next()?.parse().ok();
        let aux = config.auxiliary_addresses.into_iter().flatten();
        return DockerNetwork {
            subnet: Some(subnet),
            gateway: config.gateway.as_deref().and_then(address),
            ip_range: config.ip_range.and_then(|range| range.parse().ok()),
            aux: aux.filter_map(|(name, text)| Some((name, address(&text)?))).collect(),
            ..Default::default()
        };
    }
    DockerNetwork::default()
}
