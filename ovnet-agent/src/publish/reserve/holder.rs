//! Which program has a port, found as `ss -p` finds it.

use std::{
    net::{IpAddr, Ipv4Addr, SocketAddr},
    path::PathBuf,
};

use nix::unistd::gettid;
use procfs::{
    ProcResult,
    process::{FDTarget, Process, all_processes},
};

use super::{Key, Protocol};

/// Program and pid of whoever has a port of an address, as `nginx (pid 1234)`, in the calling
/// thread's network namespace. `None` where no process of this PID namespace has it, or `/proc`
/// cannot be read.
pub(super) fn find((protocol, address, port): Key) -> Option<String> {
    let sockets = sockets(protocol).ok()?;
    let inodes: Vec<u64> = sockets
        .into_iter()
        .filter(|(local, _)| local.port() == port && overlaps(local.ip(), address))
        .map(|(_, inode)| inode)
        .collect();
    if inodes.is_empty() {
        return None;
    }
    // Several processes may have it, as a server and its workers: the oldest is listed first.
    let process = all_processes().ok()?.flatten().find(|it| has_any(it, &inodes))?;
    let name = process.stat().ok()?.comm;
    Some(format!("{name} (pid {})", process.pid))
}

/// Local addresses and inodes of the sockets that can be in the way.
fn sockets(protocol: Protocol) -> ProcResult<Vec<(SocketAddr, u64)>> {
    // `/proc/net` is the namespace of the first thread, which need not be the caller's.
    let this = Process::new_with_root(PathBuf::from(format!("/proc/self/task/{}", gettid())))?;
    Ok(match protocol {
        Protocol::Tcp => {
            let mut all = this.tcp()?;
            // A host without IPv6 has no such file.
            all.extend(this.tcp6().unwrap_or_default());
            all.into_iter().map(|it| (it.local_address, it.inode)).collect()
        }
        Protocol::Udp => {
            let mut all = this.udp()?;
            all.extend(this.udp6().unwrap_or_default());
            all.into_iter().map(|it| (it.local_address, it.inode)).collect()
        }
    })
}

fn has_any(process: &Process, inodes: &[u64]) -> bool {
    let Ok(files) = process.fd() else { return false };
    files
        .flatten()
        .any(|it| matches!(it.target, FDTarget::Socket(inode) if inodes.contains(&inode)))
}

/// Whether a socket's address is in the way of one of IPv4. The IPv6 wildcard takes IPv4 too, where
/// the socket was not told otherwise, which `/proc` does not show.
fn overlaps(socket: IpAddr, address: Ipv4Addr) -> bool {
    match socket.to_canonical() {
        IpAddr::V4(it) => it == address || it.is_unspecified() || address.is_unspecified(),
        IpAddr::V6(it) => it.is_unspecified(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_in_the_way_of_each_other() {
        let [every, one]: [Ipv4Addr; 2] = [Ipv4Addr::UNSPECIFIED, [192, 168, 1, 12].into()];
        for (socket, address, so) in [
            ("0.0.0.0", one, true),
            ("192.168.1.12", every, true),
            ("192.168.1.12", one, true),
            ("192.168.1.11", one, false),
            ("::", one, true),
            ("::ffff:192.168.1.12", one, true),
            ("fd00::1", every, false),
        ] {
            assert_eq!(overlaps(socket.parse().unwrap(), address), so, "{socket} {address}");
        }
    }
}
