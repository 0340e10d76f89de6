//! Endpoints' veth pairs.

use std::{
    net::Ipv4Addr,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, bail};
use ipnet::Ipv4Net;
use netlink_packet_route::link::{InfoData, InfoVeth, LinkAttribute, LinkMessage};
use nix::errno::Errno;
use rtnetlink::{LinkUnspec, LinkVeth};

use super::{
    Net, Offload, Offloads,
    link::{check_name, is, mtu_of, name_of, plain},
    netns::{Namespace, Space},
    offload,
    undo::{Undo, random_mac},
};
use crate::repairs::{Repair, Repairs};

/// What a veth pair is to be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VethSpec {
    /// Name of the end that stays on the host.
    pub host_ifname: String,
    /// Path of the sandbox's network namespace.
    pub netns: PathBuf,
    /// Name of the sandbox's end; the first free `eth<n>` where absent.
    pub ifname: Option<String>,
    /// Hardware address of the sandbox's end.
    pub mac: [u8; 6],
    /// Address of the sandbox's end, with the prefix of the network.
    pub address: Ipv4Net,
    /// MTU of both ends in bytes.
    pub mtu: u32,
    /// Offloads of the sandbox's end.
    pub offloads: SandboxOffloads,
}

/// A veth pair to be made whose inner end is moved into its sandbox by Docker.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LooseVeth {
    /// Name of the end that stays on the host.
    pub host_ifname: String,
    /// Name of the other end until it is moved.
    pub inner_ifname: String,
    /// MAC of the inner end.
    pub mac: [u8; 6],
    /// MTU of both ends in bytes.
    pub mtu: u32,
}

/// Offloads of a sandbox's end of the pair.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SandboxOffloads {
    /// GRO: merges what XDP redirects in, and without it the kernel drops every such packet (veth
    /// then has no NAPI, and `veth_xdp_xmit` answers -ENXIO).
    pub gro: bool,
    /// Transmit checksum offload. Off where packets meet a native XDP program on a veth: a packet
    /// with CHECKSUM_PARTIAL keeps only its pseudo-header sum when turned into an XDP frame.
    pub tx_checksum: bool,
}

/// A veth pair that was made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Veth {
    /// ifindex of the host's end.
    pub ifindex: u32,
    /// Name of the sandbox's end.
    pub ifname: String,
}

/// Where a pair leads that is a sandbox's way out.
#[derive(Clone, Copy, Debug)]
pub(super) struct WayOut {
    /// ifindex of the bridge that the host's end is to be a port of.
    pub(super) bridge: u32,
    /// The sandbox's default route.
    pub(super) gateway: Ipv4Addr,
}

impl Net {
    /// Makes an endpoint's veth pair: both ends named, with MTU and up, the sandbox's with MAC,
    /// address and offloads, `lo` up beside it, the host's forwarding. Everything is checked before
    /// anything is changed, and on any failure, or when the future is dropped, the pair is deleted.
    ///
    /// The pair is made with the sandbox's end already inside the namespace, so there is no moment
    /// in which it could be left behind on the host. Each end has one queue, as the kernel does by
    /// default: its XDP frames are then merged by one NAPI.
    pub async fn create_veth(&self, spec: &VethSpec) -> Result<Veth> {
        self.create_pair(spec, None).await
    }

    /// As [`Net::create_veth`]; with a way out the host's end is a port of a bridge before it is
    /// up, and the sandbox's default route leads there.
    pub(super) async fn create_pair(
        &self,
        spec: &VethSpec,
        way_out: Option<WayOut>,
    ) -> Result<Veth> {
        let sandbox = self.sandbox(&spec.netns).await?;
        self.check_spec(spec, &sandbox).await?;
        // Given explicitly, so that nothing on the host (udev) finds a random address to change,
        // and so that this pair can be told from one that another made under the same name.
        let host_mac = random_mac();
        let undo = Undo::new(self, &spec.host_ifname, host_mac);
        let made = async {
            let index = self.add_pair(spec, &sandbox, host_mac).await?;
            self.furnish(spec, &sandbox, index, way_out).await
        };
        let made = made.await;
        undo.settle(made.is_ok()).await;
        made.with_context(|| {
            format!("make the veth pair {} of {}", spec.host_ifname, spec.netns.display())
        })
    }

