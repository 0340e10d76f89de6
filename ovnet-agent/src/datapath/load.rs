//! Loads the object over the pinned maps.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, bail, ensure};
use aya::{
    Ebpf, EbpfLoader,
    maps::MapType,
    programs::{SchedClassifier, Xdp},
};
use ovnet_common::{
    abi::{self, Program, map},
    published,
};

use super::{
    Conntrack, LoadOptions, TcMode,
    conntrack::Flows,
    former::{self, Described, Former, Shape, Source},
    layouts::Layouts,
    links,
};

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

/// The object, for tests that load it over maps the agent would not make.
pub fn object() -> &'static [u8] {
    OBJECT
}

/// The object's programs, loaded, and what there was before.
pub(super) struct Loaded {
    pub(super) ebpf: Ebpf,
    /// The folders of other versions.
    pub(super) formers: Vec<Former>,
    /// Our own maps that were made anew although programs that use the old ones may be in force.
    pub(super) remade: BTreeSet<&'static str>,
}

/// Loads every program, none attached, over the maps in the folder of this version's pins. It is
/// made, and so is each map that is neither there nor in the folder of another version.
pub(super) fn load(options: &LoadOptions, tc: TcMode, conntrack_max: u32) -> Result<Loaded> {
    ensure!(
        !object_is_missing(),
        "this ovnet-agent was built without its programs (AYA_BUILD_SKIP): build it again without"
    );
    let folder = options.abi.folder(&options.bpffs);
    let maps = folder.join("maps");
    let (formers, Prepared { remade, flows }) = prepare(options, tc, &folder, conntrack_max)?;
    let level = options.log.level();
    let mut loader = EbpfLoader::new();
    loader.override_global(aya_log::LEVEL, &level, false);
    let generic = u8::from(options.generic_xdp);
    loader.override_global("XDP_IS_GENERIC", &generic, true);
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
    if let Some(flows) = flows {
        // Until our programs are in place flows may still begin in the former map; the kernel's
        // connection tracking takes those up in the middle.
        Conntrack::open(&maps)?.adopt(&flows)?;
    }
    Ok(Loaded { ebpf, formers, remade })
}

/// Bytes of an entry of `CONNTRACK`: key, value, and what the kernel's `struct htab_elem` and bucket
/// add.
const BYTES: u64 = 176;

/// The capacity of `CONNTRACK` for this machine: a quarter of a per cent of its memory.
pub(super) fn conntrack_by_memory() -> u32 {
    entries_for(memory().unwrap_or(0))
}

/// Fails where the flows' map would take more than half of this machine's memory.
pub(super) fn require_memory(conntrack_max: u32) -> Result<()> {
    let needed = u64::from(conntrack_max) * BYTES / 1024;
    let there = memory().unwrap_or(u64::MAX);
    ensure!(
        needed <= there / 2,
        "--conntrack-max {conntrack_max} takes {} MiB of this machine's {} MiB of memory: give \
         fewer, or auto",
        needed / 1024,
        there / 1024
    );
    Ok(())
}

/// KiB of memory this machine has.
fn memory() -> Option<u64> {
    let text = fs::read_to_string("/proc/meminfo").ok()?;
    let mut lines = text.lines();
    lines.find_map(|line| line.strip_prefix("MemTotal:")?.split_whitespace().next()?.parse().ok())
}

/// How many entries a quarter of a per cent of so many KiB holds, within reason.
fn entries_for(kilobytes: u64) -> u32 {
    let entries = kilobytes * 1024 / 400 / BYTES;
    u32::try_from(entries.clamp(16_384, 1_048_576)).unwrap_or(u32::MAX)
}

/// What became of the maps there were.
#[derive(Default)]
struct Prepared {
    remade: BTreeSet<&'static str>,
    /// The flows' former map, where only its capacity is another one now.
    flows: Option<Flows>,
}

/// Makes the folders, takes over the maps of other versions that are as this build's, and removes
/// pinned maps that are not what this build expects. aya 0.14 takes any map it finds under the
/// name, whatever its layout; programs would then read garbage.
fn prepare(
    options: &LoadOptions,
    tc: TcMode,
    folder: &Path,
    conntrack_max: u32,
) -> Result<(Vec<Former>, Prepared)> {
    let LoadOptions { bpffs, abi, .. } = options;
    require_bpffs(bpffs)?;
    let maps = folder.join("maps");
    // A clsact filter has no pin: any folder may be that of programs in force.
    let in_force = |folder: &Path| match tc {
        TcMode::Tcx => links::any(folder),
        TcMode::Clsact => folder.exists(),
    };
    let own_in_force = in_force(folder);
    for path in [&maps, &folder.join("links")] {
        fs::create_dir_all(path).with_context(|| format!("make {}", path.display()))?;
    }
    let formers = former::find(bpffs, abi.version())?;
    if !own_in_force && formers.iter().any(|former| in_force(&former.folder)) {
        // Nobody's: of a start that attached nothing, or of long ago.
        former::clear(&maps)?;
    }
    let own_layouts = Layouts::read(folder, abi.version())?;
    let (mut prepared, mut anew) = (Prepared::default(), Vec::new());
    for name in map::ALL {
        let pin = maps.join(name);
        let shape = expected(name, conntrack_max);
        let wanted = Described { layout: abi.layouts().of(name), shape };
        let own = Described::pinned(&maps, name, &own_layouts)?;
        let theirs: Vec<_> = formers.iter().map(|former| former.describe(name)).collect();
        let source = former::source(name, &wanted, own.as_ref(), &theirs);
        let theirs = |at: usize| formers.get(at).map(|it| it.maps().join(name)).unwrap_or_default();
        match source {
            Source::Own => continue,
            Source::Former(at) => former::share(&theirs(at), &pin)?,
            Source::FromFormer(at) => prepared.flows = Some(Flows::open(&theirs(at))?),
            Source::FromOwn => prepared.flows = Some(Flows::open(&pin)?),
            Source::Anew => anew.push(name),
        }
        if let Some(found) = own {
            tracing::warn!(
                map = name,
                ?found,
                ?wanted,
                "a pinned map is not of this build; it is made again and filled from Consul"
            );
            fs::remove_file(&pin).with_context(|| format!("remove {}", pin.display()))?;
            prepared.remade.extend(own_in_force.then_some(name));
        }
    }
    abi.layouts().write(folder)?;
    if let Some(Former { version, .. }) = formers.first() {
        let shared = map::ALL.len() - anew.len();
        tracing::info!(version, shared, ?anew, "found what an agent of another version left");
    }
    Ok((formers, prepared))
}

/// The shape of a map of this build, `CONNTRACK` having the capacity given.
fn expected(name: &str, conntrack_max: u32) -> Shape {
    fn size<T>() -> u32 {
        u32::try_from(size_of::<T>()).unwrap_or(u32::MAX)
    }
    let key = size::<u32>();
    let (kind, key, value, entries) = match name {
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
    };
    Shape { kind, key, value, entries }
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
