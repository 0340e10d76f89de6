//! What is known of the way to each peer: questions and answers in, states out. Pure.
//!
//! Each peer is asked in rounds, with a short packet and one of full size. A round that brings back
//! nothing is followed by the next one soon, so that it is clear within seconds whether it was
//! one lost packet or a peer that cannot be reached.

use std::{
    collections::{BTreeMap, HashMap},
    net::Ipv4Addr,
    time::{Duration, Instant},
};

/// Between two rounds, before jitter of a tenth to either side.
pub(super) const EVERY: Duration = Duration::from_secs(5);
/// How long an answer may take.
pub(super) const TIMEOUT: Duration = Duration::from_secs(1);
/// Between the end of a round without an answer and the next one, while it is open what that means.
const AGAIN: Duration = Duration::from_millis(250);
/// Rounds in a row without an answer that make a peer unreachable.
const MISSES: u32 = 3;

/// What is known of the way to a peer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum State {
    /// Not asked yet, or not to be asked.
    #[default]
    Unknown,
    /// Packets of all sizes come back.
    Reachable,
    /// Short packets come back, those of full size do not.
    Narrow,
    /// Nothing comes back.
    Unreachable,
}

impl State {
    /// Every state.
    pub const ALL: [Self; 4] = [Self::Unknown, Self::Reachable, Self::Narrow, Self::Unreachable];

    /// The word for it in listings, JSON and metrics.
    pub fn name(self) -> &'static str {
        match self {
            Self::Unknown => "unknown",
            Self::Reachable => "reachable",
            Self::Narrow => "narrow",
            Self::Unreachable => "unreachable",
        }
    }
}

/// A peer that is to be asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Target {
    /// Its VTEP address.
    pub vtep: Ipv4Addr,
    /// The longest packet in bytes, outer IPv4 header included, that its uplink and ours both take.
    pub mtu: u32,
}

/// Two questions to be sent now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Round {
    pub(super) target: Target,
    /// Token of the short one.
    pub(super) short: u64,
    /// Token of the one of full size.
    pub(super) full: u64,
}

/// A peer whose state changed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Change {
    pub(super) node: String,
    pub(super) target: Target,
    pub(super) from: State,
    pub(super) to: State,
}

/// What is shown of a peer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Known {
    /// Its VTEP address.
    pub vtep: Ipv4Addr,
    /// The longest packet it is asked with.
    pub mtu: u32,
    /// What is known of it.
    pub state: State,
    /// How long that has been so.
    pub lasting: Duration,
    /// How long the last answer to a short packet took; `None` where there was none.
    pub round_trip: Option<Duration>,
}

/// How many questions were asked and answered, in all.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Questions sent.
    pub sent: u64,
    /// Answers in time.
    pub answered: u64,
}

/// The peers.
#[derive(Debug, Default)]
pub(super) struct Table {
    peers: BTreeMap<String, Peer>,
    /// The open questions by token.
    open: HashMap<u64, (String, Size)>,
    counts: Counts,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Size {
    Short,
    Full,
}

#[derive(Debug)]
struct Peer {
    target: Target,
    state: State,
    since: Instant,
    round_trip: Option<Duration>,
    /// Rounds in a row without an answer of this size.
    missed_short: u32,
    missed_full: u32,
    /// The round under way.
    asked: Option<Asked>,
    /// When the next round begins.
    next: Instant,
}

#[derive(Debug)]
struct Asked {
    at: Instant,
    short: Option<u64>,
    full: Option<u64>,
}

impl Table {
    /// Makes these the peers, by name. One whose address or MTU is another now is asked anew.
    pub(super) fn set(&mut self, wanted: &BTreeMap<String, Target>, now: Instant) {
        let open = &mut self.open;
        self.peers.retain(|node, peer| {
            let stays = wanted.get(node) == Some(&peer.target);
            if !stays && let Some(asked) = peer.asked.take() {
                for token in asked.short.into_iter().chain(asked.full) {
                    open.remove(&token);
                }
            }
            stays
        });
        for (node, target) in wanted {
            self.peers.entry(node.clone()).or_insert_with(|| Peer {
                target: *target,
                state: State::Unknown,
                since: now,
                round_trip: None,
                missed_short: 0,
                missed_full: 0,
                asked: None,
                next: now,
            });
        }
    }

