//! The control groups of a lab's containers: the one thing of a host that is not in its
//! namespaces, and so does not end with it.

use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result};

use super::wait_until;

/// Where the hierarchies are mounted: one below this for each controller (v1), or this (v2).
const MOUNT: &str = "/sys/fs/cgroup";
/// How long the kernel may take to forget the last killed process of a group.
const LIMIT: Duration = Duration::from_secs(10);

/// The group that a host's Docker puts its containers in, as its `--cgroup-parent`.
pub(super) fn parent(prefix: &str, host: &str) -> String {
    format!("/{}/{host}", of_lab(prefix))
}

/// Removes the groups of a lab that has ended.
pub(super) fn remove(prefix: &str) -> Result<()> {
    for folder in folders(prefix) {
        let what = || format!("the control group {} to be empty", folder.display());
        wait_until(LIMIT, what, || {
            remove_tree(&folder).with_context(|| format!("remove {}", folder.display()))?;
            Ok((!folder.exists()).then_some(()))
        })?;
    }
    Ok(())
}

/// The folders of a lab's groups that there are.
pub(super) fn folders(prefix: &str) -> Vec<PathBuf> {
    let below =
        fs::read_dir(MOUNT).into_iter().flatten().filter_map(|entry| Some(entry.ok()?.path()));
    let hierarchies = below.chain([PathBuf::from(MOUNT)]);
    hierarchies.map(|root| root.join(of_lab(prefix))).filter(|folder| folder.is_dir()).collect()
}

fn of_lab(prefix: &str) -> String {
    format!("ovnet-lab-{prefix}")
}

/// Removes what is empty of a group and those below it.
fn remove_tree(folder: &Path) -> std::io::Result<()> {
    let removed = fs::read_dir(folder).and_then(|entries| {
        for entry in entries {
            let entry = entry?;
            // The files in it are the kernel's, and go with it.
            if entry.file_type()?.is_dir() {
                remove_tree(&entry.path())?;
            }
        }
        fs::remove_dir(folder)
    });
    match removed.as_ref().map_err(std::io::Error::kind) {
        Err(ErrorKind::NotFound | ErrorKind::ResourceBusy) => Ok(()),
        _ => removed,
    }
}
