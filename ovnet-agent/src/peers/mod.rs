//! Whether VXLAN gets through to the other hosts, asked all the time, as cilium-health does.
//!
//! A question is a VXLAN packet to a peer's VTEP address and port, in a VNI that is no network's. The
//! peer's program turns it around (`ovnet-ebpf/src/probe.rs`): no agent need run there, and what is
//! proved is what forwarding needs: that UDP gets through in both directions, that packets of full size
//! do, that the peer's program is attached and its tables know us. The answer comes to the socket that
//! asked (`socket`). What it all means is decided by `table`, which does no I/O.

mod message;
mod socket;
mod table;

use std::{
    collections::BTreeMap,
    net::SocketAddrV4,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use tokio::{sync::watch, task::JoinHandle};

pub use self::table::{Counts, Known, State, Target};
use self::{socket::Socket, table::Table};
use crate::{
    consul::{Snapshot, schema::HostRecord},
    net::Uplink,
    reconcile::Reconciler,
};

/// Between looks at who the peers are.
const LOOK: Duration = Duration::from_secs(1);
/// Between sendings, at least.
const PACE: Duration = Duration::from_millis(20);
/// Rounds begun at once: all that could become peers ([`ovnet_common::abi::MAX_HOSTS`]) within half
/// the time between two rounds of one.
const AT_ONCE: usize = 64;

/// What is known of the ways to the peers. Clones share everything.
#[derive(Clone, Debug, Default)]
pub struct Peers(Arc<Mutex<Table>>);

impl Peers {
    /// Whether this host is reached at this VTEP address.
    pub fn reaches(&self, record: &HostRecord) -> bool {
        self.table().reaches(&record.node, record.vtep)
    }

    /// All peers that are asked, by name.
    pub fn known(&self) -> BTreeMap<String, Known> {
        self.table().known(Instant::now())
    }

    /// How many questions were asked and answered.
    pub fn counts(&self) -> Counts {
        self.table().counts()
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        // Every method leaves a table that the next one can go on with.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Asks the peers until the agent ends. `port` is the one VXLAN port of all hosts.
pub fn spawn(
    reconciler: Reconciler,
    node: String,
    port: u16,
    mut ending: watch::Receiver<bool>,
) -> JoinHandle<()> {
    tokio::spawn(async move {
        tokio::select! {
            () = ask(reconciler, node, port) => {}
            // An error means that the sender is gone, which is a stop too.
            _ = ending.wait_for(|stop| *stop) => {}
        }
    })
}

async fn ask(reconciler: Reconciler, node: String, port: u16) {
    let peers = reconciler.peers();
    let mut socket: Option<Socket> = None;
    let mut complained = false;
    loop {
        let uplink = reconciler.uplink();
        if socket.as_ref().is_none_or(|it| it.address() != uplink.address) {
            match Socket::bind(uplink.address) {
                Ok(bound) => {
                    bound.ready().await;
                    (socket, complained) = (Some(bound), false);
                }
                // Without one every question stays unanswered, which is shown.
                Err(error) => {
                    if !complained {
                        tracing::warn!("peers cannot be asked: {error:#}");
                    }
                    (socket, complained) = (None, true);
                }
            }
        }
        let targets = targets(&reconciler.snapshot(), &node, port, &uplink);
        peers.table().set(&targets, Instant::now());
        let look = Instant::now() + LOOK;
        while Instant::now() < look {
            let now = Instant::now();
            let (rounds, changes) = peers.table().advance(now, AT_ONCE, rand::random);
            for round in &rounds {
                if let Some(socket) = &socket {
                    let to = SocketAddrV4::new(round.target.vtep, port);
                    let full = Some(round.target.mtu);
                    for (token, length) in [(round.short, None), (round.full, full)] {
                        let from = socket.address();
                        socket.send(&message::question(from, *to.ip(), token, length), to);
                    }
                }
            }
            changes.iter().for_each(tell);
            let next = peers.table().next().unwrap_or(look).clamp(now + PACE, look + PACE);
            let answers = async {
                let Some(socket) = &socket else { return std::future::pending().await };
                loop {
                    let (token, from) = socket.receive().await;
                    let change = peers.table().answered(token, from, Instant::now());
                    change.iter().for_each(tell);
                }
            };
            let _: Result<(), _> = tokio::time::timeout_at(next.into(), answers).await;
        }
    }
}

/// Whom to ask: every host with an agent that Consul has a record of, its lease lost or not. A host
/// announced by hand is a plain kernel vxlan device, which answers nothing.
fn targets(
    snapshot: &Snapshot,
    node: &str,
    port: u16,
    uplink: &Uplink,
) -> BTreeMap<String, Target> {
    let hosts = snapshot.hosts.iter().flatten();
    hosts
        .map(|(_, entry)| &entry.record)
        .filter(|it| it.node != node && it.vtep != uplink.address && it.port == port)
        .filter(|it| !it.agent.is_empty())
        .map(|it| {
            // What one of the two does not take at all is no fault of what is between them.
            let target = Target { vtep: it.vtep, mtu: it.mtu.min(uplink.link.mtu) };
            (it.node.clone(), target)
        })
        .collect()
}

/// Logs a change of a peer's state.
fn tell(change: &table::Change) {
    let table::Change { node, target: Target { vtep, mtu }, from, to } = change;
    match (from, to) {
        (_, State::Unreachable | State::Narrow) => {
            tracing::warn!("{}", warning(node, *vtep, *mtu, *to));
        }
        (State::Unknown, _) => tracing::debug!(peer = node, %vtep, "a peer is reached"),
        _ => tracing::info!("host {node} ({vtep}) answers probes of all sizes again"),
    }
}

/// What is wrong with the way to a peer, on one line.
pub fn warning(node: &str, vtep: std::net::Ipv4Addr, mtu: u32, state: State) -> String {
    match state {
        State::Narrow => format!(
            "host {node} ({vtep}) answers short probes and none of {mtu} bytes: something on the way \
             takes less than the MTU of both uplinks"
        ),
        _ => format!(
            "host {node} ({vtep}) does not answer probes: it is down, VXLAN does not get through to \
             it and back, or its tables do not have this host"
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::consul::HostEntry;

    #[test]
    fn hosts_with_an_agent_are_asked_with_what_both_uplinks_take() {
        let entry = |node: &str, last: u8, port, mtu, agent: &str| {
            let record = HostRecord {
                v: 1,
                node: node.into(),
                vtep: [192, 168, 1, last].into(),
                port,
                mtu,
                agent: agent.into(),
            };
            (node.to_owned(), HostEntry { record, locked: node != "lost" })
        };
        let hosts = [
            entry("me", 11, 4789, 1500, "0.1.0"),
            entry("jumbo", 12, 4789, 9000, "0.1.0"),
            entry("lost", 13, 4789, 1400, "0.1.0"),
            entry("plain", 14, 4789, 1500, ""),
            entry("odd", 15, 8472, 1500, "0.1.0"),
            entry("liar", 11, 4789, 1500, "0.1.0"),
        ];
        let snapshot = Snapshot { hosts: Some(hosts.into()), ..Snapshot::default() };
        let link = crate::net::Link { mtu: 1500, ..Default::default() };
        let uplink = Uplink { link, address: [192, 168, 1, 11].into() };
        let asked = targets(&snapshot, "me", 4789, &uplink);
        let target = |last: u8, mtu| Target { vtep: [192, 168, 1, last].into(), mtu };
        let expected = [("jumbo", target(12, 1500)), ("lost", target(13, 1400))];
        assert_eq!(asked, expected.map(|(node, it)| (node.to_owned(), it)).into());
        assert!(targets(&Snapshot::default(), "me", 4789, &uplink).is_empty());
    }
}
