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
pub(super) struct Gateways(Arc<Mutex<Taken>>);

#[derive(Debug, Default)]
struct Taken {
    addresses: BTreeSet<Ipv4Addr>,
    /// The one handed out last.
    last: Option<Ipv4Addr>,
}

impl Gateways {
    /// The next free address of the bridge's subnet after the last that was taken, with its prefix
    /// length, and the MAC that goes with it. Nobody else gets it until it is given back. `bridge`
    /// is the bridge's own, and `local` lists this host's endpoints.
    ///
    /// In turn, so that what clients still send to a sandbox that is gone does not reach the next.
    pub(super) fn take(
        &self,
        bridge: Ipv4Net,
        local: impl FnOnce() -> Vec<LocalEndpoint>,
    ) -> Result<(Ipv4Net, [u8; 6])> {
        let mut taken = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        // Listed now: what is given back is an endpoint's before.
        let used: BTreeSet<_> =
            local().into_iter().filter_map(|it| Some(it.gateway?.address)).collect();
        let is_free = |it: &Ipv4Addr| {
            *it != bridge.addr() && !used.contains(it) && !taken.addresses.contains(it)
        };
        let last = taken.last;
        let after = bridge.hosts().filter(|it| last.is_some_and(|last| *it > last));
        let address = after.chain(bridge.hosts()).find(is_free).with_context(|| {
            format!(
                "every address of the gwbridge's subnet {} is in use: detach something, or give \
                 the agent a larger --gwbridge-subnet",
                bridge.trunc()
            )
        })?;
        taken.addresses.insert(address);
        taken.last = Some(address);
        let with_prefix = Ipv4Net::new(address, bridge.prefix_len())?;
        Ok((with_prefix, mac_of(address)))
    }

    /// Nobody gets the address until it is given back, although its endpoint has it no more: its
    /// port, and what the kernel remembers of it, have yet to go.
    pub(super) fn hold(&self, address: Ipv4Addr) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).addresses.insert(address);
    }

    /// The address is an endpoint's now, or nobody's.
    pub(super) fn give_back(&self, address: Ipv4Addr) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).addresses.remove(&address);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{service::fake, state::GatewayPort};

    #[test]
    fn the_next_address_that_nobody_has_is_taken() {
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
        gateways.give_back([172, 18, 0, 2].into());
        for last in [4, 5, 6, 2] {
            assert_eq!(take().unwrap().0.addr(), Ipv4Addr::new(172, 18, 0, last));
        }
        assert_eq!(
            take().unwrap_err().to_string(),
            "every address of the gwbridge's subnet 172.18.0.0/29 is in use: detach something, or \
             give the agent a larger --gwbridge-subnet"
        );
        gateways.hold([172, 18, 0, 3].into());
        gateways.give_back([172, 18, 0, 5].into());
        assert_eq!(take().unwrap().0.addr(), Ipv4Addr::new(172, 18, 0, 5));
    }
}
