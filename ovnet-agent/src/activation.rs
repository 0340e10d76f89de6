//! What systemd and the agent tell each other: sockets handed over, readiness, stopping.
//!
//! Docker looks for its plugin's socket when it starts, and waits long for one that is missing. So
//! systemd makes the socket before Docker starts (`ovnet-agent.socket`), and the agent takes it
//! over. Without systemd there is nothing to take and nobody to tell, which is no error.

use std::{os::unix::net::UnixListener, path::Path};

use anyhow::{Context as _, Result};
use listenfd::ListenFd;
use sd_notify::NotifyState;

/// `FileDescriptorName=` of the plugin's socket in `ovnet-agent.socket`.
const NAME: &str = "plugin";
/// How the path of the plugin's socket ends, for a unit that gives no name.
const PATH: &str = "ovnet.sock";

/// The listening socket of the Docker plugin where systemd passed one, set to non-blocking; other
/// unix sockets it may have passed are closed.
///
/// It changes this process's environment, so it must be called first, before there are threads,
/// and counts only the first time.
pub fn plugin_listener() -> Result<Option<UnixListener>> {
    let names = std::env::var("LISTEN_FDNAMES").unwrap_or_default();
    let mut passed = ListenFd::from_env();
    let named = names.split(':').position(|name| name == NAME);
    let order = named.into_iter().chain((0..passed.len()).filter(|index| Some(*index) != named));
    let mut found = None;
    for index in order {
        // What is no unix socket is none of ours, and stays where it is.
        let Ok(Some(listener)) = passed.take_unix_listener(index) else { continue };
        let ours = Some(index) == named || is_ours(&listener);
        if found.is_none() && ours {
            found = Some(listener);
        }
    }
    if let Some(listener) = &found {
        listener.set_nonblocking(true).context("take over the plugin's socket from systemd")?;
    }
    Ok(found)
}

fn is_ours(listener: &UnixListener) -> bool {
    let ends = |path: &Path| path.file_name().is_some_and(|name| name == PATH);
    listener.local_addr().is_ok_and(|address| address.as_pathname().is_some_and(ends))
}

/// Tells systemd that the agent answers; units ordered after it are started then.
pub fn ready() {
    tell(NotifyState::Ready);
}

/// Tells systemd that the agent was asked to stop and does.
pub fn stopping() {
    tell(NotifyState::Stopping);
}

fn tell(state: NotifyState<'_>) {
    // Whoever does not hear of it waits until its own time is up; nothing else depends on it.
    if let Err(error) = sd_notify::notify(&[state]) {
        tracing::warn!("systemd cannot be told the agent's state: {error}");
    }
}

#[cfg(test)]
mod tests {
    use std::{
        io::{Read as _, Write as _},
        os::{
            fd::{AsRawFd as _, OwnedFd},
            unix::{
                net::{UnixDatagram, UnixStream},
                process::CommandExt as _,
            },
        },
        process::{Command, Output},
    };

    use super::*;

    /// Set in a child that this test started: which part of it the child is.
    const PART: &str = "OVNET_TEST_ACTIVATION";

    /// Runs this test again in a process that has these descriptors from 3 on, as systemd starts
    /// a service, and the variables.
    fn child(part: &str, passed: Vec<OwnedFd>, names: Option<&str>) -> Output {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command
            .args(["activation::tests::a_child_of_the_other_tests", "--exact", "--nocapture"])
            .env(PART, part)
            .env("LISTEN_FDS", passed.len().to_string())
            // That of the child is not known before; without one it is not compared.
            .env_remove("LISTEN_PID");
        match names {
            Some(names) => command.env("LISTEN_FDNAMES", names),
            None => command.env_remove("LISTEN_FDNAMES"),
        };
        // Above those they are to become, so that none is overwritten before it was copied.
        let high: Vec<OwnedFd> = passed
            .iter()
            .map(|fd| {
                // SAFETY: F_DUPFD_CLOEXEC on an open descriptor returns a new one, owned by nobody.
                unsafe {
                    let copy = libc::fcntl(fd.as_raw_fd(), libc::F_DUPFD_CLOEXEC, 100);
                    std::os::fd::FromRawFd::from_raw_fd(copy)
                }
            })
            .collect();
        let numbers: Vec<i32> = high.iter().map(|fd| fd.as_raw_fd()).collect();
        // SAFETY: between fork and exec only dup2 is called, which is safe there.
        unsafe {
            command.pre_exec(move || {
                for (target, number) in (3..).zip(&numbers) {
                    if libc::dup2(*number, target) < 0 {
                        return Err(std::io::Error::last_os_error());
                    }
                }
                Ok(())
            });
        }
        command.output().unwrap()
    }

    /// No test by itself: what [`child`] runs. It answers the first client of its socket.
    #[test]
    fn a_child_of_the_other_tests() {
        let Ok(part) = std::env::var(PART) else { return };
        let found = plugin_listener().unwrap();
        match part.as_str() {
            "none" => assert!(found.is_none()),
            _ => {
                let listener = found.expect("no socket was taken over");
                listener.set_nonblocking(false).unwrap();
                let (mut client, _) = listener.accept().unwrap();
                client.write_all(part.as_bytes()).unwrap();
                assert!(plugin_listener().unwrap().is_none(), "only the first time");
                assert!(std::env::var_os("LISTEN_FDS").is_none(), "children must not take it");
            }
        }
    }

    /// Connects first: the connection waits in the socket until the child takes it over.
    fn answered(socket: &Path, passed: Vec<OwnedFd>, names: Option<&str>) {
        let mut client = UnixStream::connect(socket).unwrap();
        let output = child("answer", passed, names);
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
        let mut said = String::new();
        client.read_to_string(&mut said).unwrap();
        assert_eq!(said, "answer");
    }

    #[test]
    fn the_socket_is_found_by_its_name_or_by_its_path() {
        let folder = tempfile::tempdir().unwrap();
        let (by_path, by_name) = (folder.path().join("ovnet.sock"), folder.path().join("x.sock"));
        let ours = UnixListener::bind(&by_path).unwrap();
        let other = UnixListener::bind(&by_name).unwrap();
        let file = || OwnedFd::from(std::fs::File::open("/dev/null").unwrap());
        let copy = |listener: &UnixListener| OwnedFd::from(listener.try_clone().unwrap());

        answered(&by_path, vec![copy(&ours)], None);
        answered(&by_path, vec![file(), copy(&other), copy(&ours)], Some("a:b:c"));
        answered(&by_name, vec![copy(&ours), copy(&other)], Some("ovnet-agent.socket:plugin"));
    }

    #[test]
    fn without_a_socket_of_ours_there_is_none() {
        let folder = tempfile::tempdir().unwrap();
        let other = UnixListener::bind(folder.path().join("other.sock")).unwrap();
        let datagram = UnixDatagram::bind(folder.path().join("d")).unwrap();
        for passed in [vec![], vec![other.into()], vec![datagram.into()]] {
            let output = child("none", passed, Some("x"));
            assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
        }
    }

    #[test]
    fn telling_nobody_is_no_error() {
        if std::env::var_os("NOTIFY_SOCKET").is_none() {
            ready();
            stopping();
        }
    }
}
