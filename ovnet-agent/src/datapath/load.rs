//! Loads the object over the pinned maps.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, bail, ensure};
use aya::{
    Ebpf, EbpfLoader,
    maps::{MapInfo, MapType},
    programs::{SchedClassifier, Xdp},
};
use ovnet_common::{
    abi::{self, Program, map},
    published,
};

use super::Conntrack;

/// The object, built by build.rs and aligned as the ELF parser wants it.
static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/ovnet-ebpf"));

/// Magic number of a bpffs (`BPF_FS_MAGIC` of `linux/magic.h`).
const BPF_FS_MAGIC: libc::__fsword_t = 0xcafe_4a11;

/// Level of the programs' own log, `--datapath-log`. Off, the verifier removes it; on, a line
/// costs more than the rest of the program.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum DatapathLog {
    /// Nothing.
    #[default]
    Off,
    /// Every drop.
    Info,
    /// Every packet.
    Debug,
}

impl DatapathLog {
    /// The value of aya-log's `AYA_LOG_LEVEL`.
    fn level(self) -> u8 {
        match self {
            Self::Off => 0,
            Self::Info => aya_log::Level::Info as u8,
            Self::Debug => aya_log::Level::Debug as u8,
        }
    }
}

/// Whether the agent was built with `AYA_BUILD_SKIP`, without programs.
pub fn object_is_missing() -> bool {
    OBJECT.is_empty()
}

/// Loads every program, none attached. `folder` is the versioned folder of pins; it is made.
pub(super) fn load(folder: &Path, log: DatapathLog, conntrack_max: u32) -> Result<Ebpf> {
    ensure!(
        !object_is_missing(),
        "this ovnet-agent was built without its programs (AYA_BUILD_SKIP): build it again without"
    );
    let (maps, former) = prepare(folder, conntrack_max)?;
    let level = log.level();
    let mut loader = EbpfLoader::new();
    loader.override_global(aya_log::LEVEL, &level, false);
    loader.map_max_entries(map::CONNTRACK, conntrack_max);
    let pins: Vec<(&str, PathBuf)> = map::ALL.iter().map(|name| (*name, maps.join(name))).collect();
    for (name, path) in &pins {
        loader.map_pin_path(name, path.as_path());
    }
    let mut ebpf = loader.load(OBJECT).context("load the programs' object")?;
    for program in Program::ALL {
        let name = program.name();
        let handle = ebpf.program_mut(name).with_context(|| format!("the object has no {name}"))?;
        let result = match program {
            Program::UplinkXdp => TryInto::<&mut Xdp>::try_into(handle)?.load(),
            _ => TryInto::<&mut SchedClassifier>::try_into(handle)?.load(),
        };
        result.with_context(|| format!("load {name} (a kernel before 6.1, or no CAP_BPF)"))?;
    }
    if let Some(former) = former {
        // Until our programs are in place flows may still begin in the former map; the kernel's
        // connection tracking takes those up in the middle.
        Conntrack::open(&maps)?.adopt(&former)?;
    }
    Ok(ebpf)
}

/// The capacity of `CONNTRACK` for this machine: a quarter of a per cent of its memory.
pub(super) fn conntrack_by_memory() -> u32 {
    let text = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let kilobytes = text
        .lines()
        .find_map(|line| line.strip_prefix("MemTotal:")?.split_whitespace().next()?.parse().ok());
    entries_for(kilobytes.unwrap_or(0))
}

/// How many entries a quarter of a per cent of so many KiB holds, within reason.
fn entries_for(kilobytes: u64) -> u32 {
    /// Key, value, and what the kernel's `struct htab_elem` and bucket add.
    const BYTES: u64 = 176;
    let entries = kilobytes * 1024 / 400 / BYTES;
    u32::try_from(entries.clamp(16_384, 1_048_576)).unwrap_or(u32::MAX)
}

