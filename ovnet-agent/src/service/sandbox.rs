//! Which namespace a path means, and one operation at a time in each.

use std::{
    collections::HashMap,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError, Weak},
};

use tokio::sync::{Mutex as AsyncMutex, OwnedMutexGuard};

/// A sandbox by what it is and not by the path it was reached by: `/run/netns/t1` and
/// `/proc/4711/ns/net` may be one namespace, and a name may have been given to another since.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) enum SandboxId {
    /// Device and inode of the namespace.
    Namespace(u64, u64),
    /// A path nothing is at any more.
    Gone(PathBuf),
}

impl SandboxId {
    pub(super) fn of(path: &Path) -> Self {
        match std::fs::metadata(path) {
            Ok(metadata) => Self::Namespace(metadata.dev(), metadata.ino()),
            Err(_) => Self::Gone(path.to_owned()),
        }
    }
}

/// One lock per sandbox: attaches to different sandboxes do not wait for each other.
#[derive(Debug, Default)]
pub(super) struct Locks {
    held: Mutex<HashMap<SandboxId, Weak<AsyncMutex<()>>>>,
}

impl Locks {
    /// Waits until nothing else works in the sandbox.
    pub(super) async fn lock(&self, sandbox: &SandboxId) -> OwnedMutexGuard<()> {
        let lock = {
            let mut held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
            // Locks nobody holds or waits for are forgotten here, so the table stays as small as
            // the number of operations under way.
            held.retain(|_, lock| lock.strong_count() > 0);
            match held.get(sandbox).and_then(Weak::upgrade) {
                Some(lock) => lock,
                None => {
                    let lock = Arc::new(AsyncMutex::new(()));
                    held.insert(sandbox.clone(), Arc::downgrade(&lock));
                    lock
                }
            }
        };
        lock.lock_owned().await
    }
}

#[cfg(test)]
mod tests {
    use futures::FutureExt as _;

    use super::*;

    #[test]
    fn two_paths_to_one_thing_are_one_sandbox() {
        let folder = tempfile::tempdir().unwrap();
        let (a, b) = (folder.path().join("a"), folder.path().join("b"));
        std::fs::write(&a, "").unwrap();
        std::fs::hard_link(&a, &b).unwrap();
        assert_eq!(SandboxId::of(&a), SandboxId::of(&b));
        std::fs::remove_file(&a).unwrap();
        assert_eq!(SandboxId::of(&a), SandboxId::Gone(a));
    }

    #[tokio::test]
    async fn only_the_same_sandbox_waits() {
        let locks = Locks::default();
        let (a, b) = (SandboxId::Namespace(1, 1), SandboxId::Namespace(1, 2));
        let held = locks.lock(&a).await;
        assert!(locks.lock(&a).now_or_never().is_none());
        assert!(locks.lock(&b).now_or_never().is_some());
        drop(held);
        assert!(locks.lock(&a).now_or_never().is_some());
        drop(locks.lock(&b).await);
        assert_eq!(locks.held.lock().unwrap().len(), 1);
    }
}
