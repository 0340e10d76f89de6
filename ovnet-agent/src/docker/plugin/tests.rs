//! What Docker 26, 28 and 29 sent to a plugin, sent again to this one; and what no Docker sends.

use std::{collections::BTreeMap, path::Path};

use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{UnixListener, UnixStream},
};

use super::*;
use crate::{
    consul::{Publish, schema::EndpointState},
    docker::book::Book,
    service::fake::{self, Fake},
};

/// A call of a trace, and what the plugin that was traced answered.
struct Recorded {
    section: String,
    path: String,
    body: String,
    status: u16,
    answer: Value,
}

/// Reads a trace: `##### section`, `time /path  body=…`, then `-> status answer`. Docker has several
/// calls under way at once, so answers are taken in the order of their calls.
fn read_trace(text: &str) -> Vec<Recorded> {
    let (mut calls, mut answered, mut section) = (Vec::<Recorded>::new(), 0, String::new());
    for line in text.lines() {
        if let Some(title) = line.strip_prefix("##### ") {
            title.clone_into(&mut section);
        } else if let Some(answer) = line.trim().strip_prefix("-> ") {
            let (status, body) = answer.split_once(' ').unwrap();
            calls[answered].status = status.parse().unwrap();
            calls[answered].answer = serde_json::from_str(body).unwrap();
            answered += 1;
        } else if let Some((call, body)) = line.split_once("  body=") {
            let path = call.split_once(" /").unwrap().1.to_owned();
            let (section, body) = (section.clone(), body.to_owned());
            calls.push(Recorded { section, path, body, status: 0, answer: Value::Null });
        }
    }
    assert!(calls.len() > 50 && answered == calls.len());
    calls
}

/// Replaces what the traced plugin answered by what this one answered: pools, subnets, addresses.
fn translate(value: &mut Value, ours: &BTreeMap<String, String>) {
    match value {
        Value::String(text) => {
            let bare = text.split('/').next().unwrap();
            if let Some(our) = ours.get(text.as_str()) {
                our.clone_into(text);
            } else if let Some(our) = ours.get(bare) {
                *text = text.replacen(bare, our, 1);
            } else if let Some((net, our)) =
                bare.rsplit_once('.').and_then(|(net, _)| Some((net, ours.get(net)?)))
            {
                // An address the user chose in a subnet the plugin chose.
                *text = text.replacen(net, our, 1);
            }
        }
        Value::Array(values) => values.iter_mut().for_each(|value| translate(value, ours)),
        Value::Object(values) => values.values_mut().for_each(|value| translate(value, ours)),
        _ => {}
    }
}

fn driver() -> (Driver<Fake, Fake>, Fake, tempfile::TempDir) {
    let folder = tempfile::tempdir().unwrap();
    let (service, fake) = fake::service(&[]);
    let driver = Driver::new(service, Book::open(folder.path()).unwrap());
    (driver, fake, folder)
}

async fn replay(trace: &str) {
    let (driver, fake, _folder) = driver();
    let [local, global] = ADDRESS_SPACES.map(str::to_owned);
    let mut ours = BTreeMap::from([("ovl".to_owned(), local), ("ovg".to_owned(), global)]);
    let mut refused = Vec::new();
    let mut networks = 0;
    for recorded in read_trace(trace) {
        let Recorded { section, path, body, status, answer } = recorded;
        let mut body: Value =
            if body.is_empty() { json!({}) } else { serde_json::from_str(&body).unwrap() };
        translate(&mut body, &ours);
        let sent = body.to_string();
        let said = call(&driver, &path, if sent == "{}" { b"" } else { sent.as_bytes() }).await;
        let what = format!("{section}: {path} {body}");
        let said = match said {
            Ok(said) => said.unwrap_or_else(|| panic!("{what}: no such call")),
            Err(error) => {
                refused.push(format!("{section}: {path}: {}", one_line(&error)));
                continue;
            }
        };
        match path.as_str() {
            "IpamDriver.RequestPool" => {
                if status == 200 {
                    let text = |it: &Value, key: &str| it[key].as_str().unwrap().to_owned();
                    let net = |it: &Value| text(it, "Pool").rsplit_once('.').unwrap().0.to_owned();
                    ours.insert(net(&answer), net(&said));
                    for key in ["PoolID", "Pool"] {
                        ours.insert(text(&answer, key), text(&said, key));
                    }
                }
                if body["Pool"] != "" {
                    assert_eq!(said["Pool"], body["Pool"], "{what}");
                }
            }
            "IpamDriver.RequestAddress" => {
                let host = |it: &Value| {
                    it["Address"].as_str().unwrap().split('/').next().unwrap().to_owned()
                };
                assert!(said["Address"].as_str().unwrap().ends_with("/24"), "{what}");
                if body["Address"] != "" {
                    assert_eq!(json!(host(&said)), body["Address"], "{what}");
                }
                ours.insert(host(&answer), host(&said));
            }
            "NetworkDriver.CreateNetwork" => {
                networks += 1;
                let docker = body["NetworkID"].as_str().unwrap();
                let name = format!("net{networks}");
                let published = driver.publish(docker, &name, BTreeMap::new()).await.unwrap();
                assert!(matches!(published, Publish::Done(_)), "{what}");
            }
            "NetworkDriver.CreateEndpoint" => {
                let asked = body["Interface"]["MacAddress"] == "";
                assert_eq!(said["Interface"].get("MacAddress").is_some(), asked, "{what}");
            }
            "NetworkDriver.Join" => {
                let name = format!("ovnetp{}", &body["EndpointID"].as_str().unwrap()[..8]);
                let interface = json!({"SrcName": name, "DstPrefix": "eth"});
                assert_eq!(said, json!({"InterfaceName": interface}), "{what}");
            }
            _ => {}
        }
    }
    // The only things refused are those of IPv6, and what follows from their refusal.
    let of_ipv6 = |line: &String| {
        line.starts_with("D4 ipv6")
            || line.contains("IPv4 only")
            || line.contains("fd00:")
            || line.contains("does not know")
    };
    let others: Vec<_> = refused.iter().filter(|line| !of_ipv6(line)).collect();
    assert!(others.is_empty(), "{others:#?}");
    assert!(refused.iter().any(|line| line.contains("IPv4 only")));
    // What runs when the trace ends is what there is, and nothing else has an address.
    let local: Vec<_> = fake.local().into_iter().map(|it| it.record).collect();
    let up = fake.records().into_iter().filter(|it| it.state == EndpointState::Up);
    assert_eq!(up.collect::<Vec<_>>(), local);
    assert_eq!(fake.links().len(), local.len());
    assert!(!local.is_empty());
}

