use std::sync::{Arc, Mutex};

use axum::{
    Json, Router,
    extract::{Request, State},
    response::{IntoResponse as _, Response},
};
use serde_json::{Value, json};

use super::*;
use crate::service::fake::network;

/// Requests as they came: method and path, and the body where there was one.
type Seen = Arc<Mutex<Vec<(String, Value)>>>;

/// A daemon of API 1.41 as Docker 20.10 is, on a socket in the folder: it refuses newer requests.
async fn old_daemon(folder: &tempfile::TempDir) -> (String, Seen) {
    async fn answer(State(seen): State<Seen>, request: Request) -> Response {
        let line = format!("{} {}", request.method(), request.uri().path());
        let body = axum::body::to_bytes(request.into_body(), 1 << 20).await.unwrap();
        let body = serde_json::from_slice(&body).unwrap_or(Value::Null);
        seen.lock().unwrap().push((line.clone(), body));
        let network = json!({"Name": "br1", "Id": "aa", "Driver": "bridge", "Created": "x",
            "IPAM": {"Driver": "default", "Options": null,
                "Config": [{"Subnet": "fd00::/64"}, {"Subnet": "172.18.0.0/16",
                    "Gateway": "172.18.0.1/16", "IPRange": "172.18.1.0/24",
                    "AuxiliaryAddresses": {"x": "172.18.0.9/16"}}]},
            "Containers": {
                "c1": {"Name": "t1", "EndpointID": "e1"},
                "ep-e2": {"Name": "t2", "EndpointID": "e2"}},
            "Options": {"a": "b"}, "Labels": null});
        let refused =
            |status, message: &str| (status, Json(json!({"message": message}))).into_response();
        match line.as_str() {
            "GET /version" => Json(json!({"ApiVersion": "1.41"})).into_response(),
            "GET /v1.41/networks" => Json(json!([network, {"Name": "no id"}])).into_response(),
            "GET /v1.41/networks/br1" => Json(network).into_response(),
            "POST /v1.41/networks/create" => {
                Json(json!({"Id": "new", "Warning": ""})).into_response()
            }
            "DELETE /v1.41/networks/used" => {
                let message = "error while removing network: used has active endpoints\n";
                refused(axum::http::StatusCode::FORBIDDEN, message)
            }
            path if path.contains("/v1.41/") => {
                refused(axum::http::StatusCode::NOT_FOUND, "no such thing")
            }
            _ => refused(
                axum::http::StatusCode::BAD_REQUEST,
                &format!("client version is too new: {line}"),
            ),
        }
    }
    let path = folder.path().join("docker.sock");
    let seen = Seen::default();
    let listener = tokio::net::UnixListener::bind(&path).unwrap();
    let app = Router::new().fallback(answer).with_state(Arc::clone(&seen));
    tokio::spawn(async move { axum::serve(listener, app).await });
    (format!("unix://{}", path.display()), seen)
}

async fn connect(address: &str) -> Result<Daemon> {
    Daemon::connect(&DockerChoice::Address(address.to_owned()), address).await
}

#[tokio::test]
async fn an_old_daemon_is_asked_in_its_own_version() {
    let folder = tempfile::tempdir().unwrap();
    let (address, _) = old_daemon(&folder).await;
    let daemon = connect(&address).await.unwrap();
    let wanted = DockerNetwork {
        id: "aa".into(),
        name: "br1".into(),
        driver: "bridge".into(),
        options: BTreeMap::from([("a".into(), "b".into())]),
        subnet: Some("172.18.0.0/16".parse().unwrap()),
        gateway: Some([172, 18, 0, 1].into()),
        ip_range: Some("172.18.1.0/24".parse().unwrap()),
        aux: BTreeMap::from([("x".into(), [172, 18, 0, 9].into())]),
        created: "x".into(),
        ..DockerNetwork::default()
    };
    assert_eq!(daemon.networks().await.unwrap(), std::slice::from_ref(&wanted));
    assert_eq!(daemon.network("br1").await.unwrap(), Some(wanted));
    assert_eq!(daemon.network("br2").await.unwrap(), None);
    assert_eq!(daemon.names_of("c9").await.unwrap(), None);
    let endpoints = daemon.endpoints_of("br1").await.unwrap().unwrap();
    assert_eq!(endpoints["e1"].as_deref(), Some("c1"));
    assert_eq!(endpoints["e2"], None);
    assert_eq!(daemon.endpoints_of("br2").await.unwrap(), None);
    daemon.remove_network("br2").await.unwrap();
    let error = daemon.remove_network("used").await.unwrap_err();
    assert_eq!(
        format!("{error:#}"),
        "remove Docker network used: Docker says: error while removing network: used has active \
         endpoints"
    );
}

