//! Docker's plugin protocol, version 1: `POST /NetworkDriver.…`, `/IpamDriver.…` and
//! `/AuthZPlugin.…` on a unix socket (moby `pkg/plugins`, libnetwork `docs/remote.md` and
//! `docs/ipam.md`).
//!
//! An answer other than 200 carries `{"Err": "…"}`, which Docker shows to the user word for word,
//! for both kinds of driver. Docker waits for an answer for ever, so every call has a deadline.

#[cfg(test)]
mod tests;
pub mod types;

use std::{collections::BTreeMap, path::Path, sync::Arc, time::Duration};

use anyhow::{Context as _, Result, anyhow};
use axum::{
    Router,
    body::to_bytes,
    extract::{Request, State},
    http::{Method, StatusCode, header::CONTENT_TYPE},
    response::{IntoResponse, Response},
};
use serde::{Serialize, de::DeserializeOwned};
use serde_json::{Value, json};

use tokio::{net::UnixListener, sync::watch};

use super::driver::{ADDRESS_SPACES, Driver};
use crate::{
    api::{
        http::{Bounds, Server},
        socket::Socket,
    },
    service::{Records, Wiring, one_line},
};

/// What a client may cost. The largest body is what the guard is shown of a request to Docker's API.
const BOUNDS: Bounds = Bounds {
    connections: 128,
    body: 4 * 1024 * 1024,
    request: Duration::from_secs(10),
    refuse: error,
};
/// The socket, in messages.
const NAME: &str = "the socket of Docker's plugin";
/// How long a call may take; what waits for Consul has shorter deadlines of its own.
const DEADLINE: Duration = Duration::from_secs(30);
/// The content type of Docker's own answers.
const CONTENT: &str = "application/vnd.docker.plugins.v1.2+json";

/// Where Docker looks for a plugin named `ovnet`.
pub const SOCKET: &str = "/run/docker/plugins/ovnet.sock";
/// How long calls under way may take once the agent is asked to end.
const GRACE: Duration = Duration::from_secs(5);

/// The plugin's socket: bound by the agent, or by systemd, which keeps it while there is no agent.
#[derive(Debug)]
pub enum PluginSocket {
    /// The agent's own; gone with the agent, because a socket that nobody answers on keeps Docker
    /// waiting whatever it is asked.
    Bound(Socket),
    /// Handed over.
    Passed(UnixListener),
}

impl PluginSocket {
    /// The socket handed over, else one bound at [`SOCKET`].
    pub fn open(passed: Option<std::os::unix::net::UnixListener>) -> Result<Self> {
        match passed {
            Some(listener) => {
                let listener = UnixListener::from_std(listener).context("the plugin's socket")?;
                Ok(Self::Passed(listener))
            }
            None => Ok(Self::Bound(Socket::bind(Path::new(SOCKET), None)?)),
        }
    }
}

/// Answers Docker until the agent ends.
pub async fn serve<R: Records, W: Wiring>(
    socket: PluginSocket,
    driver: Driver<R, W>,
    mut ending: watch::Receiver<bool>,
) -> Result<()> {
    let stop = async move {
        // An error means that the agent is gone, which is an end too.
        let _ = ending.wait_for(|ending| *ending).await;
    };
    let server = Server::new(NAME, router(driver), BOUNDS);
    match socket {
        PluginSocket::Bound(socket) => server.serve(socket, stop, GRACE).await,
        PluginSocket::Passed(listener) => server.serve_on(listener, stop, GRACE).await,
    }
    Ok(())
}

/// Answers every call with this line, for a Docker that would wait for ever where systemd keeps the
/// socket of an agent that does not serve it.
pub async fn refuse(listener: std::os::unix::net::UnixListener, line: String) -> Result<()> {
    let listener = UnixListener::from_std(listener).context("the plugin's socket")?;
    let answer = move || {
        let line = line.clone();
        async move { error(StatusCode::INTERNAL_SERVER_ERROR, &line) }
    };
    let server = Server::new(NAME, Router::new().fallback(answer), BOUNDS);
    server.serve_on(listener, std::future::pending(), GRACE).await;
    Ok(())
}

/// The routes, for a server on the plugin's socket.
fn router<R: Records, W: Wiring>(driver: Driver<R, W>) -> Router {
    Router::new().fallback(answer::<R, W>).with_state(Arc::new(driver))
}

async fn answer<R: Records, W: Wiring>(
    State(driver): State<Arc<Driver<R, W>>>,
    request: Request,
) -> Response {
    let path = request.uri().path().trim_start_matches('/').to_owned();
    if request.method() != Method::POST {
        return error(StatusCode::METHOD_NOT_ALLOWED, "Docker's plugin protocol is POST only");
    }
    // It is there whole: the server has waited for it.
    let body = match to_bytes(request.into_body(), BOUNDS.body).await {
        Ok(body) => body,
        Err(why) => return error(StatusCode::BAD_REQUEST, &format!("{path}: {why}")),
    };
    // A call goes on when Docker hangs up: half an endpoint must not be what remains.
    let call = tokio::spawn(async move { call(&driver, &path, &body).await });
    match tokio::time::timeout(DEADLINE, call).await {
        Ok(Ok(Ok(Some(answer)))) => ok(&answer),
        Ok(Ok(Ok(None))) => error(StatusCode::NOT_FOUND, "ovnet has no such call"),
        Ok(Ok(Err(why))) => error(StatusCode::INTERNAL_SERVER_ERROR, &one_line(&why)),
        Ok(Err(why)) => {
            error(StatusCode::INTERNAL_SERVER_ERROR, &format!("the agent gave the call up: {why}"))
        }
        Err(_) => error(
            StatusCode::GATEWAY_TIMEOUT,
            &format!("the agent took longer than {DEADLINE:?}: see its log"),
        ),
    }
}

