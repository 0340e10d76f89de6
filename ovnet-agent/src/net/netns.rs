//! Network namespaces: finding them, and doing work inside one.
//!
//! A namespace is entered only on a thread that was made for it and ends afterwards: `setns` moves
//! the calling thread, and an async task does not know on which thread it runs next. Sockets stay
//! in the namespace they were opened in, so a [`Space`] enters once and then works from any task.

use std::{
    fs::File,
    os::{
        fd::{AsFd, AsRawFd as _, OwnedFd},
        unix::fs::MetadataExt as _,
    },
    path::{Path, PathBuf},
    sync::Arc,
    thread::JoinHandle,
};

use anyhow::{Context as _, Result, bail};
use nix::{
    sched::{CloneFlags, setns},
    sys::{
        socket::{AddressFamily, SockFlag, SockType, socket},
        statfs::{NSFS_MAGIC, fstatfs},
    },
};
use tokio::sync::{Mutex, MutexGuard};

/// Where `ip netns` keeps namespaces by name.
const NAMED: &str = "/run/netns";

/// Turns what a user typed into the path of a network namespace.
///
/// A name becomes a path under `/run/netns`; an absolute path, as `/proc/1234/ns/net`, is taken as
/// it is. Anything that is not a network namespace there is an error of one line.
pub fn resolve_netns(path_or_name: &str) -> Result<PathBuf> {
    let path = if path_or_name.contains('/') {
        PathBuf::from(path_or_name)
    } else if path_or_name.is_empty() || path_or_name == "." || path_or_name == ".." {
        bail!("'{path_or_name}' is no network namespace: give a path, or a name of `ip netns`");
    } else {
        Path::new(NAMED).join(path_or_name)
    };
    if !path.is_absolute() {
        bail!(
            "the network namespace '{path_or_name}' is a relative path, and the agent works in \
             another folder: give an absolute path, or a name of `ip netns`"
        );
    }
    Namespace::open(&path)?;
    Ok(path)
}

/// A network namespace, kept alive by the open file.
#[derive(Clone, Debug)]
pub(super) struct Namespace(Arc<File>);

impl Namespace {
    /// The namespace of the calling thread.
    pub(super) fn current() -> Result<Self> {
        Self::open(Path::new("/proc/thread-self/ns/net"))
    }

    /// The namespace at a path; an error names the path and says what is wrong with it.
    pub(super) fn open(path: &Path) -> Result<Self> {
        let shown = path.display();
        let file = match File::open(path) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => bail!(
                "there is no network namespace at {shown}: `ip netns list` shows those with a \
                 name, and `/proc/<pid>/ns/net` is a process's own"
            ),
            other => other.with_context(|| format!("open the network namespace {shown}"))?,
        };
        // A file that `ip netns` left behind without a namespace mounted on it opens like any
        // other; only the file system and the type tell.
        let kind = fstatfs(&file).with_context(|| format!("look at {shown}"))?.filesystem_type();
        if kind != NSFS_MAGIC {
            bail!("{shown} is a file, but no network namespace: give the path of one");
        }
        // SAFETY: NS_GET_NSTYPE takes no argument and returns the CLONE_NEW* flag of the namespace
        // behind the descriptor, which is open.
        let namespace_type = unsafe { libc::ioctl(file.as_raw_fd(), libc::NS_GET_NSTYPE) };
        if namespace_type != libc::CLONE_NEWNET {
            bail!("{shown} is a namespace, but no network namespace: give the path of one");
        }
        Ok(Self(Arc::new(file)))
    }

    /// The descriptor, for `IFLA_NET_NS_FD`.
    pub(super) fn raw(&self) -> i32 {
        self.0.as_raw_fd()
    }

    /// Whether both are the same namespace: same device and inode of nsfs.
    pub(super) fn is(&self, other: &Self) -> Result<bool> {
        let (a, b) = (self.0.metadata()?, other.0.metadata()?);
        Ok(a.dev() == b.dev() && a.ino() == b.ino())
    }

    /// Runs `work` on a thread of its own inside the namespace.
    pub(super) async fn inside<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let (done, result) = tokio::sync::oneshot::channel();
        // The receiver is gone when the request was cancelled; nobody wants the answer then.
        let _ended_by_itself = self.thread(move |entered| {
            let _ = done.send(entered.and_then(|()| work()));
        })?;
        result.await.context("the work inside the network namespace ended early")?
    }

    /// As [`Namespace::inside`], waiting for the thread: for what takes microseconds.
    pub(super) fn inside_now<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let thread = self.thread(move |entered| entered.and_then(|()| work()))?;
        match thread.join() {
            Ok(result) => result,
            Err(_) => bail!("the work inside the network namespace ended early"),
        }
    }

    /// Moves the calling thread in, where it is not there already: that needs no root, so what only
    /// reads the host's own namespace works without.
    fn enter(&self) -> Result<()> {
        if Self::current().and_then(|current| current.is(self)).unwrap_or(false) {
            return Ok(());
        }
        setns(self.0.as_fd(), CloneFlags::CLONE_NEWNET)
            .context("enter the network namespace (this needs root)")
    }

    fn thread<T: Send + 'static>(
        &self,
        work: impl FnOnce(Result<()>) -> T + Send + 'static,
    ) -> Result<JoinHandle<T>> {
        let namespace = self.clone();
        std::thread::Builder::new()
            .name("ovnet-netns".into())
            .spawn(move || work(namespace.enter()))
            .context("start a thread for work inside a network namespace")
    }
}