    /// Sets the MTU of both ends of an endpoint's pair, or of neither.
    pub async fn set_endpoint_mtu(&self, host_ifname: &str, netns: &Path, mtu: u32) -> Result<()> {
        let sandbox = self.sandbox(netns).await?;
        let host_end = self.space().link_message(host_ifname).await?;
        let host_end = host_end
            .with_context(|| format!("there is no interface {host_ifname} to set the MTU of"))?;
        let inner_end = self.inner_end(host_ifname, &sandbox).await?;
        let ifname = name_of(&inner_end);
        let mut steps = [(self.space(), host_ifname, host_end), (&sandbox, &ifname, inner_end)];
        // A veth drops what is larger than the receiving end's MTU, so the host's end, which gets
        // what the sandbox sends, must not be the smaller one in between.
        if mtu_of(&steps[0].2).is_some_and(|before| before > mtu) {
            steps.reverse();
        }
        for (done, (space, name, end)) in steps.iter().enumerate() {
            let Err(error) = space.set_mtu(end.header.index, name, mtu).await else { continue };
            for (space, name, end) in &steps[..done] {
                if let Some(before) = mtu_of(end) {
                    space.set_mtu(end.header.index, name, before).await?;
                }
            }
            return Err(error.context(format!("endpoint of {}", netns.display())));
        }
        Ok(())
    }

    /// Brings the host's end to what the programs need: forwarding on (`bpf_fib_lookup` asks for
    /// it), no IPv6, up; what was otherwise is added to `found`. Idempotent; fails where the
    /// interface is gone.
    pub async fn prepare_endpoint_host_side(
        &self,
        ifname: &str,
        found: &mut Repairs,
    ) -> Result<()> {
        let space = self.space();
        let link = space.link_message(ifname).await?;
        let link = link.with_context(|| format!("there is no interface {ifname}"))?;
        found.add_if(Repair::Sysctl, space.forward_ipv4_only(ifname).await?);
        found.add_if(Repair::Veth, space.put_up(&link).await?);
        Ok(())
    }

    /// Sets the offloads of an endpoint inside its sandbox. Idempotent.
    pub async fn set_endpoint_offloads(
        &self,
        host_ifname: &str,
        netns: &Path,
        wanted: SandboxOffloads,
    ) -> Result<()> {
        let sandbox = self.sandbox(netns).await?;
        let ifname = name_of(&self.inner_end(host_ifname, &sandbox).await?);
        set_offloads(&sandbox, &ifname, wanted)
            .with_context(|| format!("inside {}", netns.display()))
    }

    /// The name of an endpoint's interface inside its sandbox; `None` where it is not there.
    pub async fn inner_ifname(&self, host_ifname: &str, netns: &Path) -> Result<Option<String>> {
        let sandbox = self.sandbox(netns).await?;
        Ok(self.inner_end(host_ifname, &sandbox).await.ok().map(|message| name_of(&message)))
    }

