//! The lab: hosts `docker01`, `docker02`, … as namespaces on one machine, with a switch, a client
//! outside the cluster, a Consul on `docker01` and an agent on each host.
//!
//! [`Lab`] is what the verbs, the demo, the tests and the benchmarks share. Nothing in a lab is
//! reachable from the machine's own network, and labs of different prefixes do not see each other,
//! so all use the same names and addresses inside.

mod cgroups;
mod cli;
mod confine;
mod docker;
mod exec;
mod host;
mod http;
pub mod kernel_vxlan;
pub mod measure;
mod options;
mod prepare;
mod process;
mod sandbox;
mod services;
mod status;
#[cfg(test)]
mod tests;
mod wire;

use std::collections::BTreeMap;
use std::fs;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::ChildStdin;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use serde::{Deserialize, Serialize};

pub use self::cli::{Args, run};
pub use self::docker::{DOCKER_CONFIG, GWBRIDGE, docker_config};
pub use self::exec::Running;
pub use self::host::Host;
pub use self::options::{Life, Options};
pub(crate) use self::prepare::{bring, build};
pub use self::prepare::{default_bin_dir, require};
pub use self::process::{Process, patience, wait_until};
pub use self::services::{CONSUL_DATA, Halted};
pub(crate) use self::status::table;
pub use self::wire::{UPLINK, Wire};

use self::host::Starting;

/// Where the labs of this machine record what they are made of, a folder per prefix.
const RECORDS: &str = "/run/ovnet-lab";
/// The host outside the cluster.
pub const CLIENT: &str = "client";
/// Its address.
const CLIENT_ADDRESS: Ipv4Addr = Ipv4Addr::new(192, 168, 1, 100);
/// Hosts that fit between the first address and the client's.
pub const MAX_HOSTS: u8 = 80;

/// A running lab. Dropped, it is taken down if it was made with [`Life::Bound`].
pub struct Lab {
    folder: PathBuf,
    state: Mutex<State>,
    /// Open as long as this process lives: hosts bound to it end when it is closed.
    lifelines: Mutex<Vec<ChildStdin>>,
}

/// What another process must know to use a lab or to remove it.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct State {
    options: Options,
    /// What holds the hosts, recorded before they are ready so that no failure loses one.
    started: Vec<Starting>,
    /// `docker01` and its like, then the client.
    hosts: Vec<Host>,
    switch: Option<Host>,
    /// Which Consul runs, in words.
    consul: Option<services::Consul>,
    agents: BTreeMap<String, Process>,
    dockers: BTreeMap<String, Process>,
}

impl Lab {
    /// Makes a lab and waits until it is ready to be used.
    ///
    /// # Errors
    /// The lab exists, a tool or privilege is missing, or a part does not start; what was made
    /// is removed again.
    pub fn up(options: Options) -> Result<Self> {
        require(&options)?;
        let folder = Path::new(RECORDS).join(&options.prefix);
        claim(&options.prefix, &folder)?;
        let state = State {
            options,
            started: Vec::new(),
            hosts: Vec::new(),
            switch: None,
            consul: None,
            agents: BTreeMap::new(),
            dockers: BTreeMap::new(),
        };
        let lab = Self { folder, state: Mutex::new(state), lifelines: Mutex::default() };
        match lab.build() {
            Ok(()) => Ok(lab),
            Err(error) => match lab.remove() {
                Ok(()) => Err(error),
                Err(left) => Err(error.context(format!("and the lab is still there: {left:#}"))),
            },
        }
    }

    /// The lab of this prefix, made by another process.
    ///
    /// # Errors
    /// There is none.
    pub fn open(prefix: &str) -> Result<Self> {
        let folder = Path::new(RECORDS).join(prefix);
        let state = read(&folder)?
            .filter(State::is_alive)
            .context("the lab is not up: `cargo xtask lab up` makes it")?;
        Ok(Self { folder, state: Mutex::new(state), lifelines: Mutex::default() })
    }

    /// Removes the lab and everything in it.
    ///
    /// # Errors
    /// A part cannot be removed.
    pub fn down(self) -> Result<()> {
        self.remove()
    }

