//! The bridge by which sandboxes reach the world: `ovnet_gwbridge`.
//!
//! Its ports are isolated from each other, so what passes it goes to the host or comes from there,
//! where the table of `firewall` decides and masquerades. Docker's `docker_gwbridge` is only read.

use std::net::Ipv4Addr;

use anyhow::{Context as _, Result, bail};
use ipnet::Ipv4Net;
use netlink_packet_route::{
    address::AddressScope,
    link::{
        BridgeStpState, InfoBridge, InfoBridgePort, InfoData, InfoKind, InfoPortData,
        LinkAttribute, LinkInfo, LinkMessage,
    },
};
use nix::errno::Errno;
use rtnetlink::{
    AddressMessageBuilder, LinkBridge, LinkBridgePort, LinkMessageBuilder, LinkUnspec,
    RouteMessageBuilder,
};

use super::{
    Net,
    link::{is, mtu_of, plain},
    netns::Space,
};
use crate::{
    consul::schema::mac_of,
    repairs::{Repair, Repairs},
};

/// Name of the agent's own bridge.
pub const GWBRIDGE: &str = "ovnet_gwbridge";

/// A bridge that sandboxes have their default route by.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Gwbridge {
    /// ifindex.
    pub index: u32,
    /// Name.
    pub name: String,
    /// Hardware address, which its ports do not change.
    pub mac: [u8; 6],
    /// The sandboxes' gateway, with the prefix of their subnet.
    pub address: Ipv4Net,
}

impl Net {
    /// Makes sure that [`GWBRIDGE`] is there, up, with the first address of the subnet and the MTU
    /// in bytes, and as it must be; what was not is added to `found`. Idempotent. Any other IPv4
    /// address on it is taken away: it is the agent's own, and masquerading would use the first.
    pub async fn ensure_gwbridge(
        &self,
        subnet: Ipv4Net,
        mtu: u32,
        found: &mut Repairs,
    ) -> Result<Gwbridge> {
        self.try_ensure_gwbridge(subnet, mtu, found)
            .await
            .with_context(|| format!("make the bridge {GWBRIDGE} with the subnet {subnet}"))
    }

    async fn try_ensure_gwbridge(
        &self,
        subnet: Ipv4Net,
        mtu: u32,
        found: &mut Repairs,
    ) -> Result<Gwbridge> {
        let space = self.space();
        let first = subnet.hosts().next().context("there is no host address in it")?;
        let address = Ipv4Net::new(first, subnet.prefix_len())?;
        // Of its own, and the same each time it is made: else a bridge takes the smallest of its
        // ports', which changes as they come and go, and sandboxes would send to the old one.
        let mac = mac_of(first);
        let present = space.link_message(GWBRIDGE).await?;
        let made = present.is_none();
        let message = match present {
            Some(message) => message,
            None => self.create_gwbridge(mac).await?,
        };
        if !is_bridge(&message) {
            bail!("there is an interface of that name that is no bridge: ip link delete {GWBRIDGE}")
        }
        let index = message.header.index;
        let mut changed = made;
        changed |= space.put_mac(&message, mac).await?;
        if mtu_of(&message) != Some(mtu) {
            space.set_mtu(index, GWBRIDGE, mtu).await?;
            changed = true;
        }
        if !bridge_info(&message).contains(&InfoBridge::StpState(BridgeStpState::Disabled)) {
            let change = LinkMessageBuilder::<LinkBridge>::new(GWBRIDGE)
                .index(index)
                .stp_state(BridgeStpState::Disabled);
            space.set_link(change).await.context("turn its spanning tree off")?;
            changed = true;
        }
        let sysctl = space.forward_ipv4_only(GWBRIDGE).await?;
        found.add_if(Repair::Sysctl, sysctl && !made);
        changed |= self.give_address(index, address).await?;
        changed |= space.put_up(&message).await?;
        found.add_if(Repair::Gwbridge, changed);
        Ok(Gwbridge { index, name: GWBRIDGE.into(), mac, address })
    }

    /// Lets packets from and to 127.0.0.0/8 pass [`GWBRIDGE`], as a port of the host needs that
    /// leads from 127.0.0.1 to a sandbox, or forbids it. Who sits behind the bridge could then
    /// reach what listens on the host's loopback only, so the firewall must be there before, and
    /// this be taken back where it is not. Idempotent; whether it was otherwise.
    pub async fn route_loopback_to_gwbridge(&self, allowed: bool) -> Result<bool> {
        self.space().route_loopback(GWBRIDGE, allowed).await
    }

    /// A bridge of this host with its first global IPv4 address; `None` where there is no bridge of
    /// that name, or it has no address.
    pub async fn gwbridge(&self, name: &str) -> Result<Option<Gwbridge>> {
        let bridge = self.link(name).await?.filter(|link| link.kind.as_deref() == Some("bridge"));
        Ok(bridge.and_then(|link| {
            let address = *link.addresses.first()?;
            Some(Gwbridge { index: link.index, name: link.name, mac: link.mac, address })
        }))
    }

