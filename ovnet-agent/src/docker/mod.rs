//! Docker: networks of this host's Docker that stand for networks of ovnet, and their containers.
//!
//! [`plugin`] is the HTTP of Docker's plugin protocol, [`driver`] is what its calls do, [`book`] is
//! what this host remembers of Docker's networks. Everything the agent asks Docker for goes the
//! other way, by [`daemon`] and Docker's API, and never from within a call of the plugin: Docker
//! may be waiting for that very call. [`sync`] keeps Docker's networks and Consul's the same.

pub mod book;
pub mod daemon;
pub mod driver;
pub mod plugin;
pub mod setup;
pub mod sync;

use std::{net::Ipv4Addr, path::Path, time::Duration};

use anyhow::Result;
use tokio::{sync::watch, task::JoinSet};

use self::{
    book::Book,
    daemon::DockerChoice,
    driver::{Driver, HostSide},
    plugin::PluginSocket,
};
use crate::service::{
    Service,
    real::{ConsulRecords, HostWiring},
};

/// Between looks for what Docker asked for and then forgot.
const TIDY: Duration = Duration::from_secs(20);

/// Everything that serves Docker, until `ending` says so. The tasks end by themselves only when
/// something is wrong.
pub fn start(
    choice: DockerChoice,
    socket: PluginSocket,
    service: Service<ConsulRecords, HostWiring>,
    state_dir: &Path,
    gwbridge: watch::Sender<Option<Ipv4Addr>>,
    ending: watch::Receiver<bool>,
) -> Result<JoinSet<Result<()>>> {
    let driver = Driver::new(service, Book::open(state_dir)?);
    let mut tasks = JoinSet::new();
    tasks.spawn(plugin::serve(socket, driver.clone(), ending.clone()));
    let compare = sync::run(choice, HostSide::new(driver.clone()), gwbridge, ending.clone());
    tasks.spawn(async move {
        compare.await;
        Ok(())
    });
    let mut ending = ending;
    tasks.spawn(async move {
        loop {
            tokio::select! {
                () = ended(&mut ending) => return Ok(()),
                () = tokio::time::sleep(TIDY) => driver.tidy().await,
            }
        }
    });
    Ok(tasks)
}

async fn ended(ending: &mut watch::Receiver<bool>) {
    // An error means that the agent is gone, which is an end too.
    let _ = ending.wait_for(|ending| *ending).await;
}
