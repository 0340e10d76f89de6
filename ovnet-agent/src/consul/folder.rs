//! What is known of one watched folder, and how an answer changes it. Pure but for the log lines.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::Result;

use super::{
    client::{Entry, Listing},
    sentinel::{self, Identity},
};

/// A record that knows what may become of it without its key being deleted first.
pub(super) trait Follow {
    /// Fails, with what it is told by, where `self` cannot be what `before` was turned into by its
    /// owner. Then it was written by somebody else, and `before` stands.
    fn follows(&self, _before: &Self) -> Result<()> {
        Ok(())
    }
}

/// The records of a folder as far as they could be read.
#[derive(Debug)]
pub(super) struct Folder<T> {
    /// Ends in a slash.
    folder: String,
    /// By the end of their keys.
    records: BTreeMap<String, T>,
    /// Records kept although the last answer did not have them, because it was not one that
    /// absence could be concluded from.
    kept: BTreeSet<String>,
    /// Keys whose value cannot be read now, with the index of the value that was logged.
    unreadable: BTreeMap<String, u64>,
    /// Those of them that could be read but are no later form of what was read before.
    overwritten: BTreeSet<String>,
    /// When the keys of the records were created.
    created: BTreeMap<String, u64>,
    sentinel: Option<Identity>,
    index: u64,
    was_read: bool,
}

/// What to do after an answer.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Outcome {
    /// Wait for what comes after this index.
    Good {
        /// The index.
        next: u64,
    },
    /// As `Good`, but absence could not be concluded from this answer: Consul went back in time or
    /// lost everything, and other folders, too, must be read from the start.
    WentBack {
        /// The index.
        next: u64,
    },
    /// The folder's sentinel is missing, so it must be made; then read again from the start.
    NoSentinel {
        /// Whether it was there before, which means as much as `WentBack`.
        lost: bool,
    },
}

impl<T: Follow> Folder<T> {
    /// A folder of which nothing was read.
    pub(super) fn new(folder: String) -> Self {
        Self {
            folder,
            records: BTreeMap::new(),
            kept: BTreeSet::new(),
            unreadable: BTreeMap::new(),
            overwritten: BTreeSet::new(),
            created: BTreeMap::new(),
            sentinel: None,
            index: 0,
            was_read: false,
        }
    }

    /// Whether any answer was good enough to say what the folder holds.
    pub(super) fn was_read(&self) -> bool {
        self.was_read
    }

    /// The records by the end of their keys.
    pub(super) fn records(&self) -> impl Iterator<Item = (&str, &T)> {
        self.records.iter().map(|(name, record)| (name.as_str(), record))
    }

    /// The ends of the keys of records that are only kept: Consul has lost them.
    pub(super) fn kept(&self) -> impl Iterator<Item = &str> {
        self.kept.iter().map(String::as_str)
    }

    /// Forgets those of them that nobody will put back.
    pub(super) fn give_up(&mut self, is_orphan: impl Fn(&str) -> bool) {
        let orphans: Vec<String> = self.kept.iter().filter(|it| is_orphan(it)).cloned().collect();
        for name in orphans {
            tracing::info!(
                "{}{name} is given up: Consul has lost it, and its host has not put it back",
                self.folder
            );
            self.kept.remove(&name);
            self.records.remove(&name);
        }
    }

    /// The ends of the keys of records that cannot be read now.
    pub(super) fn unreadable(&self) -> impl ExactSizeIterator<Item = &str> {
        self.unreadable.keys().map(String::as_str)
    }

    /// The ends of the keys that somebody else than the owner of the record has written to.
    pub(super) fn overwritten(&self) -> impl Iterator<Item = &str> {
        self.overwritten.iter().map(String::as_str)
    }

    /// What tells the folder from the same folder of another Consul, or of this one wiped.
    pub(super) fn identity(&self) -> Option<&Identity> {
        self.sentinel.as_ref()
    }

