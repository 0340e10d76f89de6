//! One point of a curve: a lab with a cluster of one size, and what is measured in it.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow, ensure};
use hyper::Method;
use nix::sys::signal::Signal;
use serde::Serialize;
use serde_json::json;

use super::cluster::{Cluster, Place};
use super::http::Connection;
use super::observe::{EndpointMap, Traffic, Used};
use super::store::{Churn, Store, Watcher};
use crate::lab::{CLIENT, Lab, Options, Process, UPLINK};

/// Where it is attached.
const ATTACHING: &str = "docker01";
/// Where the map is looked at, and whose agent is measured.
const LOOKING: &str = "docker02";
/// The sandbox that is attached again and again.
const SANDBOX: &str = "m";
/// The agents' metrics.
const METRICS: u16 = 9481;
/// How long a change may take to get to a map before the measurement gives up.
const LIMIT: Duration = Duration::from_secs(60);
/// How long agent and Consul must have done next to nothing to count as at rest, and the limit of it.
const QUIET: (Duration, Duration) = (Duration::from_secs(2), Duration::from_secs(60));

/// How a point is measured.
#[derive(Clone, Debug)]
pub(super) struct Plan {
    /// What there is.
    pub(super) cluster: Cluster,
    /// Simulated hosts that wait for news of the first network, too.
    pub(super) watchers: u32,
    /// Changes a second of what comes and goes.
    pub(super) churn: u32,
    /// Attaches, and records written, in each phase.
    pub(super) samples: u32,
    /// Where the agent is.
    pub(super) bin_dir: PathBuf,
    /// The lab's prefix.
    pub(super) prefix: String,
}

/// What was measured.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Point {
    /// Simulated hosts.
    pub(super) hosts: u32,
    /// Simulated endpoints.
    pub(super) endpoints: u32,
    /// Those of them in the networks of the measured host.
    pub(super) known: usize,
    /// Simulated hosts that wait for news.
    pub(super) watchers: u32,
    /// From the first attach of a host to each of its networks to all endpoints in the map, in ms.
    pub(super) first_sync: f64,
    /// From the start of an agent that finds no map to all endpoints in it, in ms.
    pub(super) start_sync: f64,
    /// While nothing else happens.
    pub(super) rest: Phase,
    /// While endpoints come and go.
    pub(super) churn: Phase,
    /// Memory of the agent at the end, and the most it had, in bytes.
    pub(super) memory: (u64, u64),
}

/// What was measured while the cluster was in one condition.
#[derive(Clone, Debug, Default, Serialize)]
pub(super) struct Phase {
    /// From before the request to attach to the entry in the other host's map, in ms.
    pub(super) attach: Vec<f64>,
    /// The same from the agent's answer on; negative where the entry was there earlier.
    pub(super) answered: Vec<f64>,
    /// From a record being written to the entry, in ms.
    pub(super) record: Vec<f64>,
    /// Changes a second of what comes and goes.
    pub(super) changes: f64,
    /// What agent and Consul used, without the changes of the measurement itself.
    pub(super) load: Load,
}

/// What was used per second.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub(super) struct Load {
    /// Processor time of the measured agent, in processors.
    pub(super) agent: f64,
    /// That of Consul.
    pub(super) consul: f64,
    /// Requests of the agent that ended.
    pub(super) requests: f64,
    /// Bytes from the agent to Consul.
    pub(super) sent: f64,
    /// Bytes from Consul to the agent.
    pub(super) received: f64,
}

/// Makes the lab, measures, and takes it down.
pub(super) fn measure(plan: &Plan) -> Result<Point> {
    let lab = Lab::up(Options {
        prefix: plan.prefix.clone(),
        hosts: 2,
        agent_args: vec!["--metrics".into(), format!("0.0.0.0:{METRICS}")],
        // Each agent and each watcher has several connections, and all come from this machine.
        consul_args: vec!["-hcl".into(), "limits { http_max_conns_per_client = 10000 }".into()],
        bin_dir: Some(plan.bin_dir.clone()),
        ..Options::default()
    })
    .context("the lab does not come up")?;
    let lab = Arc::new(lab);
    let (inside, plan) = (Arc::clone(&lab), plan.clone());
    let point = lab.inside(CLIENT, move || {
        let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build();
        runtime.context("start a runtime")?.block_on(Bench::new(inside, plan)?.run())
    })?;
    let lab = Arc::try_unwrap(lab).map_err(|_| anyhow!("the lab is still in use"))?;
    lab.down().context("the lab does not go down")?;
    Ok(point)
}

struct Bench {
    lab: Arc<Lab>,
    plan: Plan,
    consul: SocketAddr,
    /// How often something was attached, or a record written.
    turn: u32,
}

