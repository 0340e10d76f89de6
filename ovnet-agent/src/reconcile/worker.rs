//! The loop itself and one pass of it.

mod answers;
mod findings;
mod handover;
mod kernel;
mod ports;
mod recover;
mod sandboxes;
mod uplink;

use std::{
    collections::{BTreeMap, BTreeSet},
    net::Ipv4Addr,
    sync::Arc,
    time::Instant,
};

use anyhow::{Result, anyhow};
use tokio::sync::{mpsc, watch};

pub(in crate::reconcile) use self::ports::Ports;
pub use self::uplink::host_record;
use self::{
    answers::{Waiting, answer},
    findings::Findings,
    handover::Handover,
    kernel::Occasion,
};
use super::{Request, Shared, records::OwnRecords, xdp};
use crate::{
    apply::Failure,
    consul::{Lease, Watcher},
    datapath::Tables,
    desired::{Inputs, Seniority, UplinkView, desired},
    hosts::HostTable,
    net::{self, Hop, Net, Uplink},
    service::with_advice,
    state::StateFolder,
};

/// Looks at the start before what fails is an error.
const FIRST_LOOKS: u32 = 3;

/// The loop. It owns everything only the loop changes.
pub struct Worker {
    shared: Arc<Shared>,
    net: Net,
    state: StateFolder,
    requests: mpsc::Receiver<Request>,
    uplink: Uplink,
    /// Whether the uplink is missing, down or without its address just now.
    away: bool,
    /// The address that the programs take for ours, see [`Worker::follow_vtep`].
    vtep: Ipv4Addr,
    hosts: HostTable,
    seniority: Seniority,
    /// What the maps hold: read whole at each repair, kept up to date by `apply` in between.
    tables: Tables,
    own_records: OwnRecords,
    ports: Ports,
    /// Names of host-side veths of endpoints whose state is lost.
    held: BTreeSet<String>,
    handover: Handover,
    waiting: Vec<Waiting>,
    /// Which namespace each endpoint's sandbox is, see [`Worker::remember_sandboxes`].
    sandboxes: BTreeMap<String, u64>,
    /// The next hops that the kernel keeps resolved for us.
    neighbours: BTreeSet<Hop>,
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
            vtep: uplink.address,
            uplink,
            away: false,
            hosts,
            seniority: Seniority::default(),
            tables: Tables::default(),
            own_records,
            ports,
            held: BTreeSet::new(),
            handover: Handover::Ahead,
            waiting: Vec::new(),
            sandboxes: BTreeMap::new(),
            neighbours: BTreeSet::new(),
            settled: false,
        }
    }

    /// The first pass. What it cannot do the agent cannot run without, so its errors are fatal; but
    /// for those that are gone in another look, as when a sandbox vanishes in the middle of it.
    pub async fn start(&mut self, watcher: &Watcher, lease: &Lease) -> Result<()> {
        let mut failures = Vec::new();
        for _ in 0..FIRST_LOOKS {
            failures = self.pass(true, watcher, lease).await?;
            if failures.is_empty() {
                break;
            }
        }
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
            let waited = self.waiting.iter().map(|waiting| waiting.until);
            let waited = waited.chain(self.own_records.next_try()).min();
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
                () = lease.changed() => {}
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
                let mut view = self.shared.view();
                view.errors = vec![line];
                view.activity.failed_passes += 1;
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
        let mut seen = Findings::default();
        let links = self.net.links().await?;
        let moved = self.follow_uplink(&links, lease, &mut seen).await;
        let repair = whole;
        // What an event tells of is put right at once, and not by the timer.
        let whole = whole || moved || self.is_broken(&links);
        let (xdp, xdp_note) = xdp::decide(self.shared.options.xdp, &self.uplink.link);
        let offloads = xdp::sandbox_offloads(xdp, &self.uplink.link);
        let port = self.shared.options.vxlan_port;
        let external = self.net.ensure_external(port, &mut seen.repairs).await;
        let external = seen.note(external).map(|link| link.index);
        if !self.settled {
            self.find_held(&links)?;
        }
        self.recover(&links, &mut seen.notes).await;
        let mut local = self.wired(&links, offloads, &mut seen).await?;
        self.remove_gateways(&mut seen).await;
        self.find_inner_ends(&mut local).await;
        self.find_gateways(&mut local, &links).await;
        self.remember_sandboxes(&local).await;
        self.follow_mtu(&local, &links, &mut seen).await;
        if whole {
            seen.notes.extend(self.keep_files());
            let before = seen.repairs.clone();
            self.repair_uplink(&mut seen).await;
            self.repair_sandboxes(&local, offloads, &mut seen).await;
            self.repair_gateways(&local, &links, offloads, &mut seen).await;
            if moved {
                // They follow the uplink, which is nobody's doing.
                seen.repairs = before;
            }
        }
        let links = if whole { self.net.links().await? } else { links };
        let snapshot = self.shared.snapshots.borrow().clone();
        if self.knows_mappings(&snapshot) {
            // Before a port is published, so that what the programs leave to the kernel finds its
            // way.
            self.enforce_rules(&local, &links, whole, &mut seen).await;
        }
        let ports = self.port_inputs(&local, &links, xdp.map(|_| offloads)).await;

        let in_use = local.iter().map(|(it, _)| it.network.id.clone());
        watcher.want_endpoints(in_use.chain(self.searched(&snapshot)).collect());
        if let Some(hosts) = &snapshot.hosts {
            // A Consul that hangs answers nothing for a while before the watch says so; the lease,
            // whose renewals are short, knows earlier.
            let connected = snapshot.consul_state == "connected" && lease.problem().is_none();
            let peers = &self.shared.peers;
            self.hosts.update(hosts, connected, Instant::now(), |host| peers.reaches(host));
        }
        self.follow_vtep(&snapshot, lease, repair);
        let usable = snapshot.hosts.as_ref().map(|read| {
            let usable = self.hosts.usable();
            self.seniority.update(&usable, read);
            usable
        });
        let desired = desired(&Inputs {
            node: self.shared.options.node.clone(),
            uplink: UplinkView {
                ifindex: self.uplink.link.index,
                name: self.uplink.link.name.clone(),
                address: self.vtep,
                mac: self.uplink.link.mac,
            },
            external,
            vxlan_port: port,
            source_ports: net::port_range(),
            xdp,
            settled: self.hosts.settled(),
            hosts: usable.clone(),
            seniority: self.seniority.order(),
            networks: snapshot.networks.clone().unwrap_or_default(),
            endpoints: snapshot.endpoints.clone(),
            local: local.clone(),
            ports,
            held: self.hold(&links),
        });
        let ignored = desired.contradictions.iter();
        seen.notes.extend(ignored.map(|line| format!("a record is ignored: {line}")));

        let told = self.hosts_are_told(&local, usable.as_ref(), &snapshot);
        let occasion = Occasion { whole, moved, told };
        let failures = self.change(&desired, occasion, &links, &mut seen).await?;
        self.own_records.keep(&snapshot, &local, whole);
        self.own_records.keep_announced(&snapshot, lease);

        let mut view = self.shared.view();
        view.usable_hosts = usable.map(|hosts| {
            let own = std::iter::once(self.shared.options.node.clone());
            Arc::new(hosts.into_keys().chain(own).collect())
        });
        view.uplink = self.uplink.clone();
        view.xdp_note = xdp_note;
        view.offloads = offloads;
        view.activity.count(failures.len(), &self.tables);
        // What the first pass finds otherwise is what it is there for.
        let Findings { mut notes, repairs } = seen;
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
}
