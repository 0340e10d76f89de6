//! Names for containers: a DNS server on this host that knows the endpoints of every host.
//!
//! Docker's own resolver in each container knows the containers of its own host only, and asks the
//! servers of daemon.json's `dns` for everything else, from inside the container. The first of
//! them is this server ([`server`]). Who asks is found by the source address ([`askers`]), and
//! hears only names of the networks it is on ([`names`]). Anything else is refused, and a refusal
//! sends Docker's resolver to its next server.

use std::{net::Ipv4Addr, os::unix::fs::MetadataExt as _, path::Path, sync::Arc};

use anyhow::Result;
use nix::sys::statfs::{NSFS_MAGIC, statfs};
use tokio::{sync::watch, task::JoinHandle};

pub mod askers;
mod message;
pub mod names;
pub mod server;

use self::{
    askers::{Askers, Places, Sandbox},
    names::{Answer, Directory, Network, Question},
    server::{Asker, Knowledge, Networks},
};
use crate::{
    config::Dns, consul::schema::NetworkRecord, net::Net, reconcile::Reconciler,
    state::LocalEndpoint,
};

/// The port of DNS; resolvers cannot be told another.
const PORT: u16 = 53;

/// Answers names until the agent ends: on the address that `--dns` says, or on `gwbridge`'s,
/// docker_gwbridge's address on this host, which may come, change and go.
///
/// Nothing here is fatal to the agent: what goes wrong is logged and tried again.
pub fn spawn(
    choice: Dns,
    gwbridge: watch::Receiver<Option<Ipv4Addr>>,
    reconciler: Reconciler,
    net: Net,
    mut ending: watch::Receiver<bool>,
) -> JoinHandle<()> {
    tokio::spawn(async move {
        let addresses = match choice {
            Dns::Off => return,
            Dns::Auto => gwbridge,
            Dns::At(address) => watch::channel(Some(address)).1,
        };
        let host = Host { reconciler: reconciler.clone(), net };
        let knowledge = Arc::new(Records { reconciler, askers: Askers::new(host) });
        tokio::select! {
            () = server::serve(addresses, PORT, knowledge) => {}
            // An error means that the sender is gone, which is a stop too.
            _ = ending.wait_for(|stop| *stop) => {}
        }
    })
}

/// What the agent knows.
struct Records {
    reconciler: Reconciler,
    askers: Askers<Host>,
}

impl Knowledge for Records {
    fn known(&self, source: Ipv4Addr) -> Asker {
        self.askers.known(source)
    }

    async fn find(&self, source: Ipv4Addr) -> Networks {
        self.askers.find(source).await
    }

    fn answer(&self, networks: &[NetworkRecord], question: &Question, turn: usize) -> Answer {
        let snapshot = self.reconciler.snapshot();
        let hosts = self.reconciler.usable_hosts();
        // While Consul has not been read, this host's own endpoints are all there is.
        let unread = networks.iter().any(|it| !snapshot.endpoints.contains_key(&it.id));
        let local = if unread { self.reconciler.local() } else { Vec::new() };
        let networks = networks.iter().map(|network| Network {
            // An endpoint may have come before its network had the name that it has now.
            record: snapshot
                .networks
                .iter()
                .flat_map(|networks| networks.values())
                .find(|it| it.id == network.id)
                .unwrap_or(network),
            endpoints: match snapshot.endpoints.get(&network.id) {
                Some(endpoints) => endpoints.values().collect(),
                None => local
                    .iter()
                    .filter(|it| it.network.id == network.id)
                    .map(|it| &it.record)
                    .collect(),
            },
        });
        let directory = Directory { networks: networks.collect(), hosts: hosts.as_deref() };
        names::answer(&directory, question, turn)
    }
}

/// The endpoints and sandboxes of this host.
struct Host {
    reconciler: Reconciler,
    net: Net,
}

impl Places for Host {
    fn endpoints(&self) -> Vec<String> {
        self.reconciler.local_ids()
    }

    fn sandboxes(&self) -> Vec<Sandbox> {
        let sandbox = |LocalEndpoint { record, network, netns, .. }| Sandbox {
            endpoint: record.id,
            network,
            netns,
        };
        self.reconciler.local().into_iter().map(sandbox).collect()
    }

    fn identity(&self, netns: &Path) -> Option<(u64, u64)> {
        identity(netns)
    }

    async fn addresses(&self, netns: &Path) -> Result<Vec<Ipv4Addr>> {
        self.net.addresses_in(netns).await
    }
}

/// Device and inode of a network namespace.
fn identity(netns: &Path) -> Option<(u64, u64)> {
    // Docker makes an empty file first, over which the namespace is mounted then.
    let kind = statfs(netns).ok()?.filesystem_type();
    let metadata = std::fs::metadata(netns).ok().filter(|_| kind == NSFS_MAGIC)?;
    Some((metadata.dev(), metadata.ino()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_namespace_has_an_identity() {
        let own = identity(Path::new("/proc/self/ns/net"));
        assert!(own.is_some());
        assert_eq!(own, identity(Path::new("/proc/thread-self/ns/net")), "however it is spelled");
        let file = tempfile::NamedTempFile::new().unwrap();
        assert_eq!(identity(file.path()), None, "nothing is mounted there yet");
        assert_eq!(identity(&file.path().with_extension("gone")), None);
    }
}