#[tokio::test]
async fn what_docker_is_to_make_says_everything_about_the_network() {
    let folder = tempfile::tempdir().unwrap();
    let (address, seen) = old_daemon(&folder).await;
    let mut record = network("ov_net1", 4096);
    record.ip_range = Some("10.0.0.128/25".parse().unwrap());
    record.aux.insert("router".into(), [10, 0, 0, 9].into());
    record.mtu = Some(1400);
    record.internal = true;
    record.options.insert("a".into(), "b".into());
    record.labels.insert("c".into(), "d".into());
    let daemon = connect(&address).await.unwrap();
    assert_eq!(daemon.create_network(&record).await.unwrap(), "new");
    let (_, body) = seen.lock().unwrap().pop().unwrap();
    let id = record.id.as_str();
    let wanted = json!({"Name": "ov_net1", "CheckDuplicate": true, "Driver": "ovnet",
        "Internal": true, "Attachable": true, "Labels": {"c": "d"},
        "Options": {"a": "b", "ovnet.id": id, "com.docker.network.driver.mtu": "1400"},
        "IPAM": {"Driver": "ovnet", "Options": {"ovnet.id": id}, "Config": [{
            "Subnet": "10.0.0.0/24", "Gateway": "10.0.0.1", "IPRange": "10.0.0.128/25",
            "AuxiliaryAddresses": {"router": "10.0.0.9"}}]}});
    assert_eq!(body, wanted);
}

#[tokio::test]
async fn nobody_at_the_socket_is_one_line_that_names_it() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("docker.sock");
    let address = format!("unix://{}", path.display());
    let error = format!("{:#}", connect(&address).await.unwrap_err());
    assert!(error.starts_with(&format!("ask Docker at {address}: ")), "{error}");
    // A socket file that its daemon left behind.
    drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
    let error = format!("{:#}", connect(&address).await.unwrap_err());
    assert!(error.contains("refused") && !error.contains('\n'), "{error}");
}

#[test]
fn the_choice_is_read_and_anything_else_refused() {
    let read = |text: &str| text.parse::<DockerChoice>();
    assert_eq!(read("auto").unwrap(), DockerChoice::Auto);
    assert_eq!(read("off").unwrap(), DockerChoice::Off);
    let address = |text: &str| read(text).unwrap().address().unwrap();
    assert_eq!(address("/run/docker.sock"), "unix:///run/docker.sock");
    assert_eq!(address("unix:///x/docker.sock"), "unix:///x/docker.sock");
    assert_eq!(address("tcp://127.0.0.1:2375"), "tcp://127.0.0.1:2375");
    for wrong in ["", "on", "unix://", "unix://x", "tcp://", "docker01:2375"] {
        assert!(read(wrong).is_err(), "{wrong}");
    }
    assert_eq!(DockerChoice::Off.address(), None);
}

#[test]
fn events_are_read_as_docker_writes_them() {
    let read = |text: &str| convert::event(serde_json::from_str(text).unwrap());
    let line = r#"{"Type":"network","Action":"connect","Actor":{"ID":"n1","Attributes":
        {"container":"c1","name":"lnet","type":"ovl"}},"scope":"local","time":1795407263,
        "timeNano":1795407263195303572}"#;
    let changed = Event::ContainerChanged { id: "c1".into() };
    assert_eq!(read(line), Some(changed.clone()));
    assert_eq!(read(&line.replace("connect", "disconnect")), Some(changed.clone()));
    assert_eq!(read(&line.replace("connect", "create")), Some(Event::NetworkCreated));
    let destroyed = Event::NetworkDestroyed { id: "n1".into() };
    assert_eq!(read(&line.replace("connect", "destroy")), Some(destroyed));
    let container = line.replace("network", "container").replace("n1", "c1");
    let container = |action| read(&container.replace("connect", action));
    assert_eq!(container("start"), Some(changed.clone()));
    assert_eq!(container("rename"), Some(changed));
    assert_eq!(container("exec_start: sh"), None);
}

