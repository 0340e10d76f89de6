//! Puts an endpoint's veth pair back to what it was made as.

use std::{io, os::fd::AsRawFd as _, path::Path};

use anyhow::{Context as _, Result};
use ipnet::Ipv4Net;
use netlink_packet_route::link::{LinkAttribute, LinkFlags, LinkMessage};
use nix::{
    errno::Errno,
    sys::statfs::{NSFS_MAGIC, statfs},
};
use rtnetlink::LinkUnspec;

use super::{
    Net, SandboxOffloads, VethSpec,
    link::{mtu_of, name_of, plain},
    netns::Space,
    offload,
    veth::set_offloads,
};
use crate::repairs::{Repair, Repairs};

impl Net {
    /// Brings both ends of an endpoint's pair back to what they were made as: up, MTU, offloads,
    /// and the sandbox's end with its MAC and its address; what was wrong is added to `found`.
    /// Others' addresses inside stay, and so does a name somebody inside gave it. Idempotent; fails
    /// where one of the ends is gone.
    pub async fn repair_endpoint(&self, spec: &VethSpec, found: &mut Repairs) -> Result<()> {
        self.repair_pair(spec, Repair::Veth, found)
            .await
            .with_context(|| format!("repair the endpoint of {}", spec.netns.display()))
    }

    /// As [`Net::repair_endpoint`], of any pair; counted as `kind`.
    pub(super) async fn repair_pair(
        &self,
        spec: &VethSpec,
        kind: Repair,
        found: &mut Repairs,
    ) -> Result<()> {
        let (space, name) = (self.space(), &spec.host_ifname);
        let sandbox = self.sandbox(&spec.netns).await?;
        let inner = self.inner_end(name, &sandbox).await?;
        let host_end = space.link_message(name).await?;
        let host_end = host_end.with_context(|| format!("there is no interface {name}"))?;
        found.add_if(Repair::Sysctl, space.forward_ipv4_only(name).await?);
        if [&host_end, &inner].iter().any(|end| mtu_of(end) != Some(spec.mtu)) {
            self.set_endpoint_mtu(name, &spec.netns, spec.mtu).await?;
            found.add(kind);
        }
        found.add_if(kind, put_offloads(&sandbox, &name_of(&inner), spec.offloads)?);
        found.add_if(kind, sandbox.put_mac(&inner, spec.mac).await?);
        for (space, end) in [(space, &host_end), (&sandbox, &inner)] {
            found.add_if(kind, space.put_up(end).await?);
        }
        // After it is up: an interface that is down has no route to the subnet.
        found.add_if(kind, sandbox.put_address(&inner, spec.address).await?);
        Ok(())
    }

    /// A number that no other network namespace of this host has had since it booted, `None` where
    /// there is none at the path; needs root. Unlike a path, and unlike an inode, it is never given
    /// to another one.
    pub async fn sandbox_cookie(&self, netns: &Path) -> Result<Option<u64>> {
        let cookie = async {
            match statfs(netns) {
                // Nothing, or what `ip netns` leaves where a namespace was mounted.
                Err(Errno::ENOENT | Errno::ENOTDIR | Errno::ESRCH) => return Ok(None),
                Ok(found) if found.filesystem_type() != NSFS_MAGIC => return Ok(None),
                _ => {}
            }
            self.sandbox(netns).await?.cookie().map(Some)
        };
        cookie.await.with_context(|| format!("tell which namespace {} is", netns.display()))
    }

    /// Whether the sandbox's end of a pair is there, up and has the address: nobody is still at
    /// work on it.
    pub async fn is_furnished(
        &self,
        host_ifname: &str,
        netns: &Path,
        address: Ipv4Net,
    ) -> Result<bool> {
        let sandbox = self.sandbox(netns).await?;
        let inner = self.inner_end(host_ifname, &sandbox).await?;
        let addresses = sandbox.addresses().await?;
        let index = inner.header.index;
        Ok(inner.header.flags.contains(LinkFlags::Up)
            && addresses.iter().any(|(on, _, net)| *on == index && *net == address))
    }
}

impl Space {
    /// Sets an interface's MAC where it has another; whether it had.
    pub(super) async fn put_mac(&self, link: &LinkMessage, mac: [u8; 6]) -> Result<bool> {
        let has = |it: &LinkAttribute| matches!(it, LinkAttribute::Address(bytes) if *bytes == mac);
        if link.attributes.iter().any(has) {
            return Ok(false);
        }
        let change = LinkUnspec::new_with_index(link.header.index).address(mac.to_vec());
        let set = self.set_link(change).await;
        set.with_context(|| format!("set the MAC of interface {}", name_of(link)))?;
        Ok(true)
    }

    /// Sets an interface up where it is down; whether it was.
    pub(super) async fn put_up(&self, link: &LinkMessage) -> Result<bool> {
        if link.header.flags.contains(LinkFlags::Up) {
            return Ok(false);
        }
        self.set_up(link.header.index, &name_of(link)).await?;
        Ok(true)
    }

    /// Gives an interface an address it lacks; whether it did.
    async fn put_address(&self, link: &LinkMessage, address: Ipv4Net) -> Result<bool> {
        let index = link.header.index;
        if self.addresses().await?.iter().any(|(on, _, net)| *on == index && *net == address) {
            return Ok(false);
        }
        let add = self.rtnetlink.address().add(index, address.addr().into(), address.prefix_len());
        let given = add.execute().await.map_err(plain);
        given.with_context(|| format!("give {address} to interface {}", name_of(link)))?;
        Ok(true)
    }

    /// `SO_NETNS_COOKIE` (Linux 5.14) of the namespace.
    fn cookie(&self) -> Result<u64> {
        let mut cookie = 0_u64;
        let mut length = libc::socklen_t::try_from(size_of::<u64>())?;
        // SAFETY: the descriptor is open, and the kernel writes at most `length` bytes, which
        // `cookie` has.
        let result = unsafe {
            libc::getsockopt(
                self.control.as_raw_fd(),
                libc::SOL_SOCKET,
                libc::SO_NETNS_COOKIE,
                (&raw mut cookie).cast(),
                &raw mut length,
            )
        };
        if result != 0 {
            return Err(io::Error::last_os_error()).context("read SO_NETNS_COOKIE");
        }
        Ok(cookie)
    }
}

/// Sets a sandbox's offloads where one of them is otherwise; whether one was.
fn put_offloads(sandbox: &Space, ifname: &str, wanted: SandboxOffloads) -> Result<bool> {
    let has = offload::read(&sandbox.control, ifname)?;
    if (has.gro, has.tx_checksum) == (wanted.gro, wanted.tx_checksum) {
        return Ok(false);
    }
    set_offloads(sandbox, ifname, wanted)?;
    Ok(true)
}
