//! What is remembered of who has which address.
//!
//! An address is given to another container as soon as its own has stopped, and docker_gwbridge's
//! appears a moment after the overlay's; so what is remembered counts only while the very endpoint
//! it was found with exists, and is looked at again after [`FRESH`]. That an address is nobody's is
//! remembered, too: containers that are none of ours ask as often as ours.

use std::{
    collections::{HashMap, HashSet},
    mem,
    net::Ipv4Addr,
    path::PathBuf,
    time::{Duration, Instant},
};

use tokio::{sync::oneshot, task::JoinHandle};

use crate::dns::server::{Asker, Networks};

/// How long an address that was found is believed to be where it was.
pub(super) const FRESH: Duration = Duration::from_secs(3);
/// How long it still counts while it is looked at again.
pub(super) const STALE: Duration = Duration::from_secs(10);
/// How long an address that was not found is believed to be nobody's, unless endpoints come or go.
pub(super) const UNKNOWN: Duration = Duration::from_secs(10);
/// The same where an endpoint may still get addresses, or where a sandbox could not be looked into.
pub(super) const DOUBT: Duration = Duration::from_secs(1);
/// Most addresses remembered as nobody's. Sources can be forged; forgetting costs a round.
const MOST_UNKNOWN: usize = 4096;

#[derive(Debug, Default)]
pub(super) struct Memory {
    /// The endpoints as of the last query.
    pub(super) endpoints: Vec<String>,
    /// Their sandboxes, and when they were listed.
    pub(super) groups: Vec<Group>,
    pub(super) grouped: Option<Instant>,
    /// Whether an endpoint had no sandbox then.
    pub(super) absent: bool,
    /// When endpoints or sandboxes last came or went.
    changed: Option<Instant>,
    /// Addresses, each with an endpoint in whose sandbox it was seen, and when.
    found: HashMap<Ipv4Addr, (String, Instant)>,
    /// Endpoints whose sandboxes were looked into.
    looked: HashSet<String>,
    /// Addresses that are in no sandbox, and until when that is believed.
    unknown: HashMap<Ipv4Addr, Instant>,
    /// Who waits for which address.
    pub(super) waiting: HashMap<Ipv4Addr, Vec<oneshot::Sender<Networks>>>,
    /// Addresses that count, but are to be looked at again.
    pub(super) doubtful: HashSet<Ipv4Addr>,
    /// When the last round through all sandboxes began.
    pub(super) everywhere: Option<Instant>,
    /// The task that looks, while somebody waits.
    pub(super) scanner: Option<JoinHandle<()>>,
}

/// A network namespace with all endpoints that are in it.
#[derive(Clone, Debug)]
pub(super) struct Group {
    pub(super) identity: (u64, u64),
    pub(super) netns: PathBuf,
    pub(super) endpoints: Vec<String>,
    pub(super) networks: Networks,
}

impl Memory {
    /// What is known of an address, and whether it is to be looked at again.
    pub(super) fn known(&self, source: Ipv4Addr) -> (Asker, bool) {
        let Some((endpoint, at)) = self.found.get(&source) else {
            let nobody = self.unknown.get(&source).is_some_and(|until| Instant::now() < *until);
            let asker = if nobody { Asker::Known(Networks::default()) } else { Asker::New };
            return (asker, false);
        };
        let Some(group) = self.group_of(endpoint) else { return (Asker::New, false) };
        let age = at.elapsed();
        // A container that has just come may have got the address of one that lost it.
        let counts = age < FRESH || (age < STALE && !self.groups.iter().any(|it| self.is_new(it)));
        if counts {
            (Asker::Known(Networks::clone(&group.networks)), age >= FRESH)
        } else {
            (Asker::Familiar, false)
        }
    }

    /// Tells those who wait what is known, and forgets those who have given up.
    pub(super) fn tell(&mut self) {
        let mut waiting = mem::take(&mut self.waiting);
        waiting.retain(|source, who| {
            who.retain(|it| !it.is_closed());
            let Asker::Known(networks) = self.known(*source).0 else { return !who.is_empty() };
            for it in who.drain(..) {
                // Who has given up meanwhile does not want it.
                let _ = it.send(Networks::clone(&networks));
            }
            false
        });
        self.waiting = waiting;
        let found = &self.found;
        self.doubtful.retain(|it| found.get(it).is_some_and(|(_, at)| at.elapsed() >= FRESH));
    }

