//! What people type to publish ports, as Docker reads it: `-p 192.168.1.12:90:80/udp`. Pure.

use std::{
    fmt,
    net::{Ipv4Addr, Ipv6Addr},
    ops::RangeInclusive,
    str::FromStr,
};

use super::{Protocol, PublishedPort};

/// The most ports one attach may publish: each is an open socket of the agent.
pub const MAX_PORTS: usize = 1024;

/// A port of a sandbox that is to be published. Ports are in host byte order.
///
/// It is printed as it is typed, and what is printed is read as the same.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PortRequest {
    /// The protocol.
    pub protocol: Protocol,
    /// The address of this host to publish it on; every one where absent.
    pub host_address: Option<Ipv4Addr>,
    /// The ports of this host it may have: the first free one of them, any free one where absent.
    pub host_ports: Option<RangeInclusive<u16>>,
    /// The port inside the sandbox.
    pub container_port: u16,
}

impl PortRequest {
    /// The port of this host, where exactly one was asked for.
    pub fn fixed(&self) -> Option<u16> {
        self.host_ports.as_ref().filter(|it| it.start() == it.end()).map(|it| *it.start())
    }

    /// Whether `port` may be what this asked for.
    fn is_met_by(&self, port: &PublishedPort) -> bool {
        self.protocol == port.protocol
            && self.container_port == port.container_port
            && self.host_address.unwrap_or(Ipv4Addr::UNSPECIFIED) == port.host_address
            && self.host_ports.as_ref().is_none_or(|it| it.contains(&port.host_port))
    }

    /// Whether both ask for one and the same port of this host.
    fn is_fixed_as(&self, other: &Self) -> bool {
        let apart = |a: Option<Ipv4Addr>, b| a.zip(b).is_some_and(|(a, b)| a != b);
        self.fixed().is_some()
            && self.fixed() == other.fixed()
            && self.protocol == other.protocol
            && !apart(self.host_address, other.host_address)
    }
}

impl fmt::Display for PortRequest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(address) = self.host_address {
            write!(f, "{address}:")?;
        }
        match &self.host_ports {
            Some(ports) if ports.start() == ports.end() => write!(f, "{}:", ports.start())?,
            Some(ports) => write!(f, "{}-{}:", ports.start(), ports.end())?,
            None if self.host_address.is_some() => f.write_str(":")?,
            None => {}
        }
        write!(f, "{}/{}", self.container_port, self.protocol)
    }
}

/// A port inside a sandbox, as `80` or `53/udp`: TCP where no protocol is given.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PrivatePort {
    /// The protocol.
    pub protocol: Protocol,
    /// The port, host byte order.
    pub port: u16,
}

impl FromStr for PrivatePort {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (ports, protocol) = with_protocol(text)?;
        Ok(Self { protocol, port: one_port(ports, Side::Container)? })
    }
}

impl fmt::Display for PrivatePort {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.port, self.protocol)
    }
}

/// What an attach publishes: all of `publish` (`-p`), and with `publish_all` (`-P`) every port of
/// `expose` that none of `publish` has, on a free port. As with Docker, `expose` alone publishes
/// nothing; it is read all the same. An error is one line that quotes what is wrong.
pub fn requests(
    publish: &[String],
    publish_all: bool,
    expose: &[String],
) -> Result<Vec<PortRequest>, String> {
    let mut wanted: Vec<(PortRequest, &str)> = Vec::new();
    for spec in publish {
        let read = published(spec).map_err(|why| format!("published port {spec:?}: {why}"))?;
        for request in read {
            if let Some((_, other)) = wanted.iter().find(|(it, _)| it.is_fixed_as(&request)) {
                let port = request.fixed().unwrap_or_default();
                return Err(format!(
                    "host port {port}/{} is asked for twice, by {other:?} and {spec:?}: choose \
                     another for one of them",
                    request.protocol
                ));
            }
            wanted.push((request, spec));
        }
    }
    for spec in expose {
        let read = exposed(spec).map_err(|why| format!("exposed port {spec:?}: {why}"))?;
        for PrivatePort { protocol, port } in read {
            let is_there = |(it, _): &(PortRequest, &str)| {
                (it.protocol, it.container_port) == (protocol, port)
            };
            if publish_all && !wanted.iter().any(is_there) {
                let request = PortRequest {
                    protocol,
                    host_address: None,
                    host_ports: None,
                    container_port: port,
                };
                wanted.push((request, spec));
            }
        }
    }
    if wanted.len() > MAX_PORTS {
        return Err(format!(
            "{} ports are to be published: an endpoint has at most {MAX_PORTS}",
            wanted.len()
        ));
    }
    Ok(wanted.into_iter().map(|(request, _)| request).collect())
}

/// The ports whose host port was chosen and not asked for: what whoever asked cannot know.
pub fn chosen<'a>(
    requests: &'a [PortRequest],
    ports: &'a [PublishedPort],
) -> impl Iterator<Item = &'a PublishedPort> {
    ports
        .iter()
        .filter(|port| !requests.iter().any(|it| it.fixed().is_some() && it.is_met_by(port)))
}

