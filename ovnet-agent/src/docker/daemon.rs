//! The API of this host's Docker daemon, as far as the agent asks it anything. The only user of
//! bollard; what the methods take and return are types of our own.
//!
//! Every call is bounded in time: while dockerd starts it accepts connections and answers nothing,
//! and it does not describe a container while that container starts.

mod convert;
#[cfg(test)]
mod tests;

use std::{
    collections::BTreeMap,
    net::Ipv4Addr,
    path::Path,
    str::FromStr,
    time::{Duration, SystemTime},
};

use anyhow::{Context as _, Result, anyhow, bail};
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
use ipnet::Ipv4Net;

use crate::consul::schema::NetworkRecord;

/// Name of our network and IPAM driver, as `docker network create -d` takes it.
pub const DRIVER: &str = "ovnet";
/// The driver option and IPAM option by which a Docker network says which network it stands for.
pub const ID_OPTION: &str = "ovnet.id";
/// Docker's option for the MTU of a network's interfaces, in bytes.
pub const MTU_OPTION: &str = "com.docker.network.driver.mtu";

/// The bridge network over which Docker gives containers their way out.
const GWBRIDGE: &str = "docker_gwbridge";
/// Where a daemon listens by default; both are one folder on most systems.
const SOCKETS: [&str; 2] = ["/run/docker.sock", "/var/run/docker.sock"];
/// How long a question may take.
const ANSWER: Duration = Duration::from_secs(10);
/// How long making or removing a network may take: Docker calls our plugin in the middle of it,
/// which asks Consul.
const WORK: Duration = Duration::from_secs(30);

/// Which daemon, if any: the value of `--docker`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum DockerChoice {
    /// The one whose socket is in the usual place, whenever there is one.
    #[default]
    Auto,
    /// None.
    Off,
    /// The one at this address, `unix:///…` or `tcp://…`.
    Address(String),
}

impl DockerChoice {
    /// The address of the daemon as things are now; `None` where there is none.
    pub fn address(&self) -> Option<String> {
        match self {
            Self::Off => None,
            Self::Address(address) => Some(address.clone()),
            Self::Auto => SOCKETS
                .iter()
                .find(|socket| Path::new(socket).exists())
                .map(|socket| format!("unix://{socket}")),
        }
    }
}

impl FromStr for DockerChoice {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        Ok(match text {
            "auto" => Self::Auto,
            "off" => Self::Off,
            path if path.starts_with('/') => Self::Address(format!("unix://{path}")),
            address
                if ["unix:///", "tcp://", "http://"]
                    .iter()
                    .any(|scheme| address.len() > scheme.len() && address.starts_with(scheme)) =>
            {
                Self::Address(address.to_owned())
            }
            other => bail!("{other:?} is not auto, off, /PATH, unix:///PATH or tcp://HOST:PORT"),
        })
    }
}

/// A network as Docker describes it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DockerNetwork {
    /// Docker's id of it, 64 hexadecimal digits, another one on each host.
    pub id: String,
    /// Its name.
    pub name: String,
    /// Name of its driver, ours or another one.
    pub driver: String,
    /// Driver options, `-o`.
    pub options: BTreeMap<String, String>,
    /// Labels.
    pub labels: BTreeMap<String, String>,
    /// Whether it has no way out.
    pub internal: bool,
    /// Its first IPv4 subnet.
    pub subnet: Option<Ipv4Net>,
    /// The gateway's address in that subnet.
    pub gateway: Option<Ipv4Addr>,
    /// Part of the subnet that addresses are chosen from.
    pub ip_range: Option<Ipv4Net>,
    /// Named addresses that belong to the network.
    pub aux: BTreeMap<String, Ipv4Addr>,
    /// When it was made: RFC 3339 text, as Docker wrote it.
    pub created: String,
}

impl DockerNetwork {
    /// Whether our driver has it.
    pub fn is_ours(&self) -> bool {
        self.driver == DRIVER
    }

    /// The id of the network it was made to stand for, where the agent made it.
    pub fn stands_for(&self) -> Option<&str> {
        self.options.get(ID_OPTION).map(String::as_str)
    }
}

/// Which container an endpoint belongs to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EndpointOwner {
    /// Docker's id of the container; `None` while the container only starts.
    pub container: Option<String>,
    /// The container's name.
    pub name: String,
}

/// What a container is called, and its endpoints.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ContainerNames {
    /// Docker's id of it.
    pub id: String,
    /// Its name, without the slash Docker puts before it.
    pub name: String,
    /// Its endpoints.
    pub endpoints: Vec<EndpointNames>,
}

/// What a container is called in one network.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct EndpointNames {
    /// Docker's id of the network.
    pub network: String,
    /// Docker's id of the endpoint.
    pub endpoint: String,
    /// Aliases, and the other names Docker's own DNS server has for it.
    pub aliases: Vec<String>,
}

/// Something that happened in Docker.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// A network, of any driver, was made.
    NetworkCreated {
        /// Docker's id of it.
        id: String,
        /// Its name.
        name: String,
    },
    /// A network, of any driver, was removed.
    NetworkDestroyed {
        /// Docker's id of it.
        id: String,
    },
    /// A container got an endpoint in a network.
    Connected {
        /// Docker's id of the network.
        network: String,
        /// Docker's id of the container.
        container: String,
    },
    /// A container lost its endpoint in a network.
    Disconnected {
        /// Docker's id of the network.
        network: String,
        /// Docker's id of the container.
        container: String,
    },
    /// A container has another name.
    Renamed {
        /// Docker's id of it.
        container: String,
    },
    /// A container started.
    Started {
        /// Docker's id of it.
        container: String,
    },
    /// A container ended.
    Died {
        /// Docker's id of it.
        container: String,
    },
}

