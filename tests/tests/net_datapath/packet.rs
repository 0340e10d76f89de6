//! Packets built byte by byte, sent and seen on an interface (`AF_PACKET`).

use std::{
    net::Ipv4Addr,
    os::fd::{AsRawFd as _, OwnedFd},
    time::{Duration, Instant},
};

use nix::{
    libc,
    net::if_::if_nametoindex,
    sys::{
        socket::{
            AddressFamily, SockFlag, SockProtocol, SockType, setsockopt, socket,
            sockopt::ReceiveTimeout,
        },
        time::TimeVal,
    },
    unistd,
};
use ovnet_common::{checksum::ipv4_checksum, headers::ipv4};
use xtask::lab::Lab;

pub(crate) type Mac = [u8; 6];

/// EtherType of IPv4 and of ARP.
pub(crate) const IPV4: u16 = 0x0800;
pub(crate) const ARP: u16 = 0x0806;

/// An Ethernet frame.
pub(crate) fn ethernet(to: Mac, from: Mac, kind: u16, payload: &[u8]) -> Vec<u8> {
    [&to[..], &from, &kind.to_be_bytes(), payload].concat()
}

/// An IPv4 packet with a UDP datagram, whose checksum is left out.
pub(crate) fn udp(
    from: Ipv4Addr,
    to: Ipv4Addr,
    tos: u8,
    ports: (u16, u16),
    payload: &[u8],
) -> Vec<u8> {
    let length = u16::try_from(payload.len()).unwrap() + 8;
    let mut header = [0u8; ipv4::LEN];
    header[0] = 0x45;
    header[1] = tos;
    header[2..4].copy_from_slice(&(length + 20).to_be_bytes());
    header[8] = 64;
    header[9] = 17;
    header[12..16].copy_from_slice(&from.octets());
    header[16..20].copy_from_slice(&to.octets());
    let checksum = ipv4_checksum(&header);
    header[10..12].copy_from_slice(&checksum);
    let (source, destination) = (ports.0.to_be_bytes(), ports.1.to_be_bytes());
    [&header[..], &source, &destination, &length.to_be_bytes(), &[0, 0], payload].concat()
}

/// A VXLAN header and an inner frame: what a UDP socket sends to the port.
pub(crate) fn vxlan(vni: u32, inner: &[u8]) -> Vec<u8> {
    [&[8, 0, 0, 0], &(vni << 8).to_be_bytes()[..], inner].concat()
}

/// An ARP packet; operation 1 is a request, 2 a reply.
pub(crate) fn arp(operation: u16, sender: (Mac, Ipv4Addr), target: (Mac, Ipv4Addr)) -> Vec<u8> {
    let mut packet = vec![0, 1, 8, 0, 6, 4];
    packet.extend(operation.to_be_bytes());
    for (mac, address) in [sender, target] {
        packet.extend(mac);
        packet.extend(address.octets());
    }
    packet
}

/// An interface of a host or sandbox, to send and see frames on.
pub(crate) struct Wire(OwnedFd);

impl Wire {
    pub(crate) fn open(lab: &Lab, place: &str, interface: &str) -> Self {
        let interface = interface.to_owned();
        let descriptor = lab
            .inside(place, move || {
                let index = if_nametoindex(interface.as_str())?;
                let (family, all) = (AddressFamily::Packet, SockProtocol::EthAll);
                let socket = socket(family, SockType::Raw, SockFlag::SOCK_CLOEXEC, all)?;
                // SAFETY: integers and bytes only, so all zero is a value.
                let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
                address.sll_family = u16::try_from(libc::AF_PACKET)?;
                address.sll_protocol = u16::try_from(libc::ETH_P_ALL)?.to_be();
                address.sll_ifindex = i32::try_from(index)?;
                let size = libc::socklen_t::try_from(size_of::<libc::sockaddr_ll>())?;
                // SAFETY: the address is as long as we say.
                let bound =
                    unsafe { libc::bind(socket.as_raw_fd(), (&raw const address).cast(), size) };
                anyhow::ensure!(bound == 0, "bind: {}", std::io::Error::last_os_error());
                setsockopt(&socket, ReceiveTimeout, &TimeVal::new(0, 100_000))?;
                Ok(socket)
            })
            .unwrap();
        Self(descriptor)
    }

    /// Every frame sent from now on begins with a `virtio_net_hdr`.
    pub(crate) fn with_header(self) -> Self {
        const PACKET_VNET_HDR: i32 = 15;
        crate::traffic::set(&self.0, libc::SOL_PACKET, PACKET_VNET_HDR, 1);
        self
    }

    pub(crate) fn send(&self, frame: &[u8]) {
        assert_eq!(unistd::write(&self.0, frame).unwrap(), frame.len());
    }

    /// The first frame, sent or received, that is looked for; `None` when there was none in time.
    pub(crate) fn find(&self, within: Duration, wanted: impl Fn(&[u8]) -> bool) -> Option<Vec<u8>> {
        let deadline = Instant::now() + within;
        let mut buffer = vec![0; 1 << 17];
        while Instant::now() < deadline {
            // An error is the time-out of one read.
            if let Ok(count) = unistd::read(&self.0, &mut buffer)
                && wanted(&buffer[..count])
            {
                return Some(buffer[..count].to_vec());
            }
        }
        None
    }
}

/// Whether a frame contains these bytes anywhere.
pub(crate) fn holds(frame: &[u8], bytes: &[u8]) -> bool {
    frame.windows(bytes.len()).any(|window| window == bytes)
}
