//! `ovnet-agent cleanup`: takes away everything the agent made on this host (invariant 9).
//!
//! Only what is certainly the agent's goes: its records in Consul, links named `ovnet*`, the pins
//! under `<bpffs>/v<ABI>/`, the files of the state folder, the socket. A folder given by mistake
//! loses nothing else.

use std::{
    fs,
    io::{ErrorKind, Write},
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, bail};

use crate::{
    api::socket,
    datapath,
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
}

/// The links of this host, as far as cleaning up needs them.
pub trait Links {
    /// Names of all links.
    fn names(&self) -> impl Future<Output = Result<Vec<String>>> + Send;
    /// Deletes a link; one that is gone is no error.
    fn delete(&self, name: &str) -> impl Future<Output = Result<()>> + Send;
    /// Takes our programs off interfaces that are not ours, where no pin keeps them: clsact
    /// filters. Returns the interfaces.
    fn unhook(&self) -> impl Future<Output = Result<Vec<String>>> + Send;
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
    let Places { socket, state_dir, bpffs } = places;
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
            "kept     this host's records: {}; run cleanup again when Consul answers",
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
    remove_state(state_dir, &mut done)?;
    remove_file(socket, "socket", &mut done)?;
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

/// Removes the endpoints' files and what a write that was cut short left of them.
fn remove_state<W: Write>(state_dir: &Path, done: &mut Progress<'_, W>) -> Result<()> {
    let endpoints = state_dir.join("endpoints");
    for file in list(&endpoints, done) {
        if file.extension().is_some_and(|extension| extension == "json" || extension == "new") {
            remove_file(&file, "state", done)?;
        }
    }
    remove_empty_folder(Some(&endpoints), done)?;
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

/// [`OwnRecords`] where no Consul was named: they stay, and lose their lease.
pub struct NoRecords;

impl OwnRecords for NoRecords {
    async fn delete(&self) -> Result<Vec<String>> {
        Ok(Vec::new())
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
        let links = self.names().await?;
        let unhooked = links.into_iter().map(|name| Ok((datapath::unhook(&name)?, name)));
        let unhooked: Result<Vec<(bool, String)>> = unhooked.collect();
        Ok(unhooked?.into_iter().filter_map(|(was, name)| was.then_some(name)).collect())
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
mod tests {
    use std::{collections::BTreeSet, sync::Mutex};

    use anyhow::anyhow;
    use tempfile::TempDir;

    use super::*;
    use crate::{
        api::socket::Socket,
        service::fake::{self, attach},
    };

    struct FakeLinks {
        names: Mutex<BTreeSet<String>>,
        stuck: &'static str,
    }

    impl Links for FakeLinks {
        async fn names(&self) -> Result<Vec<String>> {
            Ok(self.names.lock().unwrap().iter().cloned().collect())
        }

        async fn delete(&self, name: &str) -> Result<()> {
            if name == self.stuck {
                return Err(anyhow!("delete link {name}: it is stuck"));
            }
            self.names.lock().unwrap().remove(name);
            Ok(())
        }

        async fn unhook(&self) -> Result<Vec<String>> {
            Ok(vec![])
        }
    }

    struct NoRecords(Result<Vec<String>, &'static str>);

    impl OwnRecords for NoRecords {
        async fn delete(&self) -> Result<Vec<String>> {
            self.0.clone().map_err(|line| anyhow!(line))
        }
    }

    fn links(names: &[&str]) -> FakeLinks {
        let names = names.iter().map(|name| (*name).to_owned()).collect();
        FakeLinks { names: Mutex::new(names), stuck: "" }
    }

    /// A host with everything on it that an agent leaves, and things that are not its own.
    fn host() -> (TempDir, Places) {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path();
        for (path, what) in [
            ("bpffs/v1/maps/HOSTS", "ours"),
            ("bpffs/v1/links/ens33", "ours"),
            ("bpffs/v0/old", "ours"),
            ("state/endpoints/a.json", "ours"),
            ("state/endpoints/a.new", "ours"),
            ("run/ovnet.sock.lock", "ours"),
        ] {
            let path = root.join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, what).unwrap();
        }
        let places = Places {
            socket: root.join("run/ovnet.sock"),
            state_dir: root.join("state"),
            bpffs: root.join("bpffs"),
        };
        drop(std::os::unix::net::UnixListener::bind(&places.socket).unwrap());
        (folder, places)
    }

    async fn cleanup(
        places: &Places,
        links: &FakeLinks,
        records: NoRecords,
    ) -> (String, Result<()>) {
        let mut out = Vec::new();
        let result = run(places, links, &records, &mut out).await;
        (String::from_utf8(out).unwrap(), result)
    }

    #[tokio::test]
    async fn everything_goes_and_a_second_time_finds_nothing() {
        let (folder, places) = host();
        let links = links(&["lo", "ens33", "ovnet-vx", "ovnet01234567"]);
        let records = NoRecords(Ok(vec!["of host docker01".into()]));
        let (told, result) = cleanup(&places, &links, records).await;
        result.unwrap();
        assert_eq!(links.names().await.unwrap(), ["ens33", "lo"]);
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0, "{told}");
        for part in [
            "removed  record of host docker01\n",
            "removed  link ovnet-vx\n",
            "v1/maps/HOSTS\n",
            "endpoints/a.json\n",
            "removed  socket ",
        ] {
            assert!(told.contains(part), "{part} in {told}");
        }
        let (told, result) = cleanup(&places, &links, NoRecords(Ok(vec![]))).await;
        result.unwrap();
        assert_eq!(told, "nothing of ovnet is on this host\n");
    }

    #[tokio::test]
    async fn what_is_not_ours_stays() {
        let (_folder, places) = host();
        let others = [
            places.bpffs.join("other/v1/pin"),
            places.bpffs.join("vx/pin"),
            places.state_dir.join("notes.txt"),
            places.state_dir.join("endpoints/readme"),
            places.socket.with_file_name("docker.sock"),
        ];
        for path in &others {
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, "not ours").unwrap();
        }
        cleanup(&places, &links(&[]), NoRecords(Ok(vec![]))).await.1.unwrap();
        assert!(others.iter().all(|path| path.exists()));
        assert!(!places.bpffs.join("v1").exists());
    }

    #[tokio::test]
    async fn a_running_agent_is_refused_and_keeps_everything() {
        let (_folder, places) = host();
        let links = links(&["ovnet-vx"]);
        let _agent = Socket::bind(&places.socket).unwrap();
        let (told, result) = cleanup(&places, &links, NoRecords(Ok(vec![]))).await;
        let error = one_line(&result.unwrap_err());
        assert!(
            error.starts_with("cannot clean up while the agent runs: stop it first"),
            "{error}"
        );
        assert_eq!(told, "");
        assert_eq!(links.names().await.unwrap(), ["ovnet-vx"]);
        assert!(places.bpffs.join("v1/maps/HOSTS").exists());
    }

    #[tokio::test]
    async fn a_consul_that_does_not_answer_keeps_only_the_records() {
        let (folder, places) = host();
        let records = NoRecords(Err("connection refused"));
        let (told, result) = cleanup(&places, &links(&[]), records).await;
        result.unwrap();
        assert!(told.starts_with("kept     this host's records: connection refused;"), "{told}");
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
    }

    #[tokio::test]
    async fn what_cannot_be_removed_does_not_keep_the_rest() {
        let (folder, places) = host();
        let links = FakeLinks { stuck: "ovnet-vx", ..links(&["ovnet-vx", "ovnet01234567"]) };
        let (_, result) = cleanup(&places, &links, NoRecords(Ok(vec![]))).await;
        assert_eq!(result.unwrap_err().to_string(), "delete link ovnet-vx: it is stuck");
        assert_eq!(links.names().await.unwrap(), ["ovnet-vx"]);
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
    }

    #[tokio::test]
    async fn records_of_this_host_are_deleted_and_nobody_elses() {
        let (service, fake) = fake::service(&["ov_net1"]);
        let mut other = service.attach(attach("ov_net1", "t1")).await.unwrap().record;
        (other.id, other.host, other.address) =
            ("b".into(), "docker02".into(), [10, 0, 0, 9].into());
        fake.put("ov_net1", other.clone());
        let own = RecordsOf { records: &fake, node: fake::NODE, host: || async { Ok(true) } };
        assert_eq!(
            own.delete().await.unwrap(),
            ["of host docker01", "of endpoint 10.0.0.2 in ov_net1"]
        );
        assert_eq!(fake.records(), [other]);
    }
}