    /// Takes in an answer; `None` is Consul's for a folder without keys.
    pub(super) fn take_in(
        &mut self,
        listing: Option<Listing>,
        parse: impl Fn(&str, &Entry) -> Result<T>,
    ) -> Outcome {
        let Some(Listing { index, entries }) = listing else {
            if !self.records.is_empty() {
                tracing::warn!(
                    "Consul has lost everything under {}; the {} records read before are kept",
                    self.folder,
                    self.records.len()
                );
                self.kept = self.records.keys().cloned().collect();
            }
            self.unreadable.clear();
            self.overwritten.clear();
            self.created.clear();
            self.index = 0;
            return Outcome::NoSentinel { lost: self.sentinel.take().is_some() };
        };

        let of_sentinel = format!("{}{}", self.folder, sentinel::NAME);
        let identity = entries.iter().find(|entry| entry.key == of_sentinel).map(Identity::of);
        // Another Consul may have created its key of the same name at the same index.
        let known = identity.is_some() && identity == self.sentinel;
        let (mut overwritten, mut created) = (BTreeSet::new(), BTreeMap::new());
        let mut records = BTreeMap::new();
        let mut unreadable = BTreeMap::new();
        for entry in &entries {
            let name = entry.key.strip_prefix(&self.folder).unwrap_or(&entry.key);
            if name == sentinel::NAME {
                continue;
            }
            let parsed = parse(name, entry).and_then(|record| {
                let before = self
                    .records
                    .get(name)
                    .filter(|_| known && self.created.get(name) == Some(&entry.create_index));
                if let Some(Err(why)) = before.map(|before| record.follows(before)) {
                    overwritten.insert(name.to_owned());
                    return Err(why);
                }
                Ok(record)
            });
            created.insert(name.to_owned(), entry.create_index);
            match parsed {
                Ok(record) => {
                    records.insert(name.to_owned(), record);
                }
                Err(why) => {
                    if self.unreadable.get(name) != Some(&entry.modify_index) {
                        tracing::warn!("the record {} is skipped: {why:#}", entry.key);
                    }
                    unreadable.insert(name.to_owned(), entry.modify_index);
                }
            }
        }

        // Absence means deletion only next to the sentinel we know and at an index that moved on.
        let conclusive = !self.was_read || (known && index >= self.index);
        let mut kept = BTreeSet::new();
        for (name, record) in std::mem::take(&mut self.records) {
            if records.contains_key(&name) {
                continue;
            }
            if unreadable.contains_key(&name) {
                // Unreadable is not deleted: what it said before stands.
                records.insert(name, record);
            } else if !conclusive || self.kept.contains(&name) {
                kept.insert(name.clone());
                records.insert(name, record);
            }
        }
        if !conclusive && kept.len() > self.kept.len() {
            tracing::warn!(
                "Consul's state under {} went back or was wiped; {} records that it does not have \
                 any more are kept",
                self.folder,
                kept.len()
            );
        }

        (self.records, self.kept, self.unreadable) = (records, kept, unreadable);
        (self.overwritten, self.created) = (overwritten, created);
        self.was_read = true;
        self.index = index;
        let before = std::mem::replace(&mut self.sentinel, identity);
        match &self.sentinel {
            Some(_) if conclusive => Outcome::Good { next: index },
            Some(_) => Outcome::WentBack { next: index },
            None => Outcome::NoSentinel { lost: before.is_some() },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(name: &str, value: &str, create_index: u64, modify_index: u64) -> Entry {
        Entry {
            key: format!("hosts/{name}"),
            value: value.into(),
            create_index,
            modify_index,
            session: None,
        }
    }

    fn answer(
        index: u64,
        sentinel: Option<(u64, &str)>,
        records: &[(&str, &str)],
    ) -> Option<Listing> {
        let sentinel = sentinel.map(|(created, word)| entry(".keep", word, created, created));
        let records = records.iter().map(|(name, value)| entry(name, value, index, index));
        Some(Listing { index, entries: sentinel.into_iter().chain(records).collect() })
    }

    fn parse(_: &str, entry: &Entry) -> Result<String> {
        let value = String::from_utf8(entry.value.clone())?;
        anyhow::ensure!(value != "garbage", "it is garbage");
        Ok(value)
    }

    fn names(folder: &Folder<String>) -> Vec<&str> {
        folder.records().map(|(name, _)| name).collect()
    }

    impl Follow for String {
        fn follows(&self, before: &Self) -> Result<()> {
            anyhow::ensure!(self != "lie", "it is a lie, {before} was the truth");
            Ok(())
        }
    }

    const SENTINEL: Option<(u64, &str)> = Some((5, "word"));

    fn with_a_and_b() -> Folder<String> {
        let mut folder = Folder::new("hosts/".into());
        let outcome = folder.take_in(answer(9, SENTINEL, &[("a", "1"), ("b", "1")]), parse);
        assert_eq!(outcome, Outcome::Good { next: 9 });
        folder
    }

    #[test]
    fn a_deletion_next_to_the_known_sentinel_is_one() {
        let mut folder = with_a_and_b();
        assert_eq!(
            folder.take_in(answer(10, SENTINEL, &[("a", "2")]), parse),
            Outcome::Good { next: 10 }
        );
        assert_eq!(names(&folder), ["a"]);
        folder.take_in(answer(11, SENTINEL, &[]), parse);
        assert!(names(&folder).is_empty());
    }

    #[test]
    fn a_touched_sentinel_is_the_same_one() {
        let mut folder = with_a_and_b();
        folder.take_in(answer(10, Some((5, "word again")), &[("a", "2")]), parse);
        assert_eq!(names(&folder), ["a"]);
    }

    #[test]
    fn nothing_there_keeps_what_was_read() {
        let mut folder = with_a_and_b();
        assert_eq!(folder.take_in(None, parse), Outcome::NoSentinel { lost: true });
        assert_eq!(folder.take_in(None, parse), Outcome::NoSentinel { lost: false });
        assert_eq!(names(&folder), ["a", "b"]);
        // The sentinel made again by us or by another host proves nothing about a and b.
        let outcome = folder.take_in(answer(3, Some((3, "new")), &[]), parse);
        assert_eq!(outcome, Outcome::WentBack { next: 3 });
        assert_eq!(names(&folder), ["a", "b"]);
        assert!(folder.kept().eq(["a", "b"]));
        // b comes back and is then deleted for good; a never came back and stays.
        folder.take_in(answer(4, Some((3, "new")), &[("b", "1")]), parse);
        assert!(folder.kept().eq(["a"]));
        folder.take_in(answer(5, Some((3, "new")), &[]), parse);
        assert_eq!(names(&folder), ["a"]);
    }

    #[test]
    fn of_what_is_kept_some_may_be_given_up_and_of_the_rest_nothing() {
        let mut folder = with_a_and_b();
        folder.take_in(answer(9, Some((5, "other")), &[("c", "1")]), parse);
        folder.give_up(|name| name != "b");
        assert_eq!(names(&folder), ["b", "c"]);
        assert!(folder.kept().eq(["b"]));
    }

    #[test]
    fn a_wiped_consul_that_reached_the_same_index_is_found_out() {
        let mut folder = with_a_and_b();
        folder.take_in(answer(9, Some((5, "other")), &[("c", "1")]), parse);
        assert_eq!(names(&folder), ["a", "b", "c"]);
    }

    #[test]
    fn an_index_that_went_backwards_deletes_nothing() {
        let mut folder = with_a_and_b();
        let outcome = folder.take_in(answer(7, SENTINEL, &[("a", "0")]), parse);
        assert_eq!(outcome, Outcome::WentBack { next: 7 });
        assert_eq!(names(&folder), ["a", "b"]);
    }

    #[test]
    fn records_without_a_sentinel_add_but_do_not_delete() {
        let mut folder = with_a_and_b();
        let outcome = folder.take_in(answer(12, None, &[("c", "1")]), parse);
        assert_eq!(outcome, Outcome::NoSentinel { lost: true });
        assert_eq!(names(&folder), ["a", "b", "c"]);
    }

    #[test]
    fn an_unreadable_record_is_counted_and_what_it_said_before_stands() {
        let mut folder = with_a_and_b();
        let records = [("a", "garbage"), ("b", "1"), ("c", "garbage")];
        folder.take_in(answer(10, SENTINEL, &records), parse);
        assert_eq!((folder.unreadable().len(), names(&folder)), (2, vec!["a", "b"]));
        folder.take_in(answer(11, SENTINEL, &[("b", "1")]), parse);
        assert_eq!((folder.unreadable().len(), names(&folder)), (0, vec!["b"]));
    }

    #[test]
    fn what_only_its_owner_could_have_written_and_did_not_is_skipped_until_the_key_is_made_anew() {
        let mut folder = with_a_and_b();
        let at = |index: u64, created: u64, value: &str| {
            let records = vec![entry(".keep", "word", 5, 5), entry("a", value, created, index)];
            Some(Listing { index, entries: records })
        };
        folder.take_in(at(10, 9, "lie"), parse);
        let said = |folder: &Folder<String>| folder.records().next().unwrap().1.clone();
        assert_eq!((said(&folder).as_str(), folder.unreadable().len()), ("1", 1));
        assert!(folder.overwritten().eq(["a"]));
        folder.take_in(at(11, 9, "2"), parse);
        assert_eq!((said(&folder).as_str(), folder.overwritten().count()), ("2", 0));
        folder.take_in(at(12, 12, "lie"), parse);
        assert_eq!(said(&folder), "lie", "whoever makes a key may say what he likes");
    }

    #[test]
    fn a_new_cluster_is_not_read_until_it_has_a_sentinel() {
        let mut folder = Folder::new("hosts/".into());
        assert_eq!(folder.take_in(None, parse), Outcome::NoSentinel { lost: false });
        assert!(!folder.was_read());
        folder.take_in(answer(4, SENTINEL, &[]), parse);
        assert!(folder.was_read());
    }
}
