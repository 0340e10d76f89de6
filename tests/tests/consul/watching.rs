//! Snapshots: what the agent learns, how fast, and that it never forgets for the wrong reason.

use std::{
    collections::BTreeSet,
    net::TcpListener,
    sync::Arc,
    time::{Duration, Instant},
};

use ovnet_agent::consul::{Consul, Snapshot, Watcher};
use ovnet_tests::consul::RealConsul;
use tokio::sync::watch::Receiver;

use crate::{Server, claim, contract, line, pool, wanted};

contract!(
    a_new_network_and_its_endpoints_are_seen_within_a_second,
    endpoints_are_watched_only_where_wanted,
    records_that_cannot_be_read_are_skipped_and_counted,
    a_record_that_becomes_unreadable_keeps_its_last_reading,
    a_consul_that_dies_and_comes_back_empty_empties_nothing,
    a_removed_network_leaves_no_sentinel_behind,
    what_a_wiped_consul_lacks_is_not_taken_again,
);

const HOST: &str = r#"{"v":1,"node":"hand","vtep":"192.168.1.50"}"#;

/// Waits for a snapshot of which `condition` is true.
async fn seen(
    snapshots: &mut Receiver<Arc<Snapshot>>,
    what: &str,
    limit: Duration,
    condition: impl Fn(&Snapshot) -> bool,
) -> Arc<Snapshot> {
    let met = tokio::time::timeout(limit, snapshots.wait_for(|snapshot| condition(snapshot)));
    if let Ok(snapshot) = met.await.map(|snapshot| snapshot.unwrap().clone()) {
        return snapshot;
    }
    panic!("not within {limit:?}: {what}; last seen {:#?}", snapshots.borrow());
}

const SOON: Duration = Duration::from_secs(10);

fn networks(snapshot: &Snapshot) -> usize {
    snapshot.networks.as_ref().map_or(0, |networks| networks.len())
}

async fn a_new_network_and_its_endpoints_are_seen_within_a_second(server: Server) {
    let (one, two) = (server.client("docker01"), server.client("docker02"));
    let (watcher, mut snapshots) = Watcher::spawn(two);
    assert!(snapshots.borrow().hosts.is_none() && snapshots.borrow().networks.is_none());
    seen(&mut snapshots, "connected", SOON, |snapshot| {
        snapshot.consul_state == "connected" && snapshot.networks.is_some()
    })
    .await;
    let network = one.create_network(&wanted("ov_net1"), &pool(), &[]).await.unwrap();
    let second = Duration::from_secs(1);
    let snapshot = seen(&mut snapshots, "the network", second, |s| networks(s) == 1).await;
    assert_eq!(snapshot.networks.as_ref().unwrap()["ov_net1"], network);

    watcher.want_endpoints(BTreeSet::from([network.id.clone()]));
    seen(&mut snapshots, "no endpoints", SOON, |s| s.endpoints.contains_key(&network.id)).await;
    let endpoint = one.claim_address(&network, &claim("e1")).await.unwrap();
    let snapshot =
        seen(&mut snapshots, "the endpoint", second, |s| s.endpoints[&network.id].len() == 1).await;
    assert_eq!(snapshot.endpoints[&network.id][&endpoint.address], endpoint);
    one.release_endpoint(&network.id, &endpoint).await.unwrap();
    seen(&mut snapshots, "its release", second, |s| s.endpoints[&network.id].is_empty()).await;
}

async fn endpoints_are_watched_only_where_wanted(server: Server) {
    let consul = server.client("docker01");
    let (watcher, mut snapshots) = Watcher::spawn(consul.clone());
    let a = consul.create_network(&wanted("a"), &pool(), &[]).await.unwrap();
    let b = consul.create_network(&wanted("b"), &pool(), &[]).await.unwrap();
    for ids in [vec![&a.id], vec![&a.id, &b.id], vec![&b.id], vec![], vec![&a.id]] {
        let ids: BTreeSet<String> = ids.into_iter().cloned().collect();
        watcher.want_endpoints(ids.clone());
        seen(&mut snapshots, "what is wanted", SOON, |snapshot| {
            snapshot.endpoints.keys().eq(ids.iter())
        })
        .await;
    }
}

