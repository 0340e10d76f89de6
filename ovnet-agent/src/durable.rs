//! Files that survive a cut at any byte of any write, be it of the process or of the power.
//!
//! There is one way to write a file that must outlive the agent, [`replace`]: the new content under
//! another name in the same folder, that file synced, renamed over the old one, and the folder
//! synced. Whatever of it a crash leaves, the name leads to the old content or to the new one. What
//! is left under the other name is ignored, and removed at the next start.
//!
//! A [`Folder`] holds one JSON file per object. One that cannot be read, which then somebody else
//! did, is set aside: no reason not to start, nor to forget the others.

use std::{
    collections::BTreeSet,
    fs, io,
    os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
    sync::{Mutex, PoisonError},
};

use anyhow::{Context as _, Result};
use serde::{Serialize, de::DeserializeOwned};

/// What the name of a file ends with while it is written; versions before had `.new`.
const TEMPORARY: [&str; 2] = [".ovnet-new", ".new"];
/// What the name of an object's file ends with.
const OBJECT: &str = "json";
/// What it ends with once it was set aside.
const ASIDE: &str = "damaged";

/// One thing done to a file system. Each is whole only when it and what [`Effect::Sync`] or
/// [`Effect::SyncFolder`] says of it have been carried out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Effect<'a> {
    /// Make a file with this mode and this content; there is none of the name.
    Write(&'a Path, u32, &'a [u8]),
    /// Have the file's content on disk.
    Sync(&'a Path),
    /// Give the first the name of the second.
    Rename(&'a Path, &'a Path),
    /// Have the names in the folder on disk.
    SyncFolder(&'a Path),
    /// Remove a file; one that is not there is no error.
    Remove(&'a Path),
}

/// Where effects go: the kernel, or a test that looks at each of them.
pub(crate) trait Disk {
    fn carry_out(&mut self, effect: Effect<'_>) -> io::Result<()>;
}

/// The file systems of this machine.
pub(crate) struct Kernel;

impl Disk for Kernel {
    fn carry_out(&mut self, effect: Effect<'_>) -> io::Result<()> {
        use std::io::Write as _;
        match effect {
            Effect::Write(path, mode, bytes) => {
                let mut options = fs::OpenOptions::new();
                let mut file = options.write(true).create_new(true).mode(0o600).open(path)?;
                if mode != 0o600 {
                    file.set_permissions(fs::Permissions::from_mode(mode))?;
                }
                file.write_all(bytes)
            }
            Effect::Sync(path) | Effect::SyncFolder(path) => fs::File::open(path)?.sync_all(),
            Effect::Rename(from, to) => fs::rename(from, to),
            Effect::Remove(path) => match fs::remove_file(path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
                _ => Ok(()),
            },
        }
    }
}

/// Writes a file, or replaces it whole; on disk when this returns. After an error there is the old
/// file, or, where only the folder could not be synced, the new one. `mode` is the new file's.
pub fn replace(path: &Path, mode: u32, bytes: &[u8]) -> Result<()> {
    replace_on(&mut Kernel, path, mode, bytes).map_err(|error| told(error, "write", path))
}

/// Removes a file, on disk when this returns; one that is not there is no error.
pub fn remove(path: &Path) -> Result<()> {
    remove_on(&mut Kernel, path).map_err(|error| told(error, "remove", path))
}

fn replace_on(disk: &mut impl Disk, path: &Path, mode: u32, bytes: &[u8]) -> io::Result<()> {
    let mut temporary = path.to_owned();
    temporary.as_mut_os_string().push(TEMPORARY[0]);
    let mut put = || {
        // Of a write that was cut short.
        disk.carry_out(Effect::Remove(&temporary))?;
        disk.carry_out(Effect::Write(&temporary, mode, bytes))?;
        disk.carry_out(Effect::Sync(&temporary))?;
        disk.carry_out(Effect::Rename(&temporary, path))
    };
    if let Err(error) = put() {
        // A full disk must not be kept full by what it had no room for.
        let _ = disk.carry_out(Effect::Remove(&temporary));
        return Err(error);
    }
    disk.carry_out(Effect::SyncFolder(folder_of(path)))
}

fn remove_on(disk: &mut impl Disk, path: &Path) -> io::Result<()> {
    disk.carry_out(Effect::Remove(path))?;
    disk.carry_out(Effect::SyncFolder(folder_of(path)))
}

fn folder_of(path: &Path) -> &Path {
    path.parent().filter(|folder| *folder != Path::new("")).unwrap_or(Path::new("."))
}

/// The error with the file it is about and what to do.
fn told(error: io::Error, doing: &str, path: &Path) -> anyhow::Error {
    let folder = folder_of(path).display();
    let advice = match error.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
            format!(": the disk is full: free some space under {folder}, and try again")
        }
        io::ErrorKind::ReadOnlyFilesystem => {
            format!(": make {folder} writable (`mount -o remount,rw`), and try again")
        }
        io::ErrorKind::PermissionDenied => " (this needs root)".into(),
        _ => String::new(),
    };
    anyhow::Error::from(error).context(format!("{doing} {}{advice}", path.display()))
}

/// A folder of files, one per object.
#[derive(Debug)]
pub struct Folder {
    path: PathBuf,
    /// Two writes of one object would share the other name.
    writing: Mutex<()>,
}

/// What a folder holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Loaded<T> {
    /// The objects, in the order of their files' names.
    pub objects: Vec<T>,
    /// How many files were set aside.
    pub set_aside: usize,
}

