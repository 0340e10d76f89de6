//! Which daemon, and whether it is there.

use std::{
    collections::BTreeMap,
    io,
    path::{Path, PathBuf},
    str::FromStr,
    sync::{Mutex, Once, PoisonError},
    time::{Duration, Instant},
};

use anyhow::{Result, bail};

/// Where a daemon listens by default; both are one folder on most systems.
const SOCKETS: [&str; 2] = ["/run/docker.sock", "/var/run/docker.sock"];
/// Where a daemon that runs says so.
const PROCESSES: [&str; 2] = ["/run/docker.pid", "/var/run/docker.pid"];
/// How long a daemon is believed to be there after it was seen.
const BELIEVED: Duration = Duration::from_millis(200);
/// What /proc/net/unix writes for a socket that listens.
const LISTENING: &str = "00010000";

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
            Self::Auto => listened().map(|path| format!("unix://{path}")),
        }
    }
}

impl DockerChoice {
    /// Why there may be a daemon although [`Self::address`] finds none: a daemon that was told to
    /// write its process id elsewhere. Also what is seen of one that was stopped.
    pub fn doubt(&self) -> Option<String> {
        let running = PROCESSES.iter().any(|file| Path::new(file).exists());
        let socket = SOCKETS.iter().find(|socket| Path::new(socket).exists());
        match (self, socket) {
            (Self::Auto, Some(socket)) if !running => Some(format!(
                "Docker is taken to be stopped: {socket} is there, and no {}; if it runs, give \
                 --docker {socket}",
                PROCESSES[0]
            )),
            _ => None,
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

/// The default path at which a daemon listens. Asked before every question to it, so a good answer
/// is believed for a moment.
fn listened() -> Option<&'static str> {
    static LAST: Mutex<Option<(Instant, &str)>> = Mutex::new(None);
    let mut last = LAST.lock().unwrap_or_else(PoisonError::into_inner);
    match *last {
        Some((at, path)) if at.elapsed() < BELIEVED => Some(path),
        _ => {
            let path = PROCESSES.iter().find_map(|file| listened_at(Path::new(file), &SOCKETS));
            *last = path.map(|path| (Instant::now(), path));
            path
        }
    }
}

/// The one of these paths at which the process named in a file itself has a socket that listens.
///
/// The socket of a daemon that stops is there all the same where systemd holds it, and a
/// connection to it would start the daemon that was stopped on purpose. Such a daemon closes its
/// sockets first and removes its file last, so the file alone does not tell.
fn listened_at<'a>(pid_file: &Path, paths: &[&'a str]) -> Option<&'a str> {
    let pid: u32 = std::fs::read_to_string(pid_file).ok()?.trim().parse().ok()?;
    let process = PathBuf::from(format!("/proc/{pid}"));
    // The sockets of the process's network namespace, which may be another one than ours.
    let sockets = std::fs::read_to_string(process.join("net/unix")).ok()?;
    let listening: BTreeMap<_, _> =
        sockets.lines().filter_map(|line| listening(line, paths)).collect();
    if listening.is_empty() {
        return None;
    }
    let files = match std::fs::read_dir(process.join("fd")) {
        Ok(files) => files,
        Err(error) => {
            // Asked for again and again; a process that just ended is no news.
            static SAID: Once = Once::new();
            if error.kind() == io::ErrorKind::PermissionDenied {
                SAID.call_once(|| {
                    tracing::warn!(
                        "cannot see whether Docker (process {pid}) runs, which takes \
                         CAP_SYS_PTRACE: {error}"
                    );
                });
            }
            return None;
        }
    };
    files.filter_map(|file| std::fs::read_link(file.ok()?.path()).ok()).find_map(|target| {
        let inode = target.to_str()?.strip_prefix("socket:[")?.strip_suffix(']')?;
        listening.get(inode).copied()
    })
}

/// The inode and the path in a line of /proc/net/unix, where the socket listens at one of these.
fn listening<'l, 'a>(line: &'l str, paths: &[&'a str]) -> Option<(&'l str, &'a str)> {
    // Num: RefCount Protocol Flags Type St Inode Path
    let mut fields = line.split_whitespace().skip(3);
    let (flags, inode, path) = (fields.next()?, fields.nth(2)?, fields.next()?);
    let path = paths.iter().find(|known| **known == path)?;
    (flags == LISTENING).then_some((inode, *path))
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::{UnixListener, UnixStream};

    use super::*;

    #[test]
    fn a_daemon_is_there_while_its_own_process_listens() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("docker.sock");
        let pid_file = folder.path().join("docker.pid");
        let paths = ["/elsewhere", path.to_str().unwrap()];
        let listener = UnixListener::bind(&path).unwrap();
        assert_eq!(listened_at(&pid_file, &paths), None, "nobody says that it runs");
        std::fs::write(&pid_file, format!("{}\n", std::process::id())).unwrap();
        assert_eq!(listened_at(&pid_file, &paths), Some(paths[1]));
        assert_eq!(listened_at(&pid_file, &paths[..1]), None);

        // Its process runs, and another one holds the socket, as systemd does.
        let mut other = std::process::Command::new("sleep").arg("600").spawn().unwrap();
        std::fs::write(&pid_file, other.id().to_string()).unwrap();
        let not_its_own = listened_at(&pid_file, &paths);
        other.kill().unwrap();
        other.wait().unwrap();
        assert_eq!(not_its_own, None);

        std::fs::write(&pid_file, std::process::id().to_string()).unwrap();
        // The end of a connection that was accepted has the path too, but does not listen.
        let _client = UnixStream::connect(&path).unwrap();
        let _accepted = listener.accept().unwrap();
        drop(listener);
        assert_eq!(listened_at(&pid_file, &paths), None, "it has closed its socket");
    }
}