impl Bench {
    fn new(lab: Arc<Lab>, plan: Plan) -> Result<Self> {
        let consul = lab.consul()?.parse().context("the address of Consul")?;
        Ok(Self { lab, plan, consul, turn: 0 })
    }

    async fn run(mut self) -> Result<Point> {
        let cluster = self.plan.cluster;
        let known: Vec<Place> = cluster.known().collect();
        self.reach_simulated_hosts()?;
        Traffic::count(&self.lab, LOOKING)?;
        Store::open(self.consul).await?.fill(&cluster).await.context("fill Consul")?;
        let networks = cluster.networks().1;
        self.lab.add_sandbox(ATTACHING, "there")?;
        self.attach(ATTACHING, "there", 0, None).await?;
        let sandboxes = (0..networks).map(|network| (network, format!("m{network}")));
        let sandboxes: Vec<(u32, String)> = sandboxes.collect();
        for (_, sandbox) in &sandboxes {
            self.lab.add_sandbox(LOOKING, sandbox)?;
        }
        let started = Instant::now();
        for (network, sandbox) in &sandboxes {
            self.attach(LOOKING, sandbox, *network, None).await?;
        }
        let first_sync = self.all_known(started, &known)?;
        let start_sync = self.start_again(&known)?;
        let _watchers: Vec<Watcher> =
            (0..self.plan.watchers).map(|_| Watcher::start(self.consul)).collect();
        self.wait_for_quiet().await?;
        self.lab.add_sandbox(ATTACHING, SANDBOX)?;
        let rest = self.phase(0).await.context("at rest")?;
        let churn = self.phase(self.plan.churn).await.context("under churn")?;
        let used = Used::by(self.agent()?)?;
        Ok(Point {
            hosts: cluster.hosts,
            endpoints: cluster.endpoints,
            known: known.len(),
            watchers: self.plan.watchers,
            first_sync,
            start_sync,
            rest,
            churn,
            memory: (used.memory, used.peak),
        })
    }

    /// Has the VTEPs of simulated hosts be behind a router, which answers in their name that nobody
    /// receives VXLAN there. As neighbours they would fill the kernel's one table of them.
    fn reach_simulated_hosts(&self) -> Result<()> {
        let (vteps, router) = ("172.31.0.0/16", self.lab.address(CLIENT)?.to_string());
        for host in [ATTACHING, LOOKING] {
            let route = ["ip", "route", "add", vteps, "via", &router, "dev", UPLINK];
            self.lab.exec(host, &route)?;
        }
        self.lab.exec(CLIENT, &["ip", "route", "add", "local", vteps, "dev", "lo"]).map(drop)
    }

    /// Attaches a sandbox by its host's agent; when the request began and when it was answered.
    async fn attach(
        &self,
        host: &str,
        sandbox: &str,
        network: u32,
        place: Option<Place>,
    ) -> Result<(Instant, Instant)> {
        let request = json!({
            "network": Cluster::name(network), "netns": sandbox, "name": sandbox,
            "ip": place.map(|it| it.address),
        });
        let started = Instant::now();
        self.agent_api(host, "/v1/endpoints", &request).await?;
        Ok((started, Instant::now()))
    }

    async fn agent_api(&self, host: &str, path: &str, body: &serde_json::Value) -> Result<()> {
        let socket = self.lab.host(host)?.root().join("run/ovnet/ovnet.sock");
        let mut connection = Connection::unix(&socket).await?;
        connection.ask(Method::POST, path, body.to_string()).await.map(drop)
    }

    fn all_known(&self, since: Instant, known: &[Place]) -> Result<f64> {
        let map = EndpointMap::open(&self.lab, LOOKING)?;
        let mut last = since;
        for place in known {
            last = map.wait(*place, true, LIMIT)?;
        }
        Ok(milliseconds(last - since))
    }

    /// Starts the agent without anything in the kernel, but with its state: as after a boot.
    fn start_again(&self, known: &[Place]) -> Result<f64> {
        self.lab.stop_agent(LOOKING, Signal::SIGKILL)?;
        self.lab.exec(LOOKING, &["rm", "-r", "/sys/fs/bpf/ovnet"])?;
        let started = Instant::now();
        self.lab.start_agent(LOOKING, &[])?;
        self.all_known(started, known)
    }

    fn agent(&self) -> Result<Process> {
        self.lab.agent(LOOKING).with_context(|| format!("the agent of {LOOKING} ended"))
    }

