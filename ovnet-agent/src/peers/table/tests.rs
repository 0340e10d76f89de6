use super::*;

const VTEP: Ipv4Addr = Ipv4Addr::new(192, 168, 1, 12);
const TARGET: Target = Target { vtep: VTEP, mtu: 1500 };
const SECOND: Duration = Duration::from_secs(1);

/// One peer and a clock.
struct Bench {
    table: Table,
    start: Instant,
    now: Instant,
    tokens: u64,
    changes: Vec<(u64, State)>,
}

impl Bench {
    fn new() -> Self {
        let now = Instant::now();
        let mut table = Table::default();
        table.set(&BTreeMap::from([("docker02".to_owned(), TARGET)]), now);
        Self { table, start: now, now, tokens: 0, changes: Vec::new() }
    }

    /// Lets time pass; `answers` says of each round which sizes come back, a millisecond later.
    fn pass(&mut self, time: Duration, answers: impl Fn(u64) -> (bool, bool)) {
        let until = self.now + time;
        while self.now < until {
            let tokens = &mut self.tokens;
            let (rounds, changes) = self.table.advance(self.now, 8, || {
                *tokens += 1;
                *tokens
            });
            self.note(changes);
            for Round { target, short, full } in rounds {
                assert_eq!(target, TARGET);
                let (short_back, full_back) = answers((self.now - self.start).as_secs());
                let later = self.now + Duration::from_millis(1);
                for token in [(short, short_back), (full, full_back)].map(|it| it.1.then_some(it.0))
                {
                    let change = token.and_then(|it| self.table.answered(it, VTEP, later));
                    self.note(change);
                }
            }
            self.now = self.table.next().unwrap().max(self.now + Duration::from_millis(1));
        }
    }

    fn note(&mut self, changes: impl IntoIterator<Item = Change>) {
        let at = (self.now - self.start).as_secs();
        self.changes.extend(changes.into_iter().map(|it| (at, it.to)));
    }

    fn known(&self) -> Known {
        self.table.known(self.now)["docker02"].clone()
    }
}

#[test]
fn a_peer_that_answers_is_reachable_at_once_and_stays_so() {
    let mut bench = Bench::new();
    assert_eq!(bench.known().state, State::Unknown);
    assert!(!bench.table.reaches("docker02", VTEP));
    bench.pass(60 * SECOND, |_| (true, true));
    assert_eq!(bench.changes, [(0, State::Reachable)]);
    assert_eq!(bench.known().round_trip, Some(Duration::from_millis(1)));
    assert!(bench.table.reaches("docker02", VTEP));
    assert!(!bench.table.reaches("docker02", Ipv4Addr::LOCALHOST), "at another address");
    let Counts { sent, answered } = bench.table.counts();
    assert_eq!(sent, answered);
    assert!((20..30).contains(&sent), "two every five seconds: {sent}");
}

#[test]
fn a_peer_that_falls_silent_is_unreachable_within_ten_seconds_and_back_within_six() {
    let mut bench = Bench::new();
    bench.pass(
        120 * SECOND,
        |at| if (30..90).contains(&at) { (false, false) } else { (true, true) },
    );
    let [(0, State::Reachable), (lost, State::Unreachable), (back, State::Reachable)] =
        bench.changes[..]
    else {
        panic!("{:?}", bench.changes)
    };
    assert!((33..=40).contains(&lost), "{lost}");
    assert!((90..=96).contains(&back), "{back}");
}

#[test]
fn a_lost_packet_or_two_change_nothing() {
    let mut bench = Bench::new();
    let round = std::cell::Cell::new(0);
    bench.pass(120 * SECOND, |_| {
        round.set(round.get() + 1);
        // Two of three rounds bring nothing back.
        if round.get() % 3 == 1 { (true, true) } else { (false, false) }
    });
    assert_eq!(bench.changes, [(0, State::Reachable)]);
}

#[test]
fn a_path_that_takes_only_short_packets_is_narrow() {
    let mut bench = Bench::new();
    bench.pass(60 * SECOND, |at| (true, !(10..40).contains(&at)));
    let [(0, State::Reachable), (lost, State::Narrow), (back, State::Reachable)] =
        bench.changes[..]
    else {
        panic!("{:?}", bench.changes)
    };
    assert!((12..=20).contains(&lost) && (40..=46).contains(&back), "{lost} {back}");
}

#[test]
fn a_narrow_peer_still_is_reached() {
    let mut bench = Bench::new();
    bench.pass(60 * SECOND, |_| (true, false));
    assert_eq!(bench.known().state, State::Narrow);
    assert!(bench.table.reaches("docker02", VTEP));
    bench.pass(30 * SECOND, |_| (false, false));
    assert_eq!(bench.known().state, State::Unreachable);
    assert_eq!(bench.known().round_trip, None);
    assert!(bench.known().lasting > 15 * SECOND);
}

#[test]
fn an_answer_counts_once_in_time_and_from_the_peer_itself() {
    let mut bench = Bench::new();
    let (rounds, _) = bench.table.advance(bench.now, 8, rand::random);
    let token = rounds[0].short;
    let other = Ipv4Addr::new(192, 168, 1, 66);
    assert_eq!(bench.table.answered(token, other, bench.now), None, "from somebody else");
    assert_eq!(bench.table.answered(token ^ 1, VTEP, bench.now), None, "of nobody's question");
    assert_eq!(bench.known().state, State::Unknown);
    assert!(bench.table.answered(token, VTEP, bench.now).is_some());
    assert_eq!(bench.table.answered(token, VTEP, bench.now), None, "again");
    bench.now += TIMEOUT;
    bench.table.advance(bench.now, 8, rand::random);
    assert_eq!(bench.table.answered(rounds[0].full, VTEP, bench.now), None, "too late");
    assert_eq!(bench.table.counts().answered, 1);
}

#[test]
fn peers_come_and_go_and_one_that_moved_is_asked_anew() {
    let mut bench = Bench::new();
    bench.pass(SECOND, |_| (true, true));
    let moved = Target { vtep: [192, 168, 1, 52].into(), ..TARGET };
    let peers = |target| BTreeMap::from([("docker02".to_owned(), target)]);
    bench.table.set(&peers(TARGET), bench.now);
    assert_eq!(bench.known().state, State::Reachable, "the same");
    bench.table.set(&peers(moved), bench.now);
    assert_eq!(bench.known().state, State::Unknown);
    assert!(bench.table.open.is_empty(), "questions to the old address");
    let (rounds, _) = bench.table.advance(bench.now, 8, rand::random);
    assert_eq!(rounds[0].target, moved, "at once");
    bench.table.set(&BTreeMap::new(), bench.now);
    assert!(bench.table.open.is_empty() && bench.table.next().is_none());
}

#[test]
fn many_peers_are_not_asked_all_at_once() {
    let now = Instant::now();
    let mut table = Table::default();
    let peers = (0..4000).map(|it| (format!("h{it}"), TARGET)).collect();
    table.set(&peers, now);
    let mut asked = 0;
    for wake in 0..100 {
        let (rounds, _) = table.advance(now + Duration::from_millis(wake), 64, rand::random);
        assert!(rounds.len() <= 64);
        asked += rounds.len();
    }
    assert_eq!(asked, 4000, "but each of them once");
}

#[test]
fn jitter_is_a_tenth() {
    for random in [0, 1, 499, 999, u64::MAX] {
        assert!((EVERY * 9 / 10..=EVERY * 11 / 10).contains(&jittered(random)));
    }
    assert_ne!(jittered(0), jittered(999));
}
