//! A Docker and our side of it in memory, for tests. As the real ones do, making a Docker network
//! calls the plugin, and removing one that the agent did not mark is taken for a user's order.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::Ipv4Addr,
    sync::{Arc, Mutex, MutexGuard},
};

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use futures::{StreamExt as _, stream::BoxStream};
use tokio::sync::{Notify, mpsc, watch};

use super::{
    api::{Api, Dial},
    side::{Networks, Publish, Side},
};
use crate::{
    consul::schema::{EndpointRecord, EndpointState, NetworkRecord, VERSION, format_mac, mac_of},
    docker::daemon::{ContainerNames, DRIVER, DockerNetwork, EndpointNames, Event, ID_OPTION},
    reconcile::Description,
    state::{DockerEndpoint, LocalEndpoint},
};

/// Networks of a Consul that answers.
pub(super) fn networks(records: &[&NetworkRecord]) -> Networks {
    let by_name = records.iter().map(|record| (record.name.clone(), (*record).clone()));
    Networks { read: Some(by_name.collect()), connected: true, ..Networks::default() }
}

/// A Docker network that the agent made for a network.
pub(super) fn docker_network(id: &str, record: &NetworkRecord) -> DockerNetwork {
    DockerNetwork {
        id: id.into(),
        name: record.name.clone(),
        driver: DRIVER.into(),
        options: BTreeMap::from([(ID_OPTION.to_owned(), record.id.clone())]),
        labels: record.labels.clone(),
        subnet: Some(record.subnet),
        gateway: Some(record.gateway),
        created: format!("2026-11-23T08:00:00.{id}Z"),
        ..DockerNetwork::default()
    }
}

/// Both sides. Clones share everything.
#[derive(Clone, Debug)]
pub(super) struct Fake {
    state: Arc<Mutex<State>>,
    changed: Arc<watch::Sender<u64>>,
    created: Arc<Notify>,
}

#[derive(Debug, Default)]
pub(super) struct State {
    pub(super) consul: Networks,
    pub(super) bound: BTreeMap<String, NetworkRecord>,
    pub(super) endpoints: BTreeMap<String, LocalEndpoint>,
    pub(super) removing: BTreeSet<String>,
    pub(super) creating: BTreeSet<String>,
    pub(super) notes: BTreeSet<String>,
    pub(super) down: bool,
    pub(super) docker: BTreeMap<String, DockerNetwork>,
    /// Docker's ids of networks Docker is in the middle of making.
    pub(super) unfinished: BTreeSet<String>,
    pub(super) listed: BTreeMap<String, BTreeMap<String, Option<String>>>,
    pub(super) containers: BTreeMap<String, ContainerNames>,
    /// Containers that are starting: nothing is answered about them.
    pub(super) starting: BTreeSet<String>,
    /// Containers that Docker fails to describe.
    pub(super) nameless: BTreeSet<String>,
    /// Names that cannot be published, and those that another host has.
    pub(super) unpublishable: BTreeSet<String>,
    /// Docker networks, by Docker's id, about whose endpoints nothing is answered.
    pub(super) stuck: BTreeSet<String>,
    /// Docker is stopping, but has not ended the events.
    pub(super) stopping: bool,
    pub(super) gwbridge: Option<Ipv4Addr>,
    /// How many looks have missed `docker_gwbridge`, and how many had when it was made.
    pub(super) bridge_missed: usize,
    pub(super) bridge_made: Vec<usize>,
    /// What making a network and naming an endpoint wait for, and what of that was begun.
    pub(super) gate: Option<watch::Receiver<bool>>,
    pub(super) begun: Vec<String>,
    next: usize,
    /// What hears of events, of the sessions that were going on when the last one happened.
    pub(super) events: Vec<mpsc::UnboundedSender<Event>>,
}

impl Fake {
    /// A Docker without networks, and a Consul that has these.
    pub(super) fn new(records: &[&NetworkRecord]) -> Self {
        let state = State { consul: networks(records), ..State::default() };
        Self {
            state: Arc::new(Mutex::new(state)),
            changed: Arc::new(watch::channel(0).0),
            created: Arc::default(),
        }
    }

    pub(super) fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    /// Changes Consul's networks, and says so.
    pub(super) fn change(&self, change: impl FnOnce(&mut Networks)) {
        change(&mut self.state().consul);
        self.changed.send_modify(|count| *count += 1);
    }

    pub(super) fn happens(&self, event: Event) {
        self.state().events.retain(|events| events.send(event.clone()).is_ok());
    }

    /// Docker goes away, or comes back.
    pub(super) fn set_down(&self, down: bool) {
        let mut state = self.state();
        state.down = down;
        state.events.clear();
    }

