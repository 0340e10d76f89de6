//! The first file system of a kernel: an archive in cpio's "newc" format, as
//! Documentation/driver-api/early-userspace/buffer-format.rst of the kernel describes it. The kernel
//! takes several such archives one behind the other.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result};

use crate::tools;

/// Folders that are links below `usr`, here and in Debian.
const MERGED: [&str; 5] = ["bin", "sbin", "lib", "lib32", "lib64"];
/// Bits of a mode that say what an entry is.
const FOLDER: u32 = 0o040_000;
const FILE: u32 = 0o100_000;
const LINK: u32 = 0o120_000;

/// An archive that is being written.
#[derive(Default)]
pub(super) struct Archive {
    bytes: Vec<u8>,
    entries: u32,
    /// What is in it, so that nothing comes twice.
    paths: BTreeSet<String>,
}

impl Archive {
    /// Puts in a folder and those it lies in. Paths are absolute.
    pub(super) fn folder(&mut self, path: &str) {
        if let Some((parent, _)) = path.rsplit_once('/')
            && !parent.is_empty()
        {
            self.folder(parent);
        }
        self.entry(path, FOLDER | 0o755, &[]);
    }

    /// Puts in a file that anybody may run.
    pub(super) fn file(&mut self, path: &str, content: &[u8]) {
        if let Some((folder, _)) = path.rsplit_once('/').filter(|(folder, _)| !folder.is_empty()) {
            self.folder(folder);
        }
        self.entry(path, FILE | 0o755, content);
    }

    /// Puts in a symbolic link.
    pub(super) fn link(&mut self, path: &str, target: &str) {
        self.entry(path, LINK | 0o777, target.as_bytes());
    }

    /// Puts in the links of a merged `usr`, before anything is looked for below them.
    pub(super) fn merged_usr(&mut self) {
        for name in MERGED {
            self.folder(&format!("/usr/{name}"));
            self.link(&format!("/{name}"), &format!("usr/{name}"));
        }
    }

    /// Puts in a program of this machine, with the libraries it is linked with.
    ///
    /// # Errors
    /// The program or a library of it cannot be read.
    pub(super) fn program(&mut self, path: &str, source: &Path) -> Result<()> {
        let content = read(source)?;
        self.file(path, &content);
        self.libraries(source)
    }

    /// Puts in a program built here, without what only a debugger reads: that is most of it.
    ///
    /// # Errors
    /// As [`Self::program`]; or `strip` fails.
    pub(super) fn stripped(&mut self, path: &str, source: &Path) -> Result<()> {
        let name = source.file_name().unwrap_or_default();
        let small = tools::tools().join("kernels").join(name);
        let mut strip = Command::new(tools::find("strip").context("strip is not installed")?);
        tools::output(strip.args(["--strip-debug", "-o"]).args([&small, source]))?;
        let content = read(&small)?;
        self.file(path, &content);
        fs::remove_file(&small).with_context(|| format!("remove {}", small.display()))?;
        self.libraries(source)
    }

    /// What `ldd` shows of a program: `name => /path (address)`, and the loader's path alone.
    fn libraries(&mut self, source: &Path) -> Result<()> {
        // One that is linked statically has none, and ldd then fails.
        let shown = tools::output(Command::new("ldd").arg(source)).unwrap_or_default();
        let words = shown.split_whitespace().filter(|word| word.starts_with('/'));
        for library in words {
            let path = below_usr(library);
            if !self.paths.contains(&path) {
                let content = read(Path::new(library))?;
                self.file(&path, &content);
            }
        }
        Ok(())
    }

    /// The archive, complete.
    pub(super) fn finish(mut self) -> Vec<u8> {
        self.entry("/TRAILER!!!", 0, &[]);
        // Whatever is put behind it begins at a multiple of a word, and the kernel skips zeroes.
        self.bytes.resize(self.bytes.len().next_multiple_of(512), 0);
        self.bytes
    }

    fn entry(&mut self, path: &str, mode: u32, content: &[u8]) {
        if !self.paths.insert(path.to_owned()) {
            return;
        }
        self.entries += 1;
        let name = path.trim_start_matches('/');
        let fields = [
            self.entries,
            mode,
            0, // root
            0, // its group
            1, // links
            0, // time
            u32::try_from(content.len()).unwrap_or(u32::MAX),
            0, // device
            0,
            0, // device that a special file is
            0,
            u32::try_from(name.len() + 1).unwrap_or(u32::MAX),
            0, // checksum, of another format
        ];
        self.bytes.extend(b"070701");
        for field in fields {
            self.bytes.extend(format!("{field:08x}").bytes());
        }
        self.bytes.extend(name.bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend(content);
        self.pad();
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}

/// Where a path leads with a merged `usr`: `/lib/x.so` is `/usr/lib/x.so`.
fn below_usr(path: &str) -> String {
    let first = path.trim_start_matches('/').split('/').next().unwrap_or_default();
    if MERGED.contains(&first) { format!("/usr{path}") } else { path.to_owned() }
}

fn read(path: &Path) -> Result<Vec<u8>> {
    // Where a link leads to: the archive has what it names, not the link.
    let path: PathBuf = fs::canonicalize(path).with_context(|| format!("{}", path.display()))?;
    fs::read(&path).with_context(|| format!("cannot read {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_entry_is_laid_out_as_the_kernel_reads_it() {
        let mut archive = Archive::default();
        archive.file("/ab", b"hello");
        archive.file("/ab", b"twice");
        let bytes = archive.finish();
        let text = String::from_utf8_lossy(&bytes);
        assert_eq!(&text[..6], "070701");
        // Size and length of the name are the seventh and the twelfth field of eight digits.
        assert_eq!(&text[6 + 6 * 8..6 + 7 * 8], "00000005");
        assert_eq!(&text[6 + 11 * 8..6 + 12 * 8], "00000003");
        // The header has 110 bytes: the name's end is padded to 116, the content's to 124.
        assert_eq!(&bytes[110..124], b"ab\0\0\0\0hello\0\0\0");
        assert_eq!(&text[124..130], "070701");
        assert!(text.contains("TRAILER!!!\0"));
        assert!(!text.contains("twice"));
        assert_eq!(bytes.len() % 512, 0);
    }

    #[test]
    fn a_file_brings_the_folders_it_lies_in() {
        let mut archive = Archive::default();
        archive.file("/usr/bin/x", b"");
        archive.folder("/usr/bin");
        let paths: Vec<_> = archive.paths.iter().map(String::as_str).collect();
        assert_eq!(paths, ["/usr", "/usr/bin", "/usr/bin/x"]);
        assert_eq!(below_usr("/lib64/ld.so"), "/usr/lib64/ld.so");
        assert_eq!(below_usr("/usr/lib/x.so"), "/usr/lib/x.so");
        assert_eq!(below_usr("/libexec/x"), "/libexec/x");
    }
}
