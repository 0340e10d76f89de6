//! The API of this host's Docker daemon, as far as the agent asks it anything. The only user of
//! bollard; what the methods take and return are types of our own.
//!
//! Every call is bounded in time: while dockerd starts it accepts connections and answers nothing,
//! and it does not describe a container while that container starts.

mod choice;
mod convert;
#[cfg(test)]
mod tests;
mod types;

use std::{
    collections::BTreeMap,
    io,
    net::Ipv4Addr,
    time::{Duration, SystemTime},
};

use anyhow::{Context as _, Result, anyhow};
use bollard::{
    API_DEFAULT_VERSION, BollardRequest, ClientVersion, Docker,
    errors::Error as DockerError,
    models::NetworkCreateRequest,
    query_parameters::{
        EventsOptions, InspectContainerOptions, InspectNetworkOptions, ListNetworksOptions,
    },
};
use futures::{StreamExt as _, stream::BoxStream};
use http_body_util::{Either, Full};

pub use self::{
    choice::DockerChoice,
    types::{ContainerNames, DockerNetwork, EndpointNames, Event},
};
use crate::consul::schema::NetworkRecord;

/// Name of our network and IPAM driver, as `docker network create -d` takes it.
pub const DRIVER: &str = "ovnet";
/// The driver option and IPAM option by which a Docker network says which network it stands for.
pub const ID_OPTION: &str = "ovnet.id";
/// Docker's option for the MTU of a network's interfaces, in bytes.
pub const MTU_OPTION: &str = "com.docker.network.driver.mtu";

/// The bridge network over which Docker gives containers their way out, and its interface.
pub const GWBRIDGE: &str = "docker_gwbridge";
/// The API since which a network says whether it has IPv4; before, all have.
const IPV4_SWITCH: ClientVersion = ClientVersion { major_version: 1, minor_version: 48 };
/// How long a question may take.
const ANSWER: Duration = Duration::from_secs(10);
/// How long making or removing a network may take: Docker calls our plugin in the middle of it,
/// which asks Consul.
const WORK: Duration = Duration::from_secs(30);

/// A daemon that answered. Clones share everything; no connection is kept between calls.
#[derive(Clone, Debug)]
pub struct Daemon {
    docker: Docker,
    /// What is spoken with it.
    version: ClientVersion,
    address: String,
    /// By what it was found.
    choice: DockerChoice,
}

impl Daemon {
    /// Asks the daemon at an address what it speaks, and goes by that. An error where nothing
    /// there answers in time. Afterwards nothing is asked where the choice says that this daemon
    /// is not there any more.
    pub async fn connect(choice: &DockerChoice, address: &str) -> Result<Self> {
        let ask = async {
            // The client itself names no version in its requests, which every daemon takes.
            let docker = open(address)?;
            let version = in_time(ANSWER, docker.version()).await.map_err(explain)?;
            let theirs = version.api_version.as_deref().and_then(parse_version);
            let theirs = theirs.context("its answer lacks the API version")?;
            let ours = *API_DEFAULT_VERSION;
            anyhow::Ok((docker, if theirs < ours { theirs } else { ours }))
        };
        let (docker, version) = ask.await.with_context(|| format!("ask Docker at {address}"))?;
        let docker = docker.with_request_modifier(move |request| versioned(request, version));
        Ok(Self { docker, version, address: address.to_owned(), choice: choice.clone() })
    }

    /// Whether it is there, without asking it: a connection may start a daemon that was stopped.
    pub fn is_there(&self) -> bool {
        self.choice.address().as_deref() == Some(&self.address)
    }

    /// All networks of this host, those of other drivers too.
    pub async fn networks(&self) -> Result<Vec<DockerNetwork>> {
        let list = self.docker.list_networks(None::<ListNetworksOptions>);
        let list =
            self.ask(ANSWER, list).await.map_err(explain).context("list Docker's networks")?;
        Ok(list.into_iter().filter_map(convert::listed).collect())
    }

    /// One network by Docker's id or its name; `None` where Docker has none, also while it is
    /// being made.
    pub async fn network(&self, id: &str) -> Result<Option<DockerNetwork>> {
        let network = self.inspect(id).await?;
        Ok(network.and_then(|network| convert::inspected(&network)))
    }

    /// The endpoints in a network by their ids, each with Docker's id of its container, which is
    /// `None` while the container only starts. `None` where Docker has no such network.
    pub async fn endpoints_of(
        &self,
        network: &str,
    ) -> Result<Option<BTreeMap<String, Option<String>>>> {
        Ok(self.inspect(network).await?.map(convert::endpoints))
    }

    /// Makes this host's Docker network for a network, and returns Docker's id of it.
    pub async fn create_network(&self, network: &NetworkRecord) -> Result<String> {
        self.create(convert::create_request(network)).await
    }

    /// Removes a network; one that is gone is no error. Docker refuses while containers use it.
    pub async fn remove_network(&self, id: &str) -> Result<()> {
        match self.ask(WORK, self.docker.remove_network(id)).await {
            Err(error) if is_missing(&error) => Ok(()),
            other => other.map_err(explain).with_context(|| format!("remove Docker network {id}")),
        }
    }

    /// What a container is called, and its ports; `None` where Docker has no such container. Takes as long as
    /// the container's start, where it is just starting.
    pub async fn names_of(&self, container: &str) -> Result<Option<ContainerNames>> {
        let inspect = self.docker.inspect_container(container, None::<InspectContainerOptions>);
        match self.ask(ANSWER, inspect).await {
            Err(error) if is_missing(&error) => Ok(None),
            Err(error) => Err(explain(error).context(format!("inspect container {container}"))),
            Ok(found) => Ok(Some(convert::names(found))),
        }
    }

