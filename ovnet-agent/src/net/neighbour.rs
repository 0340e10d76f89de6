//! Keeps the neighbours fresh that the programs send to.
//!
//! The fast path takes a next hop's MAC from the FIB lookup and never passes the neighbour layer,
//! so nothing there would notice that an entry has grown stale or that the MAC changed, and an
//! unused one would be collected. Entries with `NTF_EXT_MANAGED` (Linux 5.16) the kernel resolves
//! and confirms by itself, with or without the agent.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, Ipv4Addr},
};

use anyhow::{Context as _, Result};
use futures::TryStreamExt as _;
use netlink_packet_route::{
    AddressFamily,
    neighbour::{
        NeighbourAddress, NeighbourAttribute, NeighbourExtFlags, NeighbourMessage, NeighbourState,
    },
    route::{RouteAddress, RouteAttribute, RouteMessage, RouteProtocol, RouteType},
};
use rtnetlink::RouteMessageBuilder;

use super::{Net, link::plain};

/// `NDA_PROTOCOL` of our entries, by which `ip neigh` and a clean-up tell them from others'. Of the
/// range `linux/rtnetlink.h` leaves to users; the number is that of the letter O.
const PROTOCOL: RouteProtocol = RouteProtocol::Other(79);

/// Where a packet for a host leaves: ifindex and next hop.
pub type Hop = (u32, Ipv4Addr);

/// What [`Net::keep_neighbours`] found and did.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Neighbours {
    /// The next hops that the kernel keeps resolved.
    pub kept: BTreeSet<Hop>,
    /// Those of them that it had to be told of.
    pub entered: BTreeSet<Hop>,
}

impl Net {
    /// Has the kernel keep the next hops towards these addresses resolved. Entries an operator
    /// made permanent stay as they are; ours that lead to none of the addresses go. Idempotent.
    ///
    /// With several next hops (ECMP) it is the one the kernel chooses for the address alone. The
    /// others are resolved by the slow path when first needed; nothing confirms them after that.
    pub async fn keep_neighbours(&self, addresses: &BTreeSet<Ipv4Addr>) -> Result<Neighbours> {
        let mut hops = BTreeSet::new();
        for address in addresses {
            hops.extend(self.hop(*address).await);
        }
        let found = self.neighbours().await?;
        let mut result = Neighbours { kept: hops.clone(), ..Neighbours::default() };
        for hop in &hops {
            if found.get(hop).is_none_or(|entry| !entry.settled) {
                if self.manage(*hop).await {
                    result.entered.insert(*hop);
                } else {
                    result.kept.remove(hop);
                }
            }
        }
        for (hop, entry) in found {
            if entry.ours && !hops.contains(&hop) {
                self.forget(entry.message).await?;
            }
        }
        Ok(result)
    }

    /// The next hop towards an address; `None` where there is no route, or none over Ethernet.
    async fn hop(&self, address: Ipv4Addr) -> Option<Hop> {
        let question =
            RouteMessageBuilder::<Ipv4Addr>::new().destination_prefix(address, 32).build();
        let answer = self.space().rtnetlink.route().get(question).execute().try_next().await;
        let route: RouteMessage = answer.ok().flatten()?;
        if route.header.kind != RouteType::Unicast {
            return None;
        }
        let (mut interface, mut gateway) = (None, address);
        for attribute in &route.attributes {
            match attribute {
                RouteAttribute::Oif(index) => interface = Some(*index),
                RouteAttribute::Gateway(RouteAddress::Inet(address)) => gateway = *address,
                _ => {}
            }
        }
        Some((interface?, gateway))
    }

    async fn neighbours(&self) -> Result<BTreeMap<Hop, Entry>> {
        let _alone = self.space().dumping().await;
        let request =
            self.space().rtnetlink.neighbours().get().set_address_family(AddressFamily::Inet);
        let messages: Vec<NeighbourMessage> =
            request.execute().try_collect().await.map_err(plain).context("list the neighbours")?;
        Ok(messages.into_iter().filter_map(Entry::of).collect())
    }

    /// Whether the kernel takes the entry.
    async fn manage(&self, (interface, hop): Hop) -> bool {
        let neighbours = self.space().rtnetlink.neighbours();
        let mut request =
            neighbours.add(interface, IpAddr::V4(hop)).state(NeighbourState::None).replace();
        request.message_mut().attributes.extend([
            NeighbourAttribute::ExtFlags(NeighbourExtFlags::Managed),
            NeighbourAttribute::Protocol(PROTOCOL),
        ]);
        match request.execute().await {
            // An interface without neighbours, or a kernel before 5.16: the slow path resolves.
            Err(error) => {
                tracing::debug!(%hop, %error, "a next hop is not kept resolved");
                false
            }
            Ok(()) => {
                tracing::debug!(%hop, "a next hop is kept resolved");
                true
            }
        }
    }

    async fn forget(&self, message: NeighbourMessage) -> Result<()> {
        // One that went by itself meanwhile is no error.
        if let Err(error) = self.space().rtnetlink.neighbours().del(message).execute().await {
            tracing::debug!(%error, "a neighbour entry of ours could not be removed");
        }
        Ok(())
    }
}

struct Entry {
    /// Permanent, or managed already.
    settled: bool,
    /// Made by us.
    ours: bool,
    message: NeighbourMessage,
}

impl Entry {
    fn of(message: NeighbourMessage) -> Option<(Hop, Self)> {
        let mut address = None;
        let state = message.header.state;
        let mut settled = matches!(state, NeighbourState::Permanent | NeighbourState::Noarp);
        let mut ours = false;
        for attribute in &message.attributes {
            match attribute {
                NeighbourAttribute::Destination(NeighbourAddress::Inet(to)) => address = Some(*to),
                NeighbourAttribute::ExtFlags(flags) => {
                    settled |= flags.contains(NeighbourExtFlags::Managed);
                }
                NeighbourAttribute::Protocol(protocol) => ours |= *protocol == PROTOCOL,
                _ => {}
            }
        }
        Some(((message.header.ifindex, address?), Self { settled, ours, message }))
    }
}
