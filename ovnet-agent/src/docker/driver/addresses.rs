//! Addresses of a pool: the network's own, and those of endpoints, which are claimed in Consul.

use std::{collections::BTreeMap, net::Ipv4Addr, time::Instant};

use anyhow::Result;
use ipnet::Ipv4Net;
use uuid::Uuid;

use super::{Driver, RESERVATION_LIFE, networks::parse_optional};
use crate::{
    consul::{
        pending::gateway_of,
        schema::{NetworkRecord, check_name, is_host_of},
    },
    docker::{
        book::Reservation,
        plugin::types::{Address, PoolAddress},
    },
    service::{AddressClaim, Records, Refusal, Wiring},
};

/// Docker 29 and later say here who will have the address.
const NAME_OPTION: &str = "com.docker.network.endpoint.name";

impl<R: Records, W: Wiring> Driver<R, W> {
    /// `RequestAddress`: the gateway's, an aux address, or one for an endpoint.
    pub async fn request_address(&self, wanted: PoolAddress) -> Result<Address> {
        let address = parse_optional::<Ipv4Addr>("address", &wanted.address)?;
        let network = self.network_of_pool(&wanted.pool).await?;
        let kind = wanted.options.get("RequestAddressType").map(String::as_str);
        let found = if kind == Some("com.docker.network.gateway") {
            self.gateway(&network, address)?
        } else if let Some(address) = address.filter(|it| self.is_the_networks(&network, *it)) {
            // Every host's Docker asks for these and gives them back; they belong to the network.
            address
        } else if let Some(address) = address.filter(|it| self.was_ours(&network, *it)) {
            address
        } else {
            self.reserve(&wanted, address).await?
        };
        let prefix = network.subnet.prefix_len();
        Ok(Address { address: format!("{found}/{prefix}"), data: BTreeMap::new() })
    }

    /// The gateway; the one asked for where the network is only being made.
    fn gateway(&self, network: &NetworkRecord, wanted: Option<Ipv4Addr>) -> Result<Ipv4Addr> {
        let mut pages = self.book().pages();
        if let Some(making) = pages.making.get_mut(&network.id) {
            let gateway = gateway_of(&making.claim, wanted)?;
            making.gateway = Some(gateway);
            return Ok(gateway);
        }
        match wanted {
            Some(wanted) if wanted != network.gateway => Err(Refusal::invalid(format!(
                "the gateway of network {} is {} and not {wanted}",
                network.name, network.gateway
            ))),
            _ => Ok(network.gateway),
        }
    }

    /// Whether an address asked for is the network's own and nobody's to claim.
    fn is_the_networks(&self, network: &NetworkRecord, address: Ipv4Addr) -> bool {
        // While a network is made, an address asked for is one of its aux addresses.
        let making = self.book().pages().making.contains_key(&network.id);
        (making && is_host_of(network.subnet, address))
            || address == network.gateway
            || network.aux.values().any(|aux| *aux == address)
    }

    /// Whether a Docker that starts again asks for an address that its container has.
    fn was_ours(&self, network: &NetworkRecord, address: Ipv4Addr) -> bool {
        let mut pages = self.book().pages();
        pages.replay.get_mut(&network.id).is_some_and(|replay| replay.remove(&address))
    }

    /// Claims an address for an endpoint to come.
    async fn reserve(&self, wanted: &PoolAddress, address: Option<Ipv4Addr>) -> Result<Ipv4Addr> {
        let network = self.named(&wanted.pool).await?;
        let id = Uuid::new_v4().to_string();
        let name = wanted.options.get(NAME_OPTION).cloned();
        let names = name.filter(|it| check_name("name", it).is_ok()).into_iter().collect();
        let claim = AddressClaim { id: id.clone(), names, address };
        self.shared.service.attaching().insert(id.clone());
        let what = format!("allocate an address of network {}", network.name);
        match self.in_time(&what, self.records().claim_address(&network, &claim)).await {
            Ok(record) => {
                let found = record.address;
                let key = (network.id.clone(), found);
                let reservation = Reservation { network, record, since: Instant::now() };
                self.book().pages().reserved.insert(key, reservation);
                Ok(found)
            }
            Err(error) => {
                self.shared.service.attaching().remove(&id);
                if crate::service::kind_of(&error).is_none() {
                    // The claim may have been carried out all the same.
                    self.shared.service.forget_later(network, id);
                }
                Err(error)
            }
        }
    }

    /// `ReleaseAddress`. Docker gives back what it asked for; what a container of this host still
    /// has, and what another host has, stays.
    pub async fn release_address(&self, wanted: &PoolAddress) {
        let Ok(address) = wanted.address.split('/').next().unwrap_or_default().parse() else {
            return;
        };
        self.release_of(&wanted.pool, address).await;
    }

    /// Releases an address of a network that no endpoint has any more.
    pub(super) async fn release_of(&self, network: &str, address: Ipv4Addr) {
        let reservation = self.book().pages().reserved.remove(&(network.to_owned(), address));
        if let Some(reservation) = reservation {
            self.let_go(reservation).await;
        }
    }

    /// Releases a reserved address, now or when Consul is back.
    async fn let_go(&self, reservation: Reservation) {
        let Reservation { network, record, .. } = reservation;
        let id = record.id.clone();
        let service = &self.shared.service;
        let now = self.records().release_endpoint(&network.id, &record);
        if self.in_time("release an address", now).await.is_err() {
            service.release_later(network, record);
        }
        service.attaching().remove(&id);
    }

    /// Releases addresses that Docker asked for and did not use, or did not give back.
    pub(super) async fn forget_stale_reservations(&self) {
        let stale: Vec<Reservation> = {
            let mut pages = self.book().pages();
            let created: Vec<String> =
                pages.created.values().map(|created| created.claimed_as.clone()).collect();
            let is_stale = |it: &Reservation| {
                it.since.elapsed() > RESERVATION_LIFE && !created.contains(&it.record.id)
            };
            let stale = pages.reserved.values().filter(|it| is_stale(it)).cloned().collect();
            pages.reserved.retain(|_, it| !is_stale(it));
            stale
        };
        for reservation in stale {
            tracing::info!(
                address = %reservation.record.address, network = reservation.network.name,
                "an address that no container came to have is released"
            );
            self.let_go(reservation).await;
        }
    }
}

/// The host part of `10.0.0.2/24`, as an endpoint's address comes.
pub(super) fn host_of(cidr: &str) -> Result<Option<Ipv4Addr>> {
    Ok(parse_optional::<Ipv4Net>("address", cidr)?.map(|it| it.addr()))
}