async fn records_that_cannot_be_read_are_skipped_and_counted(server: Server) {
    let consul = server.client("docker01");
    let network = consul.create_network(&wanted("ov_net1"), &pool(), &[]).await.unwrap();
    consul.claim_address(&network, &claim("e1")).await.unwrap();
    let endpoint = |address: &str| format!("endpoints/{}/{address}", network.id);
    for (key, value) in [
        ("hosts/hand", HOST),
        ("hosts/half", r#"{"v":1,"node":"half","#),
        ("hosts/empty", ""),
        ("hosts/newer", r#"{"v":2,"node":"newer","vtep":"192.168.1.51"}"#),
        ("hosts/liar", HOST),
        ("networks/garbage", "\u{0}\u{1}"),
        (&endpoint("10.0.0.9"), "[]"),
        (
            &endpoint("not-an-address"),
            r#"{"v":1,"id":"x","address":"10.0.0.8","mac":"02:42:0a:00:00:08","host":"hand"}"#,
        ),
    ] {
        server.put(key, value).await;
    }
    let (watcher, mut snapshots) = Watcher::spawn(consul);
    watcher.want_endpoints(BTreeSet::from([network.id.clone()]));
    let snapshot = seen(&mut snapshots, "7 skipped", SOON, |s| s.unreadable == 7).await;
    let hosts = snapshot.hosts.as_ref().unwrap();
    assert!(hosts.keys().eq(["hand"]) && !hosts["hand"].locked);
    assert_eq!(networks(&snapshot), 1);
    assert_eq!(snapshot.endpoints[&network.id].len(), 1);
    server.delete("hosts/half").await;
    seen(&mut snapshots, "6 skipped", SOON, |s| s.unreadable == 6).await;
}

async fn a_record_that_becomes_unreadable_keeps_its_last_reading(server: Server) {
    server.put("hosts/hand", HOST).await;
    let (_watcher, mut snapshots) = Watcher::spawn(server.client("docker01"));
    let has = |snapshot: &Snapshot| snapshot.hosts.as_ref().is_some_and(|h| h.contains_key("hand"));
    seen(&mut snapshots, "the host", SOON, has).await;
    // Whoever looks after the sentinel was made sees a deletion for what it is.
    seen(&mut snapshots, "the sentinel", SOON, |s| s.consul_state == "connected").await;
    server.put("hosts/hand", r#"{"v":2}"#).await;
    let snapshot = seen(&mut snapshots, "it is unreadable", SOON, |s| s.unreadable == 1).await;
    assert!(has(&snapshot), "an unreadable record is no deletion");
    server.delete("hosts/hand").await;
    seen(&mut snapshots, "it is deleted", SOON, |s| s.unreadable == 0 && !has(s)).await;
}

async fn a_consul_that_dies_and_comes_back_empty_empties_nothing(mut server: Server) {
    let consul = server.client("docker01");
    let network = consul.create_network(&wanted("ov_net1"), &pool(), &[]).await.unwrap();
    let endpoint = consul.claim_address(&network, &claim("e1")).await.unwrap();
    let (watcher, mut snapshots) = Watcher::spawn(consul.clone());
    watcher.want_endpoints(BTreeSet::from([network.id.clone()]));
    seen(&mut snapshots, "connected", SOON, |s| s.consul_state == "connected").await;
    server.put("hosts/hand", HOST).await;
    let whole = |snapshot: &Snapshot| {
        snapshot.hosts.as_ref().is_some_and(|hosts| hosts.contains_key("hand"))
            && networks(snapshot) == 1
            && snapshot.endpoints.get(&network.id).is_some_and(|there| there.len() == 1)
    };
    seen(&mut snapshots, "everything", SOON, whole).await;

    server.kill();
    let snapshot =
        seen(&mut snapshots, "the outage", SOON, |s| s.consul_state != "connected").await;
    assert!(whole(&snapshot) && snapshot.consul_state.contains("cannot reach Consul at"));

    tokio::task::block_in_place(|| server.start_wiped());
    // Backing off takes a few seconds at most.
    let limit = Duration::from_secs(30);
    server.put("hosts/new", &HOST.replace("hand", "new")).await;
    let snapshot = seen(&mut snapshots, "a new host", limit, |snapshot| {
        snapshot.hosts.as_ref().is_some_and(|hosts| hosts.contains_key("new"))
    })
    .await;
    assert!(whole(&snapshot), "{snapshot:#?}");
    // What is lost is told, so that its owners know to put it back.
    let lost = |snapshot: &Snapshot| {
        snapshot.has_lost_network("ov_net1")
            && snapshot.has_lost_endpoint(&network.id, endpoint.address)
            && snapshot.lost.contains("hosts/hand")
    };
    assert!(!snapshot.lost.contains("hosts/new"));
    let snapshot = seen(&mut snapshots, "the loss", limit, |snapshot| {
        lost(snapshot) && snapshot.consul_state == "connected"
    })
    .await;
    assert!(whole(&snapshot), "{snapshot:#?}");
    // What its owners put back is ordinary again: its deletion is one.
    consul.restore_network(&network).await.unwrap();
    consul.publish_endpoint(&network, &endpoint).await.unwrap();
    seen(&mut snapshots, "the endpoint is up", limit, |snapshot| {
        whole(snapshot)
            && !snapshot.has_lost_network("ov_net1")
            && snapshot.endpoints[&network.id][&endpoint.address].state != endpoint.state
    })
    .await;
    seen(&mut snapshots, "connected", limit, |s| s.consul_state == "connected").await;
    consul.release_endpoint(&network.id, &endpoint).await.unwrap();
    let snapshot = seen(&mut snapshots, "the endpoint is released", limit, |snapshot| {
        snapshot.endpoints[&network.id].is_empty()
    })
    .await;
    assert!(snapshot.hosts.as_ref().unwrap().contains_key("hand"), "kept until seen again");
    assert!(snapshot.lost.iter().eq(["hosts/hand"]), "{:?}", snapshot.lost);
}

async fn a_removed_network_leaves_no_sentinel_behind(server: Server) {
    let consul = server.client("docker01");
    let network = consul.create_network(&wanted("ov_net1"), &pool(), &[]).await.unwrap();
    let (watcher, mut snapshots) = Watcher::spawn(server.client("docker02"));
    watcher.want_endpoints(BTreeSet::from([network.id.clone()]));
    seen(&mut snapshots, "connected", SOON, |snapshot| {
        snapshot.consul_state == "connected" && snapshot.endpoints.contains_key(&network.id)
    })
    .await;
    consul.remove_network("ov_net1").await.unwrap();
    seen(&mut snapshots, "the removal", SOON, |snapshot| networks(snapshot) == 0).await;
    // The watch has tried its hand at the missing sentinel a few times by now.
    let until = Instant::now() + Duration::from_secs(2);
    while Instant::now() < until {
        assert!(!server.keys().await.iter().any(|key| key.contains(&network.id)));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restart_of_a_real_consul_is_only_a_pause() {
    let Some(mut server) = RealConsul::start_durable() else { return };
    let consul = Consul::new(&server.address().to_string(), "ovnet/v1", "docker01").unwrap();
    consul.create_network(&wanted("a"), &pool(), &[]).await.unwrap();
    let (_watcher, mut snapshots) = Watcher::spawn(consul.clone());
    let limit = Duration::from_secs(30);
    seen(&mut snapshots, "a", limit, |s| networks(s) == 1 && s.consul_state == "connected").await;
    server.kill();
    let snapshot =
        seen(&mut snapshots, "the outage", limit, |s| s.consul_state != "connected").await;
    assert_eq!(networks(&snapshot), 1);
    tokio::task::block_in_place(|| server.start_again());
    let snapshot =
        seen(&mut snapshots, "the return", limit, |s| s.consul_state == "connected").await;
    assert_eq!(networks(&snapshot), 1);
    consul.create_network(&wanted("b"), &pool(), &[]).await.unwrap();
    seen(&mut snapshots, "b", limit, |s| networks(s) == 2).await;
    consul.remove_network("a").await.unwrap();
    seen(&mut snapshots, "the removal of a", limit, |s| networks(s) == 1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_consul_that_is_not_there_or_never_answers_is_an_error_in_bounded_time() {
    // A port that was free a moment ago refuses.
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    // The listener takes connections and never answers.
    let silent = Consul::new(&address, "ovnet/v1", "docker01").unwrap();
    let started = Instant::now();
    assert!(line(silent.ping().await).contains("no answer within 10 s"));
    assert!(started.elapsed() < Duration::from_secs(15));
    drop(listener);
    let absent = Consul::new(&address, "ovnet/v1", "docker01").unwrap();
    let refused = line(absent.networks().await);
    assert!(
        refused.contains(&format!("cannot reach Consul at {address}: Connection refused")),
        "{refused}"
    );
}

/// Before those it belongs to have put it back, a VNI, a subnet or an address is chosen by what this
/// host remembers, too.
async fn what_a_wiped_consul_lacks_is_not_taken_again(mut server: Server) {
    let consul = server.client("docker01");
    let (watcher, mut snapshots) = Watcher::spawn(consul.clone());
    let network = consul.create_network(&wanted("a"), &pool(), &[]).await.unwrap();
    let endpoint = consul.claim_address(&network, &claim("e1")).await.unwrap();
    watcher.want_endpoints(BTreeSet::from([network.id.clone()]));
    // Only what was read can be remembered, and the endpoint may be read first.
    seen(&mut snapshots, "the network and its endpoint", SOON, |snapshot| {
        networks(snapshot) == 1
            && snapshot.endpoints.get(&network.id).is_some_and(|it| it.len() == 1)
    })
    .await;
    server.kill();
    server.start_wiped();
    // Each of them may meet the watcher before or after it has read the wiped folders.
    let other = consul.create_network(&wanted("b"), &pool(), &[]).await.unwrap();
    assert_ne!(other.vni, network.vni);
    assert_ne!(other.subnet, network.subnet);
    consul.restore_network(&network).await.unwrap();
    let next = consul.claim_address(&network, &claim("e2")).await.unwrap();
    assert_ne!(next.address, endpoint.address);
    consul.publish_endpoint(&network, &endpoint).await.unwrap();
    let refused = consul
        .claim_address(
            &network,
            &ovnet_agent::consul::Claim { address: Some(endpoint.address), ..claim("e3") },
        )
        .await;
    assert!(line(refused).contains("is taken by endpoint name-e1 on host docker01"));
}