    /// Removes the lab of this prefix if there is one; says whether there was.
    ///
    /// # Errors
    /// A part cannot be removed.
    pub fn remove_prefix(prefix: &str) -> Result<bool> {
        let folder = Path::new(RECORDS).join(prefix);
        let Some(state) = read(&folder)? else { return Ok(false) };
        Self { folder, state: Mutex::new(state), lifelines: Mutex::default() }.remove()?;
        Ok(true)
    }

    /// How the lab was made.
    pub fn options(&self) -> Options {
        self.state().options.clone()
    }

    /// The names of the cluster's hosts: `docker01`, `docker02`, …
    pub fn nodes(&self) -> Vec<String> {
        let state = self.state();
        state.hosts.iter().map(|host| host.name.clone()).filter(|name| name != CLIENT).collect()
    }

    /// A host of the cluster, or the client.
    ///
    /// # Errors
    /// There is none of this name.
    pub fn host(&self, name: &str) -> Result<Host> {
        let state = self.state();
        let found = state.hosts.iter().chain(&state.switch).find(|host| host.name == name);
        found.cloned().with_context(|| {
            let names: Vec<&str> = state.hosts.iter().map(|host| host.name.as_str()).collect();
            format!("no host {name} in the lab: it has {}", names.join(", "))
        })
    }

    /// Address of a host's `ens33`.
    ///
    /// # Errors
    /// No such host, or it is the switch.
    pub fn address(&self, host: &str) -> Result<Ipv4Addr> {
        self.host(host)?.address.with_context(|| format!("{host} has no address"))
    }

    /// The lab's folder, with the logs of hosts, agents and Consul.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Kills a host of the cluster with everything that runs and is kept in it, as when a machine
    /// burns down. It stays in the lab's list.
    ///
    /// # Errors
    /// There is no such host, or it does not end.
    pub fn kill_host(&self, name: &str) -> Result<()> {
        let started = self.state().started.iter().find(|it| it.is_of(name)).cloned();
        let started = started.with_context(|| format!("no host {name} in the lab"))?;
        started.kill()?;
        started.ended()?;
        self.state().agents.remove(name);
        self.record()
    }

    /// Puts an empty host, with this address, in the place of one that was killed. Its agent is not
    /// started.
    ///
    /// # Errors
    /// It cannot be made, or the one before still runs.
    pub fn replace_host(&self, name: &str, address: Ipv4Addr) -> Result<()> {
        let options = self.options();
        if self.host(name)?.holder.is_alive() {
            bail!("host {name} runs: kill it first");
        }
        let bound = options.life == Life::Bound;
        let (starting, lifeline) =
            Starting::new(name, Some(address), &self.folder.join(name), bound)?;
        self.lifelines.lock().unwrap_or_else(PoisonError::into_inner).extend(lifeline);
        {
            let mut state = self.state();
            state.started.retain(|it| !it.is_of(name));
            state.started.push(starting.clone());
        }
        self.record()?;
        let host = starting.ready()?;
        for place in self.state().hosts.iter_mut().filter(|it| it.name == name) {
            place.clone_from(&host);
        }
        self.record()?;
        wire::plug(&self.host("switch")?, &[&host], &options)
    }

    fn build(&self) -> Result<()> {
        let options = self.options();
        self.record()?;
        if options.docker {
            docker::load_modules();
        }
        let nodes = (1..=options.hosts)
            .map(|number| (format!("docker{number:02}"), Some(node_address(number))));
        let places =
            nodes.chain([(CLIENT.to_owned(), Some(CLIENT_ADDRESS)), ("switch".to_owned(), None)]);
        for (name, address) in places {
            let bound = options.life == Life::Bound;
            let (starting, lifeline) =
                Starting::new(&name, address, &self.folder.join(&name), bound)?;
            self.lifelines.lock().unwrap_or_else(PoisonError::into_inner).extend(lifeline);
            self.state().started.push(starting);
        }
        self.record()?;
        let starting = self.state().started.clone();
        for host in starting {
            let host = host.ready()?;
            let mut state = self.state();
            if host.address.is_some() {
                state.hosts.push(host);
            } else {
                state.switch = Some(host);
            }
        }
        self.record()?;

        let switch = self.host("switch")?;
        let hosts = self.state().hosts.clone();
        wire::connect(&switch, &hosts.iter().collect::<Vec<_>>(), &options)?;
        self.start_consul()?;
        if options.agents {
            self.start_agents()?;
        }
        if options.docker {
            // After the agents, as on a machine that boots: a daemon waits for a missing plugin.
            self.start_dockers()?;
        }
        Ok(())
    }

