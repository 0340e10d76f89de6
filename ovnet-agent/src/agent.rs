//! The agent from start to stop: what `ovnet-agent` does once its arguments are read.

use std::{
    collections::BTreeSet,
    os::{
        linux::net::SocketAddrExt as _,
        unix::net::{SocketAddr, UnixListener},
    },
    time::Duration,
};

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use tokio::{
    signal::unix::{SignalKind, signal},
    task::JoinSet,
};

use crate::{
    activation, api,
    check::{self, CheckInput},
    cleanup,
    config::{Arguments, Cleanup, Command, Config, Egress, PortsPath},
    consul::{Announced, Lease, Pool, Watcher},
    datapath::{self, Datapath, LoadOptions},
    dns,
    docker::{self, daemon::DockerChoice, plugin::PluginSocket},
    metrics,
    net::Net,
    peers,
    publish::reserve::Reservations,
    reconcile::{Options, Reconciler, host_record},
    service::{
        Service,
        real::{ConsulRecords, HostWiring},
    },
};

/// Between attempts to release what an agent killed in the middle of an attach left in Consul.
const ORPHANS_RETRY: Duration = Duration::from_secs(1);
/// Between looks for records that stand for nothing.
const SWEEP: Duration = Duration::from_secs(20);
/// How long what serves Docker may take to end.
const DOCKER_GRACE: Duration = Duration::from_secs(7);

/// Does what the arguments say, with the plugin's socket that systemd passed; `false` is a check that failed and said so itself.
pub async fn main(arguments: Arguments, passed: Option<UnixListener>) -> Result<bool> {
    match (arguments.command, arguments.run) {
        (Some(Command::Check(config)), _) => check(&config).await,
        (Some(Command::Cleanup(options)), _) => clean_up(options).await.map(|()| true),
        (Some(Command::DockerSetup(options)), _) => {
            docker::setup::run(&options).await.map(|()| true)
        }
        (None, Some(config)) => run(config, passed).await.map(|()| true),
        (None, None) => bail!("give --consul and --advertise, or see --help"),
    }
}

/// Runs the agent until it is told to stop.
async fn run(config: Config, passed: Option<UnixListener>) -> Result<()> {
    if !nix::unistd::geteuid().is_root() {
        bail!("ovnet-agent must run as root: it loads programs and makes interfaces");
    }
    check::require_kernel()?;
    let node = config.names.node()?;
    let consul = config.names.connect(&config.consul)?;
    let net = Net::open()?;
    // Looked at before anything is made: wrong input changes nothing.
    let uplink = net.uplink(&config.advertise).await?;
    if config.gwbridge_subnet.is_some() && config.egress == Egress::On {
        net.free_gwbridge_subnet(config.gwbridge_subnet).await?;
    }
    datapath::require_bpffs(&config.folders.bpffs)?;
    let pool = Pool { subnet: config.default_pool, size: config.default_pool_size };
    ensure!(
        pool.size >= pool.subnet.prefix_len(),
        "--default-pool {} is smaller than one subnet of --default-pool-size {}",
        pool.subnet,
        pool.size
    );
    let group = config.socket_group.as_deref();
    let socket = api::socket::Socket::bind(&config.folders.socket, group)?;
    let _only = only_agent()?;
    let plugin = match &config.docker {
        DockerChoice::Off => {
            if let Some(socket) = passed {
                let line = "the ovnet agent of this host runs with --docker off".to_owned();
                tokio::spawn(docker::plugin::refuse(socket, line));
            }
            None
        }
        // Before anything that takes time: Docker's calls wait in it from here on.
        _ => Some(PluginSocket::open(passed)?),
    };
    let datapath = Datapath::load(&LoadOptions {
        bpffs: config.folders.bpffs.clone(),
        log: config.datapath_log,
        force_clsact: config.force_clsact,
        generic_xdp: config.xdp == crate::config::Xdp::Generic,
        conntrack_max: config.conntrack_max.entries(),
        abi: config.abi(),
    })?;
    let (watcher, snapshots) = Watcher::spawn(consul.clone());
    let lease = Lease::spawn(consul.clone(), host_record(&node, &uplink, config.vxlan_port));
    let announced = lease.announced();
    let options = Options {
        node: node.clone(),
        advertise: config.advertise.clone(),
        vxlan_port: config.vxlan_port,
        xdp: config.xdp,
        host_grace: config.host_grace,
        repair_interval: config.repair_interval,
        state_dir: config.folders.state_dir.clone(),
        ports_by_bpf: config.ports == PortsPath::Bpf,
    };
    let reservations = Reservations::default();
    let (reconciler, mut worker) = Reconciler::new(
        options,
        consul.clone(),
        net.clone(),
        datapath,
        snapshots,
        reservations.clone(),
    )
    .await?;
    worker.start(&watcher, &lease).await?;
    tracing::info!(
        node, interface = uplink.link.name, vtep = %uplink.address, consul = consul.describe(),
        endpoints = reconciler.local().len(), "forwarding"
    );

    // Whoever asks for things ends first, and then the loop that carries them out.
    let (stop, stopping) = tokio::sync::watch::channel(false);
    let (stop_loop, loop_stopping) = tokio::sync::watch::channel(false);
    let mut worker = tokio::spawn(worker.run(watcher, lease, loop_stopping));
    let records = ConsulRecords { consul, pool };
    let (gwbridge_sender, gwbridge) = tokio::sync::watch::channel(None);
    peers::spawn(reconciler.clone(), node.clone(), config.vxlan_port, stopping.clone());
    metrics::spawn(config.metrics, reconciler.clone(), stopping.clone());
    dns::spawn(config.dns, gwbridge, reconciler.clone(), net.clone(), stopping.clone());
    let egress = (config.egress == Egress::On).then_some(config.gwbridge_subnet);
    let wiring = HostWiring::new(reconciler, net, reservations, egress);
    let service = Service::new(records, wiring, node, config.vxlan_port);
    service.set_announced(announced.clone());
    let orphans = tokio::spawn(release_orphans(service.clone(), announced));
    let mut docker = match plugin {
        Some(plugin) => docker::start(
            config.docker.clone(),
            plugin,
            service.clone(),
            &config.folders.state_dir,
            gwbridge_sender,
            stopping.clone(),
        )?,
        None => JoinSet::new(),
    };
    let mut ending = stopping;
    let shutdown = async move {
        // An error means that the sender is gone, which is a stop too.
        let _ = ending.wait_for(|stop| *stop).await;
    };
    let mut api = tokio::spawn(api::server::serve(socket, service, shutdown));

    activation::ready();
    // Without the loop or the API the agent is none: it ends, and whoever watches it starts it
    // anew.
    tokio::select! {
        stop = stop_signal() => stop?,
        ended = &mut worker => {
            ended.context("the loop's task")?;
            bail!("the loop ended by itself");
        }
        ended = &mut api => {
            ended.context("the API's task")?;
            bail!("the API ended by itself");
        }
        Some(ended) = docker.join_next() => {
            ended.context("Docker's task")?.context("serve Docker")?;
            bail!("what serves Docker ended by itself");
        }
    }
    tracing::info!("stopping; what is pinned forwards on");
    activation::stopping();
    stop.send_replace(true);
    orphans.abort();
    let docker_ends = async { while docker.join_next().await.is_some() {} };
    if tokio::time::timeout(DOCKER_GRACE, docker_ends).await.is_err() {
        // What waits for Docker now waits for a Docker that waits for us.
        docker.abort_all();
    }
    let api = api.await.context("the API's task");
    stop_loop.send_replace(true);
    let lease = worker.await.context("the loop's task")?;
    if let Err(error) = lease.withdraw().await {
        tracing::warn!("{error:#}");
    }
    api
}

