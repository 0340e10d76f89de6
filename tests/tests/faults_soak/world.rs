//! What was asked for, and so should be there: the soak's own account, from exit codes alone.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::Ipv4Addr,
    sync::atomic::{AtomicUsize, Ordering},
    thread,
};

use nix::sys::signal::Signal;
use ovnet_tests::cluster::{Cluster, until};
use serde_json::Value;
use xtask::lab::CONSUL_DATA;

use super::{
    on_each_host,
    plan::{Act, HOSTS, Round, Trouble},
};

/// How many acts run into a Consul that hangs: each waits its time.
const HELD_UP: usize = 4;

/// An endpoint that was attached.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Endpoint {
    /// The host it is on.
    pub(crate) host: &'static str,
    /// Its sandbox, whose name is the endpoint's.
    pub(crate) sandbox: String,
    /// Its network.
    pub(crate) network: String,
    /// Its address.
    pub(crate) address: Ipv4Addr,
    /// The host port that leads to its port 80.
    pub(crate) port: Option<u16>,
}

/// What should be there.
#[derive(Debug, Default)]
pub(crate) struct World {
    endpoints: BTreeMap<(&'static str, String), Endpoint>,
    networks: BTreeSet<String>,
    /// Endpoints and networks that stay.
    anchors: BTreeSet<String>,
    done: usize,
    refused: usize,
}

/// What a host's acts came to.
#[derive(Default)]
struct Outcome {
    attached: Vec<Endpoint>,
    gone: BTreeSet<String>,
    done: usize,
    refused: usize,
}

impl World {
    /// One with a network that stays, and nothing in it.
    pub(crate) fn new(network: &str) -> Self {
        let mut world = Self::default();
        world.networks.insert(network.to_owned());
        world.anchors.insert(network.to_owned());
        world
    }

    /// Takes in an endpoint that stays.
    pub(crate) fn anchor(
        &mut self,
        host: &'static str,
        name: &str,
        network: &str,
        address: Ipv4Addr,
    ) {
        let (sandbox, network) = (name.to_owned(), network.to_owned());
        self.anchors.insert(sandbox.clone());
        let endpoint = Endpoint { host, sandbox: sandbox.clone(), network, address, port: None };
        self.endpoints.insert((host, sandbox), endpoint);
    }

    /// The endpoints there should be.
    pub(crate) fn endpoints(&self) -> impl Iterator<Item = &Endpoint> {
        self.endpoints.values()
    }

    /// The networks there should be.
    pub(crate) fn networks(&self) -> impl Iterator<Item = &String> {
        self.networks.iter()
    }

    /// The address of a host's anchor.
    pub(crate) fn address_of(&self, host: &'static str) -> Ipv4Addr {
        self.endpoints[&(host, "anchor".to_owned())].address
    }

    /// What was done in all, in words.
    pub(crate) fn tally(&self) -> String {
        format!("{} acts done, {} refused", self.done, self.refused)
    }

    /// Does what a round has, with its trouble in the middle, and takes in what came of it. What is
    /// refused must leave nothing: an attach that failed, whatever it failed for, has not been.
    pub(crate) fn live_through(&mut self, cluster: &Cluster, round: &Round) {
        for network in round.networks.iter().map(|number| network(*number)) {
            if self.networks.insert(network.clone()) {
                cluster.sh(HOSTS[0], &format!("ovnet network create {network}"));
            }
        }
        let begun = AtomicUsize::new(0);
        let outcomes = thread::scope(|scope| {
            let acting = scope.spawn(|| {
                on_each_host(|host| {
                    let mut outcome = self.on(HOSTS[host]);
                    for act in &round.acts[host] {
                        begun.fetch_add(1, Ordering::Relaxed);
                        outcome.act(cluster, HOSTS[host], *act);
                    }
                    outcome
                })
            });
            until("the acts to have begun", || {
                (begun.load(Ordering::Relaxed) >= round.after || acting.is_finished()).then_some(())
            });
            let all_done = || within_reason("the acts to end", || acting.is_finished());
            let some_done = || {
                let enough = begun.load(Ordering::Relaxed) + HELD_UP;
                within_reason("further acts to begin", || {
                    begun.load(Ordering::Relaxed) >= enough || acting.is_finished()
                });
            };
            trouble(cluster, round.trouble, all_done, some_done);
            acting.join().unwrap()
        });
        for (host, outcome) in HOSTS.into_iter().zip(outcomes) {
            for sandbox in outcome.gone {
                self.endpoints.remove(&(host, sandbox));
            }
            for endpoint in outcome.attached {
                self.endpoints.insert((host, endpoint.sandbox.clone()), endpoint);
            }
            self.done += outcome.done;
            self.refused += outcome.refused;
        }
        self.adopt_networks(cluster, round);
    }

