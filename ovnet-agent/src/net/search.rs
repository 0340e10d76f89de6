//! Finding the sandbox of an endpoint that nobody remembers.

use std::{
    collections::BTreeSet,
    fs,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
};

use anyhow::Result;

use super::Net;

/// Where namespaces have names: Docker's containers', and those of `ip netns`.
const NAMED: [&str; 2] = ["/run/docker/netns", "/run/netns"];

impl Net {
    /// The network namespace that has the other end of a veth, and the end's name there; `None`
    /// where none that can be found has it. A path with a name comes before one of a process.
    pub async fn find_sandbox(&self, host_ifname: &str) -> Result<Option<(PathBuf, String)>> {
        let candidates = tokio::task::spawn_blocking(namespaces).await?;
        for netns in candidates {
            // One may be gone meanwhile, and the host's own is none.
            if let Ok(Some(ifname)) = self.inner_ifname(host_ifname, &netns).await {
                return Ok(Some((netns, ifname)));
            }
        }
        Ok(None)
    }
}

/// A path for each network namespace of this host.
fn namespaces() -> Vec<PathBuf> {
    let entries = |folder: &str| {
        let entries = fs::read_dir(folder).into_iter().flatten().flatten();
        entries.map(|entry| entry.path()).collect::<Vec<_>>()
    };
    let is_process = |path: &PathBuf| {
        let name = path.file_name().and_then(|name| name.to_str());
        name.is_some_and(|name| name.bytes().all(|it| it.is_ascii_digit()))
    };
    let named = NAMED.into_iter().flat_map(entries);
    let processes = entries("/proc").into_iter().filter(is_process);
    let own = identity(Path::new("/proc/self/ns/net"));
    let mut seen: BTreeSet<(u64, u64)> = own.into_iter().collect();
    let all = named.chain(processes.map(|process| process.join("ns/net")));
    all.filter(|path| identity(path).is_some_and(|it| seen.insert(it))).collect()
}

/// What tells one namespace from another: device and inode.
fn identity(path: &Path) -> Option<(u64, u64)> {
    fs::metadata(path).ok().map(|found| (found.dev(), found.ino()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_namespace_is_looked_into_twice() {
        let found = namespaces();
        let identities: BTreeSet<_> = found.iter().filter_map(|path| identity(path)).collect();
        assert_eq!(identities.len(), found.len());
        assert!(!identities.contains(&identity(Path::new("/proc/self/ns/net")).unwrap()));
    }
}
