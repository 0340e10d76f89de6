//! Which layout each pinned map has, said in a way that agents of every version can read.
//!
//! A folder of pins bears it as a symbolic link `layouts`, which points nowhere: bpffs has no files,
//! and an agent of an earlier version cannot know what a later one changed. Its text names each
//! map with the ABI version that its layout dates from, see [`map::since`].

use std::{
    collections::BTreeMap,
    fmt, fs, io,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result};
use ovnet_common::abi::{ABI_VERSION, map};

/// Name of the symbolic link in a folder of pins.
const LINK: &str = "layouts";

/// A version of the maps: the number their folder is named after, and the layout of each.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Abi {
    version: u32,
    layouts: Layouts,
}

impl Default for Abi {
    fn default() -> Self {
        Self::like(ABI_VERSION, map::since)
    }
}

impl Abi {
    /// This build's maps under another version, as if the layout of those in `changed` dated from
    /// it: what an upgrade is tried with.
    pub fn pretend(version: u32, changed: &[&str]) -> Self {
        Self::like(version, |name| match changed.contains(&name) {
            true => version,
            false => map::since(name),
        })
    }

    fn like(version: u32, layout: impl Fn(&str) -> u32) -> Self {
        let layouts = map::ALL.iter().map(|name| ((*name).to_owned(), layout(name)));
        Self { version, layouts: Layouts { named: layouts.collect(), others: version } }
    }

    /// The folder of this version's pins under the folder of `--bpffs`.
    pub fn folder(&self, bpffs: &Path) -> PathBuf {
        bpffs.join(format!("v{}", self.version))
    }

    /// The layout of its maps.
    pub(super) fn layouts(&self) -> &Layouts {
        &self.layouts
    }

    /// Its number.
    pub(super) fn version(&self) -> u32 {
        self.version
    }
}

/// The layout of each map of one folder, as the ABI version it dates from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Layouts {
    named: BTreeMap<String, u32>,
    /// Of a map that is not named.
    others: u32,
}

impl Layouts {
    /// The layout of a map.
    pub(super) fn of(&self, name: &str) -> u32 {
        self.named.get(name).copied().unwrap_or(self.others)
    }

    /// Reads what a folder of the ABI version `version` says of its maps. Of those it says nothing
    /// of the layout is taken to date from that very version: so it is with agents of before, and
    /// where it is not, a map is made anew for nothing.
    pub(super) fn read(folder: &Path, version: u32) -> Result<Self> {
        let link = folder.join(LINK);
        let text = match fs::read_link(&link) {
            Ok(target) => target.to_string_lossy().into_owned(),
            Err(error) if error.kind() == io::ErrorKind::NotFound => String::new(),
            Err(error) => return Err(error).with_context(|| format!("read {}", link.display())),
        };
        Ok(Self::parse(&text, version))
    }

    /// Writes it into a folder, in place of what was there.
    pub(super) fn write(&self, folder: &Path) -> Result<()> {
        let (link, new) = (folder.join(LINK), folder.join("layouts_new"));
        let text = self.to_string();
        if fs::read_link(&link).is_ok_and(|there| there == Path::new(&text)) {
            return Ok(());
        }
        let write = || -> io::Result<()> {
            match fs::remove_file(&new) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
            symlink(&text, &new)?;
            fs::rename(&new, &link)
        };
        write().with_context(|| format!("write {}", link.display()))
    }

    fn parse(text: &str, version: u32) -> Self {
        let named = text.split(',').filter_map(|entry| {
            let (name, layout) = entry.split_once('=')?;
            Some((name.to_owned(), layout.parse().ok()?))
        });
        Self { named: named.collect(), others: version }
    }
}

impl fmt::Display for Layouts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (position, (name, layout)) in self.named.iter().enumerate() {
            let comma = if position == 0 { "" } else { "," };
            write!(f, "{comma}{name}={layout}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read() {
        let folder = tempfile::tempdir().unwrap();
        let abi = Abi::pretend(9, &[map::HOSTS]);
        abi.layouts().write(folder.path()).unwrap();
        assert_eq!(Layouts::read(folder.path(), 9).unwrap(), *abi.layouts());
        let changed = Abi::pretend(9, &[map::ENDPOINTS]);
        changed.layouts().write(folder.path()).unwrap();
        assert_eq!(Layouts::read(folder.path(), 9).unwrap(), *changed.layouts());
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1, "nothing beside it");
    }

    #[test]
    fn a_map_that_is_not_named_dates_from_its_folders_version() {
        let folder = tempfile::tempdir().unwrap();
        let silent = Layouts::read(folder.path(), 3).unwrap();
        assert!(map::ALL.iter().all(|name| silent.of(name) == 3));
        let some = Layouts::parse("HOSTS=2,,CONFIG,PORTS=x,FUTURE=5", 4);
        let expected = [("HOSTS", 2), ("FUTURE", 5), ("CONFIG", 4), ("PORTS", 4), ("OTHER", 4)];
        for (name, layout) in expected {
            assert_eq!(some.of(name), layout, "{name}");
        }
    }

    #[test]
    fn no_layout_is_newer_than_its_version() {
        let abi = Abi::default();
        for name in map::ALL {
            assert!(abi.layouts().of(name) <= ABI_VERSION, "{name}");
            assert!(!name.contains([',', '=']), "{name}");
        }
    }
}