    /// A user's `docker network create`, up to the plugin's answer to CreateNetwork.
    pub(super) fn user_creates(&self, name: &str, record: &NetworkRecord) -> String {
        let mut state = self.state();
        let id = state.next_id();
        let nameless = NetworkRecord { name: String::new(), ..record.clone() };
        let named = NetworkRecord { name: name.into(), ..record.clone() };
        state.bound.insert(id.clone(), nameless);
        let docker = DockerNetwork { options: BTreeMap::new(), ..docker_network(&id, &named) };
        state.docker.insert(id.clone(), docker);
        state.unfinished.insert(id.clone());
        drop(state);
        self.created.notify_one();
        id
    }

    /// The rest of it.
    pub(super) fn user_created(&self, id: &str) {
        self.state().unfinished.remove(id);
    }

    /// The names of Docker's networks.
    pub(super) fn docker_names(&self) -> Vec<String> {
        let mut names: Vec<_> = self.state().docker.values().map(|n| n.name.clone()).collect();
        names.sort();
        names
    }

    /// An endpoint as the plugin makes it for a container, of which Docker knows all but what the
    /// plugin is told of it.
    pub(super) fn start_container(&self, docker_network: &str, container: &str, aliases: &[&str]) {
        let mut state = self.state();
        let id = format!("endpoint-{container}");
        let address = Ipv4Addr::new(10, 0, 0, 2);
        let record = EndpointRecord {
            v: VERSION,
            id: id.clone(),
            address,
            mac: format_mac(mac_of(address)),
            host: "docker01".into(),
            names: vec![],
            state: EndpointState::Up,
        };
        let local = LocalEndpoint {
            record,
            network: state.bound[docker_network].clone(),
            netns: "/var/run/docker/netns/1".into(),
            ifname: String::new(),
            host_ifname: "ovnet00000001".into(),
            mtu: 1450,
            docker: Some(DockerEndpoint { network: docker_network.into(), container: None }),
            gateway: None,
            ports: Vec::new(),
        };
        state.endpoints.insert(id.clone(), local);
        let listed = state.listed.entry(docker_network.into()).or_default();
        listed.insert(id.clone(), Some(container.into()));
        let endpoint = EndpointNames {
            endpoint: id,
            aliases: aliases.iter().map(|alias| (*alias).to_owned()).collect(),
        };
        let names = ContainerNames {
            id: container.into(),
            name: format!("name-{container}"),
            endpoints: vec![endpoint],
            ports: Vec::new(),
        };
        state.containers.insert(container.into(), names);
    }

    /// Begins something, and waits where there is a gate.
    async fn begin(&self, what: &str) {
        let gate = {
            let mut state = self.state();
            state.begun.push(what.to_owned());
            state.gate.clone()
        };
        if let Some(mut gate) = gate {
            gate.wait_for(|open| *open).await.unwrap();
        }
    }

    fn up(&self) -> Result<MutexGuard<'_, State>> {
        let state = self.state();
        ensure!(!state.down, "Docker is down");
        Ok(state)
    }
}

impl State {
    fn next_id(&mut self) -> String {
        self.next += 1;
        format!("d{}", self.next)
    }
}

impl Dial for Fake {
    type Api = Self;

    fn address(&self) -> Option<String> {
        (!self.state().stopping).then(|| "unix:///fake".into())
    }

    async fn dial(&self, _: &str) -> Result<Self> {
        self.up().map(|_| self.clone())
    }
}

impl Api for Fake {
    fn is_there(&self) -> bool {
        self.address().is_some()
    }

    async fn networks(&self) -> Result<Vec<DockerNetwork>> {
        let state = self.up()?;
        let whole = state.docker.values().filter(|n| !state.unfinished.contains(&n.id));
        Ok(whole.cloned().collect())
    }

    async fn network(&self, id: &str) -> Result<Option<DockerNetwork>> {
        Ok(Api::networks(self).await?.into_iter().find(|network| network.id == id))
    }

    async fn endpoints_of(&self, id: &str) -> Result<Option<BTreeMap<String, Option<String>>>> {
        if self.state().stuck.contains(id) {
            std::future::pending::<()>().await;
        }
        let state = self.up()?;
        let listed = || state.listed.get(id).cloned().unwrap_or_default();
        Ok(state.docker.contains_key(id).then(listed))
    }

    async fn create_network(&self, network: &NetworkRecord) -> Result<String> {
        self.begin(&network.name).await;
        let mut state = self.up()?;
        assert!(state.creating.contains(&network.id));
        let taken = state.docker.values().any(|other| other.name == network.name);
        ensure!(!taken, "network with name {} already exists", network.name);
        let id = state.next_id();
        state.docker.insert(id.clone(), docker_network(&id, network));
        state.bound.insert(id.clone(), network.clone());
        Ok(id)
    }

