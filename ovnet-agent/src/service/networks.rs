//! Networks: create, remove, find, list.

use anyhow::Result;

use super::{Records, Service, Wiring, carried_out, in_time, is_prefix, validate};
use crate::{
    api::types::{CreateNetwork, NetworkView},
    consul::schema::NetworkRecord,
};

impl<R: Records, W: Wiring> Service<R, W> {
    /// Creates a network. Routes of this host are kept out of a subnet chosen for it.
    pub async fn create_network(&self, wanted: CreateNetwork) -> Result<NetworkRecord> {
        validate::network(&wanted)?;
        let service = self.clone();
        carried_out(async move {
            let routes = service.wiring().routes().await?;
            service.records().create_network(&wanted, &routes).await
        })
        .await
    }

    /// Removes a network that has no endpoint on any host.
    pub async fn remove_network(&self, name_or_id: &str) -> Result<NetworkRecord> {
        let name = self.find_network(name_or_id).await?.name;
        let service = self.clone();
        carried_out(async move { service.records().remove_network(&name).await }).await
    }

    /// All networks, by name.
    pub async fn networks(&self) -> Result<Vec<NetworkRecord>> {
        let mut networks = self.records().networks().await?;
        networks.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(networks)
    }

    /// A network and everyone in it.
    pub async fn network(&self, name_or_id: &str) -> Result<NetworkView> {
        let network = self.find_network(name_or_id).await?;
        let mut endpoints = self.records().endpoints(&network.id).await?;
        endpoints.sort_by_key(|endpoint| endpoint.address);
        Ok(NetworkView { network, endpoints })
    }

    /// A network by its name, its id or the start of its id that `ovnet network ls` shows.
    pub(super) async fn find_network(&self, text: &str) -> Result<NetworkRecord> {
        let unknown =
            match in_time(&format!("read network {text}"), self.records().network(text)).await {
                Ok(network) => return Ok(network),
                Err(error) => error,
            };
        // Where Consul cannot be reached this fails again, and the first error is the one to tell.
        let Ok(networks) = self.records().networks().await else { return Err(unknown) };
        let mut matching = networks.into_iter().filter(|network| is_prefix(text, &network.id));
        match (matching.next(), matching.next()) {
            (Some(network), None) => Ok(network),
            _ => Err(unknown),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::service::fake;

    #[tokio::test]
    async fn a_network_is_created_listed_seen_and_removed() {
        let (service, fake) = fake::service(&[]);
        let wanted = CreateNetwork { name: "b".into(), ..Default::default() };
        service.create_network(wanted).await.unwrap();
        let wanted = CreateNetwork { name: "a".into(), ..Default::default() };
        service.create_network(wanted.clone()).await.unwrap();
        assert!(service.create_network(wanted).await.is_err());
        let names: Vec<_> = service.networks().await.unwrap().into_iter().map(|n| n.name).collect();
        assert_eq!(names, ["a", "b"]);
        service.attach(fake::attach("a", "t1")).await.unwrap();
        assert_eq!(service.network("a").await.unwrap().endpoints, fake.records());
        assert!(service.remove_network("a").await.is_err());
        assert_eq!(service.remove_network("b").await.unwrap().name, "b");
    }

    #[tokio::test]
    async fn a_bad_name_is_refused_before_consul_is_asked() {
        let (service, fake) = fake::service(&[]);
        let wanted = CreateNetwork { name: "a/b".into(), ..Default::default() };
        service.create_network(wanted).await.unwrap_err();
        assert!(fake.calls().is_empty());
    }
}
