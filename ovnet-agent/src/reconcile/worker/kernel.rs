//! The last part of a pass: what should be, what is, and what has to be done about it.

use std::collections::BTreeSet;

use anyhow::Result;
use ovnet_common::abi::unmapped;

use super::{Findings, Worker};
use crate::{
    apply::{Failure, apply},
    datapath::Attachment,
    desired::Desired,
    diff::{Actual, Op, diff},
    net::Link,
    reconcile::drift::Drift,
    repairs::Repair,
};

/// How a pass came about.
#[derive(Clone, Copy, Debug)]
pub(super) struct Occasion {
    /// Everything is looked at, and not only what an event told of.
    pub(super) whole: bool,
    /// The uplink is another one, or back: what differs now is nobody's doing.
    pub(super) moved: bool,
    /// Consul has told everything that the programs need to know of other hosts.
    pub(super) told: bool,
}

impl Worker {
    /// Compares what should be with what the kernel holds, and changes what differs; the steps that
    /// failed. An error means that looking failed.
    pub(super) async fn change(
        &mut self,
        desired: &Desired,
        Occasion { whole, moved, told }: Occasion,
        links: &[Link],
        seen: &mut Findings,
    ) -> Result<Vec<Failure>> {
        let hooks = match whole {
            true => seen.note(self.net.hooks().await),
            false => None,
        };
        let (failures, changed, republished) = {
            let mut datapath = self.shared.datapath();
            let written = self.tables.clone();
            if whole {
                self.tables = datapath.maps().read()?;
            }
            if let Some(made) = seen.note(datapath.repin()) {
                seen.repairs.add_many(Repair::Pin, made);
            }
            let known = datapath.known();
            if let Some(foreign) = hooks.and_then(|it| seen.note(datapath.check_hooks(&it))) {
                seen.repairs.add_many(Repair::Program, foreign);
            }
            let actual = Actual {
                tables: self.tables.clone(),
                attached: datapath.attached(),
                stale_links: datapath.stale_links(&desired.attachments)?,
            };
            let is_behind = |it: &Attachment| datapath.is_behind(it);
            let ops = diff(desired, &actual);
            let ops = self.handover.hold_back(ops, told, is_behind, &mut seen.notes);
            let changed = !ops.is_empty();
            let of_ports = |op: &Op| matches!(op, Op::SetPublished(..) | Op::RemovePublished(_));
            let republished = ops.iter().any(of_ports);
            let lost = known.difference(&actual.attached).cloned().collect();
            let drift = Drift { written: &written, found: &actual.tables, lost: &lost };
            let repairs: Vec<(Op, Repair)> =
                ops.iter().filter_map(|op| Some((op.clone(), drift.repair(op)?))).collect();
            let failures = apply(&mut datapath, &mut self.tables, ops);
            for (op, kind) in repairs {
                let done = failures.iter().all(|failure| failure.op != op);
                // A new name of the uplink takes its programs' attachments with it.
                seen.repairs.add_if(kind, done && !(moved && kind == Repair::Program));
            }
            (failures, changed, republished)
        };
        let failures = self.tolerate(failures, seen);
        if failures.is_empty() {
            self.handover.finish(&mut self.shared.datapath(), links, &mut seen.notes);
        }
        // The first time in any case: before, the table of ports may not be filled.
        if republished || !self.settled {
            self.ports.published.send_replace(());
        }
        if changed || whole {
            self.keep_neighbours(moved, seen).await;
        }
        Ok(failures)
    }

    async fn keep_neighbours(&mut self, moved: bool, seen: &mut Findings) {
        let vteps: BTreeSet<_> =
            self.tables.hosts.keys().map(|vtep| unmapped(vtep).into()).collect();
        let Some(found) = seen.note(self.net.keep_neighbours(&vteps).await) else { return };
        if !moved {
            let forgotten = found.entered.intersection(&self.neighbours).count();
            seen.repairs.add_many(Repair::Neighbour, forgotten.try_into().unwrap_or(u64::MAX));
        }
        self.neighbours = found.kept;
    }

    /// Takes out of the failures what `--xdp auto` promised not to fail for, and what cannot be
    /// while the uplink is away, which is said already.
    fn tolerate(&self, failures: Vec<Failure>, seen: &mut Findings) -> Vec<Failure> {
        let auto = self.shared.options.xdp == crate::config::Xdp::Auto;
        let uplink = self.uplink.link.index;
        let of_uplink = |op: &Op| matches!(op, Op::Attach(it) if it.ifindex == uplink);
        let failures = failures.into_iter().filter(|it| !(self.away && of_uplink(&it.op)));
        let (tolerated, failures): (Vec<_>, Vec<_>) = failures.partition(|failure| {
            auto && matches!(&failure.op, Op::Attach(attachment) if attachment.xdp.is_some())
        });
        seen.notes.extend(tolerated.iter().map(|it| format!("XDP is off: {:#}", it.error)));
        failures
    }
}