    /// Makes a veth pair whose inner end stays on the host, down, until somebody moves it into a
    /// sandbox. Both ends have their MTU, the inner one MAC and offloads, the host's end is ready.
    /// On any failure, or when the future is dropped, the pair is deleted.
    pub async fn create_loose_veth(
        &self,
        wanted: &LooseVeth,
        offloads: SandboxOffloads,
    ) -> Result<()> {
        let LooseVeth { host_ifname, inner_ifname, mac, mtu } = wanted;
        check_name(host_ifname)?;
        check_name(inner_ifname)?;
        let space = self.space();
        let host_mac = random_mac();
        let undo = Undo::new(self, host_ifname, host_mac);
        let made = async {
            let inner = LinkUnspec::new_with_name(inner_ifname).address(mac.to_vec()).mtu(*mtu);
            let pair = LinkVeth::new(host_ifname, inner_ifname)
                .set_info_data(InfoData::Veth(InfoVeth::Peer(inner.build())))
                .address(host_mac.to_vec())
                .mtu(*mtu)
                .build();
            space.rtnetlink.link().add(pair).execute().await.map_err(plain)?;
            set_offloads(space, inner_ifname, offloads)?;
            space.forward_ipv4_only(host_ifname).await?;
            let index = space.index_of(host_ifname).await?;
            space.set_up(index, host_ifname).await
        };
        let made = made.await;
        undo.settle(made.is_ok()).await;
        made.with_context(|| format!("make the veth pair {host_ifname}"))
    }

    /// The end of an endpoint's pair that is inside its sandbox, by its ifindex: whoever is inside
    /// may give it another name.
    pub(super) async fn inner_end(
        &self,
        host_ifname: &str,
        sandbox: &Space,
    ) -> Result<LinkMessage> {
        let host_end = self.space().link_message(host_ifname).await?;
        let inner_index = host_end.as_ref().and_then(peer_index);
        let inner_index = inner_index.with_context(|| format!("there is no veth {host_ifname}"))?;
        let inner_end = sandbox.link_message_at(inner_index).await?;
        let back = host_end.as_ref().map(|it| it.header.index);
        inner_end
            .filter(|it| peer_index(it) == back)
            .with_context(|| format!("the other end of {host_ifname} is not in its sandbox"))
    }

    /// The offloads of an interface inside a sandbox.
    pub async fn endpoint_offloads(&self, netns: &Path, ifname: &str) -> Result<Offloads> {
        let sandbox = self.sandbox(netns).await?;
        offload::read(&sandbox.control, ifname)
            .with_context(|| format!("inside {}", netns.display()))
    }

    /// The inside of a sandbox, which must not be the host's own namespace.
    pub(super) async fn sandbox(&self, netns: &Path) -> Result<Space> {
        let namespace = Namespace::open(netns)?;
        if namespace.is(&self.space().namespace)? {
            bail!(
                "{} is the host's own network namespace: an endpoint needs another, as of a \
                 container or made with `ip netns add`",
                netns.display()
            );
        }
        Space::open(namespace).await
    }

    async fn check_spec(&self, spec: &VethSpec, sandbox: &Space) -> Result<()> {
        let shown = spec.netns.display();
        check_name(&spec.host_ifname)?;
        if !(68..=65_535).contains(&spec.mtu) {
            bail!("an MTU of {} bytes is not between 68 and 65535", spec.mtu);
        }
        if spec.mac[0] & 1 != 0 || spec.mac == [0; 6] {
            bail!("the MAC {:02x?} is not one an interface can have", spec.mac);
        }
        if self.space().link_message(&spec.host_ifname).await?.is_some() {
            bail!("there is an interface {} on this host already", spec.host_ifname);
        }
        if let Some(ifname) = &spec.ifname {
            check_name(ifname)?;
            if sandbox.link_message(ifname).await?.is_some() {
                bail!(
                    "there is an interface {ifname} in {shown} already: choose another name with \
                     --ifname"
                );
            }
        }
        let addresses = sandbox.addresses().await?;
        let address = spec.address.addr();
        if let Some((index, ..)) = addresses.iter().find(|(_, _, net)| net.addr() == address) {
            // Another interface may have it as far as the kernel cares, but replies would then
            // leave by whichever comes first.
            let on = sandbox.link_message_at(*index).await?.map(|message| name_of(&message));
            let on = on.unwrap_or_default();
            bail!("the address {address} is on interface {on} in {shown} already");
        }
        Ok(())
    }

