//! Records of endpoints that Consul lost and that nobody puts back.
//!
//! What Consul loses is kept, for its owner puts it back (invariant 7). An endpoint that was detached
//! while the data was gone has no owner any more: no deletion will ever be read. So a record is given
//! up where its host has been able to put it back for long, and has not.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::{Duration, Instant},
};

/// How long a host has for it, announced again and with Consul answering. It takes it a second or
/// two, and it tries again every second.
const TIME: Duration = Duration::from_secs(30);

/// Since when each of them could have been put back, by key.
#[derive(Debug, Default)]
pub(super) struct Orphans {
    since: BTreeMap<String, Instant>,
}

impl Orphans {
    /// Takes in the keys of those that Consul lacks and whose hosts could put them back, at the time
    /// `now`; gives those that are to be given up.
    pub(super) fn update(&mut self, lacking: BTreeSet<String>, now: Instant) -> BTreeSet<String> {
        self.since.retain(|key, _| lacking.contains(key));
        for key in lacking {
            self.since.entry(key).or_insert(now);
        }
        let due = self.since.iter().filter(|(_, since)| now.duration_since(**since) >= TIME);
        due.map(|(key, _)| key.clone()).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_is_given_up_after_its_host_has_had_the_time_and_not_before() {
        let (mut orphans, start) = (Orphans::default(), Instant::now());
        let keys = |names: &[&str]| names.iter().map(|it| (*it).to_owned()).collect();
        let mut due = |second, lacking: &[&str]| -> Vec<String> {
            let now = start + Duration::from_secs(second);
            orphans.update(keys(lacking), now).into_iter().collect()
        };
        assert!(due(0, &["a"]).is_empty());
        assert!(due(29, &["a", "b"]).is_empty());
        assert_eq!(due(30, &["a", "b"]), ["a"]);
        // Consul did not answer for a moment, or the host was away.
        assert!(due(40, &[]).is_empty());
        assert!(due(60, &["b"]).is_empty());
        assert_eq!(due(90, &["b"]), ["b"]);
    }
}
