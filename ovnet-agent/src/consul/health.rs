//! How Consul answers this host, counted for whoever watches.

use std::{
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

/// Counts requests and their outcomes.
#[derive(Debug, Default)]
pub(super) struct Counters {
    requests: AtomicU64,
    failures: AtomicU64,
    answered: Mutex<Option<Instant>>,
}

/// How Consul answers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Health {
    /// Requests that came to an end, one way or the other.
    pub requests: u64,
    /// Those among them without an answer, or refused, or answered with an error of Consul's own.
    pub failures: u64,
    /// How long ago the last good answer was; `None` where there was none.
    pub answered_ago: Option<Duration>,
}

impl Counters {
    /// Counts a request that ended. An answer of `code` below 500 and not 403 says that Consul works;
    /// `None` is no answer.
    pub(super) fn count(&self, code: Option<u16>) {
        self.requests.fetch_add(1, Ordering::Relaxed);
        if code.is_some_and(|code| code < 500 && code != 403) {
            let mut answered = self.answered.lock().unwrap_or_else(PoisonError::into_inner);
            *answered = Some(Instant::now());
        } else {
            self.failures.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// As it is now.
    pub(super) fn read(&self) -> Health {
        let answered = *self.answered.lock().unwrap_or_else(PoisonError::into_inner);
        Health {
            requests: self.requests.load(Ordering::Relaxed),
            failures: self.failures.load(Ordering::Relaxed),
            answered_ago: answered.map(|at| at.elapsed()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_that_there_is_nothing_is_an_answer() {
        let counters = Counters::default();
        assert_eq!(counters.read(), Health::default());
        for code in [None, Some(500), Some(403)] {
            counters.count(code);
        }
        assert_eq!(counters.read().answered_ago, None);
        for code in [200, 404, 409] {
            counters.count(Some(code));
        }
        let Health { requests, failures, answered_ago } = counters.read();
        assert_eq!((requests, failures), (6, 3));
        assert!(answered_ago.is_some());
    }
}
