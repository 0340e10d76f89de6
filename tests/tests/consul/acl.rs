//! A Consul that denies everything by default, and the policy that README gives for it.

use std::{fs, net::SocketAddr, time::Duration};

use anyhow::{Result, ensure};
use ovnet_agent::consul::{
    Consul, Lease, Watcher,
    schema::{HostRecord, NetworkRecord, VERSION},
};
use ovnet_tests::consul::{RealConsul, request_as};
use serde_json::{Value, json};

use crate::{claim, eventually, pool, wanted};

/// May do everything.
const MASTER: &str = "11111111-2222-3333-4444-555555555555";
/// As it is shipped.
const POLICY: &str = include_str!("../../../ovnet-agent/package/consul-policy.hcl");

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_policy_of_readme_is_enough_and_every_rule_of_it_is_needed() {
    let Some(consul) = RealConsul::start_with_acl(MASTER) else { return };
    let at = consul.address();
    let rules = rules(POLICY);
    assert_eq!(rules.len(), 9, "{rules:#?}");
    // Without each of them in turn, and then with all.
    for left_out in (0..=rules.len()).rev() {
        wipe(at);
        let kept = rules.iter().enumerate().filter(|(number, _)| *number != left_out);
        let kept: Vec<&str> = kept.map(|(_, rule)| rule.as_str()).collect();
        let token = token_with(at, &format!("p{left_out}"), &kept.join("\n"));
        let worked = everything_an_agent_does(at, &token).await;
        match rules.get(left_out) {
            None => worked.unwrap(),
            Some(rule) => {
                let line = format!("{:#}", worked.expect_err(&format!("not needed: {rule}")));
                println!("without {}: {line}", rule.lines().next().unwrap_or_default());
                // Of a folder that may not be read Consul shows what may, and says nothing.
                let told = if rule.contains("\"read\"") { "is not seen" } else { "refused access" };
                assert!(line.contains(told), "without {rule}: {line}");
                assert!(!line.contains('\n') && !line.contains(&token), "{line}");
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_token_is_read_from_its_file_and_read_again_and_one_that_is_refused_is_told_of() {
    let Some(consul) = RealConsul::start_with_acl(MASTER) else { return };
    let at = consul.address();
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("token");
    let replace = |token: &str| {
        fs::write(folder.path().join("new"), token).unwrap();
        fs::rename(folder.path().join("new"), &file).unwrap();
    };
    let connect = || Consul::with_token_file(&at.to_string(), "ovnet/v1", "docker01", Some(&file));
    let line = |error: anyhow::Error| format!("{error:#}");
    let missing = line(connect().err().unwrap());
    assert!(missing.contains(&file.display().to_string()), "{missing}");

    let good = token_with(at, "good", POLICY);
    let powerless = token_with(at, "powerless", "key_prefix \"other/\" { policy = \"read\" }");
    replace(&good);
    let client = connect().unwrap();
    let network = client.create_network(&wanted("ov_net1"), &pool(), &[]).await.unwrap();
    let (watcher, snapshots) = Watcher::spawn(client.clone());
    watcher.want_endpoints([network.id.clone()].into());
    eventually("all is read", Duration::from_secs(10), || async {
        let snapshot = snapshots.borrow().clone();
        (snapshot.consul_state == "connected" && !snapshot.endpoints.is_empty()).then_some(())
    })
    .await;

    // One that nobody gave out, and one that may not do this: told apart, and forgotten is nothing.
    for (token, words) in [
        ("00000000-dead-beef-0000-000000000000", "does not know"),
        (powerless.as_str(), "refused access"),
    ] {
        replace(token);
        client.claim_address(&network, &claim("e1")).await.unwrap_err();
        client.remove_network("ov_net1").await.unwrap_err();
        let refused = client.create_network(&wanted("other"), &pool(), &[]).await.unwrap_err();
        let refused = line(refused);
        assert!(refused.contains(words), "{refused}");
        assert!(refused.contains(&file.display().to_string()), "{refused}");
        assert!(!refused.contains(token) && !refused.contains('\n'), "{refused}");
        // What makes a query that waits come back.
        poke(at);
        eventually("the watch tells of it", Duration::from_secs(10), || async {
            snapshots.borrow().consul_state.contains(words).then_some(())
        })
        .await;
        let snapshot = snapshots.borrow().clone();
        assert!(snapshot.networks.as_ref().unwrap().contains_key("ov_net1"));
        assert!(snapshot.endpoints.contains_key(&network.id));
    }

    replace(&good);
    eventually("all is well again", Duration::from_secs(5), || async {
        (snapshots.borrow().consul_state == "connected").then_some(())
    })
    .await;
    client.claim_address(&network, &claim("e1")).await.unwrap();
}

/// What the agent of docker01 asks of Consul, all of it.
async fn everything_an_agent_does(at: SocketAddr, token: &str) -> Result<()> {
    let folder = tempfile::tempdir()?;
    let file = folder.path().join("token");
    fs::write(&file, token)?;
    let client = Consul::with_token_file(&at.to_string(), "ovnet/v1", "docker01", Some(&file))?;
    client.ping().await?;
    // The first of a new cluster, which makes the sentinels.
    let (watcher, snapshots) = Watcher::spawn(client.clone());
    let record = HostRecord {
        v: VERSION,
        node: "docker01".into(),
        vtep: [192, 168, 1, 11].into(),
        port: 4789,
        mtu: 1500,
        agent: "0.1.0".into(),
    };
    let lease = Lease::spawn(client.clone(), record.clone());
    let connected = || async {
        let snapshot = snapshots.borrow().clone();
        let announced = lease.problem().is_none();
        let here = snapshot.hosts.as_ref().is_some_and(|it| it.contains_key("docker01"));
        (announced && here && snapshot.consul_state == "connected").then_some(Ok(()))
    };
    let refused = || {
        let problems =
            [lease.problem().unwrap_or_default(), snapshots.borrow().consul_state.clone()];
        let refused = problems.into_iter().find(|it| it.contains("refused access"));
        refused.map(|line| Err(anyhow::anyhow!(line)))
    };
    eventually("the agent is connected, or refused", Duration::from_secs(20), || async {
        connected().await.or_else(refused)
    })
    .await?;

    let network = client.create_network(&wanted("ov_net1"), &pool(), &[]).await?;
    watcher.want_endpoints([network.id.clone()].into());
    let endpoint = client.claim_address(&network, &claim("e1")).await?;
    client.publish_endpoint(&network, &endpoint).await?;
    ensure!(client.endpoints(&network.id).await?.len() == 1, "the endpoint is not there");
    ask(
        at,
        "PUT",
        "kv/ovnet/v1/hosts/docker02",
        json!({"v": 1, "node": "docker02", "vtep": "192.168.1.12"}),
    );
    ensure!(client.hosts().await?.contains_key("docker02"), "another host is not seen");
    client.release_endpoint(&network.id, &endpoint).await?;
    client.remove_network("ov_net1").await?;
    client.restore_network(&network).await?;
    client.remove_network("ov_net1").await?;
    // What Docker makes: a claim first, a name later.
    let pending = client.claim_pending(None, None, &pool(), &[]).await?;
    ensure!(client.pending().await?.len() == 1, "the claim is not there");
    let named =
        NetworkRecord { id: pending.id, vni: pending.vni, subnet: pending.subnet, ..network };
    client.publish_network(&named).await?;
    client.remove_network("ov_net1").await?;
    // A new life takes the record over from the one before, whose session it ends.
    drop(lease);
    let lease = Lease::spawn(client.clone(), record);
    eventually("the next life is announced, or refused", Duration::from_secs(20), || async {
        lease.problem().is_none().then_some(())
    })
    .await;
    lease.withdraw().await
}

/// The rules of a policy, one each.
fn rules(policy: &str) -> Vec<String> {
    let lines = policy.lines().filter(|line| !line.starts_with('#') && !line.trim().is_empty());
    let text = lines.collect::<Vec<_>>().join("\n");
    text.split_inclusive("}\n").map(|rule| rule.trim_end().to_owned()).collect()
}

fn ask(at: SocketAddr, method: &str, path: &str, body: Value) -> Value {
    let body = if body.is_null() { String::new() } else { body.to_string() };
    let (status, answer) =
        request_as(Some(MASTER), at, method, &format!("/v1/{path}"), body.as_bytes()).unwrap();
    assert_eq!(status, 200, "{path}: {}", String::from_utf8_lossy(&answer));
    serde_json::from_slice(&answer).unwrap_or(Value::Null)
}

/// The secret of a new token with these rules.
fn token_with(at: SocketAddr, name: &str, rules: &str) -> String {
    ask(at, "PUT", "acl/policy", json!({ "Name": name, "Rules": rules }));
    let token = json!({ "Policies": [{ "Name": name }] });
    ask(at, "PUT", "acl/token", token)["SecretID"].as_str().unwrap().to_owned()
}

fn wipe(at: SocketAddr) {
    ask(at, "DELETE", "kv/ovnet/?recurse", Value::Null);
}

/// Changes every folder, and changes it back.
fn poke(at: SocketAddr) {
    for folder in ["hosts", "networks"] {
        ask(at, "PUT", &format!("kv/ovnet/v1/{folder}/.poke"), json!("x"));
        ask(at, "DELETE", &format!("kv/ovnet/v1/{folder}/.poke"), Value::Null);
    }
}
