//! Bodies of Docker's plugin protocol (libnetwork `drivers/remote/api` and `ipams/remote/api`).
//!
//! Docker sends keys only where they are set, `null` for an empty map, and an empty body where a
//! call has no arguments; newer versions add keys. So everything has a default, and what is unknown
//! is ignored.

use std::collections::BTreeMap;

use serde::{Deserialize, Deserializer, Serialize};
use serde_json::Value;

/// `NetworkDriver.CreateNetwork`.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct CreateNetwork {
    /// Docker's id of the network.
    #[serde(rename = "NetworkID")]
    pub network: String,
    /// Options; those of `-o` are under `com.docker.network.generic`.
    #[serde(rename = "Options", deserialize_with = "nullable")]
    pub options: BTreeMap<String, Value>,
    /// The IPv4 pools.
    #[serde(rename = "IPv4Data", deserialize_with = "nullable")]
    pub ipv4: Vec<IpamData>,
    /// The IPv6 pools.
    #[serde(rename = "IPv6Data", deserialize_with = "nullable")]
    pub ipv6: Vec<IpamData>,
}

/// A pool that a network is made with.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default, rename_all = "PascalCase")]
pub struct IpamData {
    /// The address space, which tells whose IPAM driver made it.
    pub address_space: String,
    /// Subnet in CIDR form.
    pub pool: String,
    /// Gateway in CIDR form.
    pub gateway: String,
    /// Named addresses in CIDR form.
    #[serde(deserialize_with = "nullable")]
    pub aux_addresses: BTreeMap<String, String>,
}

/// A call about a network or an endpoint.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct About {
    /// Docker's id of the network.
    #[serde(rename = "NetworkID")]
    pub network: String,
    /// Docker's id of the endpoint.
    #[serde(rename = "EndpointID")]
    pub endpoint: String,
}

/// `NetworkDriver.CreateEndpoint`.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct CreateEndpoint {
    /// Docker's id of the network.
    #[serde(rename = "NetworkID")]
    pub network: String,
    /// Docker's id of the endpoint.
    #[serde(rename = "EndpointID")]
    pub endpoint: String,
    /// The interface as far as it is decided.
    #[serde(rename = "Interface", deserialize_with = "nullable")]
    pub interface: Interface,
}

/// An endpoint's interface.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default, rename_all = "PascalCase")]
pub struct Interface {
    /// IPv4 address in CIDR form.
    pub address: String,
    /// IPv6 address in CIDR form.
    #[serde(rename = "AddressIPv6")]
    pub address_ipv6: String,
    /// MAC address.
    pub mac_address: String,
}

/// `NetworkDriver.Join`.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct Join {
    /// Docker's id of the network.
    #[serde(rename = "NetworkID")]
    pub network: String,
    /// Docker's id of the endpoint.
    #[serde(rename = "EndpointID")]
    pub endpoint: String,
    /// Path of the sandbox; before Docker 28 it is not there yet at this call.
    #[serde(rename = "SandboxKey")]
    pub sandbox: String,
}

/// Answer of `NetworkDriver.Join`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "PascalCase")]
pub struct Joined {
    /// The interface Docker is to move into the sandbox.
    pub interface_name: InterfaceName,
}

/// Part of [`Joined`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "PascalCase")]
pub struct InterfaceName {
    /// Its name on the host.
    pub src_name: String,
    /// What its name in the sandbox begins with.
    pub dst_prefix: String,
}

/// `IpamDriver.RequestPool`.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default, rename_all = "PascalCase")]
pub struct RequestPool {
    /// Subnet asked for, in CIDR form.
    pub pool: String,
    /// `--ip-range`, in CIDR form.
    pub sub_pool: String,
    /// `--ipam-opt`.
    #[serde(deserialize_with = "nullable")]
    pub options: BTreeMap<String, String>,
    /// Whether the pool is for IPv6.
    #[serde(rename = "V6")]
    pub v6: bool,
}

/// Answer of `IpamDriver.RequestPool`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Pool {
    /// What Docker calls the pool from now on.
    #[serde(rename = "PoolID")]
    pub id: String,
    /// The subnet in CIDR form.
    #[serde(rename = "Pool")]
    pub subnet: String,
    /// Nothing of ours.
    #[serde(rename = "Data")]
    pub data: BTreeMap<String, String>,
}

/// `IpamDriver.RequestAddress`, `ReleaseAddress` and `ReleasePool`.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default, rename_all = "PascalCase")]
pub struct PoolAddress {
    /// The pool.
    #[serde(rename = "PoolID")]
    pub pool: String,
    /// The address, without a prefix length; empty where any will do.
    pub address: String,
    /// What it is for, and from Docker 29 on whose it will be.
    #[serde(deserialize_with = "nullable")]
    pub options: BTreeMap<String, String>,
}

/// Answer of `IpamDriver.RequestAddress`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "PascalCase")]
pub struct Address {
    /// The address in CIDR form.
    pub address: String,
    /// Nothing of ours.
    pub data: BTreeMap<String, String>,
}

/// `AuthZPlugin.AuthZReq`: a request to Docker's API (moby `pkg/authorization/api.go`).
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct Authorization {
    /// HTTP method.
    #[serde(rename = "RequestMethod")]
    pub method: String,
    /// Path and query.
    #[serde(rename = "RequestUri")]
    pub uri: String,
}

fn nullable<'de, D: Deserializer<'de>, T: Default + Deserialize<'de>>(
    deserializer: D,
) -> Result<T, D::Error> {
    Ok(Option::<T>::deserialize(deserializer)?.unwrap_or_default())
}
