//! The calls themselves, as anyone with `curl` could make them.

use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::{Server, contract, eventually};

contract!(
    check_and_set_creates_once_and_updates_by_index,
    an_equal_value_does_not_move_the_index,
    a_transaction_is_all_or_nothing_and_names_what_failed,
    a_blocking_query_wakes_up_for_a_write_and_for_a_deletion,
    a_lock_is_exclusive_until_its_session_ends,
    a_session_that_is_not_renewed_releases_its_lock,
);

const NO_DELAY: &str = r#"{"TTL":"10s","LockDelay":"0s","NodeChecks":[],"Behavior":"release"}"#;

impl Server {
    async fn pair(&self, key: &str) -> Value {
        let (status, answer) = self.request("GET", &format!("kv/{key}"), "").await;
        assert_eq!(status, 200, "read {key}");
        answer[0].clone()
    }

    async fn session(&self) -> String {
        let (status, answer) = self.request("PUT", "session/create", NO_DELAY).await;
        assert_eq!(status, 200, "{answer}");
        answer["ID"].as_str().unwrap().to_owned()
    }
}

async fn check_and_set_creates_once_and_updates_by_index(server: Server) {
    assert_eq!(server.request("PUT", "kv/a/k?cas=0", "1").await.1, json!(true));
    assert_eq!(server.request("PUT", "kv/a/k?cas=0", "2").await.1, json!(false));
    let index = server.pair("a/k").await["ModifyIndex"].as_u64().unwrap();
    let (stale, right) = (format!("kv/a/k?cas={}", index + 1), format!("kv/a/k?cas={index}"));
    assert_eq!(server.request("PUT", &stale, "3").await.1, json!(false));
    assert_eq!(server.request("PUT", &right, "4").await.1, json!(true));
    let pair = server.pair("a/k").await;
    assert_eq!((&pair["Value"], &pair["CreateIndex"]), (&json!("NA=="), &json!(index)));
    assert_eq!(server.request("DELETE", &right, "").await.1, json!(false));
    assert_eq!(server.request("DELETE", "kv/a/k", "").await.1, json!(true));
    assert_eq!(server.request("GET", "kv/a/k", "").await.0, 404);
    assert_eq!(server.request("GET", "kv/a/?recurse", "").await.0, 404);
}

async fn an_equal_value_does_not_move_the_index(server: Server) {
    server.request("PUT", "kv/a/k", "1").await;
    let before = server.pair("a/k").await;
    server.request("PUT", "kv/a/k", "1").await;
    assert_eq!(server.pair("a/k").await, before);
    server.request("PUT", "kv/a/k", "2").await;
    assert_ne!(server.pair("a/k").await["ModifyIndex"], before["ModifyIndex"]);
}

async fn a_transaction_is_all_or_nothing_and_names_what_failed(server: Server) {
    let operation = |verb: &str, key: &str, index: u64| json!({"KV": {"Verb": verb, "Key": key, "Value": "MQ==", "Index": index}});
    let failing = json!([
        operation("set", "t/a", 0),
        operation("check-index", "t/missing", 7),
        operation("cas", "t/b", 9),
    ]);
    let (status, answer) = server.request("PUT", "txn", &failing.to_string()).await;
    assert_eq!((status, &answer["Results"]), (409, &Value::Null));
    let failed: Vec<_> =
        answer["Errors"].as_array().unwrap().iter().map(|error| &error["OpIndex"]).collect();
    assert_eq!(failed, [1, 2]);
    assert_eq!(server.request("GET", "kv/t/?recurse", "").await.0, 404);

    let working = json!([
        operation("cas", "t/a", 0),
        operation("set", "t/b", 0),
        operation("delete-cas", "t/missing", 7),
        operation("delete", "t/missing", 0),
        operation("delete-tree", "t/none/", 0),
    ]);
    let (status, answer) = server.request("PUT", "txn", &working.to_string()).await;
    assert_eq!(status, 200, "{answer}");
    let (a, b) = (server.pair("t/a").await, server.pair("t/b").await);
    assert_eq!(a["ModifyIndex"], b["ModifyIndex"], "one transaction has one index");

    let removing = json!([
        operation("check-index", "t/a", a["ModifyIndex"].as_u64().unwrap()),
        operation("delete-tree", "t/", 0),
    ]);
    assert_eq!(server.request("PUT", "txn", &removing.to_string()).await.0, 200);
    assert_eq!(server.request("GET", "kv/t/?recurse", "").await.0, 404);
    let unknown = json!([operation("frobnicate", "t/a", 0)]).to_string();
    assert_eq!(server.request("PUT", "txn", &unknown).await.0, 409);
    assert_eq!(server.request("PUT", "txn", "garbage").await.0, 400);
}