    /// A network whose creation or removal was answered by an error may be there or not, when Consul
    /// was killed over it: what its record says is right, as long as everybody says the same. Those
    /// that nobody tried to remove are there, also after Consul lost them.
    fn adopt_networks(&mut self, cluster: &Cluster, round: &Round) {
        for host in HOSTS {
            cluster.wait_connected(host);
        }
        let removed: BTreeSet<String> = round
            .acts
            .iter()
            .flatten()
            .filter_map(|act| match act {
                Act::Remove { network: number } => Some(network(*number)),
                _ => None,
            })
            .collect();
        let in_use = self.endpoints.values().map(|it| it.network.clone());
        let certain: BTreeSet<String> =
            self.networks.difference(&removed).cloned().chain(in_use).collect();
        self.networks = until(&format!("{certain:?} to be in Consul"), || {
            let records = cluster.records();
            let names = records.keys().filter_map(|key| key.strip_prefix("networks/"));
            let names: BTreeSet<String> = names.map(str::to_owned).collect();
            names.is_superset(&certain).then_some(names)
        });
    }

    /// Takes down everything but the anchors.
    pub(crate) fn drain(&mut self, cluster: &Cluster) {
        let anchors = self.anchors.clone();
        for endpoint in self.endpoints.values().filter(|it| !anchors.contains(&it.sandbox)) {
            cluster.lab.stop_sandbox(endpoint.host, &endpoint.sandbox).unwrap();
        }
        self.endpoints.retain(|_, endpoint| anchors.contains(&endpoint.sandbox));
        for network in self.networks.iter().filter(|it| !anchors.contains(*it)) {
            // Its last endpoint's record may still be on its way out.
            until(&format!("network {network} to be removed"), || {
                cluster.lab.exec("docker01", &["ovnet", "network", "rm", network]).ok()
            });
        }
        self.networks.retain(|network| anchors.contains(network));
    }

    /// What a host has at the beginning of a round.
    fn on(&self, host: &'static str) -> Outcome {
        let attached = self.endpoints.values().filter(|it| it.host == host);
        Outcome { attached: attached.cloned().collect(), ..Outcome::default() }
    }
}

impl Outcome {
    fn act(&mut self, cluster: &Cluster, host: &'static str, act: Act) {
        let sandbox = |number: usize| format!("s{number}");
        let done = match act {
            Act::Attach { sandbox: number, network: of, port } => {
                let sandbox = sandbox(number);
                if self.attached.iter().any(|it| it.sandbox == sandbox) {
                    return;
                }
                self.attach(cluster, host, &sandbox, &network(of), port)
            }
            Act::Stop { sandbox: number } => {
                let sandbox = sandbox(number);
                if !self.forget(&sandbox) {
                    return;
                }
                // Whether its agent knew or not: the sandbox is gone, and so must the endpoint be.
                cluster.lab.stop_sandbox(host, &sandbox).is_ok()
            }
            Act::Vanish { sandbox: number } => {
                let sandbox = sandbox(number);
                if !self.forget(&sandbox) {
                    return;
                }
                cluster.lab.remove_sandbox(host, &sandbox).unwrap();
                true
            }
            Act::Create { network: number } => {
                let name = network(number);
                cluster.lab.exec(host, &["ovnet", "network", "create", &name]).is_ok()
            }
            Act::Remove { network: number } => {
                let name = network(number);
                cluster.lab.exec(host, &["ovnet", "network", "rm", &name]).is_ok()
            }
        };
        if done {
            self.done += 1;
        } else {
            self.refused += 1;
        }
    }

