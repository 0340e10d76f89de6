//! The unix socket: only root may connect, or a group besides, one agent has it, and a dead agent's
//! is replaced.
//!
//! Its file is looked at every second. Where somebody removed it, or put a socket in its place that
//! nobody answers on, it is made again: an agent that cannot be asked is of no use. What somebody
//! else answers on, or what is no socket, stays.

use std::{
    fs::{self, DirBuilder, File, OpenOptions, Permissions, TryLockError},
    io::ErrorKind,
    os::unix::{
        fs::{
            DirBuilderExt as _, FileTypeExt as _, MetadataExt as _, OpenOptionsExt as _,
            PermissionsExt as _,
        },
        net::UnixStream,
    },
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context as _, Result, bail};
use nix::unistd::{Gid, Group};
use tokio::net::UnixListener;

/// Between looks at whether the socket's file is there.
const LOOK: Duration = Duration::from_secs(1);

/// A bound socket. Dropped, it removes its file, unless that is another agent's by now.
#[derive(Debug)]
pub struct Socket {
    listener: UnixListener,
    file: SocketFile,
    group: Option<Gid>,
    /// Whether it was told that the socket cannot be made again.
    complained: bool,
}

/// The file of a socket, removed when this is dropped.
#[derive(Debug)]
pub(crate) struct SocketFile {
    path: PathBuf,
    inode: u64,
    // Held as long as the socket is: the kernel gives it back when the agent dies, however it dies.
    lock: File,
}

impl Socket {
    /// Binds `path` with mode 0600, or 0660 for a group, by name or number, making its folder where
    /// it is missing. A socket nobody answers on is replaced; one of a running agent, or a file that
    /// is no socket, is an error.
    pub fn bind(path: &Path, group: Option<&str>) -> Result<Self> {
        let group = group.map(group_of).transpose()?;
        let folder = folder_of(path);
        make_folder(folder)?;
        // Two agents started at once would both find nobody answering; the lock lets one through.
        let lock = lock(path)?;
        let (listener, inode) = put(path, group)?;
        let file = SocketFile { path: path.to_owned(), inode, lock };
        Ok(Self { listener, file, group, complained: false })
    }

    /// What accepts connections.
    pub(crate) fn listener(&self) -> &UnixListener {
        &self.listener
    }

    /// Waits until the socket's file is not there, or is another.
    pub(crate) async fn lost(&self) {
        loop {
            tokio::time::sleep(LOOK).await;
            if !self.file.is_in_place() {
                return;
            }
        }
    }

    /// Makes the socket again, where nobody else is in its place.
    pub(crate) fn make_again(&mut self) {
        match self.try_again() {
            Ok(()) => {
                self.complained = false;
                tracing::warn!("{} was removed, and is made again", self.file.path.display());
            }
            Err(error) if !self.complained => {
                self.complained = true;
                tracing::warn!("the agent cannot be asked: {error:#}");
            }
            Err(_) => {}
        }
    }

    fn try_again(&mut self) -> Result<()> {
        let SocketFile { path, inode, lock: held } = &mut self.file;
        make_folder(folder_of(path))?;
        // With its folder the lock's file is gone, too, and would keep nobody away.
        let there = fs::metadata(lock_path(path)).ok().map(|it| it.ino());
        if there != Some(held.metadata().context("look at the socket's lock")?.ino()) {
            *held = lock(path)?;
        }
        (self.listener, *inode) = put(path, self.group)?;
        Ok(())
    }
}

