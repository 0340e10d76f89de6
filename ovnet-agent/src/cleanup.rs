//! `ovnet-agent cleanup`: takes away everything the agent made on this host (invariant 9).
//!
//! Only what is certainly the agent's goes: its records in Consul, links named `ovnet*`, the table
//! `ip ovnet` and the rules of iptables with its name as comment, the pins under `<bpffs>/v<ABI>/`,
//! the files of the state folder, the socket. A folder given by mistake loses nothing else.

use std::{
    collections::BTreeSet,
    fs,
    io::{ErrorKind, Write},
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, bail};

use crate::{
    api::socket,
    datapath,
    firewall::{self, Firewall},
    net::Net,
    service::{Records, one_line},
};

/// What the names of all links of the agent begin with.
const PREFIX: &str = "ovnet";

/// Where things of the agent are.
#[derive(Clone, Debug)]
pub struct Places {
    /// Socket of the agent.
    pub socket: PathBuf,
    /// Its state folder.
    pub state_dir: PathBuf,
    /// Its bpffs folder.
    pub bpffs: PathBuf,
    /// Docker's socket of the plugin.
    pub plugin: PathBuf,
}

/// The links and packet filters of this host, as far as cleaning up needs them.
pub trait Links {
    /// Names of all links.
    fn names(&self) -> impl Future<Output = Result<Vec<String>>> + Send;
    /// Deletes a link; one that is gone is no error.
    fn delete(&self, name: &str) -> impl Future<Output = Result<()>> + Send;
    /// Takes our programs off interfaces that are not ours, where no pin keeps them: clsact
    /// filters. Returns the interfaces.
    fn unhook(&self) -> impl Future<Output = Result<Vec<String>>> + Send;
    /// Deletes our table of nftables and our rules in others' chains. Returns which there were.
    fn unfilter(&self) -> impl Future<Output = Result<Vec<&'static str>>> + Send;
}

/// This host's own records in Consul.
pub trait OwnRecords {
    /// Deletes every record this host wrote, and returns what each was. An error is a Consul that
    /// does not answer.
    fn delete(&self) -> impl Future<Output = Result<Vec<String>>> + Send;
}

/// Removes everything, telling each thing on `out`. What cannot be removed does not keep the rest;
/// the first error is returned at the end. Running it again is harmless.
///
/// Refuses while an agent runs on the socket: it would put back what is taken.
pub async fn run(
    places: &Places,
    links: &impl Links,
    records: &impl OwnRecords,
    out: &mut impl Write,
) -> Result<()> {
    let Places { socket, state_dir, bpffs, plugin } = places;
    // Held to the end, so no agent starts in the middle. Without the socket's folder there is
    // nobody to hold off, and making it would be to leave something.
    let lock = match socket.parent() {
        Some(folder) if folder.is_dir() => Some(socket::lock(socket).context(RUNNING)?),
        _ => None,
    };
    if socket::answers(socket) {
        bail!("{RUNNING}: an agent answers on {}", socket.display());
    }

    let mut done = Progress { out, count: 0, failed: None };
    // Others stop sending before this host stops receiving.
    match records.delete().await {
        Ok(deleted) => {
            for record in deleted {
                done.removed("record", &record)?;
            }
        }
        Err(error) => writeln!(
            done.out,
            "kept     this host's records: {}; run cleanup again with a Consul that answers",
            one_line(&error)
        )?,
    }
    match links.unhook().await {
        Ok(interfaces) => {
            for interface in interfaces {
                done.removed("programs", &interface)?;
            }
        }
        Err(error) => done.failed(error),
    }
    remove_pins(bpffs, &mut done)?;
    match links.names().await {
        Ok(names) => {
            for name in names.iter().filter(|name| name.starts_with(PREFIX)) {
                match links.delete(name).await {
                    Ok(()) => done.removed("link", name)?,
                    Err(error) => done.failed(error),
                }
            }
        }
        Err(error) => done.failed(error),
    }
    // After the bridge, which it keeps from leading to this host's loopback.
    match links.unfilter().await {
        Ok(filters) => {
            for filter in filters {
                done.removed("rules", filter)?;
            }
        }
        Err(error) => done.failed(error),
    }
    remove_state(state_dir, &mut done)?;
    remove_file(socket, "socket", &mut done)?;
    // One without a lock beside it is systemd's, and to connect to it would start an agent.
    let plugin_lock = socket::lock_path(plugin);
    if plugin_lock.exists() {
        remove_file(plugin, "socket", &mut done)?;
        remove_file(&plugin_lock, "lock", &mut done)?;
    }
    if lock.is_some() {
        // Last: an agent that starts from here on finds all of it gone.
        remove_file(&socket::lock_path(socket), "lock", &mut done)?;
        remove_empty_folder(socket.parent(), &mut done)?;
    }

    let Progress { out, count, failed } = done;
    if count == 0 && failed.is_none() {
        writeln!(out, "nothing of ovnet is on this host")?;
    }
    failed.map_or(Ok(()), Err)
}

