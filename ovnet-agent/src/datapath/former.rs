//! What agents of other ABI versions, earlier or later, left pinned.
//!
//! Their programs forward on until ours take their places, one hook after the other, so what both
//! need must be the same: a map whose layout did not change is pinned a second time, under our
//! folder, and every entry in it, a counter or a connection, is there for both. A map that did
//! change is made anew, and filled before the programs that read it are put in place.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BTreeSet},
    fmt, fs, io,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result};
use aya::maps::{MapData, MapInfo, MapType};
use ovnet_common::abi::map;

use super::{
    layouts::Layouts,
    links::{self, Hook},
};

/// The maps without which packets to other hosts go nowhere, and which only Consul can fill.
const FROM_CONSUL: [&str; 2] = [map::HOSTS, map::ENDPOINTS];

/// The folder of another version.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Former {
    /// Its ABI version.
    pub(super) version: u32,
    /// `<bpffs>/v<version>`.
    pub(super) folder: PathBuf,
    /// The links in it when it was found, each with its hook.
    pub(super) links: Vec<(Option<Hook>, PathBuf)>,
}

impl Former {
    /// Where it has its maps.
    pub(super) fn maps(&self) -> PathBuf {
        self.folder.join("maps")
    }

    /// Its map of this name, if it has one. One that cannot be read is as good as none: ours is made.
    pub(super) fn describe(&self, name: &str) -> Option<Described> {
        let described = Layouts::read(&self.folder, self.version)
            .and_then(|layouts| Described::pinned(&self.maps(), name, &layouts));
        described.unwrap_or_else(|error| {
            tracing::warn!("{error:#}");
            None
        })
    }

    /// Removes everything pinned in it; programs that are attached by nothing else go with it.
    pub(super) fn remove(&self) -> Result<()> {
        match fs::remove_dir_all(&self.folder) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(error).with_context(|| format!("remove {}", self.folder.display()))
            }
            _ => Ok(()),
        }
    }
}

/// The folders of other versions than `own`, the one to take maps from first: those whose links are
/// in force, and of these the latest.
pub(super) fn find(bpffs: &Path, own: u32) -> Result<Vec<Former>> {
    let listed = || format!("list {}", bpffs.display());
    let mut found = Vec::new();
    for entry in fs::read_dir(bpffs).with_context(listed)? {
        let entry = entry.with_context(listed)?;
        let is_folder = entry.file_type().with_context(listed)?.is_dir();
        if let Some(version) = entry.file_name().to_str().and_then(version_of)
            && is_folder
            && version != own
        {
            let folder = entry.path();
            found.push(Former { version, links: links::list(&folder)?, folder });
        }
    }
    found.sort_by_key(|former| (former.links.is_empty(), Reverse(former.version)));
    Ok(found)
}

/// The version in the name of a folder. Pure.
fn version_of(name: &str) -> Option<u32> {
    let digits = name.strip_prefix('v')?;
    // As we write it, so that no two names stand for one version.
    let canonical = digits == "0" || !digits.starts_with(['0', '+']);
    digits.parse().ok().filter(|_| canonical)
}

/// Removes the maps in a folder of maps.
pub(super) fn clear(maps: &Path) -> Result<()> {
    for name in map::ALL {
        let pin = maps.join(name);
        match fs::remove_file(&pin) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(error).with_context(|| format!("remove {}", pin.display()));
            }
            _ => {}
        }
    }
    Ok(())
}

/// Type, sizes and capacity of a map.
#[derive(Clone, Copy, PartialEq)]
pub(super) struct Shape {
    pub(super) kind: MapType,
    pub(super) key: u32,
    pub(super) value: u32,
    pub(super) entries: u32,
}

impl Shape {
    fn of(pin: &Path) -> Result<Self> {
        let info = MapInfo::from_pin(pin)
            .with_context(|| format!("{} is no map: remove it", pin.display()))?;
        Ok(Self {
            kind: info.map_type().unwrap_or(MapType::Unspecified),
            key: info.key_size(),
            value: info.value_size(),
            entries: info.max_entries(),
        })
    }
}

impl fmt::Debug for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { kind, key, value, entries } = self;
        write!(f, "{kind:?} of {entries}, {key} and {value} bytes")
    }
}

/// A map as it is, or as it must be.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Described {
    /// The ABI version that its layout dates from.
    pub(super) layout: u32,
    pub(super) shape: Shape,
}

impl Described {
    /// The map pinned under this name in a folder of maps, if there is one.
    pub(super) fn pinned(maps: &Path, name: &str, layouts: &Layouts) -> Result<Option<Self>> {
        let pin = maps.join(name);
        // Asking for what is there leaves out what cannot be asked, and that is an error.
        if !pin.exists() {
            return Ok(None);
        }
        Ok(Some(Self { layout: layouts.of(name), shape: Shape::of(&pin)? }))
    }

    /// Whether only the capacity differs.
    fn is_resized(&self, wanted: &Self) -> bool {
        let shape = Shape { entries: wanted.shape.entries, ..self.shape };
        self != wanted && Self { shape, ..*self } == *wanted
    }
}

/// Where a map of ours comes from. The numbers are positions in the list of formers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Source {
    /// It is pinned under our folder.
    Own,
    /// It is pinned there, and under ours from now on.
    Former(usize),
    /// It is made.
    Anew,
    /// It is made, and given what is in our own of another capacity.
    FromOwn,
    /// It is made, and given what is in that one of another capacity.
    FromFormer(usize),
}

