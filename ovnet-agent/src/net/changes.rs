//! Notice of changes to this host's interfaces and addresses.

use std::{
    io,
    os::fd::{AsRawFd as _, OwnedFd},
    time::Duration,
};

use anyhow::{Context as _, Result};
use nix::{
    errno::Errno,
    sys::socket::{
        AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, socket,
    },
};
use rtnetlink::MulticastGroup;
use tokio::{
    io::unix::AsyncFd,
    sync::mpsc::{Receiver, Sender, channel, error::TrySendError},
};

use super::Net;

/// How long a burst of changes is gathered into one notice: making a veth pair alone is a dozen.
const GATHER: Duration = Duration::from_millis(50);

impl Net {
    /// A channel that gets a unit after interfaces or IPv4 addresses of this host changed, whoever
    /// changed them. What changed is not told: read it. A burst is one notice; notices the reader
    /// has not taken yet are one too. Watching ends when the receiver is dropped.
    pub fn changes(&self) -> Result<Receiver<()>> {
        let socket = self.space().namespace.inside_now(subscribe)?;
        // SAFETY: an `OwnedFd` is the same open descriptor from here until it is dropped, and the
        // `AsyncFd` alone owns it.
        let socket = unsafe { AsyncFd::register(socket) }.context("watch the interfaces")?;
        let (sender, receiver) = channel(1);
        tokio::spawn(watch(socket, sender));
        Ok(receiver)
    }
}

fn subscribe() -> Result<OwnedFd> {
    let open = || -> nix::Result<OwnedFd> {
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let route = SockProtocol::NetlinkRoute;
        let socket = socket(AddressFamily::Netlink, SockType::Raw, flags, route)?;
        let groups = [MulticastGroup::Link, MulticastGroup::Ipv4Ifaddr];
        let mask = groups.iter().fold(0, |mask, &group| mask | 1 << (group as u32 - 1));
        bind(socket.as_raw_fd(), &NetlinkAddr::new(0, mask))?;
        Ok(socket)
    };
    open().context("open a netlink socket to watch the interfaces")
}

async fn watch(socket: AsyncFd<OwnedFd>, sender: Sender<()>) {
    loop {
        let readable = tokio::select! {
            () = sender.closed() => return,
            readable = socket.readable() => readable,
        };
        let Ok(mut ready) = readable else { return };
        // Bytes that come while this sleeps are read below, so they belong to this notice.
        tokio::time::sleep(GATHER).await;
        let changed = match drain(&socket) {
            Ok(changed) => changed,
            Err(error) => {
                tracing::warn!(%error, "watching the interfaces failed; changes show by the timer");
                return;
            }
        };
        ready.clear_ready();
        // What came during the sleep makes the socket count as readable once more, for nothing.
        if changed && matches!(sender.try_send(()), Err(TrySendError::Closed(()))) {
            return;
        }
    }
}

/// Reads all there is; whether there was anything. An overrun (ENOBUFS) is a change like any other:
/// what was lost is never looked at.
fn drain(socket: &AsyncFd<OwnedFd>) -> io::Result<bool> {
    let mut buffer = [0; 4096];
    let mut any = false;
    loop {
        match recv(socket.as_raw_fd(), &mut buffer, MsgFlags::empty()) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(_) | Err(Errno::ENOBUFS) => any = true,
            Err(Errno::EINTR) => {}
            Err(Errno::EAGAIN) => return Ok(any),
            Err(error) => return Err(error.into()),
        }
    }
}
