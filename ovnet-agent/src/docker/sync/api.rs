//! What the task asks of Docker, as traits, so that tests run it without one.

use std::{collections::BTreeMap, net::Ipv4Addr};

use anyhow::Result;
use futures::stream::BoxStream;

use crate::{
    consul::schema::NetworkRecord,
    docker::daemon::{ContainerNames, Daemon, DockerChoice, DockerNetwork, Event},
};

/// Finds this host's daemon.
pub(super) trait Dial: Send + Sync + 'static {
    /// A daemon that answered.
    type Api: Api;
    /// Where the daemon would be; `None` where there is none.
    fn address(&self) -> Option<String>;
    /// What speaks against there being none, where something does.
    fn doubt(&self) -> Option<String> {
        None
    }
    /// Asks the daemon at an address whether it answers.
    fn dial(&self, address: &str) -> impl Future<Output = Result<Self::Api>> + Send;
}

/// A daemon. The methods are those of [`Daemon`], which describes them.
pub(super) trait Api: Clone + Send + Sync + 'static {
    fn is_there(&self) -> bool;
    fn networks(&self) -> impl Future<Output = Result<Vec<DockerNetwork>>> + Send;
    fn network(&self, id: &str) -> impl Future<Output = Result<Option<DockerNetwork>>> + Send;
    fn endpoints_of(
        &self,
        network: &str,
    ) -> impl Future<Output = Result<Option<BTreeMap<String, Option<String>>>>> + Send;
    fn create_network(
        &self,
        network: &NetworkRecord,
    ) -> impl Future<Output = Result<String>> + Send;
    fn remove_network(&self, id: &str) -> impl Future<Output = Result<()>> + Send;
    fn names_of(
        &self,
        container: &str,
    ) -> impl Future<Output = Result<Option<ContainerNames>>> + Send;
    fn gwbridge(&self) -> impl Future<Output = Result<Option<Ipv4Addr>>> + Send;
    fn make_gwbridge(&self) -> impl Future<Output = Result<Ipv4Addr>> + Send;
    fn events(&self) -> BoxStream<'static, Event>;
}

impl Dial for DockerChoice {
    type Api = Daemon;

    fn address(&self) -> Option<String> {
        self.address()
    }

    fn doubt(&self) -> Option<String> {
        self.doubt()
    }

    async fn dial(&self, address: &str) -> Result<Daemon> {
        Daemon::connect(self, address).await
    }
}

impl Api for Daemon {
    fn is_there(&self) -> bool {
        self.is_there()
    }

    async fn networks(&self) -> Result<Vec<DockerNetwork>> {
        self.networks().await
    }

    async fn network(&self, id: &str) -> Result<Option<DockerNetwork>> {
        self.network(id).await
    }

    async fn endpoints_of(
        &self,
        network: &str,
    ) -> Result<Option<BTreeMap<String, Option<String>>>> {
        self.endpoints_of(network).await
    }

    async fn create_network(&self, network: &NetworkRecord) -> Result<String> {
        self.create_network(network).await
    }

    async fn remove_network(&self, id: &str) -> Result<()> {
        self.remove_network(id).await
    }

    async fn names_of(&self, container: &str) -> Result<Option<ContainerNames>> {
        self.names_of(container).await
    }

    async fn gwbridge(&self) -> Result<Option<Ipv4Addr>> {
        self.gwbridge().await
    }

    async fn make_gwbridge(&self) -> Result<Ipv4Addr> {
        self.make_gwbridge().await
    }

    fn events(&self) -> BoxStream<'static, Event> {
        self.events()
    }
}
