//! Tells the wire that an address of this host is at another MAC now.
//!
//! Neighbours keep what they resolved for minutes; until they ask again, all they send is lost. A
//! gratuitous ARP (RFC 5227 §3, RFC 2002 §4.6) has them look at once, and bridges and switches learn
//! the new port.

use std::{
    io,
    net::Ipv4Addr,
    os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd},
};

use anyhow::{Context as _, Result};
use ovnet_common::headers::ethernet;

use super::{Link, Net};

const BROADCAST: [u8; 6] = [0xff; 6];
/// Ethernet and ARP header of an IPv4 address, without padding.
const LENGTH: usize = ethernet::LEN + 28;

impl Net {
    /// Broadcasts that the address is at the interface's MAC, once as a request and once as a reply:
    /// some systems heed only one of them. Needs root; fails where the interface is down or gone.
    pub async fn announce(&self, link: &Link, address: Ipv4Addr) -> Result<()> {
        let (index, mac) = (link.index, link.mac);
        let sent = self.space().namespace.inside(move || {
            let socket = packet_socket()?;
            for operation in [1, 2] {
                send(&socket, index, &gratuitous(mac, address, operation))?;
            }
            Ok(())
        });
        sent.await.with_context(|| format!("announce {address} by {}", link.name))
    }
}

/// The frame; `operation` is 1 for a request and 2 for a reply.
fn gratuitous(mac: [u8; 6], address: Ipv4Addr, operation: u8) -> [u8; LENGTH] {
    let mut frame = [0; LENGTH];
    let (header, arp) = frame.split_at_mut(ethernet::LEN);
    header[..6].copy_from_slice(&BROADCAST);
    header[6..12].copy_from_slice(&mac);
    header[12..].copy_from_slice(&ethernet::ARP.to_be_bytes());
    // Ethernet, IPv4, and how long the addresses of either are.
    arp[..8].copy_from_slice(&[0, 1, 8, 0, 6, 4, 0, operation]);
    arp[8..14].copy_from_slice(&mac);
    arp[14..18].copy_from_slice(&address.octets());
    arp[18..24].copy_from_slice(if operation == 1 { &[0; 6] } else { &BROADCAST });
    arp[24..].copy_from_slice(&address.octets());
    frame
}

fn packet_socket() -> Result<OwnedFd> {
    // With protocol 0 nothing is received.
    // SAFETY: no pointer is passed.
    let raw = unsafe { libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_CLOEXEC, 0) };
    if raw < 0 {
        return Err(io::Error::last_os_error()).context("open a packet socket");
    }
    // SAFETY: the descriptor was made just now, and nobody else has it.
    Ok(unsafe { OwnedFd::from_raw_fd(raw) })
}

fn send(socket: &OwnedFd, index: u32, frame: &[u8]) -> Result<()> {
    // SAFETY: integers and an array, for which zeroes are a value.
    let mut to: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
    to.sll_family = libc::sa_family_t::try_from(libc::AF_PACKET)?;
    to.sll_protocol = ethernet::ARP.to_be();
    to.sll_ifindex = i32::try_from(index)?;
    to.sll_halen = 6;
    to.sll_addr[..6].copy_from_slice(&BROADCAST);
    let length = libc::socklen_t::try_from(size_of_val(&to))?;
    // SAFETY: both pointers are valid for the lengths beside them.
    let sent = unsafe {
        libc::sendto(
            socket.as_raw_fd(),
            frame.as_ptr().cast(),
            frame.len(),
            0,
            (&raw const to).cast(),
            length,
        )
    };
    if sent < 0 {
        return Err(io::Error::last_os_error()).context("send a gratuitous ARP");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_announcement_names_the_address_as_sender_and_target() {
        let (mac, address) = ([2, 0x33, 0, 0, 0, 1], Ipv4Addr::new(192, 168, 1, 12));
        let frame = gratuitous(mac, address, 1);
        assert_eq!(frame[..14], [255, 255, 255, 255, 255, 255, 2, 0x33, 0, 0, 0, 1, 8, 6]);
        assert_eq!(frame[14..22], [0, 1, 8, 0, 6, 4, 0, 1]);
        assert_eq!(frame[22..32], [2, 0x33, 0, 0, 0, 1, 192, 168, 1, 12]);
        assert_eq!(frame[32..], [0, 0, 0, 0, 0, 0, 192, 168, 1, 12]);
        assert_eq!(gratuitous(mac, address, 2)[21], 2);
    }
}
