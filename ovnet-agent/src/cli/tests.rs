//! Whole command lines, against a server on fakes.

use std::path::Path;

use tempfile::TempDir;

use super::*;
use crate::{
    api::{server::serve, socket::Socket},
    service::fake::{self, Fake},
};

/// An agent's socket; it ends with the test's runtime.
fn agent(networks: &[&str]) -> (TempDir, Fake) {
    let folder = tempfile::tempdir().unwrap();
    let (service, fake) = fake::service(networks);
    let socket = Socket::bind(&folder.path().join("s"), None).unwrap();
    tokio::spawn(serve(socket, service, std::future::pending()));
    (folder, fake)
}

/// What a command line prints, what it complains about, and whether all went well.
async fn ovnet(folder: &Path, line: &str) -> (String, String, bool) {
    let socket = format!("--socket={}", folder.join("s").display());
    let words = ["ovnet", &socket].into_iter().chain(line.split_whitespace());
    let cli = Cli::try_parse_from(words).unwrap();
    let (mut out, mut errors) = (Vec::new(), Vec::new());
    let well = match run(cli, &mut out, &mut errors).await {
        Ok(well) => well,
        Err(error) => {
            complain(&mut errors, &error).unwrap();
            false
        }
    };
    (String::from_utf8(out).unwrap(), String::from_utf8(errors).unwrap(), well)
}

#[tokio::test]
async fn a_network_and_an_endpoint_come_and_go() {
    let (folder, _fake) = agent(&[]);
    let folder = folder.path();
    let (id, _, _) = ovnet(folder, "network create ov_net1").await;
    assert_eq!(id, "00001000-0000-4000-8000-000000000000\n");
    let (listed, _, _) = ovnet(folder, "network ls -q").await;
    assert_eq!(listed, "00001000-000\n");
    let (address, errors, well) =
        ovnet(folder, "attach --network ov_net1 --netns t1 --name t1 --alias web").await;
    assert_eq!((address.as_str(), errors.as_str(), well), ("10.0.0.2\n", "", true));
    let (listed, _, _) = ovnet(folder, "endpoint ls").await;
    assert_eq!(listed.lines().count(), 2, "{listed}");
    assert_eq!(ovnet(folder, "detach t1").await.0, "t1\n");
    assert_eq!(ovnet(folder, "network rm ov_net1").await.0, "ov_net1\n");
    assert_eq!(ovnet(folder, "network ls -q").await.0, "");
}

#[tokio::test]
async fn every_verb_prints_json() {
    let (folder, _fake) = agent(&["ov_net1"]);
    for line in [
        "network create ov_net2",
        "network ls",
        "network inspect ov_net1 ov_net2",
        "attach --network ov_net1 --netns t1 --name t1 -p 80",
        "port t1",
        "port t1 80",
        "endpoint ls",
        "endpoint ls --local",
        "host ls",
        "status",
        "counters",
        "detach --netns t1",
        "network rm ov_net2",
    ] {
        let (out, errors, well) = ovnet(folder.path(), &format!("{line} --json")).await;
        assert!(well && errors.is_empty(), "{line}: {errors}");
        serde_json::from_str::<serde_json::Value>(&out).unwrap();
    }
}

