//! Pins that somebody removed are made again.
//!
//! The kernel keeps a map or link for as long as a pin or a descriptor leads to it. This process has
//! one of each, so nothing is lost by `rm -r` of the pins; but the next agent would find nothing, and
//! the end of this one would end the forwarding.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result};
use aya::{
    maps::{MapData, MapInfo},
    programs::links::FdLink,
};
use ovnet_common::abi::map;

use super::{Datapath, links, load};

impl Datapath {
    /// Makes the pins again that somebody removed; how many.
    pub fn repin(&mut self) -> Result<u64> {
        let mut made = 0;
        for (name, id) in &self.map_ids {
            let pin = self.folder.join("maps").join(name);
            if !pin.exists() {
                make_parent(&pin)?;
                let map = MapData::from_id(*id).with_context(|| format!("find the map {name}"))?;
                map.pin(&pin).with_context(|| format!("pin {} again", pin.display()))?;
                made += 1;
            }
        }
        for (attachment, link) in &mut self.attached {
            let pin = links::path(&self.folder, attachment);
            if link.is_none() || pin.exists() {
                continue;
            }
            make_parent(&pin)?;
            if let Some(open) = link.take() {
                let pinned = open.pin(&pin);
                let pinned = pinned.with_context(|| format!("pin {} again", pin.display()))?;
                *link = Some(FdLink::from(pinned));
                made += 1;
            }
        }
        if made > 0 {
            self.abi.layouts().write(&self.folder)?;
            tracing::warn!(made, folder = %self.folder.display(), "pins were removed; made again");
        }
        Ok(made)
    }
}

/// Lets this process open as many descriptors as it may: each attached program takes one, and the
/// usual limit of 1024 is far below what may be had. Where it cannot, attaching says so.
pub(super) fn allow_descriptors() {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: the structure is the one the kernel fills in, and reads, during the calls.
    unsafe {
        if libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit) == 0 {
            limit.rlim_cur = limit.rlim_max;
            libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit);
        }
    }
}

/// The ids of the maps that are pinned, by name.
pub(super) fn map_ids(folder: &Path) -> Result<BTreeMap<&'static str, u32>> {
    let id = |name: &&'static str| {
        let pin = folder.join("maps").join(name);
        let info = MapInfo::from_pin(&pin).with_context(|| format!("open {}", pin.display()))?;
        Ok((*name, info.id()))
    };
    map::ALL.iter().map(id).collect()
}

fn make_parent(pin: &Path) -> Result<()> {
    let parent: PathBuf = pin.parent().map(Path::to_path_buf).unwrap_or_default();
    // Somebody may have unmounted it.
    load::require_bpffs(&parent)?;
    fs::create_dir_all(&parent).with_context(|| format!("make {}", parent.display()))
}
