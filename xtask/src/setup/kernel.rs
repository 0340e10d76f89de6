//! Debian's kernels, unpacked into the project's own folder to be booted by an emulator. None is
//! installed on the machine.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail, ensure};

use super::apt::Apt;
use super::sources::{self, Mirror};
use crate::tools;

/// The package that depends on a suite's newest kernel: the one for virtual machines, which has less
/// to boot and all that we need.
const NEWEST: &str = "linux-image-cloud-amd64";
/// What the kernel itself is in: one package until Debian 13, two more after it.
const PARTS: [&str; 3] = ["linux-image-", "linux-binary-", "linux-modules-"];

/// A kernel that was unpacked.
pub(crate) struct Kernel {
    /// As `uname -r` says it: `6.1.0-57-cloud-amd64`.
    pub(crate) release: String,
    /// What a boot loader loads.
    pub(crate) image: PathBuf,
    /// The folder of its modules, `kernel/` and all below.
    pub(crate) modules: PathBuf,
}

/// The kernel of a suite of Debian's archive: the one that was brought before, else the newest there
/// is now, from the mirror that this machine's own packages come from.
///
/// # Errors
/// It cannot be had: this is no Debian, or the mirror cannot be reached or lacks the suite.
pub(crate) fn kernel(suite: &str) -> Result<Kernel> {
    let _lock = super::lock()?;
    let root = tools::tools().join("kernels").join(suite);
    if let Ok(kernel) = find(&root) {
        return Ok(kernel);
    }
    let what = || format!("the kernel of Debian's suite {suite}");
    download(suite, &root).with_context(what)?;
    find(&root).with_context(what)
}

fn download(suite: &str, root: &Path) -> Result<()> {
    if cfg!(not(target_arch = "x86_64")) {
        bail!("only for x86-64 machines");
    }
    if tools::find("apt-get").is_none() {
        bail!("there is no apt to take it from");
    }
    let Mirror { uri, signed_by } = sources::debian_mirror()?;
    let source = format!(
        "Types: deb\nURIs: {uri}\nSuites: {suite}\nComponents: main\nArchitectures: amd64\n\
         Signed-By: {signed_by}\n"
    );
    let apt = Apt::private(&format!("kernel-{suite}"), Some(&source))?;
    apt.update().with_context(|| format!("{uri} {suite}"))?;
    let is_part = |name: &String| PARTS.iter().any(|part| name.starts_with(part));
    let mut packages: Vec<String> = apt.depends(NEWEST).into_iter().filter(is_part).collect();
    let image = packages.first().with_context(|| format!("no {NEWEST} in {suite}"))?;
    packages.extend(apt.depends(image).into_iter().filter(is_part));
    // Another name than the last one until it is whole.
    let new = root.with_extension("new");
    for folder in [&new, root] {
        if folder.exists() {
            fs::remove_dir_all(folder).with_context(|| format!("remove {}", folder.display()))?;
        }
    }
    let packages: Vec<&str> = packages.iter().map(String::as_str).collect();
    apt.unpack(&packages, &new)?;
    find(&new)?;
    fs::rename(&new, root).with_context(|| format!("rename {}", new.display()))
}

/// Finds image and modules below the folder they were unpacked to; where, depends on the release.
fn find(root: &Path) -> Result<Kernel> {
    let modules = ["usr/lib/modules", "lib/modules"].map(|folder| root.join(folder));
    let modules = modules.iter().flat_map(fs::read_dir).flatten().flatten();
    let modules: Vec<PathBuf> = modules.map(|entry| entry.path()).collect();
    let [modules] = <[PathBuf; 1]>::try_from(modules).map_err(|found| {
        anyhow::anyhow!("{} kernels in {} and not one", found.len(), root.display())
    })?;
    let release = modules.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let images = [root.join(format!("boot/vmlinuz-{release}")), modules.join("vmlinuz")];
    let image = images.into_iter().find(|path| path.is_file());
    let image = image.with_context(|| format!("no vmlinuz below {}", root.display()))?;
    let modules = modules.join("kernel");
    ensure!(modules.is_dir(), "{} is not there", modules.display());
    Ok(Kernel { release, image, modules })
}
