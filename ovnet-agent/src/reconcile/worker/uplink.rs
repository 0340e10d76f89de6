//! What a pass does about the uplink: it may go, come back, and be another one then.

use std::mem;

use anyhow::Result;

use super::{Findings, Worker};
use crate::{
    consul::{
        Lease, Snapshot,
        schema::{HostRecord, VERSION},
    },
    net::{GWBRIDGE, Link, Uplink},
    repairs::Repair,
};

impl Worker {
    /// Resolves `--advertise` again and announces what changed; whether anything did, so that the
    /// pass must look at everything. An uplink that is gone for the moment stays what it was:
    /// absence is not an order.
    pub(super) async fn follow_uplink(
        &mut self,
        links: &[Link],
        lease: &Lease,
        seen: &mut Findings,
    ) -> bool {
        let advertised = Uplink::among(links, &self.shared.options.advertise);
        let found = match advertised {
            Ok(uplink) => Some(uplink),
            Err(error) => match self.uplink.renamed(links) {
                Some(uplink) => {
                    let (old, new) = (&self.shared.options.advertise, &uplink.link.name);
                    seen.notes.push(format!(
                        "interface {old} is called {new} now: give --advertise {new} at the next \
                         start"
                    ));
                    Some(uplink)
                }
                None => {
                    seen.notes.push(format!("{error:#}"));
                    None
                }
            },
        };
        let was_away = mem::replace(&mut self.away, found.is_none());
        let changed = match found {
            Some(uplink) if was_away || uplink != self.uplink => {
                self.take_uplink(uplink, was_away, seen).await;
                true
            }
            _ => false,
        };
        lease.update(host_record(
            &self.shared.options.node,
            &self.uplink,
            self.shared.options.vxlan_port,
        ));
        changed
    }

    async fn take_uplink(&mut self, uplink: Uplink, was_away: bool, seen: &mut Findings) {
        tracing::info!(
            interface = uplink.link.name, address = %uplink.address, mtu = uplink.link.mtu,
            "the uplink {}", if was_away { "is back" } else { "changed" }
        );
        let place = |it: &Uplink| (it.link.index, it.link.mac, it.address);
        let moved = was_away || place(&uplink) != place(&self.uplink);
        // Before the lease writes the new address, on a connection that works.
        if uplink.address != self.uplink.address {
            seen.note(self.shared.consul.reconnect());
        }
        self.uplink = uplink;
        let Uplink { link, address } = &self.uplink;
        if moved {
            seen.note(self.net.announce(link, *address).await);
        }
        // A new interface has the settings of a new interface; that nobody broke them is why this
        // is not left to the repair, which counts.
        for set in self.set_uplink().await {
            seen.note(set);
        }
    }

    /// Puts back the settings of the uplink that somebody changed.
    pub(super) async fn repair_uplink(&self, seen: &mut Findings) {
        // One that is away is said to be.
        if self.away {
            return;
        }
        let mut changed = 0;
        for set in self.set_uplink().await {
            changed += u64::from(seen.note(set).unwrap_or(false));
        }
        seen.repairs.add_many(Repair::Sysctl, changed);
    }

    /// Gives the uplink the settings it must have; of each whether it had another.
    async fn set_uplink(&self) -> Vec<Result<bool>> {
        let name = &self.uplink.link.name;
        let mut set = vec![self.net.notify_neighbours(name).await];
        let leads_out = self.shared.view().local.values().any(|endpoint| {
            let gateway = endpoint.gateway.as_ref();
            gateway.is_some_and(|gateway| gateway.bridge == GWBRIDGE)
        });
        if leads_out {
            set.push(self.net.forward_ipv4(name).await);
        }
        set
    }

    /// Decides from when on the programs speak by a new VTEP address: as soon as the record that
    /// says so was read back, because the other hosts read it in the same moment. Until then they
    /// send to the old one, and believe nobody else. Not later than the next repair: with Consul
    /// out of reach nobody would hear of it at all.
    pub(super) fn follow_vtep(&mut self, snapshot: &Snapshot, lease: &Lease, repair: bool) {
        if self.vtep == self.uplink.address {
            return;
        }
        let own = snapshot.hosts.as_ref().and_then(|it| it.get(&self.shared.options.node));
        let is_read = own.is_some_and(|it| it.record.vtep == self.uplink.address);
        let is_lost = snapshot.consul_state != "connected" || lease.problem().is_some();
        if is_read || is_lost || repair {
            self.vtep = self.uplink.address;
        }
    }
}

/// What this host announces of itself.
pub fn host_record(node: &str, uplink: &Uplink, port: u16) -> HostRecord {
    HostRecord {
        v: VERSION,
        node: node.to_owned(),
        vtep: uplink.address,
        port,
        mtu: uplink.link.mtu,
        agent: env!("CARGO_PKG_VERSION").to_owned(),
    }
}
