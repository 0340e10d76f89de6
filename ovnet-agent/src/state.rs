//! What this host remembers of its own endpoints: one JSON file each in the state folder.
//!
//! Consul holds what others must know; these files hold what only this host knows (which sandbox,
//! which interface) and enough of the network to go on without Consul. How they are written so that
//! a cut at any byte leaves the old file or the new one is in [`crate::durable`].

use std::{
    collections::BTreeSet,
    fs,
    net::Ipv4Addr,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result};
use serde::{Deserialize, Serialize};

use crate::{
    consul::schema::{EndpointRecord, NetworkRecord},
    durable::{Folder, Loaded},
    publish::PublishedPort,
};

/// An endpoint of this host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LocalEndpoint {
    /// The record as Consul has, or must have, it.
    pub record: EndpointRecord,
    /// The network as it was when last read.
    pub network: NetworkRecord,
    /// Path of the sandbox's network namespace.
    pub netns: PathBuf,
    /// Name of the interface inside the sandbox; empty where Docker moves and names it.
    pub ifname: String,
    /// Name of the host-side veth, `ovnet` and 8 hexadecimal digits.
    pub host_ifname: String,
    /// The MTU of the pair in bytes.
    pub mtu: u32,
    /// What Docker calls it, where Docker made it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub docker: Option<DockerEndpoint>,
    /// Its sandbox's way out, which endpoints of one sandbox share.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gateway: Option<GatewayPort>,
    /// The ports of this host that lead to it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub ports: Vec<PublishedPort>,
}

/// A sandbox's interface on a gwbridge: its default route, and where published ports are delivered.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GatewayPort {
    /// The bridge: `ovnet_gwbridge`, or `docker_gwbridge` where Docker made it.
    pub bridge: String,
    /// The bridge's port: the end of the veth pair that stays on the host.
    pub host_ifname: String,
    /// The end inside the sandbox.
    pub ifname: String,
    /// Its address.
    pub address: Ipv4Addr,
    /// Its MAC.
    pub mac: String,
}

/// An endpoint as Docker knows it. Its endpoint id is the one of the record.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DockerEndpoint {
    /// Docker's id of the network: 64 hexadecimal digits, another one on each host.
    pub network: String,
    /// Docker's id of the container, once it is known: the plugin's calls do not tell.
    #[serde(default)]
    pub container: Option<String>,
}

/// The folder of files.
#[derive(Debug)]
pub struct StateFolder(Folder);

impl StateFolder {
    /// Opens `<folder>/endpoints`, making it, readable by root only, where it is missing.
    pub fn open(folder: &Path) -> Result<Self> {
        use std::os::unix::fs::PermissionsExt as _;
        let endpoints = Folder::open(&folder.join("endpoints"))?;
        let mode = || format!("restrict the state folder {} to root", folder.display());
        let now = fs::metadata(folder).with_context(mode)?.permissions().mode();
        if now & 0o777 != 0o700 {
            fs::set_permissions(folder, fs::Permissions::from_mode(0o700)).with_context(mode)?;
        }
        Ok(Self(endpoints))
    }

    /// Every endpoint that can be read, by id; the files that cannot are set aside.
    pub fn load(&self) -> Result<Loaded<LocalEndpoint>> {
        self.0.load(|endpoint: &LocalEndpoint| &endpoint.record.id)
    }

    /// The ids of all endpoints that have a file.
    pub fn ids(&self) -> Result<BTreeSet<String>> {
        self.0.ids()
    }

    /// The ids of endpoints whose file was set aside and that have no other.
    pub fn set_aside(&self) -> Result<BTreeSet<String>> {
        self.0.set_aside()
    }

    /// Writes or replaces an endpoint's file, on disk before this returns.
    pub fn store(&self, endpoint: &LocalEndpoint) -> Result<()> {
        self.0.store(&endpoint.record.id, endpoint).context("keep the endpoint's state")
    }

    /// Removes an endpoint's file; one that is not there is no error.
    pub fn remove(&self, id: &str) -> Result<()> {
        self.0.remove(id).context("forget the endpoint's state")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::consul::schema::{EndpointState, VERSION, format_mac, mac_of};

    fn endpoint(id: &str) -> LocalEndpoint {
        let address = [10, 0, 0, 2].into();
        LocalEndpoint {
            record: EndpointRecord {
                v: VERSION,
                id: id.into(),
                address,
                mac: format_mac(mac_of(address)),
                host: "docker01".into(),
                names: vec!["t1".into()],
                state: EndpointState::Up,
            },
            network: NetworkRecord {
                v: VERSION,
                id: "net".into(),
                name: "ov_net1".into(),
                vni: 4096,
                subnet: "10.0.0.0/24".parse().unwrap(),
                gateway: [10, 0, 0, 1].into(),
                ip_range: None,
                aux: Default::default(),
                mtu: None,
                internal: false,
                options: Default::default(),
                labels: Default::default(),
                created_by: "docker02".into(),
            },
            netns: "/run/netns/t1".into(),
            ifname: "eth0".into(),
            host_ifname: "ovnet01234567".into(),
            mtu: 1450,
            docker: None,
            gateway: None,
            ports: Vec::new(),
        }
    }

    #[test]
    fn what_is_stored_is_loaded_and_what_is_removed_is_gone() {
        let folder = tempfile::tempdir().unwrap();
        let state = StateFolder::open(folder.path()).unwrap();
        let load = || state.load().unwrap().objects;
        state.store(&endpoint("a")).unwrap();
        state.store(&endpoint("b")).unwrap();
        assert_eq!(load(), [endpoint("a"), endpoint("b")]);
        state.remove("a").unwrap();
        state.remove("a").unwrap();
        assert_eq!(load(), [endpoint("b")]);
    }

    #[test]
    fn a_file_cut_at_any_byte_is_set_aside_and_never_taken_for_another() {
        let folder = tempfile::tempdir().unwrap();
        let state = StateFolder::open(folder.path()).unwrap();
        state.store(&endpoint("a")).unwrap();
        let whole = fs::read(folder.path().join("endpoints/a.json")).unwrap();
        for cut in 0..whole.len() {
            fs::write(folder.path().join("endpoints/b.json"), &whole[..cut]).unwrap();
            let loaded = state.load().unwrap();
            assert_eq!((loaded.objects, loaded.set_aside), (vec![endpoint("a")], 1), "at {cut}");
        }
        assert_eq!(state.set_aside().unwrap(), BTreeSet::from(["b".to_owned()]));
    }
}