    /// Makes the pair; the host's ifindex.
    async fn add_pair(&self, spec: &VethSpec, sandbox: &Space, host_mac: [u8; 6]) -> Result<u32> {
        // The kernel replaces the pattern with the first free number, without a race.
        let ifname = spec.ifname.as_deref().unwrap_or("eth%d");
        let inner = LinkUnspec::new_with_name(ifname)
            .setns_by_fd(sandbox.namespace.raw())
            .address(spec.mac.to_vec())
            .mtu(spec.mtu)
            .build();
        let pair = LinkVeth::new(&spec.host_ifname, ifname)
            .set_info_data(InfoData::Veth(InfoVeth::Peer(inner)))
            .address(host_mac.to_vec())
            .mtu(spec.mtu)
            .build();
        match self.space().rtnetlink.link().add(pair).execute().await {
            Ok(()) => {}
            Err(error) if is(&error, Errno::EEXIST) => bail!(
                "an interface {} on this host or {ifname} in {} was made by another in this \
                 moment: try again",
                spec.host_ifname,
                spec.netns.display()
            ),
            Err(error) if is(&error, Errno::EOPNOTSUPP) => {
                bail!("the kernel has no veth devices: load the module with `modprobe veth`")
            }
            Err(error) => {
                return Err(plain(error))
                    .with_context(|| format!("make the veth pair {}", spec.host_ifname));
            }
        }
        self.space().index_of(&spec.host_ifname).await
    }

    async fn furnish(
        &self,
        spec: &VethSpec,
        sandbox: &Space,
        index: u32,
        way_out: Option<WayOut>,
    ) -> Result<Veth> {
        let space = self.space();
        // The end inside is found by number: its name is not known yet where the kernel chose it.
        let host_end = space.link_message_at(index).await?;
        let inner_index = host_end.as_ref().and_then(peer_index).context("it has no other end")?;
        let inner_end = sandbox.link_message_at(inner_index).await?;
        let ifname = inner_end.as_ref().map(name_of).context("its other end is gone")?;

        // Before it is up: packets must not leave with settings that the path cannot carry.
        set_offloads(sandbox, &ifname, spec.offloads)?;
        sandbox.disable_ipv6(&ifname).await?;
        space.forward_ipv4_only(&spec.host_ifname).await?;

        let address = spec.address;
        sandbox
            .rtnetlink
            .address()
            .add(inner_index, address.addr().into(), address.prefix_len())
            .execute()
            .await
            .map_err(plain)
            .with_context(|| format!("give {address} to interface {ifname}"))?;
        if let Some(WayOut { bridge, .. }) = way_out {
            space.make_isolated_port(index, bridge, &spec.host_ifname).await?;
        }
        space.set_up(index, &spec.host_ifname).await?;
        sandbox.set_up(inner_index, &ifname).await?;
        if let Some(WayOut { gateway, .. }) = way_out {
            sandbox.add_default_route(inner_index, gateway).await?;
        }
        // Last, because it is the one thing that deleting the pair would not take back.
        let loopback = sandbox.index_of("lo").await?;
        sandbox.set_up(loopback, "lo").await?;
        Ok(Veth { ifindex: index, ifname })
    }
}

pub(super) fn set_offloads(sandbox: &Space, ifname: &str, wanted: SandboxOffloads) -> Result<()> {
    let SandboxOffloads { gro, tx_checksum } = wanted;
    offload::set(&sandbox.control, ifname, Offload::Gro, gro)?;
    offload::set(&sandbox.control, ifname, Offload::TxChecksum, tx_checksum)
}

/// `IFLA_LINK` of a veth: the other end's ifindex in its own namespace.
pub(super) fn peer_index(message: &LinkMessage) -> Option<u32> {
    message.attributes.iter().find_map(|attribute| match attribute {
        LinkAttribute::Link(index) => Some(*index),
        _ => None,
    })
}
