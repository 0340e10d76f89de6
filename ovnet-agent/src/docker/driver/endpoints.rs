//! Endpoints: made in `Join`, gone in `DeleteEndpoint`. Docker moves, names and addresses the
//! interface; everything else is as with `ovnet attach`.

use std::{path::PathBuf, time::Instant};

use anyhow::{Context as _, Result, bail};

use super::{Driver, addresses::host_of, unknown_network};
use crate::{
    consul::schema::{EndpointRecord, EndpointState, NetworkRecord, format_mac, mac_of, parse_mac},
    desired::endpoint_mtu,
    docker::{
        book::{Created, Reservation},
        plugin::types::{CreateEndpoint, InterfaceName, Join, Joined},
    },
    ipam,
    net::LooseVeth,
    service::{Records, Refusal, Wiring, one_line},
    state::{DockerEndpoint, LocalEndpoint},
};

impl<R: Records, W: Wiring> Driver<R, W> {
    /// `CreateEndpoint`: settles who has the address that was reserved. Returns the MAC address
    /// where Docker left it to us.
    pub async fn create_endpoint(&self, wanted: CreateEndpoint) -> Result<Option<String>> {
        let CreateEndpoint { network, endpoint: id, interface } = wanted;
        let bound = self.book().bound(&network).ok_or_else(|| unknown_network(&network))?;
        let network = &bound.network;
        if !interface.address_ipv6.is_empty() {
            return Err(Refusal::invalid("ovnet networks are IPv4 only: leave out --ip6"));
        }
        let address = host_of(&interface.address)?.context("the endpoint has no IPv4 address")?;
        ipam::check_address(network, address)?;
        let mac = match interface.mac_address.as_str() {
            "" => mac_of(address),
            given => parse_mac(given)?,
        };
        if let Some(other) = self.local_at(network, address).filter(|other| other.record.id != id) {
            let name = other.record.names.first().unwrap_or(&other.record.id);
            return Err(Refusal::conflict(format!(
                "address {address} of network {} is that of {name}",
                network.name
            )));
        }
        let reservation = match self.reservation(network, address) {
            Some(reservation) => reservation,
            None => self.find_reservation(network, address).await?,
        };
        let record = EndpointRecord {
            id: id.clone(),
            mac: format_mac(mac),
            state: EndpointState::Up,
            ..reservation.record.clone()
        };
        let claimed_as = reservation.record.id;
        self.book()
            .pages()
            .created
            .insert(id, Created { record, bound, claimed_as, since: Instant::now() });
        Ok(interface.mac_address.is_empty().then(|| format_mac(mac)))
    }

    fn reservation(
        &self,
        network: &NetworkRecord,
        address: std::net::Ipv4Addr,
    ) -> Option<Reservation> {
        let mut pages = self.book().pages();
        let reservation = pages.reserved.get_mut(&(network.id.clone(), address))?;
        // It has its endpoint now, and as long as any other to be joined.
        reservation.since = Instant::now();
        Some(reservation.clone())
    }

    /// A reservation of an agent before this one.
    async fn find_reservation(
        &self,
        network: &NetworkRecord,
        address: std::net::Ipv4Addr,
    ) -> Result<Reservation> {
        let what = format!("look up address {address} of network {}", network.name);
        let records = self.in_time(&what, self.records().endpoints(&network.id)).await?;
        let node = self.shared.service.node();
        let record = records
            .into_iter()
            .find(|it| {
                it.address == address && it.host == node && it.state == EndpointState::Reserved
            })
            .with_context(|| {
                format!("address {address} of network {} was not reserved: try again", network.name)
            })?;
        let reservation = Reservation { network: network.clone(), record, since: Instant::now() };
        let key = (network.id.clone(), address);
        self.shared.service.begin(network, &reservation.record.id);
        self.book().pages().reserved.insert(key, reservation.clone());
        Ok(reservation)
    }

    pub(super) fn local_at(
        &self,
        network: &NetworkRecord,
        address: std::net::Ipv4Addr,
    ) -> Option<LocalEndpoint> {
        let local = self.wiring().local();
        local.into_iter().find(|it| it.network.id == network.id && it.record.address == address)
    }

