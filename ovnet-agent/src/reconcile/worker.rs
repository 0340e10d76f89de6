//! The loop itself and one pass of it.

mod answers;
mod handover;
mod ports;
mod recover;
mod sandboxes;

use std::{collections::BTreeSet, sync::Arc, time::Instant};

use anyhow::{Result, anyhow};
use ovnet_common::abi::unmapped;
use tokio::sync::{mpsc, watch};

pub(in crate::reconcile) use self::ports::Ports;
use self::{
    answers::{Waiting, answer},
    handover::Handover,
};
use super::{Request, Shared, drift::Drift, records::OwnRecords, xdp};
use crate::{
    apply::{Failure, apply},
    consul::{
        Lease, Watcher,
        schema::{HostRecord, VERSION},
    },
    datapath::{Attachment, Tables},
    desired::{Inputs, UplinkView, desired},
    diff::{Actual, Op, diff},
    hosts::HostTable,
    net::{self, Net, Uplink},
    repairs::{Repair, Repairs},
    service::with_advice,
    state::StateFolder,
};

/// The loop. It owns everything only the loop changes.
pub struct Worker {
    shared: Arc<Shared>,
    net: Net,
    state: StateFolder,
    requests: mpsc::Receiver<Request>,
    uplink: Uplink,
    hosts: HostTable,
    /// What the maps hold: read whole at each repair, kept up to date by `apply` in between.
    tables: Tables,
    own_records: OwnRecords,
    ports: Ports,
    /// Names of host-side veths of endpoints whose state is lost.
    held: BTreeSet<String>,
    handover: Handover,
    waiting: Vec<Waiting>,
    /// The last pass's contradictions, so that each is logged once.
    contradictions: BTreeSet<String>,
    /// Whether the first pass is over; its changes are no repairs.
    settled: bool,
}

impl std::fmt::Debug for Worker {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Worker").field("uplink", &self.uplink).finish_non_exhaustive()
    }
}

impl Worker {
    pub(super) fn new(
        shared: Arc<Shared>,
        net: Net,
        state: StateFolder,
        requests: mpsc::Receiver<Request>,
        uplink: Uplink,
        ports: Ports,
    ) -> Self {
        let hosts = HostTable::new(shared.options.host_grace);
        let own_records = OwnRecords::new(Arc::clone(&shared));
        Self {
            shared,
            net,
            state,
            requests,
            uplink,
            hosts,
            tables: Tables::default(),
            own_records,
            ports,
            held: BTreeSet::new(),
            handover: Handover::Ahead,
            waiting: Vec::new(),
            contradictions: BTreeSet::new(),
            settled: false,
        }
    }

    /// The first pass. What it cannot do the agent cannot run without, so its errors are fatal.
    pub async fn start(&mut self, watcher: &Watcher, lease: &Lease) -> Result<()> {
        let failures = self.pass(true, watcher, lease).await?;
        self.settled = true;
        match failures.into_iter().next() {
            Some(failure) => Err(failure.error),
            None => self.remove_leftovers().await,
        }
    }

