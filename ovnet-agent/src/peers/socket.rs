//! The socket of probes: plain UDP towards the peers' VXLAN port, without a checksum, as VXLAN has it.

use std::{
    io,
    net::{Ipv4Addr, SocketAddr, SocketAddrV4, UdpSocket},
    os::fd::AsRawFd as _,
};

use anyhow::{Context as _, Result};

use super::message;

/// A socket at our VTEP address, at a port of the kernel's choice.
pub(super) struct Socket {
    address: Ipv4Addr,
    udp: tokio::net::UdpSocket,
}

impl Socket {
    /// Binds one.
    pub(super) fn bind(address: Ipv4Addr) -> Result<Self> {
        let make = || -> io::Result<tokio::net::UdpSocket> {
            let socket = UdpSocket::bind((address, 0))?;
            // Programs leave what has a checksum to the kernel: they could not verify it.
            set(&socket, libc::SOL_SOCKET, libc::SO_NO_CHECK, 1)?;
            // DF, and the length of the uplink whatever path MTU the kernel has learned: a question of
            // full size is to find out.
            set(&socket, libc::IPPROTO_IP, libc::IP_MTU_DISCOVER, libc::IP_PMTUDISC_PROBE)?;
            socket.set_nonblocking(true)?;
            tokio::net::UdpSocket::from_std(socket)
        };
        let udp = make().with_context(|| format!("open a socket at {address} for probes"))?;
        Ok(Self { address, udp })
    }

    /// The address it is bound to.
    pub(super) fn address(&self) -> Ipv4Addr {
        self.address
    }

    /// Sends, or does not: what stands in the way of a question is what it is to find out.
    pub(super) fn send(&self, bytes: &[u8], to: SocketAddrV4) {
        if let Err(error) = self.udp.try_send_to(bytes, to.into()) {
            tracing::debug!(%error, %to, length = bytes.len(), "a probe is not sent");
        }
    }

    /// Waits for an answer: its token and who sent it. Anything else is skipped.
    pub(super) async fn receive(&self) -> (u64, Ipv4Addr) {
        // The rest of a longer one is cut off.
        let mut buffer = [0; message::SHORTEST];
        loop {
            match self.udp.recv_from(&mut buffer).await {
                Ok((length, SocketAddr::V4(from))) => {
                    if let Some(token) = message::answered(&buffer[..length]) {
                        return (token, *from.ip());
                    }
                }
                Ok((_, SocketAddr::V6(_))) => {}
                // Reported once each by the kernel, about an earlier question.
                Err(error) => {
                    tracing::debug!(%error, "receive the answer to a probe");
                    tokio::time::sleep(super::PACE).await;
                }
            }
        }
    }

    /// Waits until the runtime has seen that the socket can send: before, it sends nothing.
    pub(super) async fn ready(&self) {
        // An error shows where something is sent.
        let _ = self.udp.writable().await;
    }
}

/// Sets an option of the kernel's that has an integer and no wrapper.
fn set(socket: &UdpSocket, level: i32, option: i32, value: i32) -> io::Result<()> {
    let size = libc::socklen_t::try_from(size_of::<i32>()).unwrap_or(0);
    // SAFETY: the value is an integer of the size given, and lives until the call returns.
    let result = unsafe {
        libc::setsockopt(socket.as_raw_fd(), level, option, (&raw const value).cast(), size)
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
