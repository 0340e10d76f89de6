//! The unix socket: only root may connect, one agent has it, and a dead agent's is replaced.

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
};

use anyhow::{Context as _, Result, bail};
use tokio::net::UnixListener;

/// A bound socket. Dropped, it removes its file, unless that is another agent's by now.
#[derive(Debug)]
pub struct Socket {
    listener: UnixListener,
    file: SocketFile,
}

/// The file of a socket, removed when this is dropped.
#[derive(Debug)]
pub(crate) struct SocketFile {
    path: PathBuf,
    inode: u64,
    // Held as long as the socket is: the kernel gives it back when the agent dies, however it dies.
    _lock: File,
}

impl Socket {
    /// Binds `path` with mode 0600, making its folder where it is missing. A socket nobody answers
    /// on is replaced; one of a running agent, or a file that is no socket, is an error.
    pub fn bind(path: &Path) -> Result<Self> {
        let folder = match path.parent() {
            Some(folder) if folder != Path::new("") => folder,
            _ => Path::new("."),
        };
        DirBuilder::new()
            .recursive(true)
            .mode(0o755)
            .create(folder)
            .with_context(|| format!("make the socket's folder {}", folder.display()))?;

        // Two agents started at once would both find nobody answering; the lock lets one through.
        let lock = lock(path)?;
        if answers(path) {
            bail!(
                "another agent answers on {}: stop it or choose another --socket",
                path.display()
            );
        }
        match fs::symlink_metadata(path) {
            Ok(there) if !there.file_type().is_socket() => bail!(
                "{} is there and is no socket: remove it or choose another --socket",
                path.display()
            ),
            Err(error) if error.kind() != ErrorKind::NotFound => {
                return Err(error)
                    .with_context(|| format!("look at the socket {}", path.display()));
            }
            _ => {}
        }

        // Bound where nobody but root can look, given its mode, then moved into place: it is never
        // reachable with a wider mode, and the process-wide umask is left alone.
        let private = folder.join(format!(".ovnet-{}", std::process::id()));
        remove_folder(&private)?;
        DirBuilder::new()
            .mode(0o700)
            .create(&private)
            .with_context(|| format!("make the folder {}", private.display()))?;
        let bound = bind_in(&private, path);
        // Empty when all went well; after a failure it takes what was bound with it.
        let removed = remove_folder(&private);
        let (listener, inode) = bound?;
        let file = SocketFile { path: path.to_owned(), inode, _lock: lock };
        removed?;
        Ok(Self { listener, file })
    }

    /// The listener, and the file it is reached by.
    pub(crate) fn into_parts(self) -> (UnixListener, SocketFile) {
        (self.listener, self.file)
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        if fs::symlink_metadata(&self.path).is_ok_and(|it| it.ino() == self.inode) {
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

fn bind_in(private: &Path, path: &Path) -> Result<(UnixListener, u64)> {
    let hidden = private.join("s");
    let listener = UnixListener::bind(&hidden)
        .with_context(|| format!("bind the socket {}", path.display()))?;
    fs::set_permissions(&hidden, Permissions::from_mode(0o600))
        .with_context(|| format!("restrict the socket {} to root", path.display()))?;
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
        let socket = Socket::bind(&path).unwrap();
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
    async fn a_running_agents_socket_is_left_alone() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("ovnet.sock");
        let _first = Socket::bind(&path).unwrap();
        let error = Socket::bind(&path).unwrap_err().to_string();
        assert!(error.starts_with("another agent has the socket"), "{error}");
        assert!(answers(&path));
    }

    #[tokio::test]
    async fn a_socket_of_something_that_takes_no_lock_is_left_alone() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("ovnet.sock");
        let _other = std::os::unix::net::UnixListener::bind(&path).unwrap();
        let error = Socket::bind(&path).unwrap_err().to_string();
        assert!(error.starts_with("another agent answers on"), "{error}");
    }

    #[tokio::test]
    async fn a_dead_agents_socket_is_replaced() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("ovnet.sock");
        // The standard library leaves the file when it closes the socket, as a kill would.
        drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
        assert!(path.exists() && !answers(&path));
        let _socket = Socket::bind(&path).unwrap();
        assert!(answers(&path));
    }

    #[tokio::test]
    async fn a_file_that_is_no_socket_is_left_alone() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("ovnet.sock");
        fs::write(&path, "mine").unwrap();
        let error = Socket::bind(&path).unwrap_err().to_string();
        assert!(error.contains("is no socket"), "{error}");
        assert_eq!(fs::read_to_string(&path).unwrap(), "mine");
    }

    #[tokio::test]
    async fn a_path_too_long_for_a_socket_is_told() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a".repeat(120)).join("ovnet.sock");
        let error = format!("{:#}", Socket::bind(&path).unwrap_err());
        assert!(error.contains("bind the socket"), "{error}");
    }
}