    /// Runs until it is told to stop, and gives the lease back to be withdrawn.
    pub async fn run(
        mut self,
        watcher: Watcher,
        lease: Lease,
        mut stopping: watch::Receiver<bool>,
    ) -> Lease {
        let mut snapshots = self.shared.snapshots.clone();
        let mut repair = tokio::time::interval(self.shared.options.repair_interval);
        repair.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut changes = match self.net.changes() {
            Ok(changes) => Some(changes),
            Err(error) => {
                tracing::warn!(error = format!("{error:#}"), "interfaces are only polled");
                None
            }
        };
        loop {
            let mut requests = Vec::new();
            let mut whole = false;
            let changed = async {
                match &mut changes {
                    Some(changes) => changes.recv().await,
                    None => std::future::pending().await,
                }
            };
            let waited = self.waiting.iter().map(|waiting| waiting.until).min();
            let overdue = async {
                match waited {
                    Some(until) => tokio::time::sleep_until(until.into()).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                count = self.requests.recv_many(&mut requests, 256) => {
                    if count == 0 {
                        return lease;
                    }
                }
                _ = stopping.wait_for(|stop| *stop) => return lease,
                Ok(()) = snapshots.changed() => {}
                Some(()) = changed => {}
                () = overdue => {}
                _ = repair.tick() => whole = true,
            }
            self.turn(requests, whole, &watcher, &lease).await;
        }
    }

    /// Takes in requests, runs a pass, answers.
    async fn turn(
        &mut self,
        requests: Vec<Request>,
        whole: bool,
        watcher: &Watcher,
        lease: &Lease,
    ) {
        let (mut added, mut removed) = (Vec::new(), Vec::new());
        for request in requests {
            match request {
                Request::Add(endpoint, reply) => match self.state.store(&endpoint) {
                    Ok(()) => {
                        self.own_records.added(&endpoint.record.id);
                        added.push(((*endpoint).clone(), reply));
                        let id = endpoint.record.id.clone();
                        self.shared.view().local.insert(id, *endpoint);
                    }
                    Err(error) => answer(reply, Err(error)),
                },
                Request::Describe(description, reply) => {
                    answer(reply, self.describe(description));
                }
                Request::Remove(id, reply) => {
                    let endpoint = self.shared.view().local.remove(&id);
                    removed.push((id, endpoint, reply));
                }
            }
        }
        match self.pass(whole, watcher, lease).await {
            Ok(failures) => self.answer_added(added, &failures),
            Err(error) => {
                let line = with_advice(format!("{error:#}"));
                tracing::warn!(error = line, "a pass failed; it is tried again");
                for (_, reply) in added {
                    answer(reply, Err(anyhow!("{line}")));
                }
                self.shared.view().errors = vec![line];
            }
        }
        for (id, endpoint, reply) in removed {
            let done = self.forget(&id, endpoint.as_ref()).await;
            if done.is_err()
                && let Some(endpoint) = endpoint
            {
                // Still here, so that it can be detached again.
                self.shared.view().local.insert(id, endpoint);
            }
            answer(reply, done);
        }
        self.answer_waiting();
    }

    /// One pass: look, compute, compare, change. An error means that looking failed.
    async fn pass(
        &mut self,
        whole: bool,
        watcher: &Watcher,
        lease: &Lease,
    ) -> Result<Vec<Failure>> {
        let (mut notes, mut repairs) = (Vec::new(), Repairs::default());
        let links = self.net.links().await?;
        self.follow_uplink(lease, &mut notes).await;
        let (xdp, xdp_note) = xdp::decide(self.shared.options.xdp, &self.uplink.link);
        let offloads = xdp::sandbox_offloads(xdp, &self.uplink.link);
        let external = match self.net.ensure_external(self.shared.options.vxlan_port).await {
            Ok(link) => Some(link.index),
            Err(error) => {
                notes.push(format!("{error:#}"));
                None
            }
        };
        if !self.settled {
            self.find_held(&links)?;
        }
        self.recover(&links, &mut notes).await;
        let mut local = self.wired(&links, &mut repairs).await?;
        self.remove_gateways(&mut notes).await;
        self.find_inner_ends(&mut local).await;
        self.find_gateways(&mut local, &links).await;
        self.follow_mtu(&local, &links, &mut notes).await;
        if whole {
            notes.extend(self.keep_files());
            self.repair_sandboxes(&local, offloads, &mut notes).await;
            self.repair_gateways(&local, &links, offloads, &mut notes).await;
        }
        let links = if whole { self.net.links().await? } else { links };
        let snapshot = self.shared.snapshots.borrow().clone();
        if self.knows_mappings(&snapshot) {
            // Before a port is published, so that what the programs leave to the kernel finds its
            // way.
            self.enforce_rules(&local, &links, whole, &mut notes).await;
        }
        let ports = self.port_inputs(&local, &links, xdp.map(|_| offloads)).await;

        let in_use = local.iter().map(|(it, _)| it.network.id.clone());
        watcher.want_endpoints(in_use.chain(self.searched(&snapshot)).collect());
        if let Some(hosts) = &snapshot.hosts {
            // A Consul that hangs answers nothing for a while before the watch says so; the lease,
            // whose renewals are short, knows earlier.
            let connected = snapshot.consul_state == "connected" && lease.problem().is_none();
            self.hosts.update(hosts, connected, Instant::now());
        }
        let usable = snapshot.hosts.is_some().then(|| self.hosts.usable());
        let desired = desired(&Inputs {
            node: self.shared.options.node.clone(),
            uplink: UplinkView {
                ifindex: self.uplink.link.index,
                name: self.uplink.link.name.clone(),
                address: self.uplink.address,
                mac: self.uplink.link.mac,
            },
            external,
            vxlan_port: self.shared.options.vxlan_port,
            source_ports: net::port_range(),
            xdp,
            settled: self.hosts.settled(),
            hosts: usable.clone(),
            endpoints: snapshot.endpoints.clone(),
            local: local.clone(),
            ports,
            held: self.hold(&links),
        });
        self.log_contradictions(&desired.contradictions);
        let told = self.hosts_are_told(&local, usable.as_ref(), &snapshot);

        let (failures, changed, republished) = {
            let mut datapath = self.shared.datapath();
            let written = self.tables.clone();
            if whole {
                self.tables = datapath.maps().read()?;
                datapath.refresh()?;
            }
            let known = datapath.known();
            let actual = Actual {
                tables: self.tables.clone(),
                attached: datapath.attached(),
                stale_links: datapath.stale_links(&desired.attachments)?,
            };
            let is_behind = |it: &Attachment| datapath.is_behind(it);
            let ops = diff(&desired, &actual);
            let ops = self.handover.hold_back(ops, told, is_behind, &mut notes);
            let changed = !ops.is_empty();
            let of_ports = |op: &Op| matches!(op, Op::SetPublished(..) | Op::RemovePublished(_));
            let republished = ops.iter().any(of_ports);
            let lost = known.difference(&actual.attached).cloned().collect();
            let drift = Drift { written: &written, found: &actual.tables, lost: &lost };
            let steps: Vec<(Op, Repair)> =
                ops.iter().filter_map(|op| Some((op.clone(), drift.repair(op)?))).collect();
            let failures = apply(&mut datapath, &mut self.tables, ops);
            for (_, kind) in
                steps.iter().filter(|(op, _)| failures.iter().all(|failed| failed.op != *op))
            {
                repairs.add(*kind);
            }
            (failures, changed, republished)
        };
        let failures = self.tolerate(failures, &mut notes);
        if failures.is_empty() {
            self.handover.finish(&mut self.shared.datapath(), &links, &mut notes);
        }
        // The first time in any case: before, the table of ports may not be filled.
        if republished || !self.settled {
            self.ports.published.send_replace(());
        }
        if changed || whole {
            let vteps = self.tables.hosts.keys().map(|vtep| unmapped(vtep).into()).collect();
            if let Err(error) = self.net.keep_neighbours(&vteps).await {
                notes.push(format!("{error:#}"));
            }
        }
        self.own_records.keep(&snapshot, &local, whole);

        let mut view = self.shared.view();
        view.usable_hosts = usable.map(|hosts| {
            let own = std::iter::once(self.shared.options.node.clone());
            Arc::new(hosts.into_keys().chain(own).collect())
        });
        view.uplink = self.uplink.clone();
        view.xdp_note = xdp_note;
        view.offloads = offloads;
        // What the first pass finds otherwise is what it is there for.
        if self.settled {
            view.repairs.merge(repairs);
        }
        notes.extend(failures.iter().map(|failure| format!("{:#}", failure.error)));
        let mut notes: Vec<String> = notes.into_iter().map(with_advice).collect();
        // At the start nothing is announced yet, which is no problem.
        notes.extend(lease.problem().filter(|_| self.settled));
        if view.errors != notes {
            for note in notes.iter().filter(|note| !view.errors.contains(note)) {
                tracing::warn!("{note}");
            }
            view.errors = notes;
        }
        Ok(failures)
    }

    /// Resolves `--advertise` again and announces what changed. An uplink that is gone for the
    /// moment stays what it was: absence is not an order.
    async fn follow_uplink(&mut self, lease: &Lease, notes: &mut Vec<String>) {
        match self.net.uplink(&self.shared.options.advertise).await {
            Ok(uplink) => {
                if uplink != self.uplink {
                    tracing::info!(
                        interface = uplink.link.name, address = %uplink.address,
                        mtu = uplink.link.mtu, "the uplink changed"
                    );
                    // Before the lease writes the new address, on a connection that works.
                    if uplink.address != self.uplink.address
                        && let Err(error) = self.shared.consul.reconnect()
                    {
                        notes.push(format!("{error:#}"));
                    }
                    self.uplink = uplink;
                }
            }
            Err(error) => notes.push(format!("{error:#}")),
        }
        lease.update(host_record(
            &self.shared.options.node,
            &self.uplink,
            self.shared.options.vxlan_port,
        ));
    }

    /// Takes out of the failures what `--xdp auto` promised not to fail for.
    fn tolerate(&self, failures: Vec<Failure>, notes: &mut Vec<String>) -> Vec<Failure> {
        let auto = self.shared.options.xdp == crate::config::Xdp::Auto;
        let (tolerated, failures) = failures.into_iter().partition(|failure| {
            auto && matches!(&failure.op, Op::Attach(attachment) if attachment.xdp.is_some())
        });
        let tolerated: Vec<Failure> = tolerated;
        notes.extend(tolerated.iter().map(|it| format!("XDP is off: {:#}", it.error)));
        failures
    }

    fn log_contradictions(&mut self, found: &[String]) {
        let found: BTreeSet<String> = found.iter().cloned().collect();
        for line in found.difference(&self.contradictions) {
            tracing::warn!("a record is ignored: {line}");
        }
        self.contradictions = found;
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