    /// Every IPv4 address of this host's interfaces that are up, 127.0.0.0/8 left out; sorted.
    pub async fn local_addresses(&self) -> Result<Vec<Ipv4Addr>> {
        let space = self.space();
        let up: Vec<u32> = space
            .link_messages()
            .await?
            .iter()
            .filter(|message| {
                message.header.flags.contains(netlink_packet_route::link::LinkFlags::Up)
            })
            .map(|message| message.header.index)
            .collect();
        let addresses = space.addresses().await?.into_iter();
        let mut addresses: Vec<Ipv4Addr> = addresses
            .filter(|(index, _, address)| up.contains(index) && !address.addr().is_loopback())
            .map(|(_, _, address)| address.addr())
            .collect();
        addresses.sort();
        addresses.dedup();
        Ok(addresses)
    }

    async fn create_gwbridge(&self, mac: [u8; 6]) -> Result<LinkMessage> {
        let space = self.space();
        let bridge = LinkMessageBuilder::<LinkBridge>::new(GWBRIDGE)
            .address(mac.to_vec())
            .stp_state(BridgeStpState::Disabled);
        match space.rtnetlink.link().add(bridge.build()).execute().await {
            Ok(()) => {}
            // Made by another in this moment: it is set right like one that was there before.
            Err(error) if is(&error, Errno::EEXIST) => {}
            Err(error) if is(&error, Errno::EOPNOTSUPP) => {
                bail!("the kernel has no bridges: load the module with `modprobe bridge`")
            }
            Err(error) => return Err(plain(error)),
        }
        space.link_message(GWBRIDGE).await?.context("it was deleted as soon as it was made")
    }

    /// Whether it had another address, or none.
    async fn give_address(&self, index: u32, wanted: Ipv4Net) -> Result<bool> {
        let space = self.space();
        let mut changed = false;
        let addresses = async || -> Result<Vec<(AddressScope, Ipv4Net)>> {
            let all = space.addresses().await?.into_iter();
            Ok(all.filter(|(on, ..)| *on == index).map(|(_, scope, net)| (scope, net)).collect())
        };
        for (_, other) in addresses().await?.into_iter().filter(|(_, net)| *net != wanted) {
            let message = AddressMessageBuilder::<Ipv4Addr>::new()
                .index(index)
                .address(other.addr(), other.prefix_len())
                .build();
            changed = true;
            match space.rtnetlink.address().del(message).execute().await {
                // A secondary one goes with its primary.
                Err(error) if is(&error, Errno::EADDRNOTAVAIL) => {}
                done => done.map_err(plain).with_context(|| format!("take {other} from it"))?,
            }
        }
        // Asked again: what was wanted may have gone with the others.
        if addresses().await?.iter().any(|(_, net)| *net == wanted) {
            return Ok(changed);
        }
        let request =
            space.rtnetlink.address().add(index, wanted.addr().into(), wanted.prefix_len());
        request.execute().await.map_err(plain).with_context(|| format!("give it {wanted}"))?;
        Ok(true)
    }
}

impl Space {
    /// Makes an interface a port of a bridge that exchanges nothing with other isolated ports.
    pub(super) async fn make_isolated_port(
        &self,
        port: u32,
        bridge: u32,
        name: &str,
    ) -> Result<()> {
        let join = LinkUnspec::new_with_index(port).controller(bridge);
        self.set_link(join).await.with_context(|| format!("make {name} a port of a bridge"))?;
        let isolate = LinkBridgePort::new(port).isolated(true);
        self.set_link(isolate).await.with_context(|| format!("isolate the bridge's port {name}"))
    }

    /// Adds a default route to the table `main`.
    pub(super) async fn add_default_route(&self, index: u32, gateway: Ipv4Addr) -> Result<()> {
        let route =
            RouteMessageBuilder::<Ipv4Addr>::new().gateway(gateway).output_interface(index).build();
        let added = self.rtnetlink.route().add(route).execute().await;
        added.map_err(plain).with_context(|| format!("add a default route via {gateway}"))
    }
}

/// The bridge that an interface is a port of, by ifindex, and whether the port is isolated.
pub(super) fn port_of(message: &LinkMessage) -> Option<(u32, bool)> {
    let bridge = message.attributes.iter().find_map(|attribute| match attribute {
        LinkAttribute::Controller(index) => Some(*index),
        _ => None,
    })?;
    let isolated = infos(message).iter().any(|info| match info {
        LinkInfo::PortData(InfoPortData::BridgePort(settings)) => {
            settings.contains(&InfoBridgePort::Isolated(true))
        }
        _ => false,
    });
    Some((bridge, isolated))
}

fn infos(message: &LinkMessage) -> &[LinkInfo] {
    let infos = message.attributes.iter().find_map(|attribute| match attribute {
        LinkAttribute::LinkInfo(infos) => Some(infos.as_slice()),
        _ => None,
    });
    infos.unwrap_or_default()
}

fn is_bridge(message: &LinkMessage) -> bool {
    infos(message).contains(&LinkInfo::Kind(InfoKind::Bridge))
}

fn bridge_info(message: &LinkMessage) -> &[InfoBridge] {
    let settings = infos(message).iter().find_map(|info| match info {
        LinkInfo::Data(InfoData::Bridge(settings)) => Some(settings.as_slice()),
        _ => None,
    });
    settings.unwrap_or_default()
}
