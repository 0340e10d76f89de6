//! The one loop that changes the kernel: event or timer → desired → diff → apply.
//!
//! Start-up, change and repair run the same pass (invariant 2), in one task, so no two passes ever
//! meet. [`Reconciler`] is the handle the rest of the agent holds: it asks the task for changes and
//! reads what the task last saw.

mod drift;
mod flows;
mod records;
mod worker;
mod xdp;

use std::{
    collections::{BTreeMap, BTreeSet},
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use anyhow::{Context as _, Result, anyhow, bail};
use ovnet_common::{
    abi::{DropEvent, PortCounters, Program},
    verdict,
};
use tokio::sync::{broadcast, mpsc, oneshot, watch};
use worker::Ports;
pub use worker::{Worker, host_record};

use crate::{
    api::types::{CounterView, PeerView, Status},
    config::Xdp,
    consul::{Consul, Health, Snapshot},
    datapath::{Datapath, Tables, TcMode},
    net::{Net, SandboxOffloads, Uplink},
    peers::{self, Peers, State},
    publish::{PublishedPort, reserve::Reservations},
    repairs::Repairs,
    service::views::path_view,
    state::{LocalEndpoint, StateFolder},
};

/// Drop events kept for a slow reader of `ovnet monitor`.
const EVENT_BACKLOG: usize = 1024;
/// Requests waiting for a pass; more wait in their callers.
const REQUEST_BACKLOG: usize = 256;

/// What the loop needs to know of the command line.
#[derive(Clone, Debug)]
pub struct Options {
    /// Name of this host.
    pub node: String,
    /// `--advertise`.
    pub advertise: String,
    /// `--vxlan-port`, host byte order.
    pub vxlan_port: u16,
    /// `--xdp`.
    pub xdp: Xdp,
    /// `--host-grace`.
    pub host_grace: Duration,
    /// Time between repairs.
    pub repair_interval: Duration,
    /// `--state-dir`.
    pub state_dir: PathBuf,
    /// `--ports`: whether programs serve published ports.
    pub ports_by_bpf: bool,
}

/// A request to the loop.
enum Request {
    Add(Box<LocalEndpoint>, oneshot::Sender<Result<()>>),
    Remove(String, oneshot::Sender<Result<()>>),
    Describe(Description, oneshot::Sender<Result<Option<LocalEndpoint>>>),
}

/// What is learned of an endpoint after it was made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Description {
    /// Id of the endpoint.
    pub id: String,
    /// Name and aliases.
    pub names: Vec<String>,
    /// Docker's id of the container.
    pub container: String,
    /// The ports of this host that lead to the container, sorted.
    pub ports: Vec<PublishedPort>,
}

/// The handle. Clones share everything.
#[derive(Clone)]
pub struct Reconciler {
    requests: mpsc::Sender<Request>,
    shared: Arc<Shared>,
}

impl std::fmt::Debug for Reconciler {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Reconciler").finish_non_exhaustive()
    }
}

/// What the loop writes and everybody reads.
struct Shared {
    options: Options,
    consul: Consul,
    datapath: Mutex<Datapath>,
    snapshots: watch::Receiver<Arc<Snapshot>>,
    view: Mutex<View>,
    events: broadcast::Sender<DropEvent>,
    flows: Arc<flows::Flows>,
    peers: Peers,
}

/// The loop's view of this host after its last pass.
#[derive(Clone, Debug)]
struct View {
    local: BTreeMap<String, LocalEndpoint>,
    usable_hosts: Option<Arc<BTreeSet<String>>>,
    uplink: Uplink,
    xdp_note: String,
    offloads: SandboxOffloads,
    repairs: Repairs,
    activity: Activity,
    errors: Vec<String>,
    /// State files of endpoints that could not be read when the agent started.
    set_aside: usize,
    /// What the ids of endpoints begin with whose state is lost and not recovered yet.
    held: BTreeSet<String>,
    /// What stands in the way elsewhere than in the loop.
    notes: BTreeSet<String>,
}

