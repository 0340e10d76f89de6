//! What the agent itself takes of the machine, under the names all Prometheus clients use.

use anyhow::{Context as _, Result};
use procfs::{CurrentSI as _, WithCurrentSystemInfo as _, process::LimitValue};

/// The agent's process.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct Process {
    /// Processor time used, in seconds.
    pub(super) cpu_seconds: f64,
    /// Memory in RAM, in bytes.
    pub(super) resident_bytes: u64,
    /// Address space, in bytes.
    pub(super) virtual_bytes: u64,
    /// Open file descriptors.
    pub(super) open_fds: u64,
    /// How many it may have open; `None` for any number.
    pub(super) max_fds: Option<u64>,
    pub(super) threads: u64,
    /// When it started, in seconds since 1970.
    pub(super) start_seconds: f64,
}

impl Process {
    /// As it is now.
    pub(super) fn read() -> Result<Self> {
        let read = || -> Result<Self, procfs::ProcError> {
            let process = procfs::process::Process::myself()?;
            let stat = process.stat()?;
            let ticks = procfs::ticks_per_second();
            let seconds = |count: u64| count as f64 / ticks as f64;
            let booted = procfs::KernelStats::current()?.btime;
            Ok(Self {
                cpu_seconds: seconds(stat.utime + stat.stime),
                resident_bytes: stat.rss_bytes().get(),
                virtual_bytes: stat.vsize,
                open_fds: u64::try_from(process.fd_count()?).unwrap_or(u64::MAX),
                max_fds: match process.limits()?.max_open_files.soft_limit {
                    LimitValue::Value(most) => Some(most),
                    LimitValue::Unlimited => None,
                },
                threads: u64::try_from(stat.num_threads).unwrap_or(0),
                start_seconds: booted as f64 + seconds(stat.starttime),
            })
        };
        read().context("read what the agent itself takes from /proc")
    }
}

#[cfg(test)]
mod tests {
    use std::time::{SystemTime, UNIX_EPOCH};

    use super::*;

    #[test]
    fn this_very_process_is_told() {
        let it = Process::read().unwrap();
        assert!(it.resident_bytes > 100_000 && it.virtual_bytes >= it.resident_bytes, "{it:?}");
        assert!(it.open_fds >= 3 && it.threads >= 1, "{it:?}");
        assert!(it.max_fds.is_none_or(|most| most >= it.open_fds), "{it:?}");
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs_f64();
        assert!((0.0..3600.0 * 24.0).contains(&(now - it.start_seconds)), "{it:?}");
    }
}