    fn attach(
        &mut self,
        cluster: &Cluster,
        host: &'static str,
        sandbox: &str,
        network: &str,
        port: Option<u16>,
    ) -> bool {
        let publish = port.map(|port| format!("{port}:80"));
        let mut arguments = vec!["--network", network];
        arguments.extend(publish.iter().flat_map(|it| ["-p", it.as_str()]));
        // One that fails is removed again, with its network namespace.
        let Ok(printed) = cluster.lab.run_sandbox(host, sandbox, &arguments) else { return false };
        let address = printed.lines().next().unwrap_or_default().trim().parse().unwrap();
        self.attached.push(Endpoint {
            host,
            sandbox: sandbox.to_owned(),
            network: network.to_owned(),
            address,
            port,
        });
        true
    }

    /// Takes a sandbox for gone; says whether there was one.
    fn forget(&mut self, sandbox: &str) -> bool {
        let before = self.attached.len();
        self.attached.retain(|it| it.sandbox != sandbox);
        let was_there = self.attached.len() < before;
        if was_there {
            self.gone.insert(sandbox.to_owned());
        }
        was_there
    }
}

/// Makes trouble and puts it right; `all_done` waits until everything else of the round is,
/// `some_done` until some acts more have run into it.
fn trouble(cluster: &Cluster, trouble: Trouble, all_done: impl Fn(), some_done: impl Fn()) {
    match trouble {
        Trouble::None => {}
        Trouble::AgentKilled(host) => restart(cluster, HOSTS[host], Signal::SIGKILL),
        Trouble::AgentStopped(host) => restart(cluster, HOSTS[host], Signal::SIGTERM),
        Trouble::AgentAway(host) => {
            cluster.stop_agent(HOSTS[host], Signal::SIGKILL);
            all_done();
            cluster.start_agent(HOSTS[host]);
        }
        Trouble::AgentsKilled => {
            cluster.stop_agent(HOSTS[0], Signal::SIGKILL);
            cluster.stop_agent(HOSTS[1], Signal::SIGKILL);
            cluster.start_agent(HOSTS[0]);
            cluster.start_agent(HOSTS[1]);
        }
        Trouble::ConsulKilled => {
            cluster.lab.stop_consul().unwrap();
            cluster.lab.start_consul().unwrap();
        }
        Trouble::ConsulAway => {
            cluster.lab.stop_consul().unwrap();
            all_done();
            cluster.lab.start_consul().unwrap();
        }
        Trouble::ConsulHangs => {
            let halted = cluster.lab.halt_consul().unwrap();
            some_done();
            drop(halted);
        }
        Trouble::ConsulWiped => {
            cluster.lab.stop_consul().unwrap();
            cluster.sh(HOSTS[0], &format!("rm -r {CONSUL_DATA}"));
            cluster.lab.start_consul().unwrap();
        }
        Trouble::BothKilled(host) => {
            cluster.lab.stop_consul().unwrap();
            restart(cluster, HOSTS[host], Signal::SIGKILL);
            cluster.lab.start_consul().unwrap();
        }
    }
}

/// The name of a network that comes and goes.
fn network(number: usize) -> String {
    format!("net{number}")
}

fn restart(cluster: &Cluster, host: &str, signal: Signal) {
    cluster.stop_agent(host, signal);
    cluster.start_agent(host);
}

/// Waits for what has to come, however long each command of it may take.
fn within_reason(what: &str, look: impl Fn() -> bool) {
    let limit = std::time::Duration::from_secs(300);
    ovnet_tests::cluster::within(limit, what, || look().then_some(()));
}

/// The endpoints in what `ovnet … --json` or a record says, as (address, host, name).
pub(crate) fn endpoint_of(value: &Value) -> (Ipv4Addr, String, String) {
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let address = text(&value["address"]).parse().unwrap();
    (address, text(&value["host"]), text(&value["names"][0]))
}