/// A daemon that answered. Clones share everything; no connection is kept between calls.
#[derive(Clone, Debug)]
pub struct Daemon {
    docker: Docker,
    address: String,
}

impl Daemon {
    /// Asks the daemon at an address what it speaks, and goes by that. An error where nothing
    /// there answers in time.
    pub async fn connect(address: &str) -> Result<Self> {
        let asked = async {
            // A daemon refuses a version it does not know yet, so the first question has none.
            let unversioned =
                open(address, API_DEFAULT_VERSION)?.with_request_modifier(without_version);
            let version = in_time(ANSWER, unversioned.version()).await.map_err(explain)?;
            let theirs = version.api_version.as_deref().and_then(parse_version);
            let theirs = theirs.context("its answer lacks the API version")?;
            let ours = *API_DEFAULT_VERSION;
            open(address, if theirs < ours { &theirs } else { &ours })
        };
        let docker = asked.await.with_context(|| format!("ask Docker at {address}"))?;
        Ok(Self { docker, address: address.to_owned() })
    }

    /// The address it answers at.
    pub fn address(&self) -> &str {
        &self.address
    }

    /// All networks of this host, those of other drivers too.
    pub async fn networks(&self) -> Result<Vec<DockerNetwork>> {
        let list = self.docker.list_networks(None::<ListNetworksOptions>);
        let list =
            in_time(ANSWER, list).await.map_err(explain).context("list Docker's networks")?;
        Ok(list.into_iter().filter_map(convert::listed).collect())
    }

    /// One network by Docker's id or its name; `None` where Docker has none, also while it is
    /// being made.
    pub async fn network(&self, id: &str) -> Result<Option<DockerNetwork>> {
        let network = self.inspect(id).await?;
        Ok(network.and_then(|network| convert::inspected(&network)))
    }

    /// The endpoints in a network by their ids; `None` where Docker has no such network.
    pub async fn endpoints_of(
        &self,
        network: &str,
    ) -> Result<Option<BTreeMap<String, EndpointOwner>>> {
        Ok(self.inspect(network).await?.map(convert::endpoints))
    }

    /// Makes this host's Docker network for a network, and returns Docker's id of it.
    pub async fn create_network(&self, network: &NetworkRecord) -> Result<String> {
        self.create(convert::create_request(network)).await
    }

    /// Removes a network; one that is gone is no error. Docker refuses while containers use it.
    pub async fn remove_network(&self, id: &str) -> Result<()> {
        match in_time(WORK, self.docker.remove_network(id)).await {
            Err(error) if is_missing(&error) => Ok(()),
            other => other.map_err(explain).with_context(|| format!("remove Docker network {id}")),
        }
    }

    /// What a container is called; `None` where Docker has no such container. Takes as long as
    /// the container's start, where it is just starting.
    pub async fn names_of(&self, container: &str) -> Result<Option<ContainerNames>> {
        let inspect = self.docker.inspect_container(container, None::<InspectContainerOptions>);
        match in_time(ANSWER, inspect).await {
            Err(error) if is_missing(&error) => Ok(None),
            Err(error) => Err(explain(error).context(format!("inspect container {container}"))),
            Ok(found) => Ok(Some(convert::names(found))),
        }
    }

    /// The gateway address of `docker_gwbridge`, which is made the way Docker makes it where it
    /// is missing.
    pub async fn ensure_gwbridge(&self) -> Result<Ipv4Addr> {
        let gateway = |found: DockerNetwork| {
            found.gateway.with_context(|| format!("Docker network {GWBRIDGE} has no gateway"))
        };
        if let Some(found) = self.network(GWBRIDGE).await? {
            return gateway(found);
        }
        let made = self.create(convert::gwbridge_request()).await;
        // Docker may have made it at the same moment, for a container of its own.
        match self.network(GWBRIDGE).await? {
            Some(found) => gateway(found),
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
        match in_time(ANSWER, inspect).await {
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
        let docker = self.docker.clone().with_request_modifier(move |request| {
            request.map(|_| Either::Left(Full::from(body.clone())))
        });
        let made = in_time(WORK, docker.create_network(request)).await;
        Ok(made.map_err(explain).context(what)?.id)
    }
}

fn open(address: &str, version: &ClientVersion) -> Result<Docker> {
    // Ours are the shorter deadlines; this one only counts up to an answer's header.
    let deadline = WORK.as_secs();
    Ok(if address.starts_with("unix://") {
        Docker::connect_with_unix(address, deadline, version)?
    } else {
        Docker::connect_with_http(address, deadline, version)?
    })
}

/// Takes `/v1.53` off the front of a request's path.
fn without_version(mut request: BollardRequest) -> BollardRequest {
    let path = request.uri().path();
    let rest = path.get(1..).and_then(|path| path.find('/').map(|slash| &path[slash..]));
    let mut parts = request.uri().clone().into_parts();
    parts.path_and_query = rest.and_then(|rest| rest.parse().ok());
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
        other => anyhow!(other),
    }
}
