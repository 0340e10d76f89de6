//! Interfaces as the agent sees them, and the small changes made to any of them.

use std::{collections::BTreeMap, net::Ipv4Addr, path::Path};

use anyhow::{Context as _, Result, bail};
use futures::TryStreamExt as _;
use ipnet::Ipv4Net;
use netlink_packet_route::{
    AddressFamily,
    address::{AddressAttribute, AddressMessage, AddressScope},
    link::{LinkAttribute, LinkFlags, LinkInfo, LinkMessage},
    route::{RouteAddress, RouteAttribute, RouteMessage, RouteType},
};
use nix::errno::Errno;
use rtnetlink::{LinkMessageBuilder, LinkUnspec};

use super::{
    Net,
    netns::{Namespace, Space},
    offload,
};

/// An interface of a host.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Link {
    /// ifindex, valid in the interface's namespace only.
    pub index: u32,
    /// Name.
    pub name: String,
    /// `IFLA_INFO_KIND` of a virtual interface: `veth`, `vxlan`, `bridge`, …
    pub kind: Option<String>,
    /// The driver: what ETHTOOL_GDRVINFO says, or the kind of a virtual interface.
    pub driver: Option<String>,
    /// Administratively up (IFF_UP). A cable pulled does not change it.
    pub up: bool,
    /// MTU in bytes, without the Ethernet header.
    pub mtu: u32,
    /// Hardware address; zeros where the interface has none of 6 bytes.
    pub mac: [u8; 6],
    /// IPv4 addresses of global scope with their prefix, in the kernel's order: primary ones
    /// before secondary ones.
    pub addresses: Vec<Ipv4Net>,
    /// IFF_LOOPBACK.
    pub loopback: bool,
    /// ifindex of the bridge or bond that it is a port of.
    pub controller: Option<u32>,
}

impl Net {
    /// Every interface of this host's namespace.
    pub async fn links(&self) -> Result<Vec<Link>> {
        let space = self.space();
        let mut addresses: BTreeMap<u32, Vec<Ipv4Net>> = BTreeMap::new();
        for (index, scope, address) in space.addresses().await? {
            if scope == AddressScope::Universe {
                addresses.entry(index).or_default().push(address);
            }
        }
        let messages = space.link_messages().await?;
        Ok(messages
            .iter()
            .map(|message| {
                let addresses = addresses.remove(&message.header.index).unwrap_or_default();
                space.link_of(message, addresses)
            })
            .collect())
    }

    /// The interface of that name; `None` where there is none.
    pub async fn link(&self, name: &str) -> Result<Option<Link>> {
        let space = self.space();
        let Some(message) = space.link_message(name).await? else { return Ok(None) };
        let index = message.header.index;
        let addresses = space.addresses().await?.into_iter();
        let global =
            addresses.filter(|(of, scope, _)| *of == index && *scope == AddressScope::Universe);
        let addresses = global.map(|(_, _, address)| address).collect();
        Ok(Some(space.link_of(&message, addresses)))
    }

    /// The IPv4 addresses inside another network namespace, loopback's left out; needs root.
    pub async fn addresses_in(&self, netns: &Path) -> Result<Vec<Ipv4Addr>> {
        let addresses = async {
            let inside = Space::open(Namespace::open(netns)?).await?;
            inside.addresses().await
        };
        let addresses =
            addresses.await.with_context(|| format!("look into {}", netns.display()))?;
        let addresses = addresses.into_iter().map(|(_, _, address)| address.addr());
        Ok(addresses.filter(|address| !address.is_loopback()).collect())
    }

    /// Deletes an interface, and with one end of a veth pair the other. One that is not there is
    /// no error.
    pub async fn delete_link(&self, name: &str) -> Result<()> {
        let Some(message) = self.space().link_message(name).await? else { return Ok(()) };
        self.space().delete(message.header.index, name).await
    }

    /// Where this host's routes lead: the destinations of all tables but `local`, default routes
    /// left out, sorted.
    ///
    /// Routes that lead nowhere (blackhole, unreachable, prohibit, throw) are left out too: they
    /// are commonly laid over all of RFC 1918, and no host answers behind them.
    pub async fn routes(&self) -> Result<Vec<Ipv4Net>> {
        let routes = self.space().route_messages().await?;
        let mut destinations: Vec<Ipv4Net> = routes.iter().filter_map(destination).collect();
        destinations.sort();
        destinations.dedup();
        Ok(destinations)
    }
}

/// Where a route leads; `None` for a default route, and for one that leads nowhere or is of the
/// table `local`.
pub(super) fn destination(route: &RouteMessage) -> Option<Ipv4Net> {
    if route.header.kind != RouteType::Unicast || route.header.destination_prefix_length == 0 {
        return None;
    }
    let mut table = u32::from(route.header.table);
    let mut to = None;
    for attribute in &route.attributes {
        match attribute {
            RouteAttribute::Table(number) => table = *number,
            RouteAttribute::Destination(RouteAddress::Inet(address)) => to = Some(*address),
            _ => {}
        }
    }
    if table == u32::from(libc::RT_TABLE_LOCAL) {
        return None;
    }
    Ipv4Net::new(to?, route.header.destination_prefix_length).ok().map(|net| net.trunc())
}

