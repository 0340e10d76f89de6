//! What is looked at from outside the agents: the map of endpoints, and what the processes used.

use std::fs;
use std::mem::size_of;
use std::net::Ipv4Addr;
use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use nix::errno::Errno;
use nix::libc;
use ovnet_common::abi::{ABI_VERSION, EndpointKey, EndpointValue, map, mapped};
use serde_json::Value;

use super::cluster::Place;
use crate::lab::{Lab, Process};

/// Between two looks at the map.
const LOOK: Duration = Duration::from_micros(200);
/// Commands of bpf(2).
const BPF_MAP_LOOKUP_ELEM: libc::c_long = 1;
const BPF_OBJ_GET: libc::c_long = 7;

/// The table that counts what goes between an agent and Consul.
const COUNTERS: &str = "table ip bench {
    counter sent {}
    counter received {}
    chain out { type filter hook output priority 0; tcp dport 8500 counter name sent; }
    chain in { type filter hook input priority 0; tcp sport 8500 counter name received; }
}";

/// The open map of a host's endpoints.
pub(super) struct EndpointMap(OwnedFd);

impl EndpointMap {
    /// Opens the pin of the agent of a host.
    pub(super) fn open(lab: &Lab, host: &str) -> Result<Self> {
        let pin = format!("sys/fs/bpf/ovnet/v{ABI_VERSION}/maps/{}", map::ENDPOINTS);
        let pin = lab.host(host)?.root().join(pin);
        Self::get(&pin).with_context(|| format!("open {}", pin.display()))
    }

    fn get(pin: &Path) -> Result<Self> {
        let path = std::ffi::CString::new(pin.as_os_str().as_bytes())?;
        // pathname; then bpf_fd and file_flags, both 0.
        let mut attributes = [path.as_ptr() as u64, 0];
        let fd = bpf(BPF_OBJ_GET, &mut attributes)?;
        let fd = i32::try_from(fd).context("a descriptor")?;
        // SAFETY: the kernel has just given it to us, and nobody else knows it.
        Ok(Self(unsafe { OwnedFd::from_raw_fd(fd) }))
    }

    /// Whether an endpoint is in it.
    pub(super) fn has(&self, Place { vni, address }: Place) -> Result<bool> {
        let key = EndpointKey { vni, address: mapped(Ipv4Addr::octets(&address)) };
        let mut value = EndpointValue::default();
        let fd = u64::try_from(self.0.as_raw_fd()).context("a descriptor")?;
        // map_fd and padding, key, value, flags.
        let mut attributes = [fd, &raw const key as u64, &raw mut value as u64, 0];
        match bpf(BPF_MAP_LOOKUP_ELEM, &mut attributes) {
            Ok(_) => Ok(true),
            Err(Errno::ENOENT) => Ok(false),
            Err(error) => Err(error).context("look an endpoint up"),
        }
    }

    /// Waits until an endpoint is in it, or is not; when that was.
    pub(super) fn wait(&self, place: Place, there: bool, limit: Duration) -> Result<Instant> {
        let deadline = Instant::now() + limit;
        while self.has(place)? != there {
            if Instant::now() >= deadline {
                let what = if there { "come" } else { "go" };
                bail!("{} does not {what} within {} s", place.address, limit.as_secs());
            }
            thread::sleep(LOOK);
        }
        Ok(Instant::now())
    }
}

/// bpf(2). Where pointers are among the attributes, they must lead to what the command reads or
/// writes; all callers are above.
fn bpf<const N: usize>(command: libc::c_long, attributes: &mut [u64; N]) -> Result<i64, Errno> {
    let size = size_of::<[u64; N]>();
    // SAFETY: the attributes outlive the call and are as long as is said, and so is what they point
    // to: a path that ends in a zero, a key and a value of the map's own sizes.
    let done = unsafe { libc::syscall(libc::SYS_bpf, command, attributes.as_mut_ptr(), size) };
    Errno::result(done)
}

/// What a process has used so far.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Used {
    /// Processor time.
    pub(super) cpu: Duration,
    /// Memory now, in bytes.
    pub(super) memory: u64,
    /// The most it ever was.
    pub(super) peak: u64,
}

impl Used {
    /// By a process.
    pub(super) fn by(process: Process) -> Result<Self> {
        let folder = Path::new("/proc").join(process.pid.to_string());
        let read = |name| {
            let file = folder.join(name);
            fs::read_to_string(&file).with_context(|| format!("read {}", file.display()))
        };
        let stat = read("stat")?;
        // The name, in parentheses, may itself contain spaces and parentheses.
        let (_, rest) = stat.rsplit_once(") ").context("the form of /proc/PID/stat")?;
        let ticks: u32 =
            rest.split(' ').skip(11).take(2).filter_map(|it| it.parse::<u32>().ok()).sum();
        let status = read("status")?;
        let of = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name));
            let kib = line.and_then(|it| it.split_whitespace().next()?.parse::<u64>().ok());
            kib.map(|kib| kib * 1024).with_context(|| format!("{name} of /proc/PID/status"))
        };
        // USER_HZ is 100 on every architecture we run on.
        let cpu = Duration::from_millis(10) * ticks;
        Ok(Self { cpu, memory: of("VmRSS:")?, peak: of("VmHWM:")? })
    }
}

/// What went between an agent and Consul so far, in bytes of packets.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Traffic {
    /// From the agent.
    pub(super) sent: u64,
    /// To it.
    pub(super) received: u64,
}

impl Traffic {
    /// Begins to count on a host.
    pub(super) fn count(lab: &Lab, host: &str) -> Result<()> {
        lab.exec(host, &["nft", COUNTERS]).map(drop)
    }

    /// On a host where it is counted.
    pub(super) fn of(lab: &Lab, host: &str) -> Result<Self> {
        let text = lab.exec(host, &["nft", "-j", "list", "counters", "table", "ip", "bench"])?;
        let all: Value = serde_json::from_str(&text).context("read nft's counters")?;
        let all = all.get("nftables").and_then(Value::as_array).context("nft's counters")?;
        let bytes = |name: &str| {
            let of = all.iter().filter_map(|it| it.get("counter"));
            let mut of = of.filter(|it| it.get("name").and_then(Value::as_str) == Some(name));
            of.next().and_then(|it| it.get("bytes")?.as_u64())
        };
        let (sent, received) = (bytes("sent"), bytes("received"));
        ensure!(sent.is_some() && received.is_some(), "nft has no counters");
        Ok(Self { sent: sent.unwrap_or(0), received: received.unwrap_or(0) })
    }
}
