//! What listings show, put together from Consul's records and this host's own knowledge.

use std::collections::BTreeMap;

use anyhow::Result;
use futures::{StreamExt as _, TryStreamExt as _};

use super::{Records, Service, Wiring, publish};
use crate::{
    api::types::{EndpointView, GatewayView, HostView, LocalView, PathView},
    peers::Known,
    state::LocalEndpoint,
};

/// How many networks' endpoints are read from Consul at once.
const READS_AT_ONCE: usize = 8;

impl<R: Records, W: Wiring> Service<R, W> {
    /// Endpoints on all hosts, by network and address; of one network where it is given.
    pub async fn endpoints(&self, network: Option<&str>) -> Result<Vec<EndpointView>> {
        let networks = match network {
            Some(network) => vec![self.find_network(network).await?],
            None => self.records().networks().await?,
        };
        let mut local: BTreeMap<_, _> =
            self.wiring().local().into_iter().map(|it| (it.record.id.clone(), it)).collect();
        let read: Vec<_> = futures::stream::iter(networks)
            .map(|network| async move {
                let records = self.records().endpoints(&network.id).await?;
                anyhow::Ok((network.name, records))
            })
            .buffer_unordered(READS_AT_ONCE)
            .try_collect()
            .await?;
        let mut views: Vec<_> = read
            .into_iter()
            .flat_map(|(network, records)| records.into_iter().map(move |it| (network.clone(), it)))
            .map(|(network, record)| {
                let local = local.remove(&record.id).map(|it| self.local_view(&it));
                EndpointView { record, network, local }
            })
            .collect();
        sort(&mut views);
        Ok(views)
    }

    /// The endpoints of this host, without asking Consul.
    pub fn local_endpoints(&self, network: Option<&str>) -> Vec<EndpointView> {
        let mut views: Vec<_> = self
            .wiring()
            .local()
            .iter()
            .filter(|it| {
                network.is_none_or(|name| it.network.name == name || it.network.id == name)
            })
            .map(|it| self.view_local(it))
            .collect();
        sort(&mut views);
        views
    }

    /// All hosts, by name.
    pub async fn hosts(&self) -> Result<Vec<HostView>> {
        let peers = self.wiring().peers();
        let mut hosts: Vec<_> = self
            .records()
            .hosts()
            .await?
            .into_iter()
            .map(|(record, locked)| {
                // Announced by hand it has no lease to lose, see `hosts.rs`.
                let by_hand = record.agent.is_empty();
                // One that is asked at another address by now is not known yet.
                let known = peers.get(&record.node).filter(|it| it.vtep == record.vtep);
                HostView {
                    path: known.map(path_view),
                    this: record.node == self.shared.node,
                    node: record.node,
                    vtep: record.vtep,
                    port: record.port,
                    mtu: record.mtu,
                    agent: record.agent,
                    state: if locked || by_hand { "up" } else { "lost" }.to_owned(),
                }
            })
            .collect();
        hosts.sort_by(|a, b| a.node.cmp(&b.node));
        Ok(hosts)
    }

    pub(super) fn view_local(&self, endpoint: &LocalEndpoint) -> EndpointView {
        EndpointView {
            record: endpoint.record.clone(),
            network: endpoint.network.name.clone(),
            local: Some(self.local_view(endpoint)),
        }
    }

    fn local_view(&self, endpoint: &LocalEndpoint) -> LocalView {
        // An endpoint without counters is one that has sent and received nothing yet, or whose
        // programs are being repaired; a listing shows it all the same.
        let counters = self.wiring().port_counters(&endpoint.host_ifname).unwrap_or_default();
        let gateway = endpoint.gateway.as_ref();
        let mut ports = endpoint.ports.clone();
        publish::sort(&mut ports);
        LocalView {
            netns: endpoint.netns.display().to_string(),
            ifname: endpoint.ifname.clone(),
            host_ifname: endpoint.host_ifname.clone(),
            mtu: endpoint.mtu,
            tx_packets: counters.tx_packets,
            tx_bytes: counters.tx_bytes,
            rx_packets: counters.rx_packets,
            rx_bytes: counters.rx_bytes,
            gateway: gateway
                .map(|it| GatewayView { address: it.address, ifname: it.ifname.clone() }),
            ports,
        }
    }
}

/// What is known of the way to a peer, for people.
pub(crate) fn path_view(known: &Known) -> PathView {
    let Known { vtep: _, mtu: _, state, lasting, round_trip } = known;
    PathView {
        path: state.name().to_owned(),
        seconds: lasting.as_secs(),
        round_trip_us: round_trip.map(|it| u64::try_from(it.as_micros()).unwrap_or(u64::MAX)),
    }
}

fn sort(views: &mut [EndpointView]) {
    views.sort_by(|a, b| (&a.network, a.record.address).cmp(&(&b.network, b.record.address)));
}

#[cfg(test)]
mod tests {
    use crate::service::fake::{self, attach};

    #[tokio::test]
    async fn endpoints_of_all_hosts_are_listed_and_the_local_ones_with_more() {
        let (service, fake) = fake::service(&["ov_net1", "ov_net2"]);
        let mine = service.attach(attach("ov_net2", "t1")).await.unwrap();
        let mut other = mine.record.clone();
        (other.id, other.host, other.address) =
            ("b".into(), "docker02".into(), [10, 0, 0, 3].into());
        fake.put("ov_net1", other.clone());
        let views = service.endpoints(None).await.unwrap();
        assert_eq!(views[0].record, other);
        assert_eq!(views[0].local, None);
        assert_eq!(views[1], mine);
        assert_eq!(service.endpoints(Some("ov_net1")).await.unwrap().len(), 1);
        assert_eq!(service.local_endpoints(None), [mine]);
        assert!(service.local_endpoints(Some("ov_net1")).is_empty());
    }

    #[tokio::test]
    async fn hosts_show_their_lease() {
        let (service, _) = fake::service(&[]);
        let hosts = service.hosts().await.unwrap();
        let shown: Vec<_> =
            hosts.iter().map(|it| (it.node.as_str(), it.state.as_str(), it.this)).collect();
        assert_eq!(shown, [("docker01", "up", true), ("docker02", "lost", false)]);
        let path = hosts[1].path.as_ref().map(|it| (it.path.as_str(), it.seconds));
        assert_eq!((&hosts[0].path, path), (&None, Some(("unreachable", 37))));
    }
}
