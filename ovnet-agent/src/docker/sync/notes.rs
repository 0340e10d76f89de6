//! What stands in the way: kept for `ovnet status`, and logged once.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, Mutex, PoisonError},
};

use super::side::Side;

/// Which work the notes are about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Part {
    /// Reaching Docker.
    Docker,
    /// Docker's networks.
    Networks,
    /// Endpoints whose container is gone.
    Endpoints,
    /// What containers are called.
    Names,
    /// `docker_gwbridge`.
    Gwbridge,
}

/// The notes there are now. Clones share everything.
#[derive(Clone, Debug)]
pub(super) struct Notes<S> {
    side: S,
    now: Arc<Mutex<BTreeMap<Part, BTreeSet<String>>>>,
}

impl<S: Side> Notes<S> {
    /// No notes.
    pub(super) fn new(side: S) -> Self {
        Self { side, now: Arc::default() }
    }

    /// Says all there is to say about a part. What was not said before is logged.
    pub(super) fn set(&self, part: Part, notes: BTreeSet<String>) {
        // The map is never left half changed, so a panic elsewhere does not make it wrong.
        let mut now = self.now.lock().unwrap_or_else(PoisonError::into_inner);
        let before = now.insert(part, notes.clone()).unwrap_or_default();
        if before == notes {
            return;
        }
        for note in notes.difference(&before) {
            tracing::warn!("{note}");
        }
        // Told with the lock held, so that the last one told is the last one made.
        self.side.note(now.values().flatten().cloned().collect());
    }

    /// Nothing, or one line.
    pub(super) fn set_result<T>(&self, part: Part, result: &anyhow::Result<T>) {
        self.set(
            part,
            result.as_ref().err().map(|error| format!("{error:#}")).into_iter().collect(),
        );
    }

    /// Docker is not there: what was said about it is not known any more.
    pub(super) fn docker_went(&self) {
        for part in [Part::Networks, Part::Endpoints, Part::Names, Part::Gwbridge] {
            self.set(part, BTreeSet::new());
        }
    }
}