/// Puts a socket in place that nobody answers on yet; gives it with its inode.
fn put(path: &Path, group: Option<Gid>) -> Result<(UnixListener, u64)> {
    if answers(path) {
        bail!("another agent answers on {}: stop it or choose another --socket", path.display());
    }
    match fs::symlink_metadata(path) {
        Ok(there) if !there.file_type().is_socket() => bail!(
            "{} is there and is no socket: remove it or choose another --socket",
            path.display()
        ),
        Err(error) if error.kind() != ErrorKind::NotFound => {
            return Err(error).with_context(|| format!("look at the socket {}", path.display()));
        }
        _ => {}
    }
    // Bound where nobody but root can look, given its mode, then moved into place: it is never
    // reachable with a wider mode, and the process-wide umask is left alone.
    let private = folder_of(path).join(format!(".ovnet-{}", std::process::id()));
    remove_folder(&private)?;
    DirBuilder::new()
        .mode(0o700)
        .create(&private)
        .with_context(|| format!("make the folder {}", private.display()))?;
    let bound = bind_in(&private, path, group);
    // Empty when all went well; after a failure it takes what was bound with it.
    let removed = remove_folder(&private);
    let bound = bound?;
    if let Err(error) = removed {
        // Not on its way to anybody yet.
        drop(fs::remove_file(path));
        return Err(error);
    }
    Ok(bound)
}

fn folder_of(path: &Path) -> &Path {
    path.parent().filter(|folder| *folder != Path::new("")).unwrap_or(Path::new("."))
}

/// Makes the socket's folder, which others may look into, whatever the process's umask.
fn make_folder(folder: &Path) -> Result<()> {
    if folder.is_dir() {
        return Ok(());
    }
    let made = DirBuilder::new().recursive(true).mode(0o755).create(folder);
    made.and_then(|()| fs::set_permissions(folder, Permissions::from_mode(0o755)))
        .with_context(|| format!("make the socket's folder {}", folder.display()))
}

/// The group of this name or number.
fn group_of(name: &str) -> Result<Gid> {
    if let Ok(number) = name.parse::<u32>() {
        return Ok(Gid::from_raw(number));
    }
    let found = Group::from_name(name).with_context(|| format!("look up the group {name}"))?;
    let found = found.map(|group| group.gid);
    found.with_context(|| {
        format!("there is no group {name}: make it with `groupadd {name}`, or give another one")
    })
}

impl SocketFile {
    /// Whether the path still leads to this socket.
    fn is_in_place(&self) -> bool {
        fs::symlink_metadata(&self.path).is_ok_and(|it| it.ino() == self.inode)
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        if self.is_in_place() {
            // Nothing can be done about a failure, and a stale socket is replaced anyway.
            drop(fs::remove_file(&self.path));
        }
    }
}

/// Whether somebody accepts connections on the socket.
pub fn answers(path: &Path) -> bool {
    UnixStream::connect(path).is_ok()
}

/// The lock file beside a socket.
pub fn lock_path(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".lock");
    name.into()
}

/// Takes the lock that the agent on this socket holds, or says that there is one.
pub(crate) fn lock(path: &Path) -> Result<File> {
    let lock_path = lock_path(path);
    let lock = OpenOptions::new()
        .create(true)
        .truncate(false)
        .write(true)
        .mode(0o600)
        .open(&lock_path)
        .with_context(|| format!("open the lock {}", lock_path.display()))?;
    match lock.try_lock() {
        Ok(()) => Ok(lock),
        Err(TryLockError::WouldBlock) => bail!(
            "another agent has the socket {}: stop it or choose another --socket",
            path.display()
        ),
        Err(TryLockError::Error(error)) => {
            Err(error).with_context(|| format!("lock {}", lock_path.display()))
        }
    }
}

fn bind_in(private: &Path, path: &Path, group: Option<Gid>) -> Result<(UnixListener, u64)> {
    let hidden = private.join("s");
    let listener = UnixListener::bind(&hidden)
        .with_context(|| format!("bind the socket {}", path.display()))?;
    if let Some(group) = group {
        nix::unistd::chown(&hidden, None, Some(group)).with_context(|| {
            format!("give the socket {} to group {group} (this needs CAP_CHOWN)", path.display())
        })?;
    }
    let mode = if group.is_some() { 0o660 } else { 0o600 };
    fs::set_permissions(&hidden, Permissions::from_mode(mode))
        .with_context(|| format!("restrict the socket {}", path.display()))?;
    let inode = fs::symlink_metadata(&hidden)
        .with_context(|| format!("look at the socket {}", path.display()))?
        .ino();
    fs::rename(&hidden, path)
        .with_context(|| format!("put the socket in place at {}", path.display()))?;
    Ok((listener, inode))
}