#[tokio::test]
async fn docker_26() {
    replay(include_str!("traces/docker26.log")).await;
}

#[tokio::test]
async fn docker_28() {
    replay(include_str!("traces/docker28.log")).await;
}

#[tokio::test]
async fn docker_29() {
    replay(include_str!("traces/docker29.log")).await;
}

/// A plugin on a socket.
async fn listening(folder: &Path) -> Fake {
    let (service, fake) = fake::service(&["ov_net1"]);
    let driver = Driver::new(service, Book::open(folder).unwrap());
    let listener = UnixListener::bind(folder.join("ovnet.sock")).unwrap();
    tokio::spawn(async move { axum::serve(listener, router(driver)).await.unwrap() });
    fake
}

/// One call as Docker makes it: no content type, an odd host.
async fn post(folder: &Path, path: &str, body: &[u8]) -> (u16, Value) {
    let mut stream = UnixStream::connect(folder.join("ovnet.sock")).await.unwrap();
    let head = format!(
        "POST /{path} HTTP/1.1\r\nHost: plugin.moby.localhost\r\nConnection: close\r\n\
         Accept: {CONTENT}\r\nContent-Length: {}\r\n\r\n",
        body.len()
    );
    stream.write_all(head.as_bytes()).await.unwrap();
    // The plugin may have read enough before all is sent.
    let _ = stream.write_all(body).await;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    let status = head.split(' ').nth(1).unwrap().parse().unwrap();
    (status, serde_json::from_str(body).unwrap_or_else(|_| panic!("no JSON: {body}")))
}

#[tokio::test]
async fn what_no_docker_sends_is_answered_with_an_error_and_harms_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    let fake = listening(folder).await;
    let garbage = vec![b'x'; 1024 * 1024];
    let deep = "[".repeat(100_000);
    let calls: [(&str, &[u8]); 14] = [
        ("NetworkDriver.CreateNetwork", b"{"),
        ("NetworkDriver.CreateNetwork", b""),
        ("NetworkDriver.CreateNetwork", b"[]"),
        ("NetworkDriver.CreateNetwork", br#"{"NetworkID": 7}"#),
        (
            "NetworkDriver.CreateNetwork",
            br#"{"NetworkID":"a","IPv4Data":[{"Pool":"x","AddressSpace":"ovnet-local"}]}"#,
        ),
        ("NetworkDriver.CreateEndpoint", br#"{"NetworkID":"nobody","EndpointID":"x"}"#),
        ("NetworkDriver.Join", br#"{"NetworkID":"nobody","EndpointID":"../../x"}"#),
        ("NetworkDriver.Join", b""),
        ("NetworkDriver.Leave", b"\xff\xfe"),
        ("IpamDriver.RequestPool", br#"{"Pool":"10.0.0.0/33"}"#),
        ("IpamDriver.RequestAddress", br#"{"PoolID":"nobody"}"#),
        ("IpamDriver.RequestAddress", &garbage),
        ("NetworkDriver.CreateEndpoint", deep.as_bytes()),
        ("NetworkDriver.NoSuchCall", b"{}"),
    ];
    for (path, body) in calls {
        let (status, answer) = post(folder, path, body).await;
        assert!(status >= 400, "{path}: {answer}");
        let line = answer["Err"].as_str().unwrap();
        assert!(!line.is_empty() && !line.contains('\n'), "{path}: {line}");
    }
    // What Docker repeats, or says of what is gone, is no error.
    for path in
        ["NetworkDriver.Leave", "NetworkDriver.DeleteEndpoint", "NetworkDriver.DeleteNetwork"]
    {
        let unknown = br#"{"NetworkID":"nobody","EndpointID":"nobody"}"#;
        assert_eq!(post(folder, path, unknown).await, (200, json!({})), "{path}");
    }
    for path in ["IpamDriver.ReleaseAddress", "IpamDriver.ReleasePool"] {
        let unknown = br#"{"PoolID":"nobody","Address":"10.0.0.9"}"#;
        assert_eq!(post(folder, path, unknown).await, (200, json!({})), "{path}");
    }
    // Clients that hang are nobody else's trouble.
    let mut hanging = Vec::new();
    for _ in 0..200 {
        let mut stream = UnixStream::connect(folder.join("ovnet.sock")).await.unwrap();
        let half = b"POST /NetworkDriver.Join HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{";
        stream.write_all(half).await.unwrap();
        hanging.push(stream);
    }
    let (status, answer) = post(folder, "Plugin.Activate", b"").await;
    assert_eq!(
        (status, &answer["Implements"]),
        (200, &json!(["NetworkDriver", "IpamDriver", "authz"]))
    );
    assert!(fake.records().is_empty() && fake.links().is_empty() && fake.local().is_empty());
    assert_eq!(fake.pending_claims(), 0);
}