impl Space {
    /// The kernel's messages about all interfaces.
    pub(super) async fn link_messages(&self) -> Result<Vec<LinkMessage>> {
        let _alone = self.dumping().await;
        let links = self.rtnetlink.link().get().execute().try_collect();
        links.await.map_err(plain).context("list the interfaces")
    }

    /// The kernel's messages about the IPv4 routes of all tables.
    pub(super) async fn route_messages(&self) -> Result<Vec<RouteMessage>> {
        let mut wanted = RouteMessage::default();
        wanted.header.address_family = AddressFamily::Inet;
        let _alone = self.dumping().await;
        let routes = self.rtnetlink.route().get(wanted).execute();
        routes.try_collect().await.map_err(plain).context("list the routes")
    }

    /// The kernel's message about an interface by name; `None` where there is none.
    pub(super) async fn link_message(&self, name: &str) -> Result<Option<LinkMessage>> {
        let request = self.rtnetlink.link().get().match_name(name.to_owned());
        first(request.execute().try_next().await)
            .with_context(|| format!("look up interface {name}"))
    }

    /// The kernel's message about an interface by index; `None` where there is none.
    pub(super) async fn link_message_at(&self, index: u32) -> Result<Option<LinkMessage>> {
        let request = self.rtnetlink.link().get().match_index(index);
        first(request.execute().try_next().await)
            .with_context(|| format!("look up the interface with index {index}"))
    }

    /// ifindex of an interface that must be there.
    pub(super) async fn index_of(&self, name: &str) -> Result<u32> {
        match self.link_message(name).await? {
            Some(message) => Ok(message.header.index),
            None => bail!("there is no interface {name}"),
        }
    }

    /// Every IPv4 address with the ifindex it is on and its scope.
    pub(super) async fn addresses(&self) -> Result<Vec<(u32, AddressScope, Ipv4Net)>> {
        let _alone = self.dumping().await;
        let messages: Vec<AddressMessage> = self
            .rtnetlink
            .address()
            .get()
            .execute()
            .try_filter(|message| {
                futures::future::ready(message.header.family == AddressFamily::Inet)
            })
            .try_collect()
            .await
            .map_err(plain)
            .context("list the addresses")?;
        Ok(messages
            .iter()
            .filter_map(|message| {
                let network = Ipv4Net::new(local(message)?, message.header.prefix_len).ok()?;
                Some((message.header.index, message.header.scope, network))
            })
            .collect())
    }

    /// Sets the interface up, without touching anything else.
    pub(super) async fn set_up(&self, index: u32, name: &str) -> Result<()> {
        let up = LinkUnspec::new_with_index(index).up();
        self.set_link(up).await.with_context(|| format!("set interface {name} up"))
    }

    /// Sets the MTU in bytes.
    pub(super) async fn set_mtu(&self, index: u32, name: &str, mtu: u32) -> Result<()> {
        let change = LinkUnspec::new_with_index(index).mtu(mtu);
        self.set_link(change)
            .await
            .with_context(|| format!("set the MTU of interface {name} to {mtu}"))
    }

    /// Changes what the message names of an interface.
    pub(super) async fn set_link<T>(&self, change: LinkMessageBuilder<T>) -> Result<()> {
        self.rtnetlink.link().change(change.build()).execute().await.map_err(plain)
    }

    /// Deletes by index, so that a name taken over by another interface meanwhile is not hit. One
    /// that is not there is no error.
    pub(super) async fn delete(&self, index: u32, name: &str) -> Result<()> {
        match self.rtnetlink.link().del(index).execute().await {
            Err(error) if is(&error, Errno::ENODEV) => Ok(()),
            other => other.map_err(plain).with_context(|| format!("delete interface {name}")),
        }
    }

    fn link_of(&self, message: &LinkMessage, addresses: Vec<Ipv4Net>) -> Link {
        let flags = message.header.flags;
        let mut link = Link {
            index: message.header.index,
            up: flags.contains(LinkFlags::Up),
            loopback: flags.contains(LinkFlags::Loopback),
            name: name_of(message),
            addresses,
            ..Link::default()
        };
        for attribute in &message.attributes {
            match attribute {
                LinkAttribute::Mtu(mtu) => link.mtu = *mtu,
                LinkAttribute::Controller(index) => link.controller = Some(*index),
                LinkAttribute::Address(bytes) => {
                    link.mac = bytes.as_slice().try_into().unwrap_or_default();
                }
                LinkAttribute::LinkInfo(infos) => {
                    link.kind = infos.iter().find_map(|info| match info {
                        LinkInfo::Kind(kind) => Some(kind.to_string()),
                        _ => None,
                    });
                }
                _ => {}
            }
        }
        // Asked only of what has no kind: it is one more call per interface, and a virtual
        // interface's driver is its kind in all but spelling.
        link.driver = link.kind.clone().or_else(|| offload::driver(&self.control, &link.name));
        link
    }
}

