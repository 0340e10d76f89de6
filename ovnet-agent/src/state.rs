//! What this host remembers of its own endpoints: one JSON file each in the state folder.
//!
//! Consul holds what others must know; these files hold what only this host knows (which sandbox,
//! which interface) and enough of the network to go on without Consul. A file is written whole
//! under another name, synced and renamed, so a cut at any byte leaves the old file or the new one.

use std::{
    fs,
    io::Write as _,
    net::Ipv4Addr,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result};
use serde::{Deserialize, Serialize};

use crate::{
    consul::schema::{EndpointRecord, NetworkRecord},
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
#[derive(Clone, Debug)]
pub struct StateFolder {
    endpoints: PathBuf,
}

impl StateFolder {
    /// Opens `<folder>`, making it, readable by root only, where it is missing.
    pub fn open(folder: &Path) -> Result<Self> {
        use std::os::unix::fs::{DirBuilderExt as _, PermissionsExt as _};
        let endpoints = folder.join("endpoints");
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&endpoints)
            .with_context(|| format!("make the state folder {}", endpoints.display()))?;
        fs::set_permissions(folder, fs::Permissions::from_mode(0o700))
            .with_context(|| format!("restrict the state folder {} to root", folder.display()))?;
        Ok(Self { endpoints })
    }

    /// Every endpoint that can be read. A file that cannot is logged and left where it is.
    pub fn load(&self) -> Result<Vec<LocalEndpoint>> {
        let folder = fs::read_dir(&self.endpoints)
            .with_context(|| format!("list {}", self.endpoints.display()))?;
        let mut endpoints = Vec::new();
        for entry in folder {
            let path = entry.with_context(|| format!("list {}", self.endpoints.display()))?.path();
            if path.extension().is_none_or(|extension| extension != "json") {
                continue;
            }
            let read = fs::read(&path)
                .map_err(anyhow::Error::from)
                .and_then(|bytes| Ok(serde_json::from_slice::<LocalEndpoint>(&bytes)?));
            match read {
                Ok(endpoint) => endpoints.push(endpoint),
                Err(error) => tracing::warn!(
                    path = %path.display(), %error,
                    "an endpoint's state file cannot be read; it is left alone"
                ),
            }
        }
        endpoints.sort_by(|a, b| a.record.id.cmp(&b.record.id));
        Ok(endpoints)
    }

    /// The ids of all endpoints that have a file, readable or not.
    pub fn ids(&self) -> Result<Vec<String>> {
        let listed = || format!("list {}", self.endpoints.display());
        let mut ids = Vec::new();
        for entry in fs::read_dir(&self.endpoints).with_context(listed)? {
            let path = entry.with_context(listed)?.path();
            if path.extension().is_some_and(|extension| extension == "json") {
                ids.extend(path.file_stem().and_then(|id| id.to_str()).map(str::to_owned));
            }
        }
        Ok(ids)
    }

    /// Writes or replaces an endpoint's file, on disk before this returns.
    pub fn store(&self, endpoint: &LocalEndpoint) -> Result<()> {
        let path = self.path(&endpoint.record.id);
        let temporary = path.with_extension("new");
        let write = || -> Result<()> {
            let mut file = fs::File::create(&temporary)?;
            file.write_all(&serde_json::to_vec_pretty(endpoint)?)?;
            file.sync_all()?;
            fs::rename(&temporary, &path)?;
            fs::File::open(&self.endpoints)?.sync_all()?;
            Ok(())
        };
        write().with_context(|| format!("write the endpoint's state to {}", path.display()))
    }

    /// Removes an endpoint's file; one that is not there is no error.
    pub fn remove(&self, id: &str) -> Result<()> {
        let path = self.path(id);
        match fs::remove_file(&path) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error)
                .with_context(|| format!("remove the endpoint's state {}", path.display())),
            _ => Ok(()),
        }
    }

    fn path(&self, id: &str) -> PathBuf {
        // Ids are made by us or by Docker; anything else in one must not become a path.
        let safe: String = id
            .chars()
            .map(|c| if c.is_ascii_alphanumeric() || c == '-' { c } else { '_' })
            .collect();
        self.endpoints.join(format!("{safe}.json"))
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
        state.store(&endpoint("a")).unwrap();
        state.store(&endpoint("b")).unwrap();
        assert_eq!(state.load().unwrap(), [endpoint("a"), endpoint("b")]);
        state.remove("a").unwrap();
        state.remove("a").unwrap();
        assert_eq!(state.load().unwrap(), [endpoint("b")]);
    }

    #[test]
    fn a_write_cut_at_any_byte_leaves_the_old_file() {
        let folder = tempfile::tempdir().unwrap();
        let state = StateFolder::open(folder.path()).unwrap();
        state.store(&endpoint("a")).unwrap();
        let whole = serde_json::to_vec_pretty(&endpoint("a")).unwrap();
        for cut in 0..whole.len() {
            fs::write(state.path("a").with_extension("new"), &whole[..cut]).unwrap();
            assert_eq!(state.load().unwrap(), [endpoint("a")], "cut at {cut}");
        }
    }

    #[test]
    fn an_unreadable_file_does_not_hide_the_others() {
        let folder = tempfile::tempdir().unwrap();
        let state = StateFolder::open(folder.path()).unwrap();
        state.store(&endpoint("a")).unwrap();
        fs::write(state.path("b"), b"{").unwrap();
        assert_eq!(state.load().unwrap(), [endpoint("a")]);
        let mut ids = state.ids().unwrap();
        ids.sort();
        assert_eq!(ids, ["a", "b"]);
    }

    #[test]
    fn an_id_cannot_leave_the_folder() {
        let folder = tempfile::tempdir().unwrap();
        let state = StateFolder::open(folder.path()).unwrap();
        assert_eq!(state.path("../../x").parent(), Some(state.endpoints.as_path()));
    }
}
