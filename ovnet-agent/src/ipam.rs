//! Which address, subnet and VNI to take, given what is taken. Pure: nothing here reads or writes
//! anything; what is chosen is claimed in [`crate::consul`], which asks again when it was beaten.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::Ipv4Addr,
};

use anyhow::{Result, bail, ensure};
use ipnet::Ipv4Net;

use crate::consul::schema::{FIRST_VNI, LAST_VNI, NetworkRecord, is_host_of};

/// The free addresses of a network, lowest first, none of them the gateway's, an aux address, the
/// subnet's first or last, or outside the network's `ip_range`.
pub fn free_addresses<'a>(
    network: &'a NetworkRecord,
    taken: &'a BTreeSet<Ipv4Addr>,
) -> impl Iterator<Item = Ipv4Addr> + 'a {
    let range = network.ip_range.unwrap_or(network.subnet);
    (u32::from(range.network())..=u32::from(range.broadcast())).map(Ipv4Addr::from).filter(
        |address| {
            is_host_of(network.subnet, *address)
                && reserved_for(network, *address).is_none()
                && !taken.contains(address)
        },
    )
}

/// Chooses a free address among the lowest `window` of them: `pick` gets their number, at least 1,
/// and returns which. A window of 1 is the lowest free address; claimers that were beaten widen it
/// so that they do not all meet at the next one again. Fails, saying so, where there is none.
pub fn choose_address(
    network: &NetworkRecord,
    taken: &BTreeSet<Ipv4Addr>,
    window: usize,
    pick: impl FnOnce(usize) -> usize,
) -> Result<Ipv4Addr> {
    let candidates: Vec<_> = free_addresses(network, taken).take(window.max(1)).collect();
    if candidates.is_empty() {
        let range = network.ip_range.unwrap_or(network.subnet);
        bail!(
            "network {} is full: no free address in {range}; detach an endpoint, or use a network \
             with a larger {}",
            network.name,
            if network.ip_range.is_some() { "ip range" } else { "subnet" }
        );
    }
    Ok(candidates[pick(candidates.len()) % candidates.len()])
}

/// Checks an address the user asked for: a host address of the subnet that the network itself
/// does not use. Like Docker's `--ip` it may lie outside the `ip_range`.
pub fn check_address(network: &NetworkRecord, address: Ipv4Addr) -> Result<()> {
    let (name, subnet) = (&network.name, network.subnet);
    ensure!(subnet.contains(&address), "{address} is not inside subnet {subnet} of network {name}");
    ensure!(
        is_host_of(subnet, address),
        "{address} is not a host address: it is the {} of subnet {subnet} of network {name}",
        if address == subnet.network() { "first" } else { "broadcast address" }
    );
    if let Some(holder) = reserved_for(network, address) {
        bail!("{address} is taken: it is {holder} of network {name}");
    }
    Ok(())
}

/// Checks a subnet the user asked for against the subnets taken (by name of the network) and the
/// routes of this host.
pub fn check_subnet(
    subnet: Ipv4Net,
    taken: &BTreeMap<String, Ipv4Net>,
    routes: &[Ipv4Net],
) -> Result<()> {
    if let Some((name, other)) = taken.iter().find(|(_, other)| overlap(subnet, **other)) {
        bail!("subnet {subnet} overlaps {other} of network {name}: choose another one");
    }
    if let Some(route) = routes.iter().find(|route| overlap(subnet, **route)) {
        bail!(
            "subnet {subnet} overlaps the route to {route} of this host, whose traffic it would \
             take: choose another one"
        );
    }
    Ok(())
}

/// The lowest subnet of `pool` with a prefix of `size` bits that overlaps nothing in `taken`.
pub fn choose_subnet(pool: Ipv4Net, size: u8, taken: &[Ipv4Net]) -> Result<Ipv4Net> {
    ensure!(
        size >= pool.prefix_len() && (8..=30).contains(&size),
        "no subnet of /{size} can be taken from the pool {pool}: --default-pool-size must be \
         between /8 and /30 and not larger than --default-pool"
    );
    let (end, step) = (u64::from(u32::from(pool.broadcast())), 1_u64 << (32 - size));
    let mut start = u64::from(u32::from(pool.network()));
    while let Ok(address) = u32::try_from(start)
        && start <= end
    {
        let subnet = Ipv4Net::new_assert(Ipv4Addr::from(address), size);
        match taken.iter().filter(|other| overlap(subnet, **other)).map(Ipv4Net::broadcast).max() {
            None => return Ok(subnet),
            // On behind whatever is in the way, so that a large neighbour costs one step.
            Some(last) => start = (u64::from(u32::from(last)) / step + 1) * step,
        }
    }
    bail!(
        "the pool {pool} is exhausted: every /{size} of it overlaps a network or a route of this \
         host; give the network a --subnet, or the agent another --default-pool"
    )
}

