//! Which addresses of the gwbridge are free for sandboxes.

use std::{
    collections::BTreeSet,
    net::Ipv4Addr,
    sync::{Arc, Mutex, PoisonError},
};

use anyhow::{Context as _, Result};
use ipnet::Ipv4Net;

use crate::{consul::schema::mac_of, state::LocalEndpoint};

/// Addresses of gateway ports that no local endpoint has yet. Clones share them.
#[derive(Clone, Debug, Default)]
pub(super) struct Gateways {
    taken: Arc<Mutex<BTreeSet<Ipv4Addr>>>,
}

impl Gateways {
    /// The lowest free address of the bridge's subnet, with its prefix length, and the MAC that
    /// goes with it. Nobody else gets it until it is given back. `bridge` is the bridge's own, and
    /// `local` lists this host's endpoints.
    pub(super) fn take(
        &self,
        bridge: Ipv4Net,
        local: impl FnOnce() -> Vec<LocalEndpoint>,
    ) -> Result<(Ipv4Net, [u8; 6])> {
        let mut taken = self.taken.lock().unwrap_or_else(PoisonError::into_inner);
        // Listed now: what is given back is an endpoint's before.
        let used: BTreeSet<_> =
            local().into_iter().filter_map(|it| Some(it.gateway?.address)).collect();
        let is_free =
            |it: &Ipv4Addr| *it != bridge.addr() && !used.contains(it) && !taken.contains(it);
        let address = bridge.hosts().find(is_free).with_context(|| {
            format!(
                "every address of the gwbridge's subnet {} is in use: detach something, or give \
                 the agent a larger --gwbridge-subnet",
                bridge.trunc()
            )
        })?;
        taken.insert(address);
        let with_prefix = Ipv4Net::new(address, bridge.prefix_len())?;
        Ok((with_prefix, mac_of(address)))
    }

    /// The address is an endpoint's now, or nobody's.
    pub(super) fn give_back(&self, address: Ipv4Addr) {
        self.taken.lock().unwrap_or_else(PoisonError::into_inner).remove(&address);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{service::fake, state::GatewayPort};

    #[test]
    fn the_lowest_address_that_nobody_has_is_taken() {
        let gateways = Gateways::default();
        let bridge: Ipv4Net = "172.18.0.1/29".parse().unwrap();
        let local = [LocalEndpoint {
            gateway: Some(GatewayPort {
                bridge: "ovnet_gwbridge".into(),
                host_ifname: "ovnetg01234567".into(),
                ifname: "eth1".into(),
                address: [172, 18, 0, 3].into(),
                mac: "02:42:ac:12:00:03".into(),
            }),
            ..fake::local_endpoint()
        }];
        let take = || gateways.take(bridge, || local.to_vec());
        let (address, mac) = take().unwrap();
        assert_eq!(
            (address.to_string().as_str(), mac),
            ("172.18.0.2/29", [2, 0x42, 172, 18, 0, 2])
        );
        for last in [4, 5, 6] {
            assert_eq!(take().unwrap().0.addr(), Ipv4Addr::new(172, 18, 0, last));
        }
        assert_eq!(
            take().unwrap_err().to_string(),
            "every address of the gwbridge's subnet 172.18.0.0/29 is in use: detach something, or \
             give the agent a larger --gwbridge-subnet"
        );
        gateways.give_back([172, 18, 0, 5].into());
        assert_eq!(take().unwrap().0.addr(), Ipv4Addr::new(172, 18, 0, 5));
    }
}