#[test]
fn names_of_both_kinds_are_read() {
    let inspected = json!({"Id": "c1", "Name": "/t1", "NetworkSettings": {"Networks": {
        "new": {"NetworkID": "n1", "EndpointID": "e1", "Aliases": ["web"],
            "DNSNames": ["t1", "web", "c1"]},
        "old": {"NetworkID": "n2", "EndpointID": "e2", "Aliases": null},
        "stopped": {"NetworkID": "n3", "EndpointID": ""}}}});
    let mut names = convert::names(serde_json::from_value(inspected).unwrap());
    names.endpoints.sort_by(|a, b| a.endpoint.cmp(&b.endpoint));
    let endpoint = |endpoint: &str, aliases: &[&str]| EndpointNames {
        endpoint: endpoint.into(),
        aliases: aliases.iter().map(|alias| (*alias).to_owned()).collect(),
    };
    let new = endpoint("e1", &["web", "t1", "web", "c1"]);
    let wanted = [new, endpoint("e2", &[])];
    assert_eq!((names.id.as_str(), names.name.as_str()), ("c1", "t1"));
    assert_eq!(names.endpoints, wanted);
}

#[test]
fn ports_are_those_that_docker_published_over_ipv4() {
    let read = |ports: Value| {
        let inspected = json!({"Id": "c1", "NetworkSettings": {"Ports": ports}});
        let ports = convert::names(serde_json::from_value(inspected).unwrap()).ports;
        ports
            .into_iter()
            .map(|it| {
                let (from, to) = ((it.host_address, it.host_port), it.container_port);
                format!("{}:{} {to}/{}", from.0, from.1, it.protocol)
            })
            .collect::<Vec<_>>()
    };
    // As Docker 20.10 to 29 write them: `-p 90:80 -p 81 -p 192.168.1.11:53:53/udp --expose 8080`.
    let found = read(json!({
        "80/tcp": [{"HostIp": "0.0.0.0", "HostPort": "90"}, {"HostIp": "::", "HostPort": "90"}],
        "81/tcp": [{"HostIp": "0.0.0.0", "HostPort": "32768"}, {"HostIp": "::", "HostPort": "32769"}],
        "53/udp": [{"HostIp": "192.168.1.11", "HostPort": "53"}],
        "8080/tcp": null,
        "36412/sctp": [{"HostIp": "0.0.0.0", "HostPort": "36412"}]}));
    let wanted = ["0.0.0.0:90 80/tcp", "0.0.0.0:32768 81/tcp", "192.168.1.11:53 53/udp"];
    assert_eq!(found, wanted);
    // Every address in both forms, and what is no port at all.
    let found = read(json!({
        "80/tcp": [{"HostIp": "", "HostPort": "90"}, {"HostIp": "0.0.0.0", "HostPort": "90"},
            {"HostIp": "fd00::1", "HostPort": "91"}, {"HostIp": "0.0.0.0", "HostPort": ""},
            {"HostIp": "0.0.0.0", "HostPort": "0"}, {"HostPort": "92"}],
        "x/tcp": [{"HostIp": "", "HostPort": "93"}], "81/tcp": []}));
    assert_eq!(found, ["0.0.0.0:90 80/tcp", "0.0.0.0:92 80/tcp"]);
    // A container that was stopped.
    assert!(read(json!({})).is_empty() && read(Value::Null).is_empty());
}

#[tokio::test]
async fn a_daemon_that_is_not_there_any_more_is_not_asked() {
    let folder = tempfile::tempdir().unwrap();
    let (address, seen) = old_daemon(&folder).await;
    let mut daemon = connect(&address).await.unwrap();
    assert!(daemon.is_there());
    daemon.choice = DockerChoice::Off;
    assert!(!daemon.is_there());
    seen.lock().unwrap().clear();
    let error = daemon.networks().await.unwrap_err();
    assert_eq!(format!("{error:#}"), "list Docker's networks: Docker stops");
    assert!(daemon.create_network(&network("ov_net1", 4096)).await.is_err());
    assert_eq!(daemon.events().next().await, None);
    assert!(seen.lock().unwrap().is_empty());
}

#[tokio::test]
async fn the_gateway_bridge_does_not_follow_the_defaults_for_other_networks() {
    let new = serde_json::to_value(convert::gwbridge_request(true)).unwrap();
    assert_eq!((&new["EnableIPv4"], &new["EnableIPv6"]), (&json!(true), &json!(false)));

    let folder = tempfile::tempdir().unwrap();
    let (address, seen) = old_daemon(&folder).await;
    let daemon = connect(&address).await.unwrap();
    assert_eq!(daemon.gwbridge().await.unwrap(), None);
    // This daemon forgets it at once.
    assert!(daemon.make_gwbridge().await.is_err());
    let created = seen.lock().unwrap().iter().find(|(line, _)| line.starts_with("POST")).cloned();
    let (_, body) = created.unwrap();
    assert_eq!((&body["EnableIPv6"], body.get("EnableIPv4")), (&json!(false), None));
}