    /// Whether there is anything to look for.
    pub(super) fn is_awaited(&self) -> bool {
        !self.waiting.is_empty() || !self.doubtful.is_empty()
    }

    /// The sandboxes never looked into, and those in which an address was that is looked for.
    pub(super) fn likely(&self) -> Vec<Group> {
        let sources = self.waiting.keys().chain(&self.doubtful);
        let found = sources.filter_map(|source| self.found.get(source));
        let before: HashSet<&String> =
            found.filter(|it| it.1.elapsed() >= FRESH).map(|it| &it.0).collect();
        let was_in = |group: &Group| group.endpoints.iter().any(|it| before.contains(it));
        self.groups.iter().filter(|it| self.is_new(it) || was_in(it)).cloned().collect()
    }

    /// Takes in the addresses inside a sandbox. The endpoint that vouches for them is its first:
    /// where that goes, the addresses are looked for again.
    pub(super) fn remember(&mut self, group: &Group, inside: Vec<Ipv4Addr>) {
        self.found.retain(|_, (endpoint, _)| !group.endpoints.contains(endpoint));
        let still = |endpoint: &&String| self.group_of(endpoint).is_some();
        // It may have gone while its sandbox was looked into.
        let Some(endpoint) = group.endpoints.first().filter(still) else { return };
        self.looked.extend(group.endpoints.iter().cloned());
        for address in inside {
            self.unknown.remove(&address);
            self.found.insert(address, (endpoint.clone(), Instant::now()));
        }
    }

    /// After a round that began when these waited: who is not found is nobody. `all` tells whether
    /// every sandbox could be looked into.
    pub(super) fn conclude(&mut self, sources: &[Ipv4Addr], all: bool) {
        // It came during the round; who is in it is found in the next.
        if self.groups.iter().any(|group| self.is_new(group)) {
            return;
        }
        let settled = self.changed.is_none_or(|at| at.elapsed() >= UNKNOWN);
        let now = Instant::now();
        let until = now + if settled && all { UNKNOWN } else { DOUBT };
        if self.unknown.len() + sources.len() > MOST_UNKNOWN {
            self.unknown.retain(|_, until| now < *until);
        }
        if self.unknown.len() + sources.len() > MOST_UNKNOWN {
            self.unknown.clear();
        }
        for source in sources {
            if !self.found.contains_key(source) {
                self.unknown.insert(*source, until);
            }
        }
    }

    /// Forgets who is nobody: something has come or gone.
    pub(super) fn distrust(&mut self) {
        self.unknown.clear();
        self.changed = Some(Instant::now());
    }

    /// Takes other sandboxes in place of those so far.
    pub(super) fn replace(&mut self, groups: Vec<Group>, absent: bool) {
        let same =
            |(a, b): (&Group, &Group)| a.identity == b.identity && a.endpoints == b.endpoints;
        if groups.len() != self.groups.len() || !groups.iter().zip(&self.groups).all(same) {
            self.distrust();
        }
        (self.groups, self.absent, self.grouped) = (groups, absent, Some(Instant::now()));
        let Self { groups, found, looked, .. } = self;
        let exists = |of: &String| groups.iter().any(|group| group.endpoints.contains(of));
        found.retain(|_, (of, _)| exists(of));
        looked.retain(exists);
    }

    fn group_of(&self, endpoint: &String) -> Option<&Group> {
        self.groups.iter().find(|group| group.endpoints.contains(endpoint))
    }

    /// Whether it was not looked into since one of its endpoints came.
    fn is_new(&self, group: &Group) -> bool {
        group.endpoints.iter().any(|endpoint| !self.looked.contains(endpoint))
    }

    /// Makes everything that was found older, instead of waiting.
    #[cfg(test)]
    pub(super) fn age(&mut self, by: Duration) {
        let earlier = |at: Instant| at.checked_sub(by).unwrap();
        self.found.values_mut().for_each(|it| it.1 = earlier(it.1));
        self.unknown.values_mut().for_each(|it| *it = earlier(*it));
        self.changed = self.changed.map(earlier);
        self.everywhere = self.everywhere.map(earlier);
    }
}