/// A namespace with the sockets needed to work in it.
#[derive(Clone)]
pub(super) struct Space {
    /// The namespace itself, for what goes by `/proc/sys`.
    pub(super) namespace: Namespace,
    /// rtnetlink; its connection is a task of the runtime, which ends with the last handle.
    pub(super) rtnetlink: rtnetlink::Handle,
    /// Any socket of the namespace, for ioctls about its interfaces.
    pub(super) control: Arc<OwnedFd>,
    dumps: Arc<Mutex<()>>,
}

impl Space {
    /// The namespace of the calling thread; needs the current tokio runtime.
    pub(super) fn current() -> Result<Self> {
        let namespace = Namespace::current()?;
        let (connection, rtnetlink, _) =
            rtnetlink::new_connection().context("open a netlink socket")?;
        let control = control_socket()?;
        tokio::spawn(connection);
        Ok(Self { namespace, rtnetlink, control, dumps: Arc::default() })
    }

    /// Waits until no other list is being read from this socket, and holds others off: the kernel
    /// answers EBUSY to a second dump on a socket (`__netlink_dump_start`).
    pub(super) async fn dumping(&self) -> MutexGuard<'_, ()> {
        self.dumps.lock().await
    }

    /// Another namespace; needs root.
    pub(super) async fn open(namespace: Namespace) -> Result<Self> {
        let runtime = tokio::runtime::Handle::current();
        let (connection, rtnetlink, control) = namespace
            .inside(move || {
                // The socket registers with the runtime's reactor, which another thread may do too.
                let _entered = runtime.enter();
                let (connection, rtnetlink, _) = rtnetlink::new_connection()
                    .context("open a netlink socket inside the network namespace")?;
                Ok((connection, rtnetlink, control_socket()?))
            })
            .await?;
        tokio::spawn(connection);
        Ok(Self { namespace, rtnetlink, control, dumps: Arc::default() })
    }
}

fn control_socket() -> Result<Arc<OwnedFd>> {
    let control = socket(AddressFamily::Inet, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None)
        .context("open a socket for interface settings")?;
    Ok(Arc::new(control))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn error_of(path_or_name: &str) -> String {
        format!("{:#}", resolve_netns(path_or_name).unwrap_err())
    }

    #[test]
    fn a_process_s_own_namespace_resolves_to_its_path() {
        let path = format!("/proc/{}/ns/net", std::process::id());
        assert_eq!(resolve_netns(&path).unwrap(), PathBuf::from(path));
    }

    #[test]
    fn what_is_no_network_namespace_is_told_plainly() {
        assert!(error_of("ovnet-no-such-name").contains("/run/netns/ovnet-no-such-name"));
        assert!(error_of("/proc/0/ns/net").contains("no network namespace at /proc/0/ns/net"));
        assert!(error_of("/proc/self/status").contains("is a file, but no network namespace"));
        assert!(error_of("/proc/self/ns/mnt").contains("a namespace, but no network namespace"));
        assert!(error_of("run/netns/x").contains("relative path"));
        assert!(error_of("").contains("is no network namespace"));
        assert!(error_of("..").contains("is no network namespace"));
    }

    #[test]
    fn work_in_the_own_namespace_needs_no_root() {
        let shown = Namespace::current().unwrap().inside_now(Namespace::current).unwrap();
        assert!(shown.is(&Namespace::current().unwrap()).unwrap());
    }

    #[test]
    fn a_namespace_is_itself() {
        let a = Namespace::current().unwrap();
        assert!(a.is(&Namespace::current().unwrap()).unwrap());
    }
}
