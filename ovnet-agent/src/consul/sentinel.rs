//! The `.keep` key of a watched folder; the module's documentation says what it is for.

use uuid::Uuid;

use super::{client::Entry, transaction::Operation};

/// Name of the sentinel inside its folder.
pub(super) const NAME: &str = ".keep";

/// What stays the same about a sentinel for as long as the folder was not wiped.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Identity {
    created: u64,
    word: String,
}

impl std::fmt::Display for Identity {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} {}", self.created, self.word)
    }
}

impl Identity {
    /// The identity of a sentinel as read.
    pub(super) fn of(entry: &Entry) -> Self {
        // The index alone would do but for a Consul that was wiped and reached the same index by
        // the same steps, as one started by a script does.
        Self { created: entry.create_index, word: word(entry) }
    }
}

/// The key of a folder's sentinel. `folder` ends in a slash.
pub(super) fn key(folder: &str) -> String {
    format!("{folder}{NAME}")
}

/// Creates the sentinel; the transaction fails where there is one.
pub(super) fn create(folder: &str) -> Operation {
    Operation::cas(key(folder), Uuid::new_v4().to_string().into_bytes(), 0)
}

/// A value other than the sentinel's present one but of the same identity. Writing an equal value
/// would not do: Consul then leaves the key's index as it was.
pub(super) fn touched(sentinel: Option<&Entry>) -> Vec<u8> {
    let word = sentinel.map_or_else(|| Uuid::new_v4().to_string(), word);
    format!("{word} {}", Uuid::new_v4()).into_bytes()
}

fn word(entry: &Entry) -> String {
    let value = String::from_utf8_lossy(&entry.value);
    value.split(' ').next().unwrap_or_default().to_owned()
}