#[tokio::test]
async fn published_ports_are_printed_as_docker_does() {
    let (folder, _fake) = agent(&["ov_net1"]);
    let folder = folder.path();
    let line = "attach --network ov_net1 --netns t1 --name t1 -p 90:80 -p 91-92:81 -P --expose \
                53/udp --expose 80";
    let (out, errors, well) = ovnet(folder, line).await;
    assert_eq!(
        (out.as_str(), errors.as_str(), well),
        ("10.0.0.2\n53/udp -> 0.0.0.0:32768\n81/tcp -> 0.0.0.0:91\n", "", true)
    );
    let all = "53/udp -> 0.0.0.0:32768\n80/tcp -> 0.0.0.0:90\n81/tcp -> 0.0.0.0:91\n";
    assert_eq!(ovnet(folder, "port t1").await, (all.into(), String::new(), true));
    for (line, expected) in [("port t1 80", "0.0.0.0:90\n"), ("port t1 53/udp", "0.0.0.0:32768\n")]
    {
        assert_eq!(ovnet(folder, line).await, (expected.into(), String::new(), true));
    }
    let (listed, _, _) = ovnet(folder, "endpoint ls").await;
    assert!(listed.contains(" 0.0.0.0:90-91->80-81/tcp, 0.0.0.0:32768->53/udp "), "{listed}");
    // What was asked for is known to whoever asked.
    let (out, _, _) = ovnet(folder, "attach --network ov_net1 --netns t2 --name t2 -p 95:80").await;
    assert_eq!(out, "10.0.0.3\n");
    // And an endpoint without ports has none to list.
    ovnet(folder, "attach --network ov_net1 --netns t3 --name t3").await;
    assert_eq!(ovnet(folder, "port t3").await, (String::new(), String::new(), true));
    for (line, expected) in [
        (
            "port t9",
            "ovnet: no endpoint of this host has name or id t9: see `ovnet endpoint ls --local`\n",
        ),
        ("port t1 81/udp", "ovnet: t1 has no published port 81/udp: see `ovnet port t1`\n"),
        (
            "attach --network ov_net1 --netns t4 -p 0:80",
            "ovnet: published port \"0:80\": host port 0 is not possible: leave it out for a free \
             one\n",
        ),
    ] {
        assert_eq!(ovnet(folder, line).await, (String::new(), expected.into(), false));
    }
}

#[tokio::test]
async fn inspect_prints_what_is_there_and_complains_of_the_rest() {
    let (folder, _fake) = agent(&["ov_net1"]);
    let (out, errors, well) = ovnet(folder.path(), "network inspect ov_net1 none").await;
    assert!(!well);
    assert_eq!(errors, "ovnet: there is no network none\n");
    assert!(out.starts_with("[\n    {\n        \"v\": 1,\n        \"id\": \"00001000-"), "{out}");
    assert!(out.ends_with("\"endpoints\": []\n    }\n]\n"), "{out}");
}

#[tokio::test]
async fn failures_are_one_line() {
    let (folder, fake) = agent(&["ov_net1"]);
    fake.fail("create_veth");
    for (line, expected) in [
        ("attach --network ov_net1 --netns t1", "ovnet: create_veth was told to fail\n"),
        ("network rm none", "ovnet: there is no network none\n"),
        (
            "detach t9",
            "ovnet: no endpoint of this host has name or id t9: see `ovnet endpoint ls --local`\n",
        ),
    ] {
        let (out, errors, well) = ovnet(folder.path(), line).await;
        assert_eq!((out.as_str(), errors.as_str(), well), ("", expected, false));
    }
}

#[tokio::test]
async fn a_detach_without_consul_warns() {
    let (folder, fake) = agent(&["ov_net1"]);
    ovnet(folder.path(), "attach --network ov_net1 --netns t1 --name t1").await;
    fake.fail("release_endpoint");
    let (out, errors, well) = ovnet(folder.path(), "detach t1").await;
    assert_eq!((out.as_str(), well), ("t1\n", true));
    assert!(errors.starts_with("ovnet: warning: t1 ("), "{errors}");
}

#[tokio::test]
async fn no_agent_is_one_line() {
    let folder = tempfile::tempdir().unwrap();
    let (_, errors, well) = ovnet(folder.path(), "status").await;
    assert!(!well && errors.contains("is ovnet-agent running?"), "{errors}");
    assert_eq!(errors.lines().count(), 1);
}

#[test]
fn a_relative_path_is_the_clients() {
    assert_eq!(from_here("t1".into()), "t1");
    assert_eq!(from_here("/run/netns/t1".into()), "/run/netns/t1");
    assert!(from_here("./t1".into()).starts_with('/'));
}