/// Carries one call out; `None` where there is no such call.
async fn call<R: Records, W: Wiring>(
    driver: &Driver<R, W>,
    path: &str,
    body: &[u8],
) -> Result<Option<Value>> {
    // What goes to Docker's API may hold secrets.
    if !path.starts_with("AuthZPlugin") {
        tracing::debug!(path, body = %String::from_utf8_lossy(body), "Docker calls");
    }
    let nothing = || json!({});
    let result = match path {
        "Plugin.Activate" => Ok(json!({"Implements": ["NetworkDriver", "IpamDriver", "authz"]})),
        "NetworkDriver.GetCapabilities" => {
            Ok(json!({"Scope": "local", "ConnectivityScope": "global"}))
        }
        "IpamDriver.GetCapabilities" => {
            Ok(json!({"RequiresMACAddress": false, "RequiresRequestReplay": true}))
        }
        "IpamDriver.GetDefaultAddressSpaces" => {
            let [local, global] = ADDRESS_SPACES;
            Ok(json!({"LocalDefaultAddressSpace": local, "GlobalDefaultAddressSpace": global}))
        }
        "IpamDriver.RequestPool" => to_value(driver.request_pool(parse(body)?).await),
        "IpamDriver.ReleasePool" => {
            let about: types::PoolAddress = parse(body)?;
            driver.release_pool(&about.pool).await;
            Ok(nothing())
        }
        "IpamDriver.RequestAddress" => to_value(driver.request_address(parse(body)?).await),
        "IpamDriver.ReleaseAddress" => {
            driver.release_address(&parse(body)?).await;
            Ok(nothing())
        }
        "NetworkDriver.GwAllocCheck" => Ok(json!({"SkipIPv4": false, "SkipIPv6": false})),
        "NetworkDriver.CreateNetwork" => {
            driver.create_network(parse(body)?).await.map(|()| nothing())
        }
        "NetworkDriver.DeleteNetwork" => {
            let about: types::About = parse(body)?;
            driver.delete_network(&about.network).await.map(|()| nothing())
        }
        "NetworkDriver.CreateEndpoint" => {
            driver.create_endpoint(parse(body)?).await.map(|mac| match mac {
                Some(mac) => json!({"Interface": {"MacAddress": mac}}),
                // Docker takes an answer to what it decided itself for an error.
                None => json!({"Interface": {}}),
            })
        }
        "NetworkDriver.Join" => to_value(driver.join(parse(body)?).await),
        "NetworkDriver.DeleteEndpoint" => {
            let about: types::About = parse(body)?;
            driver.delete_endpoint(&about.endpoint).await.map(|()| nothing())
        }
        "NetworkDriver.EndpointOperInfo" => {
            parse::<types::About>(body).map(|_| json!({"Value": {}}))
        }
        // Docker moves the interface out between Leave and DeleteEndpoint, where all is undone.
        // Ports are Docker's own affair, and nodes are Swarm's.
        "NetworkDriver.Leave"
        | "NetworkDriver.ProgramExternalConnectivity"
        | "NetworkDriver.RevokeExternalConnectivity"
        | "NetworkDriver.DiscoverNew"
        | "NetworkDriver.DiscoverDelete" => {
            parse::<BTreeMap<String, Value>>(body).map(|_| nothing())
        }
        "AuthZPlugin.AuthZReq" => Ok(match driver.objection(&parse(body)?).await {
            None => json!({"Allow": true}),
            Some(why) => json!({"Allow": false, "Msg": why}),
        }),
        "AuthZPlugin.AuthZRes" => Ok(json!({"Allow": true})),
        "NetworkDriver.AllocateNetwork" | "NetworkDriver.FreeNetwork" => {
            Err(anyhow!("ovnet networks are of one host's Docker each and not Swarm's to make"))
        }
        _ => return Ok(None),
    };
    if let Err(why) = &result {
        tracing::info!(path, "refused: {}", one_line(why));
    }
    result.map(Some)
}

/// Reads a call's arguments. An empty body is none: Docker sends one when it repeats a call whose
/// body it has already sent, and has arguments for all calls that come here.
fn parse<T: DeserializeOwned>(body: &[u8]) -> Result<T> {
    anyhow::ensure!(!body.is_empty(), "the connection broke in the middle of it: try again");
    serde_json::from_slice(body).context("the call cannot be read")
}

fn to_value<T: Serialize>(result: Result<T>) -> Result<Value> {
    Ok(serde_json::to_value(result?)?)
}

fn ok(answer: &Value) -> Response {
    ([(CONTENT_TYPE, CONTENT)], answer.to_string()).into_response()
}

fn error(status: StatusCode, line: &str) -> Response {
    (status, [(CONTENT_TYPE, CONTENT)], json!({"Err": line}).to_string()).into_response()
}
