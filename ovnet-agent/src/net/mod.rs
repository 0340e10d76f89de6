//! This host's interfaces: the only place that speaks rtnetlink.
//!
//! [`Net`] works in the network namespace it was opened in, whatever thread its methods run on, and
//! reaches into sandboxes' namespaces without moving any thread of the runtime (see `netns.rs`).
//! Settings are read and written by netlink, ioctl and `/proc/sys/net`; `/sys/class/net` is not
//! used, because it shows the namespace that `/sys` was mounted in.

use anyhow::{Context as _, Result};

mod announce;
mod changes;
mod connections;
mod driver;
mod external;
mod filters;
mod gateway_port;
mod gwbridge;
mod link;
mod neighbour;
mod netns;
mod offload;
mod repair;
mod search;
mod subnet;
mod sysctl;
mod undo;
mod uplink;
mod veth;

pub use driver::native_xdp_keeps_offloads;
pub use external::EXTERNAL;
pub use filters::{FilterProgram, Hooks};
pub use gateway_port::GatewaySpec;
pub use gwbridge::{GWBRIDGE, Gwbridge};
pub use link::Link;
pub use neighbour::{Hop, Neighbours};
pub use netns::resolve_netns;
pub use offload::{Offload, Offloads};
pub use sysctl::port_range;
pub use uplink::Uplink;
pub use veth::{LooseVeth, SandboxOffloads, Veth, VethSpec};

/// The interfaces of one network namespace. Cheap to clone.
#[derive(Clone)]
pub struct Net(netns::Space);

impl Net {
    /// Opens the calling thread's network namespace. Needs the current tokio runtime, which then
    /// runs a task for as long as a clone exists.
    pub fn open() -> Result<Self> {
        let space = netns::Space::current().context("open this host's network namespace")?;
        Ok(Self(space))
    }

    /// The offloads of an interface of this host.
    pub fn offloads(&self, ifname: &str) -> Result<Offloads> {
        offload::read(&self.0.control, ifname)
    }

    /// Sets one offload of an interface of this host. Idempotent.
    pub fn set_offload(&self, ifname: &str, which: Offload, on: bool) -> Result<()> {
        offload::set(&self.0.control, ifname, which, on)
    }

    /// Makes an interface of this host forward IPv4: what answers to a sandbox comes by the uplink
    /// and goes on from there; whether it did not. Idempotent.
    pub async fn forward_ipv4(&self, ifname: &str) -> Result<bool> {
        self.0.forward_ipv4(ifname).await
    }

    /// Has the kernel tell an interface's neighbours of a new MAC at once, with or without the
    /// agent; whether it did not. Idempotent.
    pub async fn notify_neighbours(&self, ifname: &str) -> Result<bool> {
        self.0.notify_neighbours(ifname).await
    }

    /// A setting below `/proc/sys/net` of this host's namespace, as `ipv4/ip_forward`; `None`
    /// where it cannot be read.
    pub async fn sysctl(&self, below: &str) -> Option<String> {
        self.0.namespace.sysctl(below.to_owned()).await
    }

    /// Whether a socket of this host's namespace, a kernel's own included, is bound to the UDP port
    /// on any IPv4 address.
    pub async fn udp_port_is_bound(&self, port: u16) -> Result<bool> {
        let read = || Ok(std::fs::read_to_string("/proc/thread-self/net/udp")?);
        let sockets = self.0.namespace.inside(read).await.context("list the UDP sockets")?;
        // The second column is address and port in hexadecimal, as `00000000:12B5`.
        let ending = format!(":{port:04X}");
        Ok(sockets
            .lines()
            .filter_map(|line| line.split_whitespace().nth(1))
            .any(|local| local.ends_with(&ending)))
    }

    fn space(&self) -> &netns::Space {
        &self.0
    }
}