const RUNNING: &str = "cannot clean up while the agent runs: stop it first";

/// What was removed, and the first thing that could not be.
struct Progress<'a, W> {
    out: &'a mut W,
    count: usize,
    failed: Option<anyhow::Error>,
}

impl<W: Write> Progress<'_, W> {
    fn removed(&mut self, kind: &str, name: impl std::fmt::Display) -> Result<()> {
        self.count += 1;
        writeln!(self.out, "removed  {kind} {name}")?;
        Ok(())
    }

    fn failed(&mut self, error: anyhow::Error) {
        tracing::warn!("{}", one_line(&error));
        self.failed.get_or_insert(error);
    }
}

/// Removes `v<number>` folders with all pins in them, of every ABI there was, then the folder
/// itself where nothing else is in it. The root of a mounted bpffs stays.
fn remove_pins<W: Write>(bpffs: &Path, done: &mut Progress<'_, W>) -> Result<()> {
    for version in list(bpffs, done) {
        let is_version = version
            .file_name()
            .and_then(|name| name.to_str())
            .and_then(|name| name.strip_prefix('v'))
            .is_some_and(|number| number.parse::<u32>().is_ok());
        if is_version && !version.is_symlink() && version.is_dir() {
            remove_tree(&version, done)?;
        }
    }
    remove_empty_folder(Some(bpffs), done)
}

fn remove_tree<W: Write>(folder: &Path, done: &mut Progress<'_, W>) -> Result<()> {
    for entry in list(folder, done) {
        if entry.is_dir() && !entry.is_symlink() {
            remove_tree(&entry, done)?;
        } else {
            remove_file(&entry, "pin", done)?;
        }
    }
    remove_empty_folder(Some(folder), done)
}

/// Removes the files of endpoints and of Docker's networks, and what a write that was cut short
/// left of them.
fn remove_state<W: Write>(state_dir: &Path, done: &mut Progress<'_, W>) -> Result<()> {
    for folder in ["endpoints", "docker"].map(|name| state_dir.join(name)) {
        for file in list(&folder, done) {
            let ours = ["json", "ovnet-new", "new", "damaged"];
            if file.extension().is_some_and(|it| ours.iter().any(|ours| it == *ours)) {
                remove_file(&file, "state", done)?;
            }
        }
        remove_empty_folder(Some(&folder), done)?;
    }
    remove_empty_folder(Some(state_dir), done)
}

/// What is in a folder, in order; nothing where there is no such folder.
fn list<W: Write>(folder: &Path, done: &mut Progress<'_, W>) -> Vec<PathBuf> {
    let read = fs::read_dir(folder)
        .and_then(|entries| entries.map(|entry| Ok(entry?.path())).collect::<Result<Vec<_>, _>>());
    match read {
        Ok(mut paths) => {
            paths.sort();
            paths
        }
        Err(error) if error.kind() == ErrorKind::NotFound => Vec::new(),
        Err(error) => {
            done.failed(anyhow::Error::new(error).context(format!("list {}", folder.display())));
            Vec::new()
        }
    }
}

