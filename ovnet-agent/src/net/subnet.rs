//! Which subnet the sandboxes' bridge gets.

use std::collections::BTreeMap;

use anyhow::{Result, bail};
use ipnet::Ipv4Net;
use netlink_packet_route::route::{RouteAttribute, RouteMessage};

use super::{
    GWBRIDGE, Net,
    link::{destination, name_of},
};

impl Net {
    /// The subnet for [`GWBRIDGE`]: the one that is wanted, which must not overlap a route of this
    /// host, nor be another than that of the sandboxes on the bridge; else the one that the bridge
    /// has; else the first of 172.18.0.0/16 to 172.31.0.0/16
    /// and of the /20 of 192.168.0.0/16 that overlaps none. An error is one line.
    pub async fn free_gwbridge_subnet(&self, wanted: Option<Ipv4Net>) -> Result<Ipv4Net> {
        let links = self.space().link_messages().await?;
        let names: BTreeMap<u32, String> =
            links.iter().map(|link| (link.header.index, name_of(link))).collect();
        let routes = self.space().route_messages().await?;
        let taken: Vec<(Ipv4Net, String)> = routes
            .iter()
            .filter_map(|route| {
                let name = interface(route).and_then(|index| names.get(&index).cloned());
                Some((destination(route)?, name.unwrap_or_else(|| "several interfaces".into())))
            })
            .collect();
        let bridge = self.gwbridge(GWBRIDGE).await?;
        if let (Some(bridge), Some(wanted)) = (&bridge, wanted.map(|wanted| wanted.trunc())) {
            let ports = links.iter().filter(|link| {
                super::gwbridge::port_of(link).is_some_and(|(of, _)| of == bridge.index)
            });
            keep(bridge.address.trunc(), wanted, ports.count())?;
        }
        choose(wanted, bridge.map(|bridge| bridge.address.trunc()), &taken)
    }
}

fn choose(
    wanted: Option<Ipv4Net>,
    has: Option<Ipv4Net>,
    taken: &[(Ipv4Net, String)],
) -> Result<Ipv4Net> {
    let in_the_way = |subnet: &Ipv4Net| {
        taken.iter().find(|(route, name)| {
            name != GWBRIDGE && (route.contains(subnet) || subnet.contains(route))
        })
    };
    if let Some(subnet) = wanted {
        check(subnet)?;
        let subnet = subnet.trunc();
        if let Some((route, name)) = in_the_way(&subnet) {
            bail!(
                "the subnet {subnet} for {GWBRIDGE} overlaps the route {route} of {name}: give \
                 another with --gwbridge-subnet"
            );
        }
        return Ok(subnet);
    }
    if let Some(subnet) = has {
        return Ok(subnet);
    }
    let large = (18..=31).map(|number| ([172, number, 0, 0], 16));
    let small = (0..=240).step_by(16).map(|number| ([192, 168, number, 0], 20));
    large
        .chain(small)
        .filter_map(|(address, length)| Ipv4Net::new(address.into(), length).ok())
        .find(|subnet| in_the_way(subnet).is_none())
        .map_or_else(
            || {
                bail!(
                    "every subnet of 172.18.0.0 to 172.31.0.0 and of 192.168.0.0/16 overlaps a \
                     route of this host: give one for {GWBRIDGE} with --gwbridge-subnet"
                )
            },
            Ok,
        )
}

/// Refuses another subnet than that of the sandboxes on the bridge, which would lose their way out.
fn keep(has: Ipv4Net, wanted: Ipv4Net, sandboxes: usize) -> Result<()> {
    if has == wanted || sandboxes == 0 {
        return Ok(());
    }
    bail!(
        "{GWBRIDGE} has the subnet {has}, in which {sandboxes} sandboxes have their addresses: \
         detach them first, or leave --gwbridge-subnet {wanted} away"
    )
}

