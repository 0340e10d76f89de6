//! A host's own record: announced, kept, taken over, lost and withdrawn.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use ovnet_agent::consul::{
    HostEntry, Lease, Watcher,
    schema::{HostRecord, VERSION},
};
use serde_json::json;

use crate::{Server, contract, eventually, line};

contract!(
    a_host_is_announced_updated_and_withdrawn,
    a_second_agent_of_the_same_name_is_refused,
    a_new_agent_takes_over_from_a_killed_one_at_once,
    a_lost_session_or_record_is_made_again,
    an_agent_that_dies_loses_its_lease_but_not_its_record,
    a_lease_outlives_a_wiped_consul,
);

const SOON: Duration = Duration::from_secs(10);

fn record(vtep: [u8; 4]) -> HostRecord {
    HostRecord {
        v: VERSION,
        node: "docker01".into(),
        vtep: vtep.into(),
        port: 4789,
        mtu: 1500,
        agent: "0.1.0".into(),
    }
}

impl Server {
    async fn host(&self) -> Option<HostEntry> {
        self.client("observer").hosts().await.unwrap().remove("docker01")
    }

    async fn host_is(&self, what: &str, limit: Duration, wanted: Option<(&HostRecord, bool)>) {
        eventually(what, limit, || async {
            let host = self.host().await;
            let host = host.as_ref().map(|host| (&host.record, host.locked));
            (host == wanted).then_some(())
        })
        .await;
    }
}

async fn a_host_is_announced_updated_and_withdrawn(server: Server) {
    let first = record([192, 168, 1, 11]);
    let lease = Lease::spawn(server.client("docker01"), first.clone());
    server.host_is("announced", SOON, Some((&first, true))).await;
    eventually("no problem", SOON, || async { lease.problem().is_none().then_some(()) }).await;
    let moved = HostRecord { mtu: 9000, ..record([192, 168, 1, 99]) };
    lease.update(moved.clone());
    // At once, not with the next renewal.
    server.host_is("updated", Duration::from_secs(2), Some((&moved, true))).await;
    lease.withdraw().await.unwrap();
    assert_eq!(server.host().await, None);
    let (_, sessions) = server.request("GET", "session/list", "").await;
    assert_eq!(sessions, json!([]), "the session is gone, too");
}

async fn a_second_agent_of_the_same_name_is_refused(server: Server) {
    let first = record([192, 168, 1, 11]);
    let lease = Lease::spawn(server.client("docker01"), first.clone());
    server.host_is("announced", SOON, Some((&first, true))).await;
    let second = record([192, 168, 1, 12]);
    let intruder = Lease::spawn(server.client("docker01"), second.clone());
    let why = eventually("the refusal", SOON, || async {
        intruder.problem().filter(|problem| problem.contains("another --node"))
    })
    .await;
    assert!(why.contains("192.168.1.11") && why.contains("docker01"), "{why}");
    assert_eq!(server.host().await.unwrap().record, first);
    // It keeps trying, and gets the name when the first one gives it up.
    lease.withdraw().await.unwrap();
    server.host_is("the second is announced", SOON, Some((&second, true))).await;
}

async fn a_new_agent_takes_over_from_a_killed_one_at_once(server: Server) {
    let record = record([192, 168, 1, 11]);
    let killed = Lease::spawn(server.client("docker01"), record.clone());
    server.host_is("announced", SOON, Some((&record, true))).await;
    drop(killed);
    let updated = HostRecord { agent: "0.2.0".into(), ..record };
    let _lease = Lease::spawn(server.client("docker01"), updated.clone());
    server.host_is("taken over", Duration::from_secs(3), Some((&updated, true))).await;
}

async fn a_lost_session_or_record_is_made_again(server: Server) {
    let record = record([192, 168, 1, 11]);
    let _lease = Lease::spawn(server.client("docker01"), record.clone());
    server.host_is("announced", SOON, Some((&record, true))).await;
    let (_, sessions) = server.request("GET", "session/list", "").await;
    let session = sessions[0]["ID"].as_str().unwrap();
    server.request("PUT", &format!("session/destroy/{session}"), "").await;
    server.host_is("a new session", SOON, Some((&record, true))).await;
    server.delete("hosts/docker01").await;
    server.host_is("a new record", SOON, Some((&record, true))).await;
}

async fn an_agent_that_dies_loses_its_lease_but_not_its_record(server: Server) {
    let record = record([192, 168, 1, 11]);
    let lease = Lease::spawn(server.client("docker01"), record.clone());
    server.host_is("announced", SOON, Some((&record, true))).await;
    let (_watcher, mut snapshots) = Watcher::spawn(server.client("docker02"));
    let locked = |snapshot: &Arc<ovnet_agent::consul::Snapshot>, wanted: bool| {
        let hosts = snapshot.hosts.as_ref();
        hosts.and_then(|hosts| hosts.get("docker01")).is_some_and(|host| host.locked == wanted)
    };
    let seen = snapshots.wait_for(|snapshot| locked(snapshot, true));
    tokio::time::timeout(SOON, seen).await.expect("the lease is seen").unwrap();
    drop(lease);
    // The TTL is 15 s, and Consul may take twice as long.
    let lost = snapshots.wait_for(|snapshot| locked(snapshot, false));
    let limit = Duration::from_secs(45);
    tokio::time::timeout(limit, lost).await.expect("the lease is lost").unwrap();
    assert_eq!(server.host().await, Some(HostEntry { record, locked: false }));
}

async fn a_lease_outlives_a_wiped_consul(mut server: Server) {
    let record = record([192, 168, 1, 11]);
    let lease = Lease::spawn(server.client("docker01"), record.clone());
    server.host_is("announced", SOON, Some((&record, true))).await;
    server.kill();
    eventually("the problem is told", SOON, || async {
        lease.problem().filter(|problem| problem.contains("cannot reach Consul"))
    })
    .await;
    tokio::task::block_in_place(|| server.start_wiped());
    server.host_is("announced again", Duration::from_secs(20), Some((&record, true))).await;
    // A stop does not hang on a Consul that is gone.
    server.kill();
    let started = Instant::now();
    let why = line(lease.withdraw().await);
    assert!(why.contains("withdraw"), "{why}");
    assert!(started.elapsed() < Duration::from_secs(7), "{:?}", started.elapsed());
}