    /// `Join`: makes the veth pair, wires it and announces the endpoint. Where any of it fails the
    /// pair is gone again; Docker then deletes the endpoint and gives its address back.
    pub async fn join(&self, wanted: Join) -> Result<Joined> {
        let id = wanted.endpoint;
        let (host_ifname, inner_ifname) = ifnames(&id)?;
        let joined = Joined {
            interface_name: InterfaceName {
                src_name: inner_ifname.clone(),
                dst_prefix: "eth".into(),
            },
        };
        let created = self.book().pages().created.get(&id).cloned();
        let Some(Created { record, bound, claimed_as, .. }) = created else {
            if self.wiring().local().iter().any(|it| it.record.id == id) {
                return Ok(joined);
            }
            self.book().bound(&wanted.network).ok_or_else(|| unknown_network(&wanted.network))?;
            bail!(
                "the agent does not know this endpoint, because it was started anew meanwhile or \
                 the start took more than a minute: try again"
            );
        };
        let network = bound.network;
        let mtu = endpoint_mtu(&network, self.wiring().uplink_mtu());
        let mac = parse_mac(&record.mac)?;
        let veth = LooseVeth { host_ifname: host_ifname.clone(), inner_ifname, mac, mtu };
        self.wiring().create_loose_veth(&veth).await?;
        self.shared.service.begin(&network, &id);
        let endpoint = LocalEndpoint {
            record,
            network,
            netns: PathBuf::from(wanted.sandbox),
            ifname: String::new(),
            host_ifname,
            mtu,
            docker: Some(DockerEndpoint { network: bound.docker, container: None }),
            gateway: None,
            ports: Vec::new(),
        };
        let result = self.wire(&endpoint, &claimed_as).await;
        self.shared.service.end(&id);
        match result {
            Ok(()) => {
                let mut pages = self.book().pages();
                pages.created.remove(&id);
                // The record is the endpoint's from here on.
                let key = (endpoint.network.id, endpoint.record.address);
                if pages.reserved.get(&key).is_some_and(|it| it.record.id == claimed_as) {
                    pages.reserved.remove(&key);
                }
                drop(pages);
                self.shared.service.end(&claimed_as);
                Ok(joined)
            }
            Err(error) => {
                for undone in [
                    self.wiring().remove_local(&id).await,
                    self.wiring().delete_link(&endpoint.host_ifname).await,
                ] {
                    if let Err(error) = undone {
                        tracing::warn!(id, "an endpoint is not undone: {}", one_line(&error));
                    }
                }
                Err(error)
            }
        }
    }

    async fn wire(&self, endpoint: &LocalEndpoint, claimed_as: &str) -> Result<()> {
        self.wiring().add_local(endpoint.clone()).await?;
        let LocalEndpoint { network, record, .. } = endpoint;
        let announced = self.records().publish_endpoint(network, record, Some(claimed_as));
        self.in_time(&format!("announce endpoint {}", record.address), announced).await
    }

    /// `DeleteEndpoint`, and the end of an endpoint that Docker does not know any more. The address
    /// stays taken until Docker gives it back: another container may be given it from then on.
    pub async fn delete_endpoint(&self, id: &str) -> Result<()> {
        if let Some(created) = self.book().pages().created.remove(id) {
            tracing::debug!(id, claimed_as = created.claimed_as, "an endpoint was not joined");
        }
        let local = self.wiring().local();
        let Some(endpoint) = local.into_iter().find(|it| it.record.id == id) else { return Ok(()) };
        let LocalEndpoint { network, record, .. } = endpoint;
        let key = (network.id.clone(), record.address);
        self.shared.service.begin(&network, &record.id);
        let reservation = Reservation { network, record, since: Instant::now() };
        self.book().pages().reserved.insert(key, reservation);
        self.wiring().remove_local(id).await
    }
}

/// Names of the two ends of an endpoint's pair: `ovnet` and 8 digits of its id stays on the host,
/// the other is Docker's to move and rename.
fn ifnames(id: &str) -> Result<(String, String)> {
    let digits = id.get(..8).filter(|digits| digits.bytes().all(|it| it.is_ascii_hexdigit()));
    let digits = digits.with_context(|| format!("{id:?} is not an endpoint's id"))?;
    let digits = digits.to_ascii_lowercase();
    Ok((format!("ovnet{digits}"), format!("ovnetp{digits}")))
}