fn remove_file<W: Write>(path: &Path, kind: &str, done: &mut Progress<'_, W>) -> Result<()> {
    match fs::remove_file(path) {
        Ok(()) => done.removed(kind, path.display()),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
        Err(error) => {
            done.failed(
                anyhow::Error::new(error).context(format!("remove {kind} {}", path.display())),
            );
            Ok(())
        }
    }
}

fn remove_empty_folder<W: Write>(folder: Option<&Path>, done: &mut Progress<'_, W>) -> Result<()> {
    // One that is not empty holds something that is not ours; a mount point cannot be removed
    // either. Both stay.
    match folder.map(|folder| (folder, fs::remove_dir(folder))) {
        Some((folder, Ok(()))) => done.removed("folder", folder.display()),
        _ => Ok(()),
    }
}

/// [`OwnRecords`] where no Consul was named: they stay.
pub struct NoRecords;

impl OwnRecords for NoRecords {
    async fn delete(&self) -> Result<Vec<String>> {
        anyhow::bail!("no --consul was given")
    }
}

/// [`Links`] of this host.
pub struct HostLinks(pub Net);

impl Links for HostLinks {
    async fn names(&self) -> Result<Vec<String>> {
        Ok(self.0.links().await?.into_iter().map(|link| link.name).collect())
    }

    async fn delete(&self, name: &str) -> Result<()> {
        self.0.delete_link(name).await
    }

    async fn unhook(&self) -> Result<Vec<String>> {
        // Neighbour entries have no name of ours, but our mark.
        self.0.keep_neighbours(&BTreeSet::new()).await?;
        let links = self.names().await?;
        let unhooked = links.into_iter().map(|name| Ok((datapath::unhook(&name)?, name)));
        let unhooked: Result<Vec<(bool, String)>> = unhooked.collect();
        Ok(unhooked?.into_iter().filter_map(|(was, name)| was.then_some(name)).collect())
    }

    async fn unfilter(&self) -> Result<Vec<&'static str>> {
        let mut filters = Vec::new();
        let firewall = Firewall::default();
        if firewall.exists().await? {
            firewall.remove().await?;
            filters.push("nftables ip ovnet");
        }
        if firewall::withdraw().await? {
            filters.push("of ovnet in iptables");
        }
        Ok(filters)
    }
}

/// [`OwnRecords`] by way of [`Records`], for endpoints; `host` deletes the host's own record and
/// says whether there was one.
pub struct RecordsOf<'a, R, F> {
    /// Consul.
    pub records: &'a R,
    /// The name of this host.
    pub node: &'a str,
    /// Deletes `hosts/<node>`.
    pub host: F,
}

impl<R, F, Fut> OwnRecords for RecordsOf<'_, R, F>
where
    R: Records,
    F: Fn() -> Fut + Send + Sync,
    Fut: Future<Output = Result<bool>> + Send,
{
    async fn delete(&self) -> Result<Vec<String>> {
        let Self { records, node, host } = self;
        let mut deleted = Vec::new();
        if host().await? {
            deleted.push(format!("of host {node}"));
        }
        for claim in records.pending().await? {
            records.release_pending(&claim.id).await?;
            deleted.push(format!("of the subnet {} claimed for Docker", claim.subnet));
        }
        for network in records.networks().await? {
            for endpoint in records.endpoints(&network.id).await? {
                if endpoint.host == *node {
                    records.release_endpoint(&network.id, &endpoint).await?;
                    deleted.push(format!("of endpoint {} in {}", endpoint.address, network.name));
                }
            }
        }
        Ok(deleted)
    }
}

#[cfg(test)]
mod tests;