/// The requests of one `-p`: one for each port of a range.
fn published(spec: &str) -> Result<Vec<PortRequest>, String> {
    if spec.contains('[') {
        return Err(NO_IPV6.into());
    }
    let (ports, protocol) = with_protocol(spec)?;
    let parts: Vec<&str> = ports.split(':').collect();
    let (address, host, container) = match parts[..] {
        [container] => (None, None, container),
        ["", _] => {
            return Err(
                "there is no host port before the colon: give one, or leave out the colon \
                        for a free one"
                    .into(),
            );
        }
        [host, container] => (None, Some(host), container),
        [address, host, container] => {
            (host_address(address)?, Some(host).filter(|it| !it.is_empty()), container)
        }
        _ if is_ipv6_before(ports) => return Err(NO_IPV6.into()),
        _ => {
            return Err("there are too many colons: ADDRESS:HOST_PORT:CONTAINER_PORT is the \
                        longest form"
                .into());
        }
    };
    let container_ports = range(container, Side::Container)?;
    let host_ports = host.map(|it| range(it, Side::Host)).transpose()?;
    let request = |host_ports, container_port| PortRequest {
        protocol,
        host_address: address,
        host_ports,
        container_port,
    };
    let Some(host_ports) = host_ports else {
        return Ok(container_ports.map(|it| request(None, it)).collect());
    };
    if container_ports.len() == 1 {
        return Ok(vec![request(Some(host_ports), *container_ports.start())]);
    }
    if host_ports.len() != container_ports.len() {
        return Err(format!(
            "{} host ports cannot lead to {} container ports: give ranges of one length",
            host_ports.len(),
            container_ports.len()
        ));
    }
    let pairs = host_ports.zip(container_ports);
    Ok(pairs.map(|(host, container)| request(Some(host..=host), container)).collect())
}

/// The ports of one `--expose`.
fn exposed(spec: &str) -> Result<Vec<PrivatePort>, String> {
    let (ports, protocol) = with_protocol(spec)?;
    if ports.contains(':') {
        return Err("a port of the container alone is exposed, as 80/tcp: publish it with -p to \
                    give it a host port"
            .into());
    }
    Ok(range(ports, Side::Container)?.map(|port| PrivatePort { protocol, port }).collect())
}

const NO_IPV6: &str = "IPv6 host addresses are not supported: give an IPv4 address";

/// Whose port it is, for what is said of it.
#[derive(Clone, Copy)]
enum Side {
    Host,
    Container,
}

impl fmt::Display for Side {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Host => "host",
            Self::Container => "container",
        })
    }
}

/// What is before the protocol, and the protocol.
fn with_protocol(spec: &str) -> Result<(&str, Protocol), String> {
    let Some((ports, protocol)) = spec.split_once('/') else { return Ok((spec, Protocol::Tcp)) };
    let protocol = match protocol.to_ascii_lowercase().as_str() {
        "" => return Err("there is no protocol after the slash: /tcp or /udp".into()),
        "sctp" => return Err("sctp is not supported: tcp and udp can be published".into()),
        protocol => protocol.parse()?,
    };
    Ok((ports, protocol))
}

fn host_address(text: &str) -> Result<Option<Ipv4Addr>, String> {
    match text.parse() {
        Ok(Ipv4Addr::UNSPECIFIED) => Ok(None),
        Ok(address) => Ok(Some(address)),
        Err(_) if text.is_empty() => Ok(None),
        Err(_) => Err(format!("{text:?} is not an IPv4 address")),
    }
}

fn is_ipv6_before(ports: &str) -> bool {
    let address = ports.rsplitn(3, ':').nth(2);
    address.is_some_and(|it| it.parse::<Ipv6Addr>().is_ok())
        || ports.rsplit_once(':').is_some_and(|(it, _)| it.parse::<Ipv6Addr>().is_ok())
}

/// A port, or a range of them.
fn range(text: &str, side: Side) -> Result<RangeInclusive<u16>, String> {
    let Some((first, last)) = text.split_once('-') else {
        let port = one_port(text, side)?;
        return Ok(port..=port);
    };
    let (first, last) = (one_port(first, side)?, one_port(last, side)?);
    if first > last {
        return Err(format!("the range {first}-{last} is reversed: the lower port comes first"));
    }
    Ok(first..=last)
}

fn one_port(text: &str, side: Side) -> Result<u16, String> {
    if text.is_empty() {
        return Err(format!("a {side} port is missing"));
    }
    if !text.bytes().all(|it| it.is_ascii_digit()) {
        return Err(format!("{side} port {text:?} is not a number"));
    }
    match (text.parse(), side) {
        (Err(_), _) => Err(format!("{side} port {text} is too large: 65535 is the largest")),
        (Ok(0), Side::Host) => {
            Err("host port 0 is not possible: leave it out for a free one".into())
        }
        (Ok(0), Side::Container) => Err("container port 0 is not possible: 1 is the lowest".into()),
        (Ok(port), _) => Ok(port),
    }
}

#[cfg(test)]
mod tests;