/// The address itself: `IFA_LOCAL`, which differs from `IFA_ADDRESS` on a point-to-point link.
fn local(message: &AddressMessage) -> Option<Ipv4Addr> {
    let mut address = None;
    for attribute in &message.attributes {
        match attribute {
            AddressAttribute::Local(std::net::IpAddr::V4(local)) => return Some(*local),
            AddressAttribute::Address(std::net::IpAddr::V4(other)) => address = Some(*other),
            _ => {}
        }
    }
    address
}

/// Name in a link message.
pub(super) fn name_of(message: &LinkMessage) -> String {
    let name = message.attributes.iter().find_map(|attribute| match attribute {
        LinkAttribute::IfName(name) => Some(name.clone()),
        _ => None,
    });
    name.unwrap_or_default()
}

/// MTU in a link message, in bytes.
pub(super) fn mtu_of(message: &LinkMessage) -> Option<u32> {
    message.attributes.iter().find_map(|attribute| match attribute {
        LinkAttribute::Mtu(mtu) => Some(*mtu),
        _ => None,
    })
}

fn first(found: Result<Option<LinkMessage>, rtnetlink::Error>) -> Result<Option<LinkMessage>> {
    match found {
        Err(error) if is(&error, Errno::ENODEV) => Ok(None),
        other => other.map_err(plain),
    }
}

/// Whether the kernel answered with that error.
pub(super) fn is(error: &rtnetlink::Error, errno: Errno) -> bool {
    match error {
        rtnetlink::Error::NetlinkError(message) => {
            message.code.is_some_and(|code| code.get() == -(errno as i32))
        }
        _ => false,
    }
}

/// The error as the operating system words it, "File exists (os error 17)", instead of as a dump
/// of the message.
pub(super) fn plain(error: rtnetlink::Error) -> anyhow::Error {
    match error {
        rtnetlink::Error::NetlinkError(message) => match message.to_io() {
            io if io.kind() == std::io::ErrorKind::PermissionDenied => {
                anyhow::Error::new(io).context("this needs root (CAP_NET_ADMIN)")
            }
            io => io.into(),
        },
        other => other.into(),
    }
}

/// Refuses a name that the kernel would (`dev_valid_name`, net/core/dev.c), and `%`, which it
/// would take as a pattern.
pub(super) fn check_name(name: &str) -> Result<()> {
    if name.is_empty() || name == "." || name == ".." {
        bail!("'{name}' is no interface name");
    }
    if name.len() > 15 {
        bail!("the interface name '{name}' has {} bytes, and 15 is the most", name.len());
    }
    let wrong = |c: char| c == '/' || c == ':' || c == '%' || c.is_whitespace() || c.is_control();
    if let Some(c) = name.chars().find(|&c| wrong(c)) {
        bail!("the interface name '{}' has {c:?} in it, which is not allowed", name.escape_debug());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_those_the_kernel_takes() {
        for good in ["eth0", "ovnet01234567", "fifteen-bytes-x", "a.100", "é"] {
            check_name(good).unwrap_or_else(|error| panic!("{good}: {error}"));
        }
        for (wrong, why) in [
            ("", "no interface name"),
            ("..", "no interface name"),
            ("sixteen-bytes-xx", "16 bytes"),
            ("a/b", "'/'"),
            ("a b", "' '"),
            ("eth%d", "'%'"),
            ("a:0", "':'"),
            ("a\n", "\\n"),
        ] {
            let error = check_name(wrong).unwrap_err().to_string();
            assert!(error.contains(why), "{wrong:?}: {error}");
        }
    }

    #[test]
    fn only_destinations_that_lead_somewhere_count() {
        let route = |kind, table: u32, address: [u8; 4], length| {
            let mut message = RouteMessage::default();
            message.header.kind = kind;
            message.header.destination_prefix_length = length;
            message.attributes.push(RouteAttribute::Table(table));
            message
                .attributes
                .push(RouteAttribute::Destination(RouteAddress::Inet(address.into())));
            destination(&message).map(|net| net.to_string())
        };
        let yes = |net: &str| Some(net.to_owned());
        assert_eq!(route(RouteType::Unicast, 254, [10, 1, 0, 0], 16), yes("10.1.0.0/16"));
        assert_eq!(route(RouteType::Unicast, 1000, [10, 1, 0, 9], 16), yes("10.1.0.0/16"));
        assert_eq!(route(RouteType::Unicast, 255, [10, 1, 0, 0], 16), None);
        assert_eq!(route(RouteType::Local, 255, [10, 1, 0, 1], 32), None);
        assert_eq!(route(RouteType::BlackHole, 254, [10, 0, 0, 0], 8), None);
        assert_eq!(route(RouteType::Unicast, 254, [0, 0, 0, 0], 0), None);
    }
}
