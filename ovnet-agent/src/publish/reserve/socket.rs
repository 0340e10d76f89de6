//! The socket that reserves a port.

use std::{
    io,
    net::SocketAddrV4,
    os::fd::{AsRawFd as _, OwnedFd},
};

use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, SockaddrIn, bind as bind_socket, getsockname,
    listen, setsockopt, socket, sockopt,
};

use super::Protocol;

/// A socket bound to an address and port, and the port it got: port 0 is any free one of the
/// ephemeral range. `AddrInUse` where somebody else has it, on this address, on all, or by IPv6
/// sockets that take IPv4 too.
pub(super) fn bind(protocol: Protocol, address: SocketAddrV4) -> io::Result<(OwnedFd, u16)> {
    let kind = match protocol {
        Protocol::Tcp => SockType::Stream,
        Protocol::Udp => SockType::Datagram,
    };
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let socket = socket(AddressFamily::Inet, kind, flags, None)?;
    // Before it has an address: nothing gets in between.
    drop_everything(&socket)?;
    // The address was this host's when it was asked for. When the agent starts it may not be back.
    setsockopt(&socket, sockopt::IpFreebind, &true)?;
    if protocol == Protocol::Tcp && address.port() != 0 {
        // Connections of an earlier listener that linger in TIME_WAIT are no reason to refuse. A
        // UDP socket with it would share the port instead.
        setsockopt(&socket, sockopt::ReuseAddr, &true)?;
    }
    bind_socket(socket.as_raw_fd(), &SockaddrIn::from(address))?;
    if protocol == Protocol::Tcp {
        // Fails as a bind would where another socket with SO_REUSEADDR is bound to the port.
        listen(&socket, Backlog::new(1)?)?;
    }
    let port = getsockname::<SockaddrIn>(socket.as_raw_fd())?.port();
    Ok((socket, port))
}

/// Attaches a classic filter of one instruction, which keeps 0 bytes of every packet.
fn drop_everything(socket: &OwnedFd) -> io::Result<()> {
    let mut program = [libc::sock_filter {
        // BPF_RET of the constant k.
        code: u16::try_from(libc::BPF_RET | libc::BPF_K).map_err(io::Error::other)?,
        jt: 0,
        jf: 0,
        k: 0,
    }];
    let size = size_of::<libc::sock_fprog>().try_into().map_err(io::Error::other)?;
    let filter = libc::sock_fprog { len: 1, filter: program.as_mut_ptr() };
    // SAFETY: the descriptor is an open socket; the kernel reads a `sock_fprog` of the size given
    // and copies the one instruction it points to, both of which outlive the call.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_ATTACH_FILTER,
            (&raw const filter).cast(),
            size,
        )
    };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