impl Folder {
    /// Opens the folder, making it, readable by root only, where it is missing, and removes what
    /// writes left that were cut short.
    pub fn open(path: &Path) -> Result<Self> {
        let shown = path.display();
        if !path.is_dir() {
            let mut builder = fs::DirBuilder::new();
            let made = builder.recursive(true).mode(0o700).create(path);
            let mut parents = path.ancestors().skip(1).take(2).filter(|it| **it != *Path::new(""));
            let synced = |()| parents.try_for_each(|it| Kernel.carry_out(Effect::SyncFolder(it)));
            made.and_then(synced).map_err(|error| told(error, "make the state folder", path))?;
        }
        let folder = Self { path: path.to_owned(), writing: Mutex::default() };
        for file in folder.files()? {
            let name = file.to_string_lossy();
            if TEMPORARY.iter().any(|end| name.ends_with(end)) {
                // It is in nobody's way, and not being able to remove it is no reason not to start.
                if let Err(error) = fs::remove_file(&file) {
                    tracing::warn!("the rest of a write stays in {shown}: {error}");
                }
            }
        }
        Ok(folder)
    }

    /// Every object that can be read. `id_of` is the one its file must be named after. A file that
    /// is no such object is set aside, with a line in the log. What keeps a file from being read
    /// without there being anything wrong with it, as too many open files, is an error.
    pub fn load<T: DeserializeOwned>(&self, id_of: impl Fn(&T) -> &str) -> Result<Loaded<T>> {
        let mut loaded = Loaded { objects: Vec::new(), set_aside: 0 };
        for path in self.files()?.into_iter().filter(|path| ends_in(path, OBJECT)) {
            let why = match fs::read(&path) {
                Ok(bytes) => match serde_json::from_slice::<T>(&bytes) {
                    Ok(object) if self.path_of(id_of(&object)) == path => {
                        loaded.objects.push(object);
                        continue;
                    }
                    Ok(object) => format!("it is about {}", id_of(&object)),
                    Err(_) if bytes.is_empty() => "it is empty".into(),
                    Err(error) => error.to_string(),
                },
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                Err(error) if is_of_the_file(&error) => error.to_string(),
                Err(error) => return Err(told(error, "read", &path)),
            };
            let aside = path.with_extension(ASIDE);
            let moved = Kernel.carry_out(Effect::Rename(&path, &aside));
            let moved = moved.and_then(|()| Kernel.carry_out(Effect::SyncFolder(&self.path)));
            match moved {
                Ok(()) => tracing::warn!(
                    path = %path.display(), now = %aside.display(),
                    "a state file cannot be read and is set aside: {why}"
                ),
                Err(error) => tracing::warn!(
                    path = %path.display(),
                    "a state file cannot be read ({why}), nor set aside: {error}"
                ),
            }
            loaded.set_aside += 1;
        }
        Ok(loaded)
    }

    /// The ids of the objects that have a file.
    pub fn ids(&self) -> Result<BTreeSet<String>> {
        self.stems(OBJECT)
    }

    /// The ids of the objects whose file was set aside and that have no other.
    pub fn set_aside(&self) -> Result<BTreeSet<String>> {
        Ok(&self.stems(ASIDE)? - &self.ids()?)
    }

    /// Writes or replaces an object's file, on disk before this returns.
    pub fn store<T: Serialize>(&self, id: &str, object: &T) -> Result<()> {
        let _alone = self.writing.lock().unwrap_or_else(PoisonError::into_inner);
        replace(&self.path_of(id), 0o600, &serde_json::to_vec_pretty(object)?)
    }

    /// Removes an object's files; that there are none is no error.
    pub fn remove(&self, id: &str) -> Result<()> {
        let _alone = self.writing.lock().unwrap_or_else(PoisonError::into_inner);
        let path = self.path_of(id);
        remove(&path.with_extension(ASIDE))?;
        remove(&path)
    }

    /// Where an object's file is.
    pub fn path_of(&self, id: &str) -> PathBuf {
        // Ids are made by us or by Docker; anything else in one must not become a path.
        let safe: String = id
            .chars()
            .map(|c| if c.is_ascii_alphanumeric() || c == '-' { c } else { '_' })
            .collect();
        self.path.join(format!("{safe}.{OBJECT}"))
    }

    fn stems(&self, end: &str) -> Result<BTreeSet<String>> {
        let files = self.files()?.into_iter().filter(|path| ends_in(path, end));
        Ok(files.filter_map(|it| Some(it.file_stem()?.to_str()?.to_owned())).collect())
    }

    /// The files of the folder, sorted.
    fn files(&self) -> Result<Vec<PathBuf>> {
        let listed = || format!("list {}", self.path.display());
        let entries = fs::read_dir(&self.path).with_context(listed)?;
        let files: io::Result<Vec<_>> = entries.map(|it| it.map(|entry| entry.path())).collect();
        let mut files = files.with_context(listed)?;
        files.sort();
        Ok(files)
    }
}

fn ends_in(path: &Path, end: &str) -> bool {
    path.extension().is_some_and(|extension| extension == end)
}

/// Whether a file cannot be read because of what it is, and not for what this process lacks.
fn is_of_the_file(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::IsADirectory | io::ErrorKind::InvalidData)
        || matches!(error.raw_os_error(), Some(libc::EIO | libc::ELOOP | libc::ENXIO))
}

#[cfg(test)]
mod tests;