/// Decides where a map comes from, by what is pinned under our folder and under each former one.
/// Pure.
///
/// What is ours is what our programs, where some are in force already, read and write. Content is
/// kept through a change of capacity for `CONNTRACK` alone, whose capacity is an option.
pub(super) fn source(
    name: &str,
    wanted: &Described,
    own: Option<&Described>,
    formers: &[Option<Described>],
) -> Source {
    if own == Some(wanted) {
        return Source::Own;
    }
    if let Some(position) = formers.iter().position(|it| it.as_ref() == Some(wanted)) {
        // With another one of ours there, links of ours may be in force that use that.
        if own.is_none() {
            return Source::Former(position);
        }
    }
    if name == map::CONNTRACK {
        if own.is_some_and(|own| own.is_resized(wanted)) {
            return Source::FromOwn;
        }
        let resized = |it: &Option<Described>| it.is_some_and(|it| it.is_resized(wanted));
        if let Some(position) = formers.iter().position(resized) {
            return Source::FromFormer(position);
        }
    }
    Source::Anew
}

/// Pins a former's map under our folder, too.
pub(super) fn share(former: &Path, own: &Path) -> Result<()> {
    let map = MapData::from_pin(former).with_context(|| format!("open {}", former.display()))?;
    map.pin(own).with_context(|| format!("pin {} as {}", former.display(), own.display()))
}

/// The ids of our maps that only Consul can fill, by name; `maps` is our folder of maps.
pub(super) fn tables_from_consul(maps: &Path) -> Result<BTreeMap<&'static str, u32>> {
    let id = |name: &'static str| {
        let pin = maps.join(name);
        let info = MapInfo::from_pin(&pin).with_context(|| format!("open {}", pin.display()))?;
        Ok((name, info.id()))
    };
    FROM_CONSUL.into_iter().map(id).collect()
}

/// Whether clsact filters, of which nothing tells what they are, may look hosts or endpoints up in
/// other maps than `ours`: in those of a former folder, or in the ones that `remade` replaces.
pub(super) fn may_read_others(
    ours: &BTreeMap<&'static str, u32>,
    formers: &[Former],
    remade: &BTreeSet<&str>,
) -> bool {
    ours.iter().any(|(name, id)| {
        let theirs =
            |former: &Former| MapInfo::from_pin(former.maps().join(name)).map(|it| it.id());
        remade.contains(name) || formers.iter().any(|it| theirs(it).ok() != Some(*id))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const WANTED: Described = described(3, 4096);

    const fn described(layout: u32, entries: u32) -> Described {
        Described { layout, shape: Shape { kind: MapType::Hash, key: 16, value: 4, entries } }
    }

    #[test]
    fn our_own_map_comes_before_a_former_one_and_that_before_a_new_one() {
        let of = |own: Option<Described>, formers: &[Option<Described>]| {
            source(map::HOSTS, &WANTED, own.as_ref(), formers)
        };
        let (same, changed, other) = (WANTED, described(4, 4096), described(3, 4));
        assert_eq!(of(None, &[]), Source::Anew);
        assert_eq!(of(Some(same), &[Some(same)]), Source::Own);
        assert_eq!(of(None, &[Some(same)]), Source::Former(0));
        assert_eq!(of(None, &[None, Some(changed), Some(same), Some(same)]), Source::Former(2));
        assert_eq!(of(None, &[Some(changed)]), Source::Anew, "of the same size, but not the same");
        assert_eq!(of(None, &[Some(other)]), Source::Anew, "of another capacity");
        assert_eq!(of(Some(changed), &[None]), Source::Anew);
        assert_eq!(of(Some(changed), &[Some(same)]), Source::Anew, "ours may be in force");
    }

    #[test]
    fn connections_are_kept_where_only_their_number_changes() {
        let of = |own: Option<Described>, formers: &[Option<Described>]| {
            source(map::CONNTRACK, &WANTED, own.as_ref(), formers)
        };
        let (smaller, changed) = (described(3, 4), described(4, 4));
        assert_eq!(of(Some(smaller), &[Some(smaller)]), Source::FromOwn);
        assert_eq!(of(None, &[Some(changed), Some(smaller)]), Source::FromFormer(1));
        assert_eq!(of(None, &[Some(smaller), Some(WANTED)]), Source::Former(1));
        assert_eq!(of(Some(changed), &[Some(changed)]), Source::Anew);
    }

    #[test]
    fn a_folder_of_pins_is_named_by_its_version_alone() {
        for (name, version) in [("v3", Some(3)), ("v0", Some(0)), ("v12", Some(12))] {
            assert_eq!(version_of(name), version, "{name}");
        }
        for name in ["3", "v", "v03", "v+3", "v-3", "v3x", "w3", "v4294967296"] {
            assert_eq!(version_of(name), None, "{name}");
        }
    }

    #[test]
    fn formers_whose_programs_are_in_force_come_first_then_the_latest() {
        let bpffs = tempfile::tempdir().unwrap();
        for folder in ["v2/links", "v3/links", "v4/links", "v5/links", "v04/links", "mine", "v9"] {
            fs::create_dir_all(bpffs.path().join(folder)).unwrap();
        }
        fs::write(bpffs.path().join("v7"), "no folder").unwrap();
        fs::write(bpffs.path().join("v2/links/from_uplink-2"), "").unwrap();
        let found = find(bpffs.path(), 4).unwrap();
        let versions: Vec<u32> = found.iter().map(|former| former.version).collect();
        assert_eq!(versions, [2, 9, 5, 3]);
        assert!(find(&bpffs.path().join("none"), 4).is_err());
    }
}