/// What the loop has done so far, and what it keeps in the tables.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Activity {
    /// Passes that came to their end.
    pub passes: u64,
    /// Passes that did not, because looking failed.
    pub failed_passes: u64,
    /// Steps that failed and were left to the next pass.
    pub failed_steps: u64,
    /// Entries of each table the agent writes, with its capacity.
    pub tables: [(&'static str, u64, u64); 5],
}

impl Activity {
    /// Counts a pass that came to its end, with steps that failed.
    fn count(&mut self, failed: usize, tables: &Tables) {
        self.passes += 1;
        self.failed_steps += u64::try_from(failed).unwrap_or(u64::MAX);
        self.tables = tables.fill();
    }
}

impl Reconciler {
    /// The handle and the loop, which does nothing until it is run. Reads the state folder, and
    /// resolves `--advertise` once: without an uplink there is nothing to start.
    pub async fn new(
        options: Options,
        consul: Consul,
        net: Net,
        mut datapath: Datapath,
        snapshots: watch::Receiver<Arc<Snapshot>>,
        reservations: Reservations,
    ) -> Result<(Self, Worker)> {
        let state = StateFolder::open(&options.state_dir)?;
        let loaded = state.load()?;
        let set_aside = loaded.set_aside;
        let local: BTreeMap<String, LocalEndpoint> =
            loaded.objects.into_iter().map(|it| (it.record.id.clone(), it)).collect();
        if let Some(other) = local.values().find(|it| it.record.host != options.node) {
            bail!(
                "the endpoints here were attached as host {}: start with --node {}, or detach them \
                 first",
                other.record.host,
                other.record.host
            );
        }
        let uplink = net.uplink(&options.advertise).await?;
        let (events, _) = broadcast::channel(EVENT_BACKLOG);
        crate::datapath::spawn_reader(&mut datapath, events.clone());
        let (published, ports) = watch::channel(());
        let flows = flows::spawn(datapath.conntrack()?, ports);
        let (requests, incoming) = mpsc::channel(REQUEST_BACKLOG);
        let view = View {
            local,
            usable_hosts: None,
            uplink: uplink.clone(),
            xdp_note: "off".into(),
            offloads: xdp::WITHOUT_XDP,
            repairs: Repairs::default(),
            activity: Activity::default(),
            errors: Vec::new(),
            set_aside,
            held: BTreeSet::new(),
            notes: BTreeSet::new(),
        };
        let shared = Arc::new(Shared {
            options,
            consul,
            datapath: Mutex::new(datapath),
            snapshots,
            view: Mutex::new(view),
            events,
            flows,
            peers: Peers::default(),
        });
        let worker = Worker::new(
            Arc::clone(&shared),
            net,
            state,
            incoming,
            uplink,
            Ports::new(reservations, published),
        );
        Ok((Self { requests, shared }, worker))
    }

    /// What Consul holds, as last read, and whenever it changes.
    pub fn snapshots(&self) -> watch::Receiver<Arc<Snapshot>> {
        self.shared.snapshots.clone()
    }

    /// What Consul holds, as last read.
    pub fn snapshot(&self) -> Arc<Snapshot> {
        self.shared.snapshots.borrow().clone()
    }

    /// The endpoints of this host.
    pub fn local(&self) -> Vec<LocalEndpoint> {
        self.shared.view().local.values().cloned().collect()
    }

    /// Whether the endpoint is one of this host whose state is lost: it may still be used.
    pub fn holds(&self, id: &str) -> bool {
        let view = self.shared.view();
        let id = id.to_ascii_lowercase();
        view.held.iter().any(|digits| id.starts_with(digits))
    }

    /// Ids of this host's endpoints, sorted.
    pub fn local_ids(&self) -> Vec<String> {
        self.shared.view().local.keys().cloned().collect()
    }

    /// Names of the hosts that count as there, this one included; `None` until they were read.
    pub fn usable_hosts(&self) -> Option<Arc<BTreeSet<String>>> {
        self.shared.view().usable_hosts.clone()
    }

    /// What is known of the ways to the other hosts.
    pub fn peers(&self) -> Peers {
        self.shared.peers.clone()
    }

    /// What the loop has done so far.
    pub fn activity(&self) -> Activity {
        self.shared.view().activity
    }

    /// How Consul has answered so far.
    pub fn consul_health(&self) -> Health {
        self.shared.consul.health()
    }

    /// The uplink as last seen.
    pub fn uplink(&self) -> Uplink {
        self.shared.view().uplink.clone()
    }

    /// What a new sandbox's interface must have on and off.
    pub fn sandbox_offloads(&self) -> SandboxOffloads {
        self.shared.view().offloads
    }

    /// Remembers an endpoint whose veth exists, wires it, and returns when its programs and table
    /// entries are in place and its network's other endpoints were read once.
    pub async fn add_local(&self, endpoint: LocalEndpoint) -> Result<()> {
        let (reply, answer) = oneshot::channel();
        self.request(Request::Add(Box::new(endpoint), reply), answer).await
    }

    /// Forgets an endpoint, unwires it and deletes its veth. One that is not there is no error.
    pub async fn remove_local(&self, id: &str) -> Result<()> {
        let (reply, answer) = oneshot::channel();
        self.request(Request::Remove(id.to_owned(), reply), answer).await
    }

    /// Adds to an endpoint what was learned of it, and returns it as it is now; `None` where it is
    /// not there any more.
    pub async fn describe_local(&self, description: Description) -> Result<Option<LocalEndpoint>> {
        let (reply, answer) = oneshot::channel();
        self.request(Request::Describe(description, reply), answer).await
    }

    /// Shows these lines in the status beside the loop's own, in place of the last ones.
    pub fn set_notes(&self, notes: BTreeSet<String>) {
        self.shared.view().notes = notes;
    }

    async fn request<T>(
        &self,
        request: Request,
        answer: oneshot::Receiver<Result<T>>,
    ) -> Result<T> {
        let stopped = || anyhow!("the agent is stopping: try again when it is back");
        self.requests.send(request).await.map_err(|_| stopped())?;
        answer.await.map_err(|_| stopped())?
    }

    /// What `ovnet status` shows.
    pub fn status(&self) -> Status {
        let (snapshot, view) = (self.snapshot(), self.shared.view().clone());
        let (flow_entries, flow_capacity) = self.shared.flows.usage();
        let tc = match self.shared.datapath().tc_mode() {
            TcMode::Tcx => "tcx",
            TcMode::Clsact => "clsact",
        };
        let uplink = view.uplink;
        let known = self.shared.peers.known();
        let trouble =
            known.iter().filter(|(_, it)| matches!(it.state, State::Narrow | State::Unreachable));
        let warnings = trouble
            .map(|(node, it)| {
                let why = peers::warning(node, it.vtep, it.mtu, it.state);
                format!("{why} (for {} s)", it.lasting.as_secs())
            })
            .collect();
        let peers = known.into_iter().map(|(node, it)| PeerView {
            node,
            vtep: it.vtep,
            path: path_view(&it),
        });
        Status {
            node: self.shared.options.node.clone(),
            agent: env!("CARGO_PKG_VERSION").into(),
            uplink: uplink.link.name,
            vtep: Some(uplink.address),
            uplink_mtu: uplink.link.mtu,
            consul: self.shared.consul.describe().into(),
            consul_state: snapshot.consul_state.clone(),
            xdp: view.xdp_note,
            tc: tc.into(),
            hosts: snapshot.hosts.as_ref().map_or(0, BTreeMap::len),
            networks: snapshot.networks.as_ref().map_or(0, BTreeMap::len),
            local_endpoints: view.local.len(),
            published_ports: view.local.values().map(|it| it.ports.len()).sum(),
            flow_entries,
            flow_capacity,
            repairs: view.repairs,
            unreadable_records: snapshot.unreadable,
            state_files_set_aside: view.set_aside,
            peers: peers.collect(),
            warnings,
            errors: view.errors.into_iter().chain(view.notes).collect(),
        }
    }

    /// Every counter, those at zero too, in the order of programs and codes.
    pub fn counters(&self) -> Result<Vec<CounterView>> {
        let mut datapath = self.shared.datapath();
        let mut counters = Vec::new();
        for program in Program::ALL {
            for (code, label) in (0..=u8::MAX).filter_map(|it| Some((it, verdict::label(it)?))) {
                let counter = datapath.maps().counter(program, code)?;
                counters.push(CounterView {
                    program: program.name().into(),
                    verdict: label.into(),
                    packets: counter.packets,
                    bytes: counter.bytes,
                });
            }
        }
        Ok(counters)
    }

    /// Packets and bytes of the endpoint behind a host-side veth.
    pub fn port_counters(&self, host_ifname: &str) -> Result<PortCounters> {
        let ifindex = nix::net::if_::if_nametoindex(host_ifname)
            .with_context(|| format!("look up {host_ifname}"))?;
        self.shared.datapath().maps().port_counters(ifindex)
    }

    /// Sampled drops from now on.
    pub fn events(&self) -> broadcast::Receiver<DropEvent> {
        self.shared.events.subscribe()
    }
}

impl Shared {
    fn view(&self) -> MutexGuard<'_, View> {
        // The view is replaced field by field with whole values; none depends on another.
        self.view.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn datapath(&self) -> MutexGuard<'_, Datapath> {
        // Every method leaves the kernel in a state the next pass compares anew.
        self.datapath.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