fn remove_folder(folder: &Path) -> Result<()> {
    match fs::remove_dir_all(folder) {
        Err(error) if error.kind() != ErrorKind::NotFound => {
            Err(error).with_context(|| format!("remove the folder {}", folder.display()))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_socket_is_roots_alone_and_goes_with_its_agent() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("run/ovnet.sock");
        let socket = Socket::bind(&path, None).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o7777, 0o600);
        assert!(answers(&path));
        let files: Vec<_> = fs::read_dir(path.parent().unwrap())
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        assert!(files.iter().all(|name| name.starts_with("ovnet.sock")), "{files:?}");
        drop(socket);
        assert!(!path.exists());
    }

    #[tokio::test]
    async fn a_group_may_have_it_besides_root() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("run/ovnet.sock");
        // One's own, which needs no privilege.
        let own = nix::unistd::getegid().to_string();
        let _socket = Socket::bind(&path, Some(&own)).unwrap();
        let there = fs::metadata(&path).unwrap();
        assert_eq!((there.mode() & 0o7777, there.gid().to_string()), (0o660, own));
        assert_eq!(fs::metadata(path.parent().unwrap()).unwrap().mode() & 0o777, 0o755);
        let error = Socket::bind(&path, Some("no-such-group")).unwrap_err().to_string();
        assert!(error.contains("`groupadd no-such-group`"), "{error}");
    }

    #[tokio::test]
    async fn a_socket_that_was_removed_is_made_again_and_anothers_is_left_alone() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("run/ovnet.sock");
        let mut socket = Socket::bind(&path, None).unwrap();
        fs::remove_dir_all(path.parent().unwrap()).unwrap();
        socket.lost().await;
        socket.make_again();
        assert!(answers(&path) && socket.file.is_in_place());
        assert!(Socket::bind(&path, None).unwrap_err().to_string().contains("another agent has"));

        fs::remove_file(&path).unwrap();
        let other = std::os::unix::net::UnixListener::bind(&path).unwrap();
        socket.lost().await;
        socket.make_again();
        assert!(!socket.file.is_in_place());
        drop(other);
        socket.make_again();
        assert!(answers(&path) && socket.file.is_in_place());
    }

    #[tokio::test]
    async fn a_running_agents_socket_is_left_alone() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("ovnet.sock");
        let _first = Socket::bind(&path, None).unwrap();
        let error = Socket::bind(&path, None).unwrap_err().to_string();
        assert!(error.starts_with("another agent has the socket"), "{error}");
        assert!(answers(&path));
    }

    #[tokio::test]
    async fn a_socket_of_something_that_takes_no_lock_is_left_alone() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("ovnet.sock");
        let _other = std::os::unix::net::UnixListener::bind(&path).unwrap();
        let error = Socket::bind(&path, None).unwrap_err().to_string();
        assert!(error.starts_with("another agent answers on"), "{error}");
    }

    #[tokio::test]
    async fn a_dead_agents_socket_is_replaced() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("ovnet.sock");
        // The standard library leaves the file when it closes the socket, as a kill would.
        drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
        assert!(path.exists() && !answers(&path));
        let _socket = Socket::bind(&path, None).unwrap();
        assert!(answers(&path));
    }

    #[tokio::test]
    async fn a_file_that_is_no_socket_is_left_alone() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("ovnet.sock");
        fs::write(&path, "mine").unwrap();
        let error = Socket::bind(&path, None).unwrap_err().to_string();
        assert!(error.contains("is no socket"), "{error}");
        assert_eq!(fs::read_to_string(&path).unwrap(), "mine");
    }

    #[tokio::test]
    async fn a_path_too_long_for_a_socket_is_told() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a".repeat(120)).join("ovnet.sock");
        let error = format!("{:#}", Socket::bind(&path, None).unwrap_err());
        assert!(error.contains("bind the socket"), "{error}");
    }
}