    /// The gateway address of `docker_gwbridge`; `None` where Docker has no such network.
    pub async fn gwbridge(&self) -> Result<Option<Ipv4Addr>> {
        let Some(found) = self.network(GWBRIDGE).await? else { return Ok(None) };
        // Where a user made it and named no gateway, Docker took the first address and does not
        // say so.
        let first = found.subnet.filter(|_| found.ip_range.is_none() && found.aux.is_empty());
        let first = first.and_then(|subnet| subnet.hosts().next());
        let gateway = found.gateway.or(first);
        gateway.map(Some).with_context(|| format!("Docker network {GWBRIDGE} has no gateway"))
    }

    /// Makes `docker_gwbridge` the way Docker makes it. Returns its gateway address.
    pub async fn make_gwbridge(&self) -> Result<Ipv4Addr> {
        let request = convert::gwbridge_request(self.version >= IPV4_SWITCH);
        let made = self.create(request).await;
        // Docker may have made it at the same moment, for a container of its own.
        match self.gwbridge().await? {
            Some(address) => Ok(address),
            None => Err(made.err().unwrap_or_else(|| anyhow!("Docker lost network {GWBRIDGE}"))),
        }
    }

    /// What happens to networks and containers from this call on. Ends with the connection.
    pub fn events(&self) -> BoxStream<'static, Event> {
        // The client only asks when the stream is first polled. Docker keeps the latest events, so
        // saying since when makes up for that.
        let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        let since = format!("{}.{:09}", since.as_secs(), since.subsec_nanos());
        let events = self.docker.events(Some(EventsOptions {
            since: Some(since),
            filters: Some(convert::event_filters()),
            until: None,
        }));
        if !self.is_there() {
            return futures::stream::empty().boxed();
        }
        let events = events.take_while(|event| {
            if let Err(error) = event {
                tracing::debug!(%error, "Docker's events ended");
            }
            std::future::ready(event.is_ok())
        });
        events.filter_map(|event| async { convert::event(event.ok()?) }).boxed()
    }

    async fn inspect(&self, id: &str) -> Result<Option<bollard::models::NetworkInspect>> {
        let inspect = self.docker.inspect_network(id, None::<InspectNetworkOptions>);
        match self.ask(ANSWER, inspect).await {
            Err(error) if is_missing(&error) => Ok(None),
            Err(error) => Err(explain(error).context(format!("inspect Docker network {id}"))),
            Ok(found) => Ok(Some(found)),
        }
    }

    async fn create(&self, request: NetworkCreateRequest) -> Result<String> {
        let what = format!("create Docker network {}", request.name);
        // Without this word Docker before 25 makes a second network of one name.
        let mut body = serde_json::to_value(&request).context(what.clone())?;
        body["CheckDuplicate"] = true.into();
        let body = body.to_string();
        let version = self.version;
        let docker = self.docker.clone().with_request_modifier(move |request| {
            versioned(request, version).map(|_| Either::Left(Full::from(body.clone())))
        });
        let made = self.ask(WORK, docker.create_network(request)).await;
        Ok(made.map_err(explain).context(what)?.id)
    }

    /// An answer in time. Each question is a new connection, so nothing is asked of a daemon that
    /// is not there.
    async fn ask<T>(
        &self,
        deadline: Duration,
        call: impl Future<Output = Result<T, DockerError>>,
    ) -> Result<T, DockerError> {
        if !self.is_there() {
            let err = io::Error::new(io::ErrorKind::NotConnected, "Docker stops");
            return Err(DockerError::IOError { err });
        }
        in_time(deadline, call).await
    }
}

fn open(address: &str) -> Result<Docker> {
    // Ours are the shorter deadlines; this one only counts up to an answer's header.
    let deadline = WORK.as_secs();
    Ok(if address.starts_with("unix://") {
        Docker::connect_with_unix(address, deadline, API_DEFAULT_VERSION)?
    } else {
        Docker::connect_with_http(address, deadline, API_DEFAULT_VERSION)?
    })
}

/// Puts the version in front of a request's path, so that the answer is what the client knows.
fn versioned(mut request: BollardRequest, version: ClientVersion) -> BollardRequest {
    let mut parts = request.uri().clone().into_parts();
    let path = parts.path_and_query.as_ref().map_or("/", |path| path.as_str());
    // Joining two good paths makes a good one; otherwise Docker takes the request as it is.
    if let Ok(path) = format!("/v{version}{path}").parse() {
        parts.path_and_query = Some(path);
    }
    if let Ok(uri) = hyper::Uri::from_parts(parts) {
        *request.uri_mut() = uri;
    }
    request
}

fn parse_version(text: &str) -> Option<ClientVersion> {
    let (major, minor) = text.split_once('.')?;
    Some(ClientVersion { major_version: major.parse().ok()?, minor_version: minor.parse().ok()? })
}

async fn in_time<T>(
    deadline: Duration,
    call: impl Future<Output = Result<T, DockerError>>,
) -> Result<T, DockerError> {
    tokio::time::timeout(deadline, call).await.unwrap_or(Err(DockerError::RequestTimeoutError))
}

fn is_missing(error: &DockerError) -> bool {
    matches!(error, DockerError::DockerResponseServerError { status_code: 404, .. })
}

/// What users read: Docker's own words where it has any.
fn explain(error: DockerError) -> anyhow::Error {
    match error {
        DockerError::DockerResponseServerError { message, .. } => {
            anyhow!("Docker says: {}", message.trim().replace('\n', " "))
        }
        DockerError::RequestTimeoutError => anyhow!("Docker did not answer in time"),
        DockerError::HyperLegacyError { err } => {
            let error = anyhow!(err);
            anyhow!("no answer from Docker: {}", error.root_cause())
        }
        other => anyhow!(other),
    }
}