/// Releases what earlier lives of the agent left, as soon as Consul answers, and from then on what
/// this one leaves. Not while this host is not announced: another machine of the same name would
/// otherwise have its records taken for ours.
async fn release_orphans(service: Service<ConsulRecords, HostWiring>, announced: Announced) {
    loop {
        if announced.now() {
            match service.release_orphans().await {
                Ok(_) => break,
                Err(error) => {
                    tracing::debug!(error = format!("{error:#}"), "orphans are looked for again");
                }
            }
        }
        tokio::time::sleep(ORPHANS_RETRY).await;
    }
    let mut found = BTreeSet::new();
    loop {
        tokio::time::sleep(SWEEP).await;
        if announced.now() {
            service.sweep(&mut found).await;
        }
    }
}

async fn stop_signal() -> Result<()> {
    let mut terminate = signal(SignalKind::terminate()).context("wait for SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("wait for SIGINT")?;
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    Ok(())
}

/// Makes sure that no other agent works on this network namespace, whatever its folders: the two
/// would take each other's interfaces for leftovers. The name is released when the agent ends.
fn only_agent() -> Result<UnixListener> {
    let name = SocketAddr::from_abstract_name("ovnet-agent").context("name a socket")?;
    UnixListener::bind_addr(&name).map_err(|error| match error.kind() {
        std::io::ErrorKind::AddrInUse => {
            anyhow!("another ovnet-agent runs in this network namespace: stop it first")
        }
        _ => anyhow!(error).context("make sure that no other ovnet-agent runs"),
    })
}

/// `ovnet-agent check`.
async fn check(config: &Config) -> Result<bool> {
    let consul = config.names.connect(&config.consul)?;
    let input = CheckInput {
        consul: consul.describe().to_owned(),
        advertise: config.advertise.clone(),
        bpffs: config.folders.bpffs.clone(),
        vxlan_port: config.vxlan_port,
        dns: config.dns,
    };
    let probe = async { consul.ping().await.map_err(|error| format!("{error:#}")) };
    check::run(&input, probe).await
}

/// `ovnet-agent cleanup`.
async fn clean_up(options: Cleanup) -> Result<()> {
    if !nix::unistd::geteuid().is_root() {
        bail!("ovnet-agent cleanup must run as root: it removes interfaces and programs");
    }
    let Cleanup { consul, names, folders } = options;
    let places = cleanup::Places {
        socket: folders.socket,
        state_dir: folders.state_dir,
        bpffs: folders.bpffs,
        plugin: docker::plugin::SOCKET.into(),
    };
    let node = names.node()?;
    let links = cleanup::HostLinks(Net::open()?);
    let mut out = std::io::stdout();
    match consul {
        Some(address) => {
            let consul = names.connect(&address)?;
            let pool = Pool { subnet: "10.0.0.0/8".parse()?, size: 24 };
            let records = ConsulRecords { consul: consul.clone(), pool };
            let host = || consul.remove_host();
            let records = cleanup::RecordsOf { records: &records, node: &node, host };
            cleanup::run(&places, &links, &records, &mut out).await
        }
        None => cleanup::run(&places, &links, &cleanup::NoRecords, &mut out).await,
    }
}
