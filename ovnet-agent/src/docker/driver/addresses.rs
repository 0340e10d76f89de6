//! Addresses of a pool: the network's own, and those of endpoints, which are claimed in Consul.

use std::{collections::BTreeMap, net::Ipv4Addr, time::Instant};

use anyhow::Result;
use ipnet::Ipv4Net;
use uuid::Uuid;

use super::{Driver, RESERVATION_LIFE, networks::parse_optional};
use crate::{
    consul::{
        pending::gateway_of,
        schema::{EndpointState, NetworkRecord, check_name, is_host_of},
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
        } else if let Some(address) = address.filter(|it| self.is_ours(&network, *it)) {
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

    /// Whether a container of this host has the address: a Docker that starts again asks for it
    /// once more, without saying so. Anybody else is refused the endpoint.
    fn is_ours(&self, network: &NetworkRecord, address: Ipv4Addr) -> bool {
        self.local_at(network, address).is_some_and(|it| it.docker.is_some())
    }

    /// Claims an address for an endpoint to come.
    async fn reserve(&self, wanted: &PoolAddress, address: Option<Ipv4Addr>) -> Result<Ipv4Addr> {
        let network = self.named(&wanted.pool).await?;
        let id = Uuid::new_v4().to_string();
        let name = wanted.options.get(NAME_OPTION).cloned();
        let names = name.filter(|it| check_name("name", it).is_ok()).into_iter().collect();
        let claim = AddressClaim { id: id.clone(), names, address };
        // Where this fails the claim may have been carried out all the same: the sweep finds it.
        self.shared.service.begin(&network, &id);
        let what = format!("allocate an address of network {}", network.name);
        let claiming = async {
            if let Some(address) = address {
                self.release_left(&network, address).await?;
            }
            self.records().claim_address(&network, &claim).await
        };
        match self.in_time(&what, claiming).await {
            Ok(record) => {
                let found = record.address;
                let key = (network.id.clone(), found);
                let reservation = Reservation { network, record, since: Instant::now() };
                self.book().pages().reserved.insert(key, reservation);
                Ok(found)
            }
            Err(error) => {
                self.shared.service.end(&id);
                Err(error)
            }
        }
    }

    /// Releases an address that is wanted again and that only a record of this host still has:
    /// because Consul was away when its container ended, or because Docker did not give it back.
    async fn release_left(&self, network: &NetworkRecord, address: Ipv4Addr) -> Result<()> {
        let key = (network.id.clone(), address);
        let ended = {
            let mut pages = self.book().pages();
            let ended =
                pages.reserved.get(&key).is_some_and(|it| it.record.state == EndpointState::Up);
            if ended { pages.reserved.remove(&key) } else { None }
        };
        if let Some(reservation) = ended {
            self.let_go(reservation).await;
        }
        if !self.shared.service.is_announced() {
            return Ok(());
        }
        let records = self.records().endpoints(&network.id).await?;
        match records.into_iter().find(|it| it.address == address) {
            Some(record) if self.shared.service.is_orphan(&record) => {
                self.records().release_endpoint(&network.id, &record).await
            }
            _ => Ok(()),
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
        service.end(&id);
    }

    /// Releases addresses that Docker asked for and did not use, or did not give back.
    pub(super) async fn forget_stale_reservations(&self) {
        let stale: Vec<Reservation> = {
            let mut pages = self.book().pages();
            let stale =
                pages.reserved.extract_if(.., |_, it| it.since.elapsed() > RESERVATION_LIFE);
            stale.map(|(_, reservation)| reservation).collect()
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
