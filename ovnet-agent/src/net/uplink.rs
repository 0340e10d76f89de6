//! Which interface and address `--advertise` means.

use std::net::{IpAddr, Ipv4Addr};

use anyhow::{Context as _, Result, bail};

use super::{Link, Net};

/// The interface that carries the VTEP address, and that address.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Uplink {
    /// The interface.
    pub link: Link,
    /// The VTEP address of this host.
    pub address: Ipv4Addr,
}

impl Net {
    /// What `--advertise` means now: an interface with exactly one global IPv4 address, or an IPv4
    /// address of an interface. An interface that is missing or down, has no address, or has
    /// several and so leaves the choice open, is an error of one line.
    pub async fn uplink(&self, advertise: &str) -> Result<Uplink> {
        Uplink::among(&self.links().await?, advertise)
    }
}

impl Uplink {
    /// As [`Net::uplink`], among these interfaces.
    pub fn among(links: &[Link], advertise: &str) -> Result<Self> {
        resolve(advertise, links).with_context(|| format!("cannot advertise '{advertise}'"))
    }

    /// The uplink under the name that it was given meanwhile; `None` where it has its old one, is
    /// gone, or has lost its address.
    pub fn renamed(&self, links: &[Link]) -> Option<Self> {
        let link = links.iter().find(|link| link.index == self.link.index)?;
        let taken = links.iter().any(|link| link.name == self.link.name);
        let has_address = link.addresses.iter().any(|net| net.addr() == self.address);
        let usable = !taken && link.up && has_address;
        usable.then(|| Self { link: link.clone(), address: self.address })
    }
}

fn resolve(advertise: &str, links: &[Link]) -> Result<Uplink> {
    let (link, address) = match advertise.parse() {
        Ok(IpAddr::V4(address)) => (by_address(address, links)?, address),
        Ok(IpAddr::V6(_)) => bail!(
            "hosts speak IPv4 to each other in this version: give an IPv4 \
                                    address or an interface that has one"
        ),
        Err(_) => by_name(advertise, links)?,
    };
    reachable(link)?;
    Ok(Uplink { link: link.clone(), address })
}

/// Whether packets of other hosts can come by the interface.
fn reachable(link: &Link) -> Result<()> {
    let name = &link.name;
    if link.loopback {
        bail!(
            "{name} is the loopback interface, which other hosts cannot reach: give the interface \
               that leads to them"
        );
    }
    if !link.up {
        bail!("interface {name} is down: bring it up with `ip link set {name} up`");
    }
    Ok(())
}

fn by_address(address: Ipv4Addr, links: &[Link]) -> Result<&Link> {
    if address.is_loopback() {
        bail!("{address} is a loopback address, which other hosts cannot reach: give one they can");
    }
    let mut having =
        links.iter().filter(|link| link.addresses.iter().any(|net| net.addr() == address));
    // The same address may be on a dummy or on `lo` too, as routing daemons like it; the interface
    // that packets can come by is the one meant.
    let usable = |link: &&Link| link.up && !link.loopback;
    match having.clone().find(usable).or_else(|| having.next()) {
        Some(link) => Ok(link),
        None => bail!("no interface of this host has the address; those it has are {}", all(links)),
    }
}

fn by_name<'a>(name: &str, links: &'a [Link]) -> Result<(&'a Link, Ipv4Addr)> {
    let Some(link) = links.iter().find(|link| link.name == name) else {
        let mut names: Vec<&str> = links
            .iter()
            .filter(|link| !link.loopback && !link.addresses.is_empty())
            .map(|link| link.name.as_str())
            .collect();
        names.sort_unstable();
        if names.is_empty() {
            bail!("there is no such interface, and no other has a global IPv4 address");
        }
        bail!("there is no such interface; those with an IPv4 address are {}", names.join(", "));
    };
    // Said first: an interface that is down often has no address for that very reason.
    reachable(link)?;
    match link.addresses.as_slice() {
        [] => bail!(
            "interface {name} has no global IPv4 address: give it one (`ip address add`) or \
             advertise another interface"
        ),
        [one] => Ok((link, one.addr())),
        several => {
            let addresses: Vec<String> = several.iter().map(|net| net.addr().to_string()).collect();
            bail!(
                "interface {name} has {} global IPv4 addresses ({}): give the one meant, as in \
                 `--advertise {}`",
                several.len(),
                addresses.join(", "),
                addresses[0]
            )
        }
    }
}

