//! Whether what was asked for, Consul, the agents and the kernels agree.

use std::{
    cell::RefCell,
    collections::{BTreeMap, BTreeSet},
    net::Ipv4Addr,
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use ovnet_tests::cluster::Cluster;
use serde_json::Value;
use xtask::lab::wait_until;

use super::{
    on_each_host,
    plan::HOSTS,
    world::{Endpoint, World, endpoint_of},
};

/// How long it may take after the last trouble. A blocking query that Consul forgot is the longest.
const LIMIT: Duration = Duration::from_secs(60);

/// Waits until all agree; panics with the last disagreement.
pub(crate) fn wait(cluster: &Cluster, world: &World) {
    let last = RefCell::new(String::new());
    let what = || format!("all to agree; the last disagreement: {}", last.borrow());
    let agreed = wait_until(LIMIT, what, || {
        let found: Result<()> = records_agree(cluster, world).and_then(|()| {
            on_each_host(|host| host_agrees(cluster, world, HOSTS[host])).into_iter().collect()
        });
        Ok(found.map_err(|error| *last.borrow_mut() = format!("{error:#}")).ok())
    });
    if let Err(error) = agreed {
        panic!("{error:#}");
    }
    reach(cluster, world);
}

/// Consul has exactly what was asked for.
fn records_agree(cluster: &Cluster, world: &World) -> Result<()> {
    let records = cluster.records();
    let of = |folder: &str| -> BTreeMap<&str, Value> {
        let below = records.iter().filter_map(|(key, value)| {
            let value = serde_json::from_str(value).unwrap_or_else(|_| value.as_str().into());
            Some((key.strip_prefix(folder)?, value))
        });
        below.collect()
    };
    let networks = of("networks/");
    let names: BTreeSet<String> = networks.keys().map(|it| (*it).to_owned()).collect();
    same("networks in Consul", &world.networks().cloned().collect(), &names)?;
    let ids: BTreeSet<String> = networks.values().map(|it| it["id"].to_string()).collect();
    for claims in ["vnis/", "subnets/"] {
        let claimed = of(claims).into_values().map(|id| id.to_string()).collect();
        same(&format!("{claims} of networks"), &ids, &claimed)?;
    }
    let endpoints: Vec<(String, Value)> = of("endpoints/")
        .into_iter()
        .map(|(key, value)| (key.split('/').next().unwrap_or_default().to_owned(), value))
        .collect();
    let name_of = |id: &str| networks.iter().find(|(_, it)| it["id"] == id).map(|(name, _)| *name);
    let found = endpoints
        .iter()
        .map(|(network, it)| (name_of(network).unwrap_or(network).to_owned(), endpoint_of(it)))
        .collect();
    let wanted = world
        .endpoints()
        .map(|it| (it.network.clone(), (it.address, it.host.to_owned(), it.sandbox.clone())))
        .collect();
    same("endpoints in Consul", &wanted, &found)?;
    ensure!(endpoints.iter().all(|(_, it)| it["state"] == "up"), "not up: {endpoints:?}");
    ensure!(found.len() == endpoints.len(), "two records for one endpoint: {endpoints:?}");
    let pending = of("pending/");
    ensure!(pending.is_empty(), "claims are left: {pending:?}");
    let hosts = of("hosts/").keys().map(|it| (*it).to_owned()).collect();
    same("hosts in Consul", &HOSTS.map(str::to_owned).into(), &hosts)?;
    for host in HOSTS {
        ensure!(cluster.is_locked(&format!("hosts/{host}")), "{host} has no lease");
    }
    Ok(())
}

/// The agent of a host and its kernel have what was asked for.
fn host_agrees(cluster: &Cluster, world: &World, host: &'static str) -> Result<()> {
    let here: Vec<&Endpoint> = world.endpoints().filter(|it| it.host == host).collect();
    let status = cluster.lab.ovnet_json(host, &["status"])?;
    ensure!(status["consul_state"] == "connected", "{host}: {status}");
    ensure!(status["errors"].as_array().is_some_and(Vec::is_empty), "{host}: {status}");
    ensure!(status["unreadable_records"] == 0, "{host}: {status}");

    let local = cluster.lab.ovnet_json(host, &["endpoint", "ls", "--local"])?;
    let local = local.as_array().context("a list of endpoints")?;
    let found = local.iter().map(|it| (it["network"].to_string(), endpoint_of(it))).collect();
    let wanted = here
        .iter()
        .map(|it| (format!("\"{}\"", it.network), (it.address, host.into(), it.sandbox.clone())))
        .collect();
    same(&format!("{host}'s own endpoints"), &wanted, &found)?;

    let joined: BTreeSet<&String> = here.iter().map(|it| &it.network).collect();
    let vtep_of = |it: &Endpoint| match it.host == host {
        true => Ipv4Addr::UNSPECIFIED,
        false => cluster.lab.address(it.host).unwrap_or(Ipv4Addr::BROADCAST),
    };
    let wanted = world.endpoints().filter(|it| joined.contains(&it.network));
    let wanted = wanted.map(|it| (it.address, vtep_of(it))).collect();
    let entries = cluster.endpoints_of(host).into_iter().collect();
    same(&format!("{host}'s map of endpoints"), &wanted, &entries)?;
    let others = HOSTS.into_iter().filter(|it| *it != host);
    let vteps = others.map(|it| cluster.lab.address(it)).collect::<Result<_>>()?;
    same(&format!("{host}'s map of hosts"), &vteps, &cluster.vteps_of(host))?;
    let (networks, found) = (joined.len(), cluster.vnis_of(host).len());
    ensure!(networks == found, "{host} is in {networks} networks, and {found} are in its map");
    let ports = here.iter().filter_map(|it| it.port).collect();
    same(&format!("{host}'s published ports"), &ports, &cluster.published_by(host))?;

    // The uplink and ovnet-vx, and two veth pairs for each endpoint: its own and its way out.
    let ends = 2 * here.len();
    let footprint = cluster.footprint(host);
    let links = footprint.pins.iter().filter(|it| it.contains("/links/")).count() - 1;
    ensure!(links == ends + 2, "{host} has {links} attachments for {ends} ends: {footprint:?}");
    let interfaces = footprint.links.len();
    ensure!(interfaces == ends + 2, "{host} has {interfaces} interfaces: {:?}", footprint.links);
    let in_map = footprint.entries.iter().filter(|it| it.starts_with("port ")).count();
    ensure!(in_map == ends, "{host} has {in_map} of {ends} ends in its map: {footprint:?}");
    Ok(())
}

/// Every endpoint answers another one of its network, by the way between their hosts.
fn reach(cluster: &Cluster, world: &World) {
    for network in world.networks() {
        let members: Vec<_> = world.endpoints().filter(|it| it.network == *network).collect();
        for pair in members.windows(2) {
            cluster.wait_ping(&format!("{}/{}", pair[0].host, pair[0].sandbox), pair[1].address);
        }
    }
}

/// Fails with what is missing and what is too much.
fn same<T: Ord + std::fmt::Debug>(
    what: &str,
    wanted: &BTreeSet<T>,
    found: &BTreeSet<T>,
) -> Result<()> {
    let missing: Vec<_> = wanted.difference(found).collect();
    let extra: Vec<_> = found.difference(wanted).collect();
    ensure!(missing.is_empty() && extra.is_empty(), "{what}: missing {missing:?}, extra {extra:?}");
    Ok(())
}
