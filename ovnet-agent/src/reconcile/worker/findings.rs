//! What a pass comes across beside its result.

use anyhow::Result;

use crate::repairs::Repairs;

/// What a pass comes across.
#[derive(Debug, Default)]
pub(super) struct Findings {
    /// What stands in the way, one line each.
    pub(super) notes: Vec<String>,
    /// What somebody else broke and the pass put right.
    pub(super) repairs: Repairs,
}

impl Findings {
    /// Notes an error; what there is otherwise.
    pub(super) fn note<T>(&mut self, result: Result<T>) -> Option<T> {
        result.map_err(|error| self.notes.push(format!("{error:#}"))).ok()
    }
}