/// The lowest free VNI from [`FIRST_VNI`] up.
pub fn choose_vni(taken: &BTreeSet<u32>) -> Result<u32> {
    let mut vni = FIRST_VNI;
    for other in taken.range(FIRST_VNI..) {
        if *other != vni {
            break;
        }
        vni += 1;
    }
    ensure!(vni <= LAST_VNI, "all VNIs from {FIRST_VNI} to {LAST_VNI} are taken: remove a network");
    Ok(vni)
}

/// The gateway where none was asked for: the first address of the subnet that is no aux address.
pub fn choose_gateway(subnet: Ipv4Net, aux: &BTreeMap<String, Ipv4Addr>) -> Result<Ipv4Addr> {
    let gateway = subnet.hosts().find(|address| !aux.values().any(|aux| aux == address));
    let Some(gateway) = gateway else {
        bail!("subnet {subnet} has no address left for a gateway: its aux addresses take them all");
    };
    Ok(gateway)
}

/// Whether two subnets share an address.
pub fn overlap(a: Ipv4Net, b: Ipv4Net) -> bool {
    a.contains(&b) || b.contains(&a)
}

fn reserved_for(network: &NetworkRecord, address: Ipv4Addr) -> Option<String> {
    if address == network.gateway {
        return Some("the gateway".into());
    }
    let aux = network.aux.iter().find(|(_, aux)| **aux == address);
    aux.map(|(name, _)| format!("the aux address {name}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::consul::schema::VERSION;
    use proptest::prelude::*;

    fn network(subnet: &str) -> NetworkRecord {
        let subnet: Ipv4Net = subnet.parse().unwrap();
        NetworkRecord {
            v: VERSION,
            id: "n".into(),
            name: "ov_net1".into(),
            vni: FIRST_VNI,
            subnet,
            gateway: subnet.hosts().next().unwrap(),
            ip_range: None,
            aux: BTreeMap::new(),
            mtu: None,
            internal: false,
            options: BTreeMap::new(),
            labels: BTreeMap::new(),
            created_by: "docker01".into(),
        }
    }

    fn net(text: &str) -> Ipv4Net {
        text.parse().unwrap()
    }

    fn line<T: std::fmt::Debug>(result: Result<T>) -> String {
        format!("{:#}", result.unwrap_err())
    }

    #[test]
    fn the_first_address_is_the_one_after_the_gateway() {
        let chosen = choose_address(&network("10.0.0.0/24"), &BTreeSet::new(), 1, |_| 0).unwrap();
        assert_eq!(chosen, Ipv4Addr::new(10, 0, 0, 2));
    }

    #[test]
    fn gateway_aux_and_range_are_respected() {
        let mut network = network("10.0.0.0/24");
        network.gateway = [10, 0, 0, 129].into();
        network.aux.insert("router".into(), [10, 0, 0, 130].into());
        network.ip_range = Some(net("10.0.0.128/30"));
        let free: Vec<_> = free_addresses(&network, &BTreeSet::new()).collect();
        assert_eq!(free, [Ipv4Addr::new(10, 0, 0, 128), Ipv4Addr::new(10, 0, 0, 131)]);
    }

    #[test]
    fn a_full_subnet_says_so() {
        let network = network("10.0.0.0/30");
        let taken = BTreeSet::from([Ipv4Addr::new(10, 0, 0, 2)]);
        let why = line(choose_address(&network, &taken, 8, |_| 0));
        assert!(why.contains("network ov_net1 is full"), "{why}");
    }

    #[test]
    fn an_address_asked_for_is_checked() {
        let mut network = network("10.0.0.0/24");
        network.aux.insert("router".into(), [10, 0, 0, 9].into());
        network.ip_range = Some(net("10.0.0.128/25"));
        check_address(&network, [10, 0, 0, 5].into()).unwrap();
        for (address, why) in [
            ([10, 0, 1, 5], "not inside"),
            ([10, 0, 0, 0], "the first of"),
            ([10, 0, 0, 255], "broadcast"),
            ([10, 0, 0, 1], "the gateway"),
            ([10, 0, 0, 9], "the aux address router"),
        ] {
            let line = line(check_address(&network, address.into()));
            assert!(line.contains(why), "{line}");
        }
    }

    #[test]
    fn a_subnet_asked_for_must_not_overlap() {
        let taken = BTreeMap::from([("ov_net1".to_owned(), net("10.0.0.0/24"))]);
        let routes = [net("192.168.1.0/24")];
        check_subnet(net("10.0.1.0/24"), &taken, &routes).unwrap();
        assert!(line(check_subnet(net("10.0.0.0/16"), &taken, &routes)).contains("ov_net1"));
        assert!(line(check_subnet(net("10.0.0.128/25"), &taken, &routes)).contains("ov_net1"));
        assert!(
            line(check_subnet(net("192.168.0.0/16"), &taken, &routes)).contains("192.168.1.0/24")
        );
    }

    #[test]
    fn the_next_subnet_skips_what_is_in_the_way() {
        let pool = net("10.0.0.0/8");
        assert_eq!(choose_subnet(pool, 24, &[]).unwrap(), net("10.0.0.0/24"));
        let taken = [net("10.0.0.0/16"), net("10.1.0.0/25"), net("192.168.0.0/16")];
        assert_eq!(choose_subnet(pool, 24, &taken).unwrap(), net("10.1.1.0/24"));
        assert!(line(choose_subnet(pool, 24, &[net("0.0.0.0/1")])).contains("exhausted"));
        // The last subnet there is must not make the search run over the end of the address space.
        let last = net("255.255.255.0/24");
        assert_eq!(choose_subnet(last, 24, &[]).unwrap(), last);
        assert!(line(choose_subnet(last, 24, &[last])).contains("exhausted"));
        choose_subnet(pool, 7, &[]).unwrap_err();
        choose_subnet(pool, 31, &[]).unwrap_err();
    }

    #[test]
    fn a_full_vni_space_says_so() {
        assert_eq!(choose_vni(&BTreeSet::from([1, 4096, 4097, 4099])).unwrap(), 4098);
        let all: BTreeSet<u32> = (FIRST_VNI..=LAST_VNI).collect();
        assert!(line(choose_vni(&all)).contains("all VNIs"));
    }

    #[test]
    fn the_gateway_avoids_aux_addresses() {
        let aux = BTreeMap::from([("router".to_owned(), Ipv4Addr::new(10, 0, 0, 1))]);
        assert_eq!(choose_gateway(net("10.0.0.0/24"), &aux).unwrap(), Ipv4Addr::new(10, 0, 0, 2));
    }

    fn any_net(sizes: std::ops::RangeInclusive<u8>) -> impl Strategy<Value = Ipv4Net> {
        // Within 10.0.0.0/8 so that overlaps do happen.
        (any::<u32>(), sizes).prop_map(|(bits, size)| {
            Ipv4Net::new_assert(Ipv4Addr::from(10 << 24 | bits >> 8), size).trunc()
        })
    }

    proptest! {
        #[test]
        fn a_chosen_address_is_always_free_and_allowed(
            subnet in any_net(22..=30),
            taken in prop::collection::btree_set(any::<u16>(), 0..400),
            window in 1_usize..300,
            pick: usize,
        ) {
            let network = network(&subnet.to_string());
            let taken: BTreeSet<_> = taken
                .into_iter()
                .map(|low| Ipv4Addr::from(u32::from(subnet.network()) | u32::from(low & 1023)))
                .collect();
            match choose_address(&network, &taken, window, |_| pick) {
                Ok(chosen) => {
                    prop_assert!(!taken.contains(&chosen));
                    check_address(&network, chosen).unwrap();
                }
                Err(_) => prop_assert_eq!(
                    subnet.hosts().find(|a| !taken.contains(a) && *a != network.gateway), None
                ),
            }
        }

        #[test]
        fn a_chosen_subnet_overlaps_nothing_and_is_the_lowest(
            taken in prop::collection::vec(any_net(9..=30), 0..40),
            size in 12_u8..=20,
        ) {
            let pool: Ipv4Net = "10.0.0.0/8".parse().unwrap();
            let first_free = pool
                .subnets(size)
                .unwrap()
                .find(|subnet| !taken.iter().any(|other| overlap(*subnet, *other)));
            prop_assert_eq!(choose_subnet(pool, size, &taken).ok(), first_free);
        }
    }
}
