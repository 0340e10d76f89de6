//! One contract, two servers: what ovnet expects of Consul, and does with it, against a real
//! Consul and against the stand-in. A difference between the two is a bug of the stand-in.

#![allow(
    clippy::expect_used,
    clippy::panic,
    clippy::unwrap_used,
    reason = "this is test code, and a panic names the line that failed"
)]

mod acl;
mod claims;
mod lease;
mod networks;
mod pending;
mod watching;
mod wire;

use std::{
    net::SocketAddr,
    time::{Duration, Instant},
};

use ovnet_agent::{
    api::types::CreateNetwork,
    consul::{Claim, Consul, Pool},
};
use ovnet_tests::consul::{RealConsul, StandIn, request};
use serde_json::Value;

/// Makes a module of tests against each of the two out of functions that take a [`Server`].
macro_rules! contract {
    ($($name:ident),* $(,)?) => {
        mod real {
            $(#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn $name() {
                if let Some(server) = crate::Server::real() {
                    super::$name(server).await;
                }
            })*
        }
        mod stand_in {
            $(#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn $name() {
                super::$name(crate::Server::stand_in()).await;
            })*
        }
    };
}
pub(crate) use contract;

/// The Consul under test.
enum Server {
    Real(RealConsul),
    StandIn(StandIn),
}

impl Server {
    fn real() -> Option<Self> {
        RealConsul::start().map(Self::Real)
    }

    fn stand_in() -> Self {
        Self::StandIn(StandIn::start())
    }

    fn address(&self) -> SocketAddr {
        match self {
            Self::Real(consul) => consul.address(),
            Self::StandIn(consul) => consul.address(),
        }
    }

    /// A client as the agent of host `node` has it.
    fn client(&self, node: &str) -> Consul {
        Consul::new(&self.address().to_string(), "ovnet/v1", node).unwrap()
    }

    fn kill(&mut self) {
        match self {
            Self::Real(consul) => consul.kill(),
            Self::StandIn(consul) => consul.kill(),
        }
    }

    /// Starts it again without anything it held.
    fn start_wiped(&mut self) {
        match self {
            Self::Real(consul) => consul.start_again(),
            Self::StandIn(consul) => consul.start_again(),
        }
    }

    /// One request off the runtime's threads; the answer must be JSON or empty.
    async fn request(&self, method: &str, path: &str, body: &str) -> (u16, Value) {
        let (address, method) = (self.address(), method.to_owned());
        let (path, body) = (format!("/v1/{path}"), body.to_owned());
        let answer = tokio::task::spawn_blocking(move || {
            request(address, &method, &path, body.as_bytes()).unwrap()
        });
        let (status, body) = answer.await.unwrap();
        (status, serde_json::from_slice(&body).unwrap_or(Value::Null))
    }

    /// `consul kv put` under the prefix.
    async fn put(&self, key: &str, value: &str) {
        let answer = self.request("PUT", &format!("kv/ovnet/v1/{key}"), value).await;
        assert_eq!(answer, (200, Value::Bool(true)), "put {key}");
    }

    /// `consul kv delete` under the prefix.
    async fn delete(&self, key: &str) {
        let answer = self.request("DELETE", &format!("kv/ovnet/v1/{key}"), "").await;
        assert_eq!(answer, (200, Value::Bool(true)), "delete {key}");
    }

    /// Every key there is under the prefix, without the prefix.
    async fn keys(&self) -> Vec<String> {
        let (_, keys) = self.request("GET", "kv/ovnet/v1/?keys", "").await;
        let keys = keys.as_array().cloned().unwrap_or_default();
        keys.iter()
            .map(|key| key.as_str().unwrap().trim_start_matches("ovnet/v1/").to_owned())
            .collect()
    }
}

fn pool() -> Pool {
    Pool { subnet: "10.0.0.0/8".parse().unwrap(), size: 24 }
}

fn wanted(name: &str) -> CreateNetwork {
    CreateNetwork { name: name.into(), ..CreateNetwork::default() }
}

fn wanted_subnet(name: &str, subnet: &str) -> CreateNetwork {
    CreateNetwork { subnet: Some(subnet.parse().unwrap()), ..wanted(name) }
}

fn claim(id: &str) -> Claim {
    Claim { id: id.into(), names: vec![format!("name-{id}")], address: None, mac: None }
}

/// The one line a user reads.
fn line<T: std::fmt::Debug>(result: anyhow::Result<T>) -> String {
    let line = format!("{:#}", result.unwrap_err());
    assert!(!line.contains('\n'), "more than one line: {line}");
    line
}

/// Waits until `condition` gives something, looking again every few milliseconds.
async fn eventually<T, F: Future<Output = Option<T>>>(
    what: &str,
    limit: Duration,
    mut condition: impl FnMut() -> F,
) -> T {
    let deadline = Instant::now() + limit;
    loop {
        if let Some(found) = condition().await {
            return found;
        }
        assert!(Instant::now() < deadline, "not within {limit:?}: {what}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}