/// Refuses what cannot be the subnet of sandboxes, whatever the routes.
fn check(subnet: Ipv4Net) -> Result<()> {
    let address = subnet.network();
    let why = if subnet.prefix_len() > 29 {
        "has too few addresses: /29 is the smallest"
    } else if subnet.prefix_len() < 8 {
        "is larger than /8, which is the largest"
    } else if address.is_loopback() {
        "is this host's loopback"
    } else if address.is_multicast() {
        "is for multicast"
    } else if address.is_link_local() {
        "is for link-local addresses"
    } else if address.octets()[0] == 0 || address.octets()[0] >= 240 {
        "is reserved"
    } else {
        return Ok(());
    };
    bail!("the subnet {subnet} for {GWBRIDGE} {why}: give another with --gwbridge-subnet")
}

fn interface(route: &RouteMessage) -> Option<u32> {
    route.attributes.iter().find_map(|attribute| match attribute {
        RouteAttribute::Oif(index) => Some(*index),
        RouteAttribute::MultiPath(hops) => hops.first().map(|hop| hop.interface_index),
        _ => None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn net(text: &str) -> Ipv4Net {
        text.parse().unwrap()
    }

    fn taken(routes: &[(&str, &str)]) -> Vec<(Ipv4Net, String)> {
        routes.iter().map(|(route, name)| (net(route), (*name).to_owned())).collect()
    }

    #[test]
    fn the_first_that_overlaps_nothing_is_taken() {
        let choice = |routes: &[(&str, &str)]| choose(None, None, &taken(routes));
        assert_eq!(choice(&[]).unwrap(), net("172.18.0.0/16"));
        let routes = [("172.18.4.0/24", "br0"), ("172.19.0.0/16", "docker_gwbridge")];
        assert_eq!(choice(&routes).unwrap(), net("172.20.0.0/16"));
        let routes = [("172.16.0.0/12", "tun0"), ("192.168.1.0/24", "ens33")];
        assert_eq!(choice(&routes).unwrap(), net("192.168.16.0/20"));
        let routes = [("172.16.0.0/12", "tun0"), ("192.168.0.0/16", "ens33")];
        assert!(choice(&routes).unwrap_err().to_string().contains("--gwbridge-subnet"));
    }

    #[test]
    fn what_the_bridge_has_stays() {
        let routes = taken(&[("172.18.0.0/16", "x"), ("172.25.0.0/16", GWBRIDGE)]);
        let has = Some(net("172.25.0.0/16"));
        assert_eq!(choose(None, has, &routes).unwrap(), net("172.25.0.0/16"));
        assert_eq!(choose(has, has, &routes).unwrap(), net("172.25.0.0/16"));
        let other = Some(net("172.26.0.9/16"));
        assert_eq!(choose(other, has, &routes).unwrap(), net("172.26.0.0/16"), "the network's own");
    }

    #[test]
    fn sandboxes_on_the_bridge_keep_their_subnet() {
        let (has, other) = (net("172.25.0.0/16"), net("172.26.0.0/16"));
        keep(has, has, 3).unwrap();
        keep(has, other, 0).unwrap();
        let error = keep(has, other, 3).unwrap_err().to_string();
        assert!(error.contains("3 sandboxes") && !error.contains('\n'), "{error}");
    }

    #[test]
    fn an_explicit_one_that_cannot_be_is_one_line_that_says_why() {
        let routes = taken(&[("192.168.1.0/24", "ens33"), ("10.9.0.0/16", "tun0")]);
        for (subnet, part) in [
            ("192.168.0.0/16", "192.168.1.0/24 of ens33"),
            ("10.9.8.0/24", "10.9.0.0/16 of tun0"),
            ("172.18.0.0/30", "/29"),
            ("172.0.0.0/7", "/8"),
            ("127.5.0.0/16", "loopback"),
            ("224.0.0.0/16", "multicast"),
            ("169.254.0.0/16", "link-local"),
            ("0.0.0.0/8", "reserved"),
            ("250.0.0.0/16", "reserved"),
        ] {
            let error = choose(Some(net(subnet)), None, &routes).unwrap_err().to_string();
            assert!(error.contains(part) && !error.contains('\n'), "{subnet}: {error}");
            assert!(error.contains("--gwbridge-subnet"), "{error}");
        }
        assert_eq!(choose(Some(net("10.0.0.0/29")), None, &routes).unwrap(), net("10.0.0.0/29"));
    }
}
