//! The task that keeps this host's Docker and Consul's networks the same.
//!
//! Docker → Consul: a network that a user made here is published under the name Docker gave it
//! (`publish`). Consul → Docker: a network of another host is made here too, and a deleted one
//! removed (`plan`, carried out by `pass`). Docker's word also decides which endpoints are
//! left over (`endpoints`) and what containers are called (`names`).
//!
//! Nothing here runs inside a call of Docker's to the plugin: Docker would wait for the plugin,
//! and the plugin for Docker.

mod api;
mod endpoints;
#[cfg(test)]
mod fake;
mod gwbridge;
mod memory;
mod names;
mod notes;
mod over;
mod pass;
mod plan;
mod publish;
mod side;
#[cfg(test)]
mod tests;

use std::{
    net::Ipv4Addr,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use futures::{StreamExt as _, stream::BoxStream};
use tokio::sync::{Notify, mpsc, watch};

pub use self::side::{Networks, Publish, Side};
use self::{
    api::{Api, Dial},
    endpoints::Endpoints,
    memory::Memory,
    notes::{Notes, Part},
    over::{Over, true_in},
    publish::Publisher,
};
use super::daemon::{DockerChoice, Event};

/// Between looks at everything, whether or not anything happened.
const EVERY: Duration = Duration::from_secs(10);
/// The pause after the first failure to reach Docker; doubled with each further one.
const FIRST_PAUSE: Duration = Duration::from_millis(100);
/// The longest pause between attempts to reach Docker.
const LONGEST_PAUSE: Duration = Duration::from_secs(1);

/// Starts the task. It waits for a Docker that is not there, and ends with `ending`. `gwbridge`
/// is kept at the gateway address of Docker's bridge.
pub async fn run<S: Side>(
    choice: DockerChoice,
    side: S,
    gwbridge: watch::Sender<Option<Ipv4Addr>>,
    ending: watch::Receiver<bool>,
) {
    if choice != DockerChoice::Off {
        Task::new(side, gwbridge, EVERY).run(choice, ending).await;
    }
}

/// What outlives a connection.
struct Task<S> {
    side: S,
    gwbridge: watch::Sender<Option<Ipv4Addr>>,
    every: Duration,
    memory: Memory,
    endpoints: Endpoints,
    notes: Notes<S>,
}

/// What the events of a session wake up.
#[derive(Debug, Default)]
struct Happened {
    /// Something that calls for a pass.
    again: Arc<Notify>,
    /// Docker's ids of networks that were removed since the last pass.
    destroyed: Mutex<Vec<String>>,
    /// Docker is not there any more, whether or not it has ended the events.
    gone: Notify,
}

impl<S: Side> Task<S> {
    fn new(side: S, gwbridge: watch::Sender<Option<Ipv4Addr>>, every: Duration) -> Self {
        let notes = Notes::new(side.clone());
        let (memory, endpoints) = (Memory::default(), Endpoints::default());
        Self { side, gwbridge, every, memory, endpoints, notes }
    }

    async fn run<D: Dial>(mut self, dial: D, mut ending: watch::Receiver<bool>) {
        let mut pause = FIRST_PAUSE;
        loop {
            let started = Instant::now();
            let api = tokio::select! {
                () = true_in(&mut ending) => return,
                api = self.reach(&dial) => api,
            };
            if let Some(api) = api {
                self.session(api, ending.clone()).await;
                self.notes.docker_went();
            }
            if started.elapsed() > LONGEST_PAUSE {
                pause = FIRST_PAUSE;
            }
            tokio::select! {
                () = true_in(&mut ending) => return,
                () = tokio::time::sleep(pause) => pause = (pause * 2).min(LONGEST_PAUSE),
            }
        }
    }

    /// A daemon that answers, where there is one.
    async fn reach<D: Dial>(&self, dial: &D) -> Option<D::Api> {
        let Some(address) = dial.address() else {
            self.notes.set(Part::Docker, dial.doubt().into_iter().collect());
            return None;
        };
        let api = dial.dial(&address).await;
        self.notes.set_result(Part::Docker, &api);
        api.inspect(|_| tracing::info!(address, "Docker answers")).ok()
    }

    /// Works with a daemon until it, or the agent, ends. The parts run side by side, so that none
    /// waits for another. From the end on each begins nothing new and drops what it asks, but
    /// finishes what it changes; every such step is bounded in time.
    async fn session<A: Api>(&mut self, api: A, ending: watch::Receiver<bool>) {
        let Self { side, gwbridge, every, memory, endpoints, notes } = self;
        endpoints.docker_came_back();
        let happened = Happened::default();
        let events = api.events();
        let (end, over) = watch::channel(false);
        let over = Over::new(over, ending.clone());
        let (again, over) = (Arc::clone(&happened.again), &over);
        let publisher = Publisher::new(api.clone(), side.clone(), again, over.clone());
        let (containers, asked) = mpsc::unbounded_channel();
        let route = async {
            route(events, &happened, &containers, ending).await;
            end.send_replace(true);
        };
        tokio::join!(
            route,
            publisher.run(),
            names::run(api.clone(), side.clone(), notes, *every, asked, over.clone()),
            gwbridge::watch(&api, gwbridge, notes, *every, &happened.gone, over.clone()),
            passes(&publisher, &happened, (memory, endpoints), notes, *every),
        );
        tracing::info!("the connection to Docker ended");
    }
}

/// Hands events on until there are no more, Docker is gone, or the agent ends.
async fn route(
    mut events: BoxStream<'static, Event>,
    happened: &Happened,
    containers: &mpsc::UnboundedSender<String>,
    mut ending: watch::Receiver<bool>,
) {
    loop {
        let event = tokio::select! {
            () = true_in(&mut ending) => return,
            () = happened.gone.notified() => return,
            event = events.next() => event,
        };
        match event {
            None => return,
            Some(Event::NetworkCreated) => happened.again.notify_one(),
            Some(Event::NetworkDestroyed { id }) => {
                happened.destroyed.lock().unwrap_or_else(PoisonError::into_inner).push(id);
                happened.again.notify_one();
            }
            Some(Event::ContainerChanged { id }) => {
                // The receiver is gone only at the session's end.
                let _ = containers.send(id);
            }
        }
    }
}

/// Passes over everything: every `every`, and over the networks when something happened.
async fn passes<A: Api, S: Side>(
    publisher: &Publisher<A, S>,
    happened: &Happened,
    (memory, endpoints): (&mut Memory, &mut Endpoints),
    notes: &Notes<S>,
    every: Duration,
) {
    let mut over = publisher.over.clone();
    let mut changed = publisher.side.changed();
    let mut ticks = tokio::time::interval(every);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        let now = Instant::now();
        let due = memory.due(now).map_or(every, |due| due - now);
        let all = tokio::select! {
            () = over.wait() => return,
            _ = ticks.tick() => true,
            () = happened.again.notified() => false,
            () = tokio::time::sleep(due) => false,
            changed = changed.changed() => {
                if changed.is_err() {
                    return;
                }
                false
            }
        };
        if !publisher.api.is_there() {
            happened.gone.notify_one();
            return;
        }
        let destroyed =
            std::mem::take(&mut *happened.destroyed.lock().unwrap_or_else(PoisonError::into_inner));
        for id in destroyed {
            endpoints.has_network(&id);
            memory.destroyed(id);
        }
        let docker = match pass::networks(publisher, memory).await {
            Ok(Some((docker, found))) => {
                notes.set(Part::Networks, found);
                docker
            }
            Ok(None) => return,
            failed => {
                notes.set_result(Part::Networks, &failed);
                continue;
            }
        };
        docker.iter().for_each(|network| endpoints.has_network(&network.id));
        if all {
            let Publisher { api, side, .. } = publisher;
            let found = endpoints.check(api, side, &docker, &mut over, Instant::now()).await;
            notes.set(Part::Endpoints, found);
        }
    }
}
