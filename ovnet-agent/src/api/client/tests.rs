//! Client and server together, over a real socket, on fakes.

use std::{sync::Arc, time::Duration};

use ovnet_common::{
    abi::{DropEvent, EVENT_DATA, Program},
    verdict::DropReason,
};
use tempfile::TempDir;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    sync::Notify,
    task::JoinHandle,
};

use super::*;
use crate::{
    api::{server::serve, socket::Socket},
    service::fake::{self, Fake, attach, eventually},
};

struct Agent {
    client: Client,
    fake: Fake,
    stop: Arc<Notify>,
    serving: JoinHandle<()>,
    _folder: TempDir,
}

fn agent(networks: &[&str]) -> Agent {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("ovnet.sock");
    let (service, fake) = fake::service(networks);
    let stop = Arc::new(Notify::new());
    let stopped = Arc::clone(&stop);
    let socket = Socket::bind(&path, None).unwrap();
    let serving = tokio::spawn(serve(socket, service, async move { stopped.notified().await }));
    Agent { client: Client::new(path), fake, stop, serving, _folder: folder }
}

fn event() -> DropEvent {
    DropEvent {
        timestamp_ns: 1,
        ifindex: 1,
        length: 60,
        program: Program::FromContainer as u8,
        reason: DropReason::NoEndpoint as u8,
        captured: 0,
        reserved: 0,
        data: [0; EVENT_DATA],
    }
}

#[tokio::test]
async fn every_request_has_its_answer() {
    let Agent { client, fake, .. } = &agent(&[]);
    let wanted = CreateNetwork { name: "ov_net1".into(), ..Default::default() };
    let network = client.create_network(&wanted).await.unwrap();
    assert_eq!(client.networks().await.unwrap(), std::slice::from_ref(&network));
    let endpoint = client.attach(&attach("ov_net1", "t1")).await.unwrap();
    assert_eq!(client.network("ov_net1").await.unwrap().endpoints, fake.records());
    for local in [false, true] {
        let listed = client.endpoints(Some("ov_net1"), local).await.unwrap();
        assert_eq!(listed, std::slice::from_ref(&endpoint));
    }
    assert_eq!(client.hosts().await.unwrap().len(), 2);
    assert_eq!(client.status().await.unwrap().local_endpoints, 1);
    assert_eq!(client.counters().await.unwrap().len(), 1);
    let wanted = Detach { endpoint: Some("t1".into()), ..Default::default() };
    assert_eq!(client.detach(&wanted).await.unwrap().endpoints, [endpoint]);
    assert_eq!(client.remove_network(&network.id[..12]).await.unwrap(), network);
}

#[tokio::test]
async fn errors_are_the_agents_own_line() {
    let Agent { client, fake, .. } = &agent(&["ov_net1"]);
    let error = client.network("a b/c?").await.unwrap_err();
    assert_eq!(format!("{error:#}"), "there is no network a b/c?");
    fake.fail("hosts");
    assert_eq!(format!("{:#}", client.hosts().await.unwrap_err()), "hosts was told to fail");
}

/// Speaks HTTP by hand, to send what the client never would.
async fn raw(client: &Client, request: &str) -> String {
    let mut stream = UnixStream::connect(client.socket()).await.unwrap();
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    let read = stream.read_to_string(&mut answer);
    tokio::time::timeout(Duration::from_secs(10), read).await.unwrap().unwrap();
    answer
}

#[tokio::test]
async fn wrong_requests_are_told_with_their_status() {
    let Agent { client, .. } = &agent(&["ov_net1"]);
    let post = |path: &str, body: &str| {
        let length = body.len();
        format!(
            "POST {path} HTTP/1.1\r\nhost: a\r\nconnection: close\r\ncontent-length: {length}\r\n\
             \r\n{body}"
        )
    };
    let large = format!("{{\"name\":\"{}\"}}", "a".repeat(70_000));
    for (request, status, part) in [
        (post("/v1/networks", "{"), 400, "the request cannot be read"),
        (post("/v1/networks", "{\"name\":\"a/b\"}"), 400, "network name"),
        (post("/v1/endpoints/detach", "{\"endpoint\":\"t9\"}"), 404, "no endpoint of this host"),
        (post("/v1/endpoints/detach", "{}"), 400, "nothing to detach is named"),
        (post("/v1/networks", &large), 413, "the request is larger than 65536 bytes"),
        (post("/v1/nowhere", "{}"), 404, "no such path"),
        (post("/v1/hosts", "{}"), 405, "no such method"),
    ] {
        let answer = raw(client, &request).await;
        assert!(answer.starts_with(&format!("HTTP/1.1 {status} ")), "{answer}");
        let body = answer.split("\r\n\r\n").nth(1).unwrap();
        let ErrorBody { error } = serde_json::from_str(body).unwrap();
        assert!(error.contains(part), "{error}");
    }
}

#[tokio::test]
async fn an_agent_that_is_not_there_is_told() {
    let client = Client::new("/nonexistent/ovnet.sock");
    let error = format!("{:#}", client.status().await.unwrap_err());
    assert!(
        error.starts_with(
            "cannot reach the agent at /nonexistent/ovnet.sock: is ovnet-agent running?"
        ),
        "{error}"
    );
}

#[tokio::test]
async fn a_monitor_is_sent_drops_and_told_what_it_missed() {
    let Agent { client, fake, .. } = &agent(&[]);
    let mut monitor = client.monitor().await.unwrap();
    fake.emit(event());
    let Some(MonitorLine::Drop(drop)) = monitor.next().await.unwrap() else { panic!("a drop") };
    assert_eq!((drop.reason.as_str(), drop.length), ("no-endpoint", 60));
    // The fake's channel holds 4 and nothing reads between these.
    for _ in 0..10 {
        fake.emit(event());
    }
    let missed = monitor.next().await.unwrap();
    assert_eq!(missed, Some(MonitorLine::Missed { missed: 6 }));
}

#[tokio::test]
async fn a_monitor_whose_client_is_gone_ends() {
    let Agent { client, fake, .. } = &agent(&[]);
    let monitor = client.monitor().await.unwrap();
    assert_eq!(fake.listeners(), 1);
    drop(monitor);
    eventually(|| fake.listeners() == 0).await;
}

#[tokio::test]
async fn a_stop_ends_monitors_and_lets_requests_under_way_end() {
    let Agent { client, fake, stop, serving, _folder } = agent(&["ov_net1"]);
    let mut monitor = client.monitor().await.unwrap();
    let gate = fake.hold("create_veth");
    let asked = tokio::spawn({
        let client = client.clone();
        async move { client.attach(&attach("ov_net1", "t1")).await }
    });
    eventually(|| fake.calls().contains(&"create_veth")).await;
    stop.notify_one();
    assert_eq!(monitor.next().await.unwrap(), None);
    drop(gate);
    asked.await.unwrap().unwrap();
    serving.await.unwrap();
    assert!(!client.socket().exists());
}

#[tokio::test]
async fn two_hundred_clients_at_once_are_all_served() {
    let Agent { client, fake, .. } = &agent(&["ov_net1"]);
    let attaches = (0..200).map(|n| {
        let client = client.clone();
        tokio::spawn(async move { client.attach(&attach("ov_net1", &format!("t{n}"))).await })
    });
    for attached in futures::future::join_all(attaches).await {
        attached.unwrap().unwrap();
    }
    assert_eq!(fake.records().len(), 200);
}