    /// Waits until what the beginning set off is over.
    async fn wait_for_quiet(&self) -> Result<()> {
        let deadline = Instant::now() + QUIET.1;
        loop {
            let load = self.load_of(QUIET.0).await?;
            if load.agent < 0.05 && load.consul < 0.1 {
                return Ok(());
            }
            ensure!(
                Instant::now() < deadline,
                "it is not quiet after {} s: the agent uses {:.2} processors and Consul {:.2}",
                QUIET.1.as_secs(),
                load.agent,
                load.consul
            );
        }
    }

    /// What is used within a time in which the measurement itself does nothing.
    async fn load_of(&self, time: Duration) -> Result<Load> {
        let before = self.used().await?;
        // This is no wait for something: the length of the window is what is divided by.
        tokio::time::sleep(time).await;
        let after = self.used().await?;
        let seconds = (after.at - before.at).as_secs_f64();
        let per_second = |before: u64, after: u64| {
            // Counters of some seconds are exact in an f64.
            #[allow(clippy::cast_precision_loss, reason = "what is counted is far below 2^52")]
            let more = after.saturating_sub(before) as f64;
            more / seconds
        };
        Ok(Load {
            agent: (after.agent.cpu.saturating_sub(before.agent.cpu)).as_secs_f64() / seconds,
            consul: (after.consul.cpu.saturating_sub(before.consul.cpu)).as_secs_f64() / seconds,
            requests: per_second(before.requests, after.requests),
            sent: per_second(before.traffic.sent, after.traffic.sent),
            received: per_second(before.traffic.received, after.traffic.received),
        })
    }

    async fn used(&self) -> Result<Moment> {
        let consul = self.lab.consul_process().context("Consul does not run")?;
        let metrics = SocketAddr::from((self.lab.address(LOOKING)?, METRICS));
        let mut metrics = Connection::tcp(metrics).await?;
        let page = metrics.ask(Method::GET, "/metrics", String::new()).await?;
        let page = String::from_utf8_lossy(&page);
        let requests = page.lines().find_map(|it| it.strip_prefix("ovnet_consul_requests_total "));
        Ok(Moment {
            at: Instant::now(),
            agent: Used::by(self.agent()?)?,
            consul: Used::by(consul)?,
            traffic: Traffic::of(&self.lab, LOOKING)?,
            requests: requests.and_then(|it| it.parse().ok()).context("requests in the metrics")?,
        })
    }

    /// Measures while so much comes and goes a second.
    async fn phase(&mut self, churn: u32) -> Result<Phase> {
        let (consul, cluster) = (self.consul, self.plan.cluster);
        let coming = match churn {
            0 => None,
            some => Some(Churn::start(consul, cluster, some).await?),
        };
        let load = self.load_of(Duration::from_secs(5)).await?;
        let mut phase = Phase { load, ..Phase::default() };
        let map = Arc::new(EndpointMap::open(&self.lab, LOOKING)?);
        let mut store = Store::open(consul).await?;
        for _ in 0..self.plan.samples {
            self.turn += 1;
            let place = cluster.attached(self.turn);
            let looking = look(&map, place);
            let (started, answered) = self.attach(ATTACHING, SANDBOX, 0, Some(place)).await?;
            let seen = seen(looking)?;
            phase.attach.push(milliseconds(seen - started));
            phase.answered.push(signed(answered, seen));
            let request = json!({ "netns": SANDBOX });
            self.agent_api(ATTACHING, "/v1/endpoints/detach", &request).await?;
            map.wait(place, false, LIMIT)?;

            let (record, place) = cluster.passing_here(self.turn);
            let looking = look(&map, place);
            store.write(&record).await?;
            let written = Instant::now();
            phase.record.push(signed(written, self::seen(looking)?).max(0.0));
            store.delete(&record).await?;
            map.wait(place, false, LIMIT)?;
        }
        if let Some(coming) = coming {
            phase.changes = coming.stop().await?;
        }
        Ok(phase)
    }
}

/// Everything that was used up to a moment.
struct Moment {
    at: Instant,
    agent: Used,
    consul: Used,
    traffic: Traffic,
    requests: u64,
}

type Looking = thread::JoinHandle<Result<Instant>>;

/// Looks for an endpoint in the map, on a thread of its own.
fn look(map: &Arc<EndpointMap>, place: Place) -> Looking {
    let map = Arc::clone(map);
    thread::spawn(move || map.wait(place, true, LIMIT))
}

fn seen(looking: Looking) -> Result<Instant> {
    looking.join().map_err(|_| anyhow!("looking at the map panicked"))?
}

fn milliseconds(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

fn signed(from: Instant, to: Instant) -> f64 {
    match to.checked_duration_since(from) {
        Some(later) => milliseconds(later),
        None => -milliseconds(from - to),
    }
}
