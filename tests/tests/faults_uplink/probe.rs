//! A datagram every millisecond that is sent back, and when each was sent and answered.
//!
//! `ping` would not do: while an answer is outstanding it sends only every 10 ms, so that it counts
//! a tenth of what is lost.

use std::{
    collections::BTreeMap,
    net::{Ipv4Addr, SocketAddr, UdpSocket},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use nix::sys::socket::{setsockopt, sockopt::RcvBufForce};
use ovnet_tests::cluster::{Cluster, until};

/// The port that sends back.
const PORT: u16 = 7;
/// Between datagrams.
const EVERY: Duration = Duration::from_millis(1);
/// Answers that say that traffic is back.
const BACK: usize = 100;

/// When a datagram was sent, and when its answer came.
type Times = BTreeMap<u64, (Instant, Option<Instant>)>;

/// The datagrams. Ended when dropped.
pub(crate) struct Probe {
    times: Arc<Mutex<Times>>,
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

/// What a fault cost.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Cost {
    /// Datagrams that were never answered.
    pub(crate) lost: usize,
    /// Those of them that were sent when the path could be used again.
    pub(crate) lost_when_usable: usize,
    /// From then to the first answer.
    pub(crate) first: Duration,
}

impl Probe {
    /// Starts it and waits for the first answers.
    pub(crate) fn start(cluster: &Cluster, from: &str, place: &str, to: Ipv4Addr) -> Self {
        let open = |place: &str, port| {
            let bind = move || Ok(UdpSocket::bind(SocketAddr::from(([0; 4], port)))?);
            let socket = cluster.lab.inside(place, bind).unwrap();
            socket.set_read_timeout(Some(Duration::from_millis(100))).unwrap();
            // A reader that waits for a busy processor must not lose what the network did not.
            setsockopt(&socket, RcvBufForce, &(16 << 20)).unwrap();
            socket
        };
        let (client, server) = (open(from, 0), open(place, PORT));
        let (times, stop) = (Arc::new(Mutex::new(Times::new())), Arc::new(AtomicBool::new(false)));
        let receiver = client.try_clone().unwrap();
        let (sent, came) = (Arc::clone(&times), Arc::clone(&times));
        let stopping = [(); 3].map(|()| Arc::clone(&stop));
        let [stop_sending, stop_receiving, stop_serving] = stopping;
        let sends = thread::spawn(move || {
            let mut number = 0_u64;
            while !stop_sending.load(Ordering::Relaxed) {
                let now = Instant::now();
                lock(&sent).insert(number, (now, None));
                // Where there is no way it is lost, too.
                let _ = client.send_to(&number.to_be_bytes(), (to, PORT));
                number += 1;
                thread::sleep(EVERY.saturating_sub(now.elapsed()));
            }
        });
        let receives = thread::spawn(move || {
            let mut number = [0; 8];
            while !stop_receiving.load(Ordering::Relaxed) {
                if let Ok((8, _)) = receiver.recv_from(&mut number)
                    && let Some((_, came)) = lock(&came).get_mut(&u64::from_be_bytes(number))
                {
                    came.get_or_insert_with(Instant::now);
                }
            }
        });
        let serves = thread::spawn(move || {
            let mut number = [0; 8];
            while !stop_serving.load(Ordering::Relaxed) {
                if let Ok((length, client)) = server.recv_from(&mut number) {
                    let _ = server.send_to(&number[..length], client);
                }
            }
        });
        let probe = Self { times, stop, threads: vec![sends, receives, serves] };
        until("the probe to be answered", || (answers(&probe.times()) >= BACK).then_some(()));
        probe
    }

    /// The number of the next datagram.
    pub(crate) fn next(&self) -> u64 {
        lock(&self.times).keys().next_back().map_or(0, |last| last + 1)
    }

    /// What has been lost from this number on, once traffic is back. `usable` is when the path could
    /// be used again.
    pub(crate) fn cost(&self, from: u64, usable: Instant) -> Cost {
        until("the probe to be answered again", || {
            let back = self.times().into_iter().filter(|(_, (sent, _))| *sent >= usable).collect();
            (answers(&back) >= BACK).then_some(())
        });
        let times = self.times();
        let answered = |(_, (_, came)): &(&u64, &(Instant, Option<Instant>))| came.is_some();
        // What was sent last is still on its way.
        let last = times.iter().rev().find(answered).map_or(0, |(number, _)| *number);
        let lost: Vec<Instant> = times
            .range(from..last.max(from))
            .filter(|(_, (_, came))| came.is_none())
            .map(|(_, (sent, _))| *sent)
            .collect();
        let first = times.values().filter_map(|(_, came)| *came).filter(|came| *came >= usable);
        Cost {
            lost: lost.len(),
            lost_when_usable: lost.iter().filter(|sent| **sent >= usable).count(),
            first: first.min().map_or(Duration::MAX, |first| first - usable),
        }
    }

    fn times(&self) -> Times {
        lock(&self.times).clone()
    }
}

impl Drop for Probe {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

fn answers(times: &Times) -> usize {
    times.values().filter(|(_, came)| came.is_some()).count()
}

fn lock<T>(shared: &Mutex<T>) -> MutexGuard<'_, T> {
    shared.lock().unwrap_or_else(PoisonError::into_inner)
}