/// Makes the folders and removes pinned maps that are not what this build expects. aya 0.14 takes
/// any map it finds under the name, whatever its layout; programs would then read garbage. Returns
/// the folder of maps, and the flows' former map where only its capacity is another one now.
fn prepare(folder: &Path, conntrack_max: u32) -> Result<(PathBuf, Option<Conntrack>)> {
    let mut former = None;
    let maps = folder.join("maps");
    let parent = folder.parent().unwrap_or(folder);
    require_bpffs(parent)?;
    for path in [&maps, &folder.join("links")] {
        fs::create_dir_all(path).with_context(|| format!("make {}", path.display()))?;
    }
    for name in map::ALL {
        let pin = maps.join(name);
        if !pin.exists() {
            continue;
        }
        let found = MapInfo::from_pin(&pin)
            .with_context(|| format!("{} is no map: remove it", pin.display()))
            .map(|info| {
                let kind = info.map_type().unwrap_or(MapType::Unspecified);
                (kind, info.key_size(), info.value_size(), info.max_entries())
            })?;
        let expected = expected(name, conntrack_max);
        let same_layout = (found.0, found.1, found.2) == (expected.0, expected.1, expected.2);
        if name == map::CONNTRACK && same_layout && found.3 != expected.3 {
            former = Some(Conntrack::open(&maps)?);
            fs::remove_file(&pin).with_context(|| format!("remove {}", pin.display()))?;
            continue;
        }
        if found != expected {
            tracing::warn!(
                map = name,
                ?found,
                ?expected,
                "a pinned map is not of this build; it is made again and filled from Consul"
            );
            fs::remove_file(&pin).with_context(|| format!("remove {}", pin.display()))?;
        }
    }
    Ok((maps, former))
}

/// Type, key size, value size and capacity of a map of this build, `CONNTRACK` having the capacity
/// given.
fn expected(name: &str, conntrack_max: u32) -> (MapType, u32, u32, u32) {
    fn size<T>() -> u32 {
        u32::try_from(size_of::<T>()).unwrap_or(u32::MAX)
    }
    let key = size::<u32>();
    match name {
        map::CONFIG => (MapType::Array, key, size::<abi::HostConfig>(), 1),
        map::HOSTS => {
            (MapType::Hash, size::<abi::Address>(), size::<abi::HostValue>(), abi::MAX_HOSTS)
        }
        map::NETWORKS => (MapType::Hash, key, size::<abi::NetworkValue>(), abi::MAX_NETWORKS),
        map::ENDPOINTS => (
            MapType::Hash,
            size::<abi::EndpointKey>(),
            size::<abi::EndpointValue>(),
            abi::MAX_ENDPOINTS,
        ),
        map::PORTS => (MapType::Hash, key, size::<abi::PortValue>(), abi::MAX_PORTS),
        map::PORT_COUNTERS => {
            (MapType::PerCpuHash, key, size::<abi::PortCounters>(), abi::MAX_PORTS)
        }
        map::COUNTERS => (MapType::PerCpuArray, key, size::<abi::Counter>(), abi::MAX_COUNTERS),
        map::EVENT_TIMES => (MapType::PerCpuArray, key, size::<u64>(), abi::MAX_COUNTERS),
        map::PUBLISHED => (
            MapType::Hash,
            size::<published::PublishedKey>(),
            size::<published::PublishedValue>(),
            published::MAX_PUBLISHED,
        ),
        map::CONNTRACK => (
            MapType::LruHash,
            size::<published::FlowKey>(),
            size::<published::FlowValue>(),
            conntrack_max,
        ),
        map::FRAGMENTS => (
            MapType::LruHash,
            size::<published::FragmentKey>(),
            size::<published::FragmentValue>(),
            published::MAX_FRAGMENTS,
        ),
        _ => (MapType::RingBuf, 0, 0, abi::EVENTS_BYTES),
    }
}

/// Fails unless the folder, or the closest parent that exists, is on a bpffs.
pub fn require_bpffs(folder: &Path) -> Result<()> {
    let existing = folder.ancestors().find(|path| path.exists()).unwrap_or(Path::new("/"));
    let found = nix::sys::statfs::statfs(existing)
        .with_context(|| format!("look at {}", existing.display()))?;
    if found.filesystem_type() != nix::sys::statfs::FsType(BPF_FS_MAGIC) {
        bail!(
            "{} is not on a bpffs: mount one with `mount -t bpf bpf /sys/fs/bpf`, or choose \
             another folder with --bpffs",
            folder.display()
        );
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::entries_for;

    #[test]
    fn flows_take_a_quarter_of_a_per_cent_of_the_memory() {
        assert_eq!(entries_for(0), 16_384);
        assert_eq!(entries_for(8 << 20), 122_016);
        assert_eq!(entries_for(1 << 30), 1_048_576);
    }
}
