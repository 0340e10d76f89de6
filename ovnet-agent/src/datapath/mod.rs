//! The only module that names aya: loads the programs, owns the pinned maps and links.
//!
//! Everything that forwards is pinned under `<bpffs>/v<ABI>/`, so it goes on without this process
//! (invariant 1). A start finds what is pinned, takes over the maps and replaces the programs
//! behind the pinned links atomically; no packet ever meets a hook without a program. An agent of
//! another ABI version, earlier or later, is succeeded in the same way, see `former.rs`.

mod attach;
mod conntrack;
mod events;
mod former;
mod layouts;
mod links;
mod load;
mod maps;
mod pins;

use std::{
    cmp::Ordering,
    collections::{BTreeMap, BTreeSet},
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result};
pub use attach::{has_tcx, unhook};
use aya::{Ebpf, programs::links::FdLink};
pub use conntrack::{Conntrack, Swept};
pub use events::spawn_reader;
use former::Former;
pub use layouts::Abi;
use links::Hook;
use load::Loaded;
pub use load::{DatapathLog, object, object_is_missing, require_bpffs};
pub use maps::{Maps, Tables};
use ovnet_common::abi::Program;

use crate::net::Hooks;

/// How TC programs are attached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TcMode {
    /// A pinned TCX link (Linux 6.6).
    Tcx,
    /// A filter on a clsact qdisc, by netlink.
    Clsact,
}

/// How the XDP program is attached.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum XdpMode {
    /// In the driver.
    Native,
    /// After the skb exists: for drivers without XDP, to try it out.
    Generic,
}

/// One program on one interface. What the interface is called makes no difference: it may be given
/// another name.
#[derive(Clone, Debug)]
pub struct Attachment {
    /// The program.
    pub program: Program,
    /// ifindex of the interface. Part of the pin's name: an interface that was deleted and made
    /// again is another one.
    pub ifindex: u32,
    /// Name of the interface, for messages and for the calls that want names.
    pub interface: String,
    /// The mode, for [`Program::UplinkXdp`].
    pub xdp: Option<XdpMode>,
}

impl Attachment {
    fn key(&self) -> (Program, u32, Option<XdpMode>) {
        (self.program, self.ifindex, self.xdp)
    }
}

impl PartialEq for Attachment {
    fn eq(&self, other: &Self) -> bool {
        self.key() == other.key()
    }
}

impl Eq for Attachment {}

impl PartialOrd for Attachment {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Attachment {
    fn cmp(&self, other: &Self) -> Ordering {
        self.key().cmp(&other.key())
    }
}

/// What to load and where.
#[derive(Clone, Debug)]
pub struct LoadOptions {
    /// The folder of `--bpffs`, on a mounted bpffs.
    pub bpffs: PathBuf,
    /// Level of the programs' own log.
    pub log: DatapathLog,
    /// Use clsact even where the kernel has TCX (a hidden option, for tests).
    pub force_clsact: bool,
    /// Whether XDP is to be attached as generic, whose program then answers probes itself.
    pub generic_xdp: bool,
    /// How many entries of published ports' flows there may be, two per flow; by the machine's
    /// memory where absent.
    pub conntrack_max: Option<u32>,
    /// The version of the maps; this build's, but for tests.
    pub abi: Abi,
}

/// The loaded programs with their pinned maps and links.
pub struct Datapath {
    ebpf: Ebpf,
    maps: Maps,
    folder: PathBuf,
    tc: TcMode,
    /// What this process attached or took over. What an earlier agent pinned and we have not taken
    /// over yet is not in here, so the first pass takes it over. With the links, because one that is
    /// open outlives its pin; a clsact filter is none.
    attached: BTreeMap<Attachment, Option<FdLink>>,
    /// Ids of the pinned maps, by which they are pinned again.
    map_ids: BTreeMap<&'static str, u32>,
    abi: Abi,
    /// The folders of other versions, until they are removed.
    formers: Vec<Former>,
    /// The hooks whose programs know more hosts and endpoints than ours would.
    ahead: BTreeSet<Hook>,
    /// Whether there may be clsact filters of which this is true.
    filters_ahead: bool,
}

impl std::fmt::Debug for Datapath {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { ebpf: _, maps: _, folder, tc, attached, formers, .. } = self;
        f.debug_struct("Datapath")
            .field("folder", folder)
            .field("formers", formers)
            .field("tc", tc)
            .field("attached", &attached.keys())
            .finish_non_exhaustive()
    }
}

impl Datapath {
    /// Loads the programs over the pinned maps, making those that are not there yet. Attaches
    /// nothing.
    pub fn load(options: &LoadOptions) -> Result<Self> {
        pins::allow_descriptors();
        let abi = options.abi.clone();
        let folder = abi.folder(&options.bpffs);
        let conntrack_max = options.conntrack_max.unwrap_or_else(load::conntrack_by_memory);
        load::require_memory(conntrack_max)?;
        let tc = match options.force_clsact || !has_tcx() {
            true => TcMode::Clsact,
            false => TcMode::Tcx,
        };
        let Loaded { mut ebpf, formers, remade } = load::load(options, tc, conntrack_max)?;
        let maps = Maps::take(&mut ebpf).context("open the maps")?;
        let ours = former::tables_from_consul(&folder.join("maps"))?;
        let theirs = formers.iter().map(|former| former.folder.as_path());
        let folders: Vec<&Path> = [folder.as_path()].into_iter().chain(theirs).collect();
        let ahead = links::reading_others(&ours, &folders)?;
        let filters_ahead =
            tc == TcMode::Clsact && former::may_read_others(&ours, &formers, &remade);
        let (attached, map_ids) = (BTreeMap::new(), pins::map_ids(&folder)?);
        Ok(Self { ebpf, maps, folder, tc, attached, map_ids, abi, formers, ahead, filters_ahead })
    }