async fn a_blocking_query_wakes_up_for_a_write_and_for_a_deletion(server: Server) {
    server.request("PUT", "kv/w/k", "1").await;
    server.request("PUT", "kv/w/gone", "1").await;
    for (method, key) in [("PUT", "w/new"), ("DELETE", "w/gone")] {
        let (_, pairs) = server.request("GET", "kv/w/?recurse", "").await;
        let pairs = pairs.as_array().unwrap().clone();
        // After the deletions so far nothing but the writes moves what to wait on.
        let index = pairs.iter().map(|pair| pair["ModifyIndex"].as_u64().unwrap()).max().unwrap();
        let waiting = format!("kv/w/?recurse&index={index}&wait=30s");
        let started = Instant::now();
        let query = server.request("GET", &waiting, "");
        let write = async {
            // What is outside the folder does not wake it up.
            server.request("PUT", "kv/other", &format!("{index}")).await;
            tokio::time::sleep(Duration::from_millis(300)).await;
            server.request(method, &format!("kv/{key}"), "2").await;
        };
        let ((status, after), ()) = tokio::join!(query, write);
        assert_eq!(status, 200);
        assert!(started.elapsed() >= Duration::from_millis(300), "it came back too early");
        assert!(started.elapsed() < Duration::from_secs(10), "it slept through the change");
        assert_ne!(after.as_array().unwrap(), &pairs);
    }
    // Nothing changes: it comes back after the time it was given, with the same.
    let (_, pairs) = server.request("GET", "kv/w/?recurse", "").await;
    let (status, same) = server.request("GET", "kv/w/?recurse&index=99999&wait=200ms", "").await;
    assert_eq!((status, same), (200, pairs));
}

async fn a_lock_is_exclusive_until_its_session_ends(server: Server) {
    let (one, two) = (server.session().await, server.session().await);
    let acquire = |session: &str| format!("kv/l/k?acquire={session}");
    assert_eq!(server.request("PUT", &acquire(&one), "1").await.1, json!(true));
    assert_eq!(server.request("PUT", &acquire(&two), "2").await.1, json!(false));
    let lock = json!([{"KV": {"Verb": "lock", "Key": "l/k", "Value": "Mg==", "Session": two}}])
        .to_string();
    assert_eq!(server.request("PUT", "txn", &lock).await.0, 409);
    // The holder may write again.
    assert_eq!(server.request("PUT", &acquire(&one), "3").await.1, json!(true));
    assert_eq!(server.pair("l/k").await["Session"], json!(one));
    assert_eq!(server.request("PUT", &format!("session/renew/{one}"), "").await.0, 200);
    assert_eq!(server.request("PUT", &format!("session/destroy/{one}"), "").await.0, 200);
    assert_eq!(server.request("PUT", &format!("session/renew/{one}"), "").await.0, 404);
    let released = server.pair("l/k").await;
    assert_eq!((&released["Session"], &released["Value"]), (&Value::Null, &json!("Mw==")));
    // With a lock delay of 0 the next one gets it at once.
    assert_eq!(server.request("PUT", "txn", &lock).await.0, 200);
    assert_eq!(server.pair("l/k").await["Session"], json!(two));
}

async fn a_session_that_is_not_renewed_releases_its_lock(server: Server) {
    let session = server.session().await;
    server.request("PUT", &format!("kv/l/k?acquire={session}"), "1").await;
    let started = Instant::now();
    // Consul may take up to twice the TTL.
    eventually("the lock is released", Duration::from_secs(30), || async {
        server.pair("l/k").await["Session"].is_null().then_some(())
    })
    .await;
    assert!(started.elapsed() >= Duration::from_secs(9), "released before its TTL");
    assert_eq!(server.request("PUT", &format!("session/renew/{session}"), "").await.0, 404);
}
