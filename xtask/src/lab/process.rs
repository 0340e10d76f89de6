//! Processes that the lab started, told apart from those that later got the same number.

use std::fs;
use std::path::Path;
use std::sync::LazyLock;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use nix::errno::Errno;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde::{Deserialize, Serialize};

/// How often [`wait_until`] looks again.
const POLL: Duration = Duration::from_millis(5);

/// A process of the lab. Its start time makes it recognisable after its number was reused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Process {
    /// Its number in the machine's own PID namespace.
    pub pid: i32,
    /// Clock ticks from boot to its start: field 22 of `/proc/PID/stat`.
    started: u64,
}

impl Process {
    /// The process that now has this number.
    ///
    /// # Errors
    /// There is none.
    pub fn of(pid: i32) -> Result<Self> {
        let stat = Stat::read(pid).with_context(|| format!("process {pid} is gone"))?;
        Ok(Self { pid, started: stat.started })
    }

    /// Whether it still runs. A zombie does not, once its last thread ended: its sockets are
    /// closed and its memory is released.
    pub fn is_alive(&self) -> bool {
        Stat::read(self.pid).is_some_and(|stat| stat.started == self.started && !stat.is_zombie())
    }

    /// Sends a signal if the process is still the one that was recorded; else does nothing.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        if !self.is_alive() {
            return Ok(());
        }
        match kill(Pid::from_raw(self.pid), signal) {
            // It ended between the check and the call.
            Ok(()) | Err(Errno::ESRCH) => Ok(()),
            Err(error) => {
                Err(error).with_context(|| format!("send {signal} to process {}", self.pid))
            }
        }
    }

    /// Sends a signal and waits until the process has ended.
    ///
    /// # Errors
    /// It did not end within `limit`.
    pub fn end(&self, signal: Signal, limit: Duration) -> Result<()> {
        self.signal(signal)?;
        let what = || format!("process {} to end after {signal}", self.pid);
        wait_until(limit, what, || Ok((!self.is_alive()).then_some(())))
    }

    /// The first child it has now.
    pub fn child(&self) -> Option<Self> {
        let of_ours = |pid| Stat::read(pid).is_some_and(|stat| stat.parent == self.pid);
        pids().find(|pid| of_ours(*pid)).and_then(|pid| Self::of(pid).ok())
    }
}

/// A limit for something that waits, on this machine: `OVNET_PATIENCE` times as long where that is
/// set, as on an emulated processor. Not for what must not take longer than it says.
pub fn patience(limit: Duration) -> Duration {
    static FACTOR: LazyLock<u32> = LazyLock::new(|| {
        let set = std::env::var("OVNET_PATIENCE").ok();
        set.and_then(|factor| factor.parse().ok()).unwrap_or(1).max(1)
    });
    limit * *FACTOR
}

/// Looks again and again until `look` gives something; with [`patience`].
///
/// # Errors
/// `limit` has passed (`what` completes "waited for …"), or `look` failed.
pub fn wait_until<T>(
    limit: Duration,
    what: impl Fn() -> String,
    mut look: impl FnMut() -> Result<Option<T>>,
) -> Result<T> {
    let limit = patience(limit);
    let deadline = Instant::now() + limit;
    loop {
        if let Some(found) = look()? {
            return Ok(found);
        }
        if Instant::now() >= deadline {
            bail!("waited {} s in vain for {}", limit.as_secs(), what());
        }
        thread::sleep(POLL);
    }
}

/// The fields of `/proc/PID/stat` that matter here.
struct Stat {
    state: char,
    parent: i32,
    threads: u32,
    started: u64,
}

impl Stat {
    fn read(pid: i32) -> Option<Self> {
        let text =
            fs::read_to_string(Path::new("/proc").join(pid.to_string()).join("stat")).ok()?;
        // The name, in parentheses, may itself contain spaces and parentheses.
        let (_, rest) = text.rsplit_once(") ")?;
        let fields: Vec<&str> = rest.split(' ').collect();
        Some(Self {
            state: fields.first()?.chars().next()?,
            parent: fields.get(1)?.parse().ok()?,
            threads: fields.get(17)?.parse().ok()?,
            started: fields.get(19)?.parse().ok()?,
        })
    }

    fn is_zombie(&self) -> bool {
        // The first thread is a zombie already while others are still ending.
        matches!(self.state, 'Z' | 'X') && self.threads <= 1
    }
}

fn pids() -> impl Iterator<Item = i32> {
    fs::read_dir("/proc")
        .into_iter()
        .flatten()
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reused_number_is_not_the_same_process() {
        let own = Process::of(i32::try_from(std::process::id()).unwrap()).unwrap();
        assert!(own.is_alive());
        assert!(!Process { started: own.started + 1, ..own }.is_alive());
    }

    #[test]
    fn waiting_ends_at_the_deadline_and_says_for_what() {
        let limit = Duration::from_millis(20);
        let error = wait_until(limit, || "rain".into(), || Ok(None::<()>)).unwrap_err();
        assert!(error.to_string().contains("rain"), "{error}");
    }
}
