//! A sandbox's port of a gwbridge: its way out, and where published ports lead in.

use std::{
    net::Ipv4Addr,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, bail};
use ipnet::Ipv4Net;
use netlink_packet_route::{
    link::{LinkAttribute, LinkMessage},
    route::{RouteAttribute, RouteMessage, RouteType},
};

use super::{
    Net, SandboxOffloads, VethSpec,
    gwbridge::port_of,
    link::name_of,
    netns::Space,
    veth::{WayOut, peer_index},
};
use crate::{
    consul::schema::format_mac,
    repairs::{Repair, Repairs},
    state::GatewayPort,
};

/// What a gateway port is to be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GatewaySpec {
    /// Name of the bridge, which must be there.
    pub bridge: String,
    /// Name of the end that stays on the host and becomes a port of the bridge.
    pub host_ifname: String,
    /// Path of the sandbox's network namespace.
    pub netns: PathBuf,
    /// Name of the sandbox's end; the first free `eth<n>` where absent.
    pub ifname: Option<String>,
    /// Hardware address of the sandbox's end.
    pub mac: [u8; 6],
    /// Address of the sandbox's end, with the prefix of the bridge's subnet.
    pub address: Ipv4Net,
    /// The bridge's address: the sandbox's default route.
    pub gateway: Ipv4Addr,
    /// MTU of both ends in bytes.
    pub mtu: u32,
    /// Offloads of the sandbox's end.
    pub offloads: SandboxOffloads,
}

impl GatewaySpec {
    /// The pair without what is about the bridge.
    fn pair(&self) -> VethSpec {
        VethSpec {
            host_ifname: self.host_ifname.clone(),
            netns: self.netns.clone(),
            ifname: self.ifname.clone(),
            mac: self.mac,
            address: self.address,
            mtu: self.mtu,
            offloads: self.offloads,
        }
    }
}

impl Net {
    /// Makes a sandbox's way out: a veth pair as [`Net::create_veth`] makes it, whose host end is
    /// an isolated port of the bridge and whose other end has the sandbox's default route. On any failure, or when the future is dropped, the pair is deleted.
    /// A sandbox that has a default route is refused.
    pub async fn create_gateway_port(&self, spec: &GatewaySpec) -> Result<GatewayPort> {
        let bridge = self.space().index_of(&spec.bridge).await?;
        if self.has_default_route(&spec.netns).await? {
            bail!("{} has a default route already, which is its way out", spec.netns.display());
        }
        let way_out = WayOut { bridge, gateway: spec.gateway };
        let veth = self.create_pair(&spec.pair(), Some(way_out)).await?;
        Ok(GatewayPort {
            bridge: spec.bridge.clone(),
            host_ifname: spec.host_ifname.clone(),
            ifname: veth.ifname,
            address: spec.address.addr(),
            mac: format_mac(spec.mac),
        })
    }

    /// Brings a gateway port back to what it was made as: port of its bridge, isolated, both ends
    /// up and with their MTU and offloads, the sandbox's with its MAC and address, and the default
    /// route where the sandbox has none; what was wrong is added to `found`. Idempotent; fails where
    /// one of the ends or the bridge is gone.
    pub async fn repair_gateway_port(&self, spec: &GatewaySpec, found: &mut Repairs) -> Result<()> {
        let repair = async {
            let (space, name) = (self.space(), &spec.host_ifname);
            let bridge = space.index_of(&spec.bridge).await?;
            let host_end = space.link_message(name).await?;
            let host_end = host_end.with_context(|| format!("there is no interface {name}"))?;
            if port_of(&host_end) != Some((bridge, true)) {
                space.make_isolated_port(host_end.header.index, bridge, name).await?;
                found.add(Repair::GatewayPort);
            }
            self.repair_pair(&spec.pair(), Repair::GatewayPort, found).await?;
            let sandbox = self.sandbox(&spec.netns).await?;
            if !default_route(&sandbox).await? {
                let inner = self.inner_end(name, &sandbox).await?;
                sandbox.add_default_route(inner.header.index, spec.gateway).await?;
                found.add(Repair::GatewayPort);
            }
            anyhow::Ok(())
        };
        repair.await.with_context(|| format!("repair the way out of {}", spec.netns.display()))
    }

    /// Deletes a gateway port and what the kernel still knows of its address, which is free then
    /// for another; a port that is gone is no error.
    pub async fn delete_gateway_port(&self, port: &GatewayPort) -> Result<()> {
        self.delete_link(&port.host_ifname).await?;
        // A kernel without connection tracking has nothing to forget, so this is not worth failing.
        match self.forget_connections(port.address).await {
            Ok(0) => {}
            Ok(count) => {
                tracing::debug!(address = %port.address, count, "connections of a sandbox that is gone are forgotten");
            }
            Err(error) => tracing::warn!(error = format!("{error:#}"), "connections may live on"),
        }
        Ok(())
    }

    /// Whether a sandbox has an IPv4 default route in its table `main`; needs root.
    pub async fn has_default_route(&self, netns: &Path) -> Result<bool> {
        let look = async { default_route(&self.sandbox(netns).await?).await };
        look.await.with_context(|| format!("look for a default route in {}", netns.display()))
    }

    /// A sandbox's interface whose other end is a port of the bridge, as Docker gives to its
    /// containers; `None` where there is no such interface, or it has no IPv4 address yet.
    pub async fn find_gateway_port(
        &self,
        netns: &Path,
        bridge: &str,
    ) -> Result<Option<GatewayPort>> {
        let Some(bridge_link) = self.space().link_message(bridge).await? else { return Ok(None) };
        let sandbox = self.sandbox(netns).await?;
        let inside = sandbox.link_messages().await?;
        for port in self.space().link_messages().await? {
            if port_of(&port).is_none_or(|(of, _)| of != bridge_link.header.index) {
                continue;
            }
            let is_other_end = |end: &&LinkMessage| {
                peer_index(end) == Some(port.header.index)
                    && peer_index(&port) == Some(end.header.index)
            };
            let Some(end) = inside.iter().find(is_other_end) else { continue };
            let addresses = sandbox.addresses().await?;
            let first = addresses.iter().find(|(index, ..)| *index == end.header.index);
            return Ok(first.zip(mac_of(end)).map(|((_, _, address), mac)| GatewayPort {
                bridge: bridge.to_owned(),
                host_ifname: name_of(&port),
                ifname: name_of(end),
                address: address.addr(),
                mac,
            }));
        }
        Ok(None)
    }
}

async fn default_route(sandbox: &Space) -> Result<bool> {
    Ok(sandbox.route_messages().await?.iter().any(is_default))
}

/// Whether a route is a default one of the table `main` that leads somewhere. Those of other tables
/// are for some of the packets only.
fn is_default(route: &RouteMessage) -> bool {
    let table = route.attributes.iter().find_map(|attribute| match attribute {
        RouteAttribute::Table(number) => Some(*number),
        _ => None,
    });
    let table = table.unwrap_or_else(|| u32::from(route.header.table));
    route.header.kind == RouteType::Unicast
        && route.header.destination_prefix_length == 0
        && table == u32::from(libc::RT_TABLE_MAIN)
}

fn mac_of(message: &LinkMessage) -> Option<String> {
    message.attributes.iter().find_map(|attribute| match attribute {
        LinkAttribute::Address(bytes) => Some(format_mac(bytes.as_slice().try_into().ok()?)),
        _ => None,
    })
}