fn all(links: &[Link]) -> String {
    let addresses: Vec<String> = links
        .iter()
        .filter(|link| !link.loopback)
        .flat_map(|link| link.addresses.iter().map(|net| format!("{} ({})", net.addr(), link.name)))
        .collect();
    if addresses.is_empty() { "none".into() } else { addresses.join(", ") }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn link(name: &str, up: bool, addresses: &[&str]) -> Link {
        Link {
            name: name.into(),
            up,
            loopback: name == "lo",
            addresses: addresses.iter().map(|address| address.parse().unwrap()).collect(),
            ..Link::default()
        }
    }

    fn host() -> Vec<Link> {
        vec![
            link("lo", true, &["192.168.7.7/32"]),
            link("ens33", true, &["192.168.1.11/24"]),
            link("two", true, &["10.1.0.1/24", "10.1.0.2/24"]),
            link("none", true, &[]),
            link("down", false, &["10.2.0.1/24"]),
            link("bare", false, &[]),
            link("dummy", true, &["192.168.7.7/32"]),
        ]
    }

    #[test]
    fn an_interface_or_an_address_gives_both() {
        let host = host();
        for (given, name, address) in [
            ("ens33", "ens33", [192, 168, 1, 11]),
            ("192.168.1.11", "ens33", [192, 168, 1, 11]),
            ("10.1.0.2", "two", [10, 1, 0, 2]),
            ("192.168.7.7", "dummy", [192, 168, 7, 7]),
        ] {
            let uplink = resolve(given, &host).unwrap();
            assert_eq!((uplink.link.name.as_str(), uplink.address), (name, address.into()));
        }
    }

    #[test]
    fn an_uplink_is_known_by_another_name() {
        let uplink = resolve("ens33", &host()).unwrap();
        assert_eq!(uplink.renamed(&host()), None, "it has its name");
        let mut links = host();
        links[1].index = 7;
        let uplink = Uplink { link: links[1].clone(), ..uplink };
        links[1].name = "lan0".into();
        assert_eq!(uplink.renamed(&links).unwrap().link.name, "lan0");
        links[1].addresses.clear();
        assert_eq!(uplink.renamed(&links), None, "without its address");
        links.remove(1);
        assert_eq!(uplink.renamed(&links), None, "gone");
    }

    #[test]
    fn every_other_choice_says_what_is_wrong_and_what_to_do() {
        let host = host();
        for (given, parts) in [
            ("ens34", &["no such interface", "dummy, ens33, two"][..]),
            ("two", &["2 global IPv4 addresses", "10.1.0.1, 10.1.0.2", "--advertise 10.1.0.1"]),
            ("none", &["no global IPv4 address", "ip address add"]),
            ("down", &["is down", "ip link set down up"]),
            ("bare", &["is down"]),
            ("10.2.0.1", &["is down"]),
            ("lo", &["loopback"]),
            ("127.0.0.1", &["loopback"]),
            ("10.9.9.9", &["no interface of this host", "192.168.1.11 (ens33)"]),
            ("fd00::1", &["IPv4"]),
        ] {
            let error = format!("{:#}", resolve(given, &host).unwrap_err());
            for part in parts {
                assert!(error.contains(part), "{given}: {error}");
            }
        }
        assert!(resolve("x", &[]).unwrap_err().to_string().contains("no other has"));
    }
}