    /// The tables and counters.
    pub fn maps(&mut self) -> &mut Maps {
        &mut self.maps
    }

    /// The flows of published ports.
    pub fn conntrack(&self) -> Result<Conntrack> {
        Conntrack::open(&self.folder.join("maps"))
    }

    /// How TC programs are attached here.
    pub fn tc_mode(&self) -> TcMode {
        self.tc
    }

    /// The programs, for tests that run them by BPF_PROG_TEST_RUN.
    pub fn ebpf(&mut self) -> &mut Ebpf {
        &mut self.ebpf
    }

    /// The attachments of this process, whether they still are in force or not.
    pub fn known(&self) -> BTreeSet<Attachment> {
        self.attached.keys().cloned().collect()
    }

    /// The attachments of this process that are still in force. One that somebody removed, or
    /// whose interface is gone, is missing here and so attached again by the next pass.
    pub fn attached(&mut self) -> BTreeSet<Attachment> {
        let (ebpf, tc) = (&self.ebpf, self.tc);
        self.attached.retain(|it, link| attach::in_force(ebpf, tc, it, link.as_ref()));
        self.known()
    }

    /// Compares with what netlink says of the interfaces. What of ours is not there is an attachment
    /// no more, so the next step brings it back. With TCX no clsact filter is ours: those that an
    /// agent without it left are taken off, and counted.
    pub fn check_hooks(&mut self, hooks: &Hooks) -> Result<u64> {
        let (ebpf, tc) = (&self.ebpf, self.tc);
        self.attached.retain(|Attachment { program, ifindex, xdp, .. }, _| {
            let own = attach::program_id(ebpf, *program);
            let mut filters = hooks.filters.get(ifindex).into_iter().flatten();
            match (xdp, tc) {
                (Some(_), _) => own.is_some() && hooks.xdp.get(ifindex).copied() == own,
                (None, TcMode::Tcx) => true,
                (None, TcMode::Clsact) => {
                    filters.any(|(name, id)| name == program.name() && Some(*id) == own)
                }
            }
        });
        if tc == TcMode::Clsact {
            return Ok(0);
        }
        let is_ours = |name: &str| Program::ALL.iter().any(|it| it.name() == name);
        let mut foreign = 0;
        for attachment in self.attached.keys().filter(|it| it.xdp.is_none()) {
            let mut filters = hooks.filters.get(&attachment.ifindex).into_iter().flatten();
            if filters.any(|(name, _)| is_ours(name)) {
                foreign += u64::from(unhook(&attachment.interface)?);
            }
        }
        Ok(foreign)
    }

    /// Takes our clsact filters off those of the interfaces that nothing of this process is attached
    /// to. With TCX there are only pinned links, which [`Self::stale_links`] finds.
    pub fn unhook_others<'a>(&mut self, interfaces: impl Iterator<Item = &'a str>) -> Result<()> {
        if self.tc == TcMode::Tcx {
            return Ok(());
        }
        let attached = self.attached();
        for interface in interfaces {
            if attached.iter().all(|attachment| attachment.interface != interface) {
                unhook(interface)?;
            }
        }
        Ok(())
    }

    /// Pinned links that belong to none of `wanted`: of deleted interfaces or another mode.
    pub fn stale_links(&self, wanted: &BTreeSet<Attachment>) -> Result<Vec<PathBuf>> {
        links::stale(&self.folder, wanted)
    }

    /// Attaches a program, or replaces what an earlier agent left there, atomically.
    pub fn attach(&mut self, attachment: &Attachment) -> Result<()> {
        attach::attach(&mut self.ebpf, &self.folder, &self.formers, self.tc, attachment)?;
        let link = links::open(&links::path(&self.folder, attachment))?;
        // With the name it has now.
        self.attached.remove(attachment);
        self.attached.insert(attachment.clone(), link);
        Ok(())
    }

    /// Whether a former agent's program is on the hook, and those look hosts and endpoints up in other
    /// maps than ours: none must be replaced before ours hold what they know.
    pub fn is_behind(&self, attachment: &Attachment) -> bool {
        let is_filter = self.tc == TcMode::Clsact && attachment.xdp.is_none();
        (is_filter && self.filters_ahead) || self.ahead.contains(&Hook::of(attachment))
    }

    /// Removes what former agents left, in folders of other versions: for when ours is on every hook
    /// it should be on. Their programs on any other hook go with it. Says of which versions.
    pub fn remove_formers(&mut self) -> Result<Vec<u32>> {
        let mut versions = Vec::new();
        while let Some(former) = self.formers.first() {
            former.remove()?;
            versions.push(self.formers.remove(0).version);
        }
        Ok(versions)
    }

    /// Detaches a program of this process. An interface that is gone is no error.
    pub fn detach(&mut self, attachment: &Attachment) -> Result<()> {
        self.attached.remove(attachment);
        attach::detach(&self.folder, self.tc, attachment)
    }

    /// Removes a pinned link found by [`Self::stale_links`], which detaches its program. One that a
    /// detach of the same pass removed is no error.
    pub fn remove_link(&mut self, pin: &Path) -> Result<()> {
        links::remove(pin).map(drop)
    }
}

/// The folder of this ABI's pins under the folder of `--bpffs`.
pub fn versioned(bpffs: &Path) -> PathBuf {
    Abi::default().folder(bpffs)
}
