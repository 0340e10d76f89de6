//! The `ovnet-vx` device: the kernel's own path beside ours.
//!
//! A vxlan device in `external` mode, with no VNI of its own. Its UDP socket is what makes the
//! kernel merge packets inside the tunnel before our program sees them (GRO looks the socket up),
//! registers the port with the card, and accepts path-MTU errors for any VNI; the device itself
//! carries what the fast path passes on.

use anyhow::{Context as _, Result, bail};
use netlink_packet_route::link::{
    InfoData, InfoKind, InfoVxlan, LinkAttribute, LinkFlags, LinkInfo, LinkMessage,
};
use nix::errno::Errno;
use rtnetlink::{LinkMessageBuilder, LinkVxlan};

use super::{
    Link, Net, Offload,
    link::{is, mtu_of, name_of, plain},
    offload,
};
use crate::repairs::{Repair, Repairs};

/// Name of the device.
pub const EXTERNAL: &str = "ovnet-vx";

/// The largest packet that fits an IPv4 packet with 50 bytes around it. The path's real MTU is
/// found by the outer packet's own route, so the device must not be what limits it.
const MTU: u32 = 65_535 - 50;

impl Net {
    /// Makes sure that [`EXTERNAL`] is there, up, on that UDP port, and as it must be; what was not
    /// is added to `found`. Idempotent; a device of the name with other parameters is made anew,
    /// under another ifindex.
    pub async fn ensure_external(&self, port: u16, found: &mut Repairs) -> Result<Link> {
        self.try_ensure_external(port, found)
            .await
            .with_context(|| format!("make the vxlan device {EXTERNAL} on UDP port {port}"))?;
        match self.link(EXTERNAL).await? {
            Some(link) => Ok(link),
            None => bail!("{EXTERNAL} was deleted by someone as soon as it was made"),
        }
    }

    async fn try_ensure_external(&self, port: u16, found: &mut Repairs) -> Result<()> {
        let space = self.space();
        let present = match space.link_message(EXTERNAL).await? {
            Some(message) if is_wanted(&message, port) => Some(message),
            Some(message) => {
                tracing::warn!("{EXTERNAL} is not as it must be, so it is made anew");
                space.delete(message.header.index, EXTERNAL).await?;
                None
            }
            None => None,
        };
        let made = present.is_none();
        let message = match present {
            Some(message) => message,
            None => self.create_external(port).await?,
        };
        let index = message.header.index;
        let set = async {
            let ipv6 = space.disable_ipv6(EXTERNAL).await?;
            found.add_if(Repair::Sysctl, ipv6 && !made);
            let merges = offload::read(&space.control, EXTERNAL)?.gro;
            if !merges {
                offload::set(&space.control, EXTERNAL, Offload::Gro, true)?;
            }
            // The kernel gives a device without a lower one 1500, whatever was asked at creation,
            // where it is old; what it allows it may refuse to raise, which costs only size.
            if mtu_of(&message) != Some(MTU)
                && let Err(error) = space.set_mtu(index, EXTERNAL, MTU).await
            {
                tracing::debug!("{error:#}");
            }
            let up = message.header.flags.contains(LinkFlags::Up);
            if !up {
                self.external_up(index, port).await?;
            }
            found.add_if(Repair::ExternalDevice, made || !merges || !up);
            anyhow::Ok(())
        };
        let result = set.await;
        if result.is_err() && made {
            // Nothing half made stays; the next try starts from nothing.
            space.delete(index, EXTERNAL).await?;
        }
        result
    }

    async fn create_external(&self, port: u16) -> Result<LinkMessage> {
        let device = LinkMessageBuilder::<LinkVxlan>::new(EXTERNAL)
            .append_info_data(InfoVxlan::CollectMetadata(true))
            .append_info_data(InfoVxlan::Port(port))
            .append_info_data(InfoVxlan::Learning(false))
            // The outer UDP checksum is zero; over IPv4 the kernel always takes that, over IPv6
            // only when told to.
            .append_info_data(InfoVxlan::UDPZeroCsumTX(true))
            .append_info_data(InfoVxlan::UDPZeroCsumRX(true))
            .mtu(MTU)
            .build();
        match self.space().rtnetlink.link().add(device).execute().await {
            Ok(()) => {}
            Err(error) if is(&error, Errno::EEXIST) => return self.port_taken(port).await,
            Err(error) if is(&error, Errno::EOPNOTSUPP) => {
                bail!("the kernel has no vxlan devices: load the module with `modprobe vxlan`")
            }
            Err(error) => return Err(plain(error)),
        }
        self.space().link_message(EXTERNAL).await?.context("it was deleted as soon as it was made")
    }

    /// The socket is bound only when the device goes up, so here is where a taken port shows.
    async fn external_up(&self, index: u32, port: u16) -> Result<()> {
        let Err(error) = self.space().set_up(index, EXTERNAL).await else { return Ok(()) };
        let errno = error.downcast_ref::<std::io::Error>().and_then(std::io::Error::raw_os_error);
        let taken = [Errno::EADDRINUSE, Errno::EEXIST];
        if errno.is_some_and(|errno| taken.contains(&Errno::from_raw(errno))) {
            return self.port_taken(port).await;
        }
        Err(error)
    }

    async fn port_taken<T>(&self, port: u16) -> Result<T> {
        let others = self.vxlan_devices(port).await?;
        match others.first() {
            Some(other) => bail!(
                "the port belongs to the vxlan device {other}: remove that device (`ip link delete \
                 {other}`) or give all hosts another port with --vxlan-port"
            ),
            None => bail!(
                "another program has bound the port (`ss -ulpn 'sport = :{port}'` shows which): \
                 stop it or give all hosts another port with --vxlan-port"
            ),
        }
    }

    /// Names of the vxlan devices on a UDP port, [`EXTERNAL`] left out.
    pub async fn vxlan_devices(&self, port: u16) -> Result<Vec<String>> {
        let messages = self.space().link_messages().await?;
        Ok(messages
            .iter()
            .filter(|message| {
                vxlan(message).is_some_and(|info| info.contains(&InfoVxlan::Port(port)))
            })
            .map(name_of)
            .filter(|name| name != EXTERNAL)
            .collect())
    }
}

/// The parameters of a vxlan device; `None` for any other.
fn vxlan(message: &LinkMessage) -> Option<&[InfoVxlan]> {
    let infos = message.attributes.iter().find_map(|attribute| match attribute {
        LinkAttribute::LinkInfo(infos) => Some(infos),
        _ => None,
    })?;
    if !infos.contains(&LinkInfo::Kind(InfoKind::Vxlan)) {
        return None;
    }
    infos.iter().find_map(|info| match info {
        LinkInfo::Data(InfoData::Vxlan(parameters)) => Some(parameters.as_slice()),
        _ => None,
    })
}

fn is_wanted(message: &LinkMessage, port: u16) -> bool {
    let Some(parameters) = vxlan(message) else { return false };
    let wanted = [
        InfoVxlan::CollectMetadata(true),
        InfoVxlan::Port(port),
        InfoVxlan::Learning(false),
        InfoVxlan::UDPZeroCsumRX(true),
    ];
    // Bound to one interface or speaking a dialect, it would not take what others send.
    let unwanted = |parameter: &InfoVxlan| {
        matches!(parameter, InfoVxlan::Gbp | InfoVxlan::Gpe | InfoVxlan::Vnifilter(true))
            || matches!(parameter, InfoVxlan::Link(index) if *index != 0)
    };
    wanted.iter().all(|one| parameters.contains(one)) && !parameters.iter().any(unwanted)
}