    async fn remove_network(&self, id: &str) -> Result<()> {
        let mut state = self.up()?;
        let used = state.listed.get(id).is_some_and(|listed| !listed.is_empty());
        ensure!(!used, "network {id} has active endpoints");
        assert!(state.removing.contains(id), "the plugin takes this for a user's order");
        state.docker.remove(id);
        Ok(())
    }

    async fn names_of(&self, container: &str) -> Result<Option<ContainerNames>> {
        if self.state().starting.contains(container) {
            std::future::pending::<()>().await;
        }
        let state = self.up()?;
        ensure!(!state.nameless.contains(container), "inspect container {container}: no");
        Ok(state.containers.get(container).cloned())
    }

    async fn gwbridge(&self) -> Result<Option<Ipv4Addr>> {
        let mut state = self.up()?;
        state.bridge_missed += usize::from(state.gwbridge.is_none());
        Ok(state.gwbridge)
    }

    async fn make_gwbridge(&self) -> Result<Ipv4Addr> {
        let mut state = self.up()?;
        let missed = std::mem::take(&mut state.bridge_missed);
        state.bridge_made.push(missed);
        Ok(*state.gwbridge.insert(Ipv4Addr::new(172, 18, 0, 1)))
    }

    fn events(&self) -> BoxStream<'static, Event> {
        let (sender, mut receiver) = mpsc::unbounded_channel();
        if let Ok(mut state) = self.up() {
            state.events.push(sender);
        }
        futures::stream::poll_fn(move |context| receiver.poll_recv(context)).boxed()
    }
}

impl Side for Fake {
    fn networks(&self) -> Networks {
        self.state().consul.clone()
    }

    fn changed(&self) -> watch::Receiver<u64> {
        self.changed.subscribe()
    }

    fn created(&self) -> Arc<Notify> {
        Arc::clone(&self.created)
    }

    fn bound(&self) -> BTreeMap<String, NetworkRecord> {
        self.state().bound.clone()
    }

    async fn publish(
        &self,
        docker_id: &str,
        name: &str,
        labels: BTreeMap<String, String>,
    ) -> Result<Publish> {
        let mut state = self.state();
        if state.unpublishable.contains(name) {
            bail!("publish network {name}: Consul does not answer");
        }
        let read = state.consul.read.get_or_insert_default();
        if let Some(theirs) = read.get(name) {
            return Ok(Publish::Taken(theirs.clone()));
        }
        let record = state.bound.get_mut(docker_id).context("nobody asked for it")?;
        (record.name, record.labels) = (name.to_owned(), labels);
        let record = record.clone();
        state.consul.read.get_or_insert_default().insert(name.to_owned(), record.clone());
        Ok(Publish::Done(record))
    }

    fn bind(&self, docker_id: &str, network: &NetworkRecord) -> Result<()> {
        self.state().bound.insert(docker_id.to_owned(), network.clone());
        Ok(())
    }

    async fn unbind(&self, docker_id: &str) -> Result<()> {
        self.state().bound.remove(docker_id);
        Ok(())
    }

    fn removing(&self, docker_id: &str, yes: bool) {
        let mut state = self.state();
        if yes {
            state.removing.insert(docker_id.to_owned());
        } else {
            state.removing.remove(docker_id);
        }
    }

    fn creating(&self, network_id: &str, yes: bool) {
        let mut state = self.state();
        if yes {
            state.creating.insert(network_id.to_owned());
        } else {
            state.creating.remove(network_id);
        }
    }

    async fn restore(&self, network: &NetworkRecord) -> Result<()> {
        let mut state = self.state();
        state.consul.lost.remove(&network.name);
        let read = state.consul.read.get_or_insert_default();
        read.insert(network.name.clone(), network.clone());
        Ok(())
    }

    fn endpoints(&self) -> Vec<LocalEndpoint> {
        self.state().endpoints.values().cloned().collect()
    }

    async fn remove_endpoint(&self, id: &str) -> Result<()> {
        self.state().endpoints.remove(id);
        Ok(())
    }

    async fn describe_endpoint(&self, description: Description) -> Result<()> {
        let Description { id, names, container, ports } = description;
        self.begin(&id).await;
        let mut state = self.state();
        let endpoint = state.endpoints.get_mut(&id).ok_or_else(|| anyhow!("no endpoint {id}"))?;
        endpoint.record.names = names;
        if let Some(docker) = &mut endpoint.docker {
            docker.container = Some(container);
            endpoint.ports = ports;
        }
        Ok(())
    }

    fn note(&self, notes: BTreeSet<String>) {
        self.state().notes = notes;
    }
}