    /// Ends the rounds that are over, and begins up to `limit` that are due. `random` gives numbers
    /// nobody can guess.
    pub(super) fn advance(
        &mut self,
        now: Instant,
        limit: usize,
        mut random: impl FnMut() -> u64,
    ) -> (Vec<Round>, Vec<Change>) {
        let (mut rounds, mut changes) = (Vec::new(), Vec::new());
        for (node, peer) in &mut self.peers {
            if let Some(asked) = peer.asked.take_if(|asked| now >= asked.at + TIMEOUT) {
                for token in asked.short.into_iter().chain(asked.full) {
                    self.open.remove(&token);
                }
                changes.extend(peer.close(node, &asked, now, random()));
            }
            if peer.asked.is_none() && now >= peer.next && rounds.len() < limit {
                let (short, full) = (random(), random());
                self.open.insert(short, (node.clone(), Size::Short));
                self.open.insert(full, (node.clone(), Size::Full));
                peer.asked = Some(Asked { at: now, short: Some(short), full: Some(full) });
                self.counts.sent += 2;
                rounds.push(Round { target: peer.target, short, full });
            }
        }
        (rounds, changes)
    }

    /// Takes in an answer that came from this address.
    pub(super) fn answered(&mut self, token: u64, from: Ipv4Addr, now: Instant) -> Option<Change> {
        // Only the peer itself can answer: the address is part of what was asked.
        let (node, size) = self.open.get(&token)?.clone();
        let peer = self.peers.get_mut(&node).filter(|peer| peer.target.vtep == from)?;
        let asked = peer.asked.as_mut()?;
        self.open.remove(&token);
        self.counts.answered += 1;
        match size {
            Size::Short => {
                asked.short = None;
                peer.round_trip = Some(now.saturating_duration_since(asked.at));
                peer.missed_short = 0;
            }
            Size::Full => {
                asked.full = None;
                peer.missed_full = 0;
            }
        }
        let narrow = size == Size::Short && peer.missed_full >= MISSES;
        peer.turn(&node, if narrow { State::Narrow } else { State::Reachable }, now)
    }

    /// When there is something to do next; `None` without peers.
    pub(super) fn next(&self) -> Option<Instant> {
        let of = |peer: &Peer| peer.asked.as_ref().map_or(peer.next, |asked| asked.at + TIMEOUT);
        self.peers.values().map(of).min()
    }

    /// Whether this peer is reached at this address.
    pub(super) fn reaches(&self, node: &str, vtep: Ipv4Addr) -> bool {
        self.peers.get(node).is_some_and(|peer| {
            peer.target.vtep == vtep && matches!(peer.state, State::Reachable | State::Narrow)
        })
    }

    /// All peers by name.
    pub(super) fn known(&self, now: Instant) -> BTreeMap<String, Known> {
        let known = |peer: &Peer| Known {
            vtep: peer.target.vtep,
            mtu: peer.target.mtu,
            state: peer.state,
            lasting: now.saturating_duration_since(peer.since),
            round_trip: peer.round_trip.filter(|_| peer.state != State::Unreachable),
        };
        self.peers.iter().map(|(node, peer)| (node.clone(), known(peer))).collect()
    }

    /// How many questions there were.
    pub(super) fn counts(&self) -> Counts {
        self.counts
    }
}

impl Peer {
    /// Ends a round: counts what did not come back, and says when the next one is.
    fn close(&mut self, node: &str, asked: &Asked, now: Instant, random: u64) -> Option<Change> {
        let (short, full) = (asked.short.is_none(), asked.full.is_none());
        if short || full {
            self.missed_short = 0;
            // Of a peer that answers nothing it is not known which size it would answer.
            self.missed_full = if full { 0 } else { self.missed_full.saturating_add(1) };
        } else {
            self.missed_short = self.missed_short.saturating_add(1);
        }
        let open =
            (1..MISSES).contains(&self.missed_short) || (1..MISSES).contains(&self.missed_full);
        self.next = if open { now + AGAIN } else { asked.at + jittered(random) };
        if self.missed_short >= MISSES {
            self.turn(node, State::Unreachable, now)
        } else if self.missed_short == 0 && self.missed_full >= MISSES {
            self.turn(node, State::Narrow, now)
        } else {
            None
        }
    }

    fn turn(&mut self, node: &str, to: State, now: Instant) -> Option<Change> {
        let from = std::mem::replace(&mut self.state, to);
        if from == to {
            return None;
        }
        self.since = now;
        Some(Change { node: node.to_owned(), target: self.target, from, to })
    }
}

/// [`EVERY`], and up to a tenth more or less.
fn jittered(random: u64) -> Duration {
    let fifth = EVERY / 5;
    let share = u32::try_from(random % 1000).unwrap_or(0);
    EVERY - fifth / 2 + fifth * share / 1000
}

#[cfg(test)]
mod tests;
