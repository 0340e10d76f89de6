//! The baseline: what Docker's overlay driver sets up, without Docker.
//!
//! On each host a vxlan device and a bridge, and a veth pair from the bridge into a sandbox. As
//! in Docker's overlay, addresses are known beforehand: static forwarding and neighbour entries,
//! no learning, ARP answered by the vxlan device (`proxy`). The UDP port is not the agent's, so
//! that both overlays can be measured in one lab, in turns.

use std::net::Ipv4Addr;

use anyhow::{Context as _, Result};

use super::Lab;

/// The UDP port; the agent's is 4789.
pub const PORT: u16 = 4790;
/// Bytes that VXLAN over IPv4 adds to a frame, and takes from the MTU.
const OVERHEAD: u32 = 50;

/// A kernel VXLAN network with one sandbox on each of its hosts.
#[derive(Clone, Debug)]
pub struct KernelVxlan {
    /// The sandboxes, in the order of the hosts.
    pub members: Vec<Member>,
}

/// A sandbox of the network.
#[derive(Clone, Debug)]
pub struct Member {
    /// Host it is on.
    pub host: String,
    /// Name of the sandbox on that host.
    pub sandbox: String,
    /// Its address.
    pub address: Ipv4Addr,
    vtep: Ipv4Addr,
    mac: String,
}

impl Member {
    /// Where it is, as the lab's methods take it: `docker01/k1`.
    pub fn place(&self) -> String {
        format!("{}/{}", self.host, self.sandbox)
    }
}

impl KernelVxlan {
    /// Makes the network on these hosts, with sandboxes `k1`, `k2`, …
    ///
    /// # Errors
    /// A device or sandbox cannot be made, as when the network is there already.
    pub fn up(lab: &Lab, hosts: &[&str]) -> Result<Self> {
        let members = (1..)
            .zip(hosts)
            .map(|(number, host): (u8, _)| {
                Ok(Member {
                    host: (*host).to_owned(),
                    sandbox: format!("k{number}"),
                    address: Ipv4Addr::new(10, 255, 0, number),
                    vtep: lab.address(host)?,
                    mac: format!("02:42:0a:ff:00:{number:02x}"),
                })
            })
            .collect::<Result<Vec<_>>>()?;
        let mtu = (lab.options().mtu - OVERHEAD).to_string();
        let port = PORT.to_string();
        for member in &members {
            let Member { host, sandbox, address, vtep, mac } = member;
            let (address, vtep) = (format!("{address}/24"), vtep.to_string());
            lab.add_sandbox(host, sandbox)?;
            let argv =
                ["sh", "-e", "-c", DEVICES, "sh", sandbox, &address, mac, &vtep, &port, &mtu];
            lab.exec(host, &argv).with_context(|| format!("kernel vxlan on {host}"))?;
            for peer in members.iter().filter(|peer| peer.host != *host) {
                let (address, vtep) = (peer.address.to_string(), peer.vtep.to_string());
                lab.exec(host, &["sh", "-e", "-c", PEER, "sh", &address, &peer.mac, &vtep])
                    .with_context(|| format!("kernel vxlan on {host}: {}", peer.place()))?;
            }
        }
        Ok(Self { members })
    }

    /// Removes the network and its sandboxes.
    ///
    /// # Errors
    /// A device or sandbox cannot be removed.
    pub fn down(self, lab: &Lab) -> Result<()> {
        for member in &self.members {
            lab.remove_sandbox(&member.host, &member.sandbox)?;
            for device in ["kvx0", "kbr0"] {
                lab.exec(&member.host, &["ip", "link", "del", device])?;
            }
        }
        Ok(())
    }
}

const DEVICES: &str = r#"
sandbox=$1 address=$2 mac=$3 vtep=$4 port=$5 mtu=$6
ip link add kbr0 type bridge stp_state 0 mcast_snooping 0 forward_delay 0
ip link add kvx0 type vxlan id 42 local "$vtep" dstport "$port" nolearning proxy
ip link set kvx0 mtu "$mtu" master kbr0 up
ip link set kbr0 mtu "$mtu" up
ip link add kve0 mtu "$mtu" type veth peer name eth0 address "$mac" mtu "$mtu" netns "$sandbox"
ip link set kve0 master kbr0 up
ip -n "$sandbox" address add "$address" dev eth0
ip -n "$sandbox" link set eth0 up
"#;

const PEER: &str = r#"
address=$1 mac=$2 vtep=$3
bridge fdb replace "$mac" dev kvx0 dst "$vtep" self permanent
ip neigh replace "$address" lladdr "$mac" dev kvx0 nud permanent
"#;