    fn remove(&self) -> Result<()> {
        let started = std::mem::take(&mut self.state().started);
        // All are told first: hosts end in parallel.
        let told: Vec<_> = started.iter().map(Starting::kill).collect();
        told.into_iter().collect::<Result<()>>()?;
        for host in &started {
            host.ended()?;
        }
        let options = self.options();
        if options.docker {
            cgroups::remove(&options.prefix)?;
        }
        match fs::remove_dir_all(&self.folder) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(error)
                    .with_context(|| format!("cannot remove {}", self.folder.display()));
            }
            _ => {}
        }
        // Succeeds with the last lab only.
        let _ = fs::remove_dir(RECORDS);
        Ok(())
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Writes the state to where other processes find it.
    fn record(&self) -> Result<()> {
        let state = self.state();
        let file = self.folder.join("lab.json");
        let written = || format!("cannot write {}", file.display());
        let text = serde_json::to_string_pretty(&*state).with_context(written)?;
        // A reader sees the old or the new one, never half of it.
        let new = file.with_extension("new");
        fs::write(&new, text).with_context(written)?;
        fs::rename(&new, &file).with_context(written)
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        if self.state().options.life == Life::Bound
            && let Err(error) = self.remove()
        {
            eprintln!("warning: {error:#}");
        }
    }
}

impl State {
    fn is_alive(&self) -> bool {
        if self.hosts.is_empty() {
            return self.started.iter().any(Starting::is_alive);
        }
        self.hosts.iter().any(|host| host.holder.is_alive())
    }
}

/// Address of the nth host, from 1.
fn node_address(number: u8) -> Ipv4Addr {
    Ipv4Addr::new(192, 168, 1, 10 + number)
}

/// Makes the lab's folder; one that a killed process left behind is no obstacle.
fn claim(prefix: &str, folder: &Path) -> Result<()> {
    if let Some(state) = read(folder)? {
        if state.is_alive() {
            bail!("the lab is up already: `cargo xtask lab down` removes it");
        }
        Lab::remove_prefix(prefix)?;
    }
    for left in of_dead_tests() {
        // Somebody else's rest; it is in nobody's way.
        if let Err(error) = Lab::remove_prefix(&left) {
            eprintln!("warning: the rest of lab {left} stays: {error:#}");
        }
    }
    fs::create_dir_all(folder).with_context(|| format!("cannot make {}", folder.display()))
}

/// Prefixes of labs whose test was killed: they end in the number of a process that is gone.
fn of_dead_tests() -> Vec<String> {
    let entries = fs::read_dir(RECORDS).into_iter().flatten();
    let names = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
    let is_dead = |name: &String| {
        let number = name.rsplit_once('-').and_then(|(_, number)| number.parse::<u32>().ok());
        let gone = |number: u32| !Path::new("/proc").join(number.to_string()).exists();
        // A prefix of one's own may end in a number, too.
        let ended = || {
            read(&Path::new(RECORDS).join(name)).is_ok_and(|it| it.is_some_and(|it| !it.is_alive()))
        };
        number.is_some_and(gone) && ended()
    };
    names.filter(is_dead).collect()
}

fn read(folder: &Path) -> Result<Option<State>> {
    let file = folder.join("lab.json");
    let text = match fs::read_to_string(&file) {
        Ok(text) => text,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error).with_context(|| format!("cannot read {}", file.display())),
    };
    let state = serde_json::from_str(&text)
        .with_context(|| format!("{} is of another version of the lab", file.display()))?;
    Ok(Some(state))
}

/// How long a service may take to answer after its start.
const READY: Duration = Duration::from_secs(20);
