//! One connection after the other to a published port, all the time.

use std::{
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpListener, TcpStream},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread::{self, JoinHandle},
    time::Duration,
};

use anyhow::Result;
use ovnet_tests::{
    cluster::{Cluster, until},
    ports::HOST,
};
use xtask::lab::CLIENT;

/// Between the end of one and the beginning of the next.
const PAUSE: Duration = Duration::from_millis(5);
/// How long any part of one may take.
const PATIENCE: Duration = Duration::from_secs(10);

/// Opens connections from outside until it is dropped.
pub(super) struct Connections {
    opened: Arc<AtomicU64>,
    failed: Arc<Mutex<Vec<String>>>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Connections {
    /// To port 91, which leads to port 81 of `docker01/t1`.
    pub(super) fn start(cluster: &Cluster) -> Self {
        let bind = || Ok(TcpListener::bind("0.0.0.0:81")?);
        let listener = cluster.lab.inside("docker01/t1", bind).unwrap();
        thread::spawn(move || {
            for mut stream in listener.incoming().map_while(Result::ok) {
                let mut byte = [0];
                // Whoever asked tells what went wrong.
                let _ = stream.read_exact(&mut byte).and_then(|()| stream.write_all(&byte));
            }
        });
        let (opened, failed) = (Arc::new(AtomicU64::new(0)), Arc::new(Mutex::new(Vec::new())));
        let stop = Arc::new(AtomicBool::new(false));
        let (count, failures, stopping) = (opened.clone(), failed.clone(), stop.clone());
        // A thread begins in the namespace of the one that made it.
        let spawn = move || {
            Ok(thread::spawn(move || {
                while !stopping.load(Ordering::Relaxed) {
                    match ask() {
                        Ok(()) => _ = count.fetch_add(1, Ordering::Relaxed),
                        Err(error) => failures.lock().unwrap().push(format!("{error:#}")),
                    }
                    thread::sleep(PAUSE);
                }
            }))
        };
        let thread = Some(cluster.lab.inside(CLIENT, spawn).unwrap());
        Self { opened, failed, stop, thread }
    }

    /// Waits for further ones; none may have failed.
    pub(super) fn goes_on(&self) {
        let wanted = self.opened.load(Ordering::Relaxed) + 20;
        until("connections to be opened", || {
            assert!(self.failed.lock().unwrap().is_empty(), "{:?}", self.failed.lock().unwrap());
            (self.opened.load(Ordering::Relaxed) >= wanted).then_some(())
        });
    }

    /// How many were opened so far.
    pub(super) fn opened(&self) -> u64 {
        self.opened.load(Ordering::Relaxed)
    }
}

impl Drop for Connections {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn ask() -> Result<()> {
    let mut stream = TcpStream::connect_timeout(&SocketAddr::from((HOST, 91)), PATIENCE)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.write_all(b"?")?;
    stream.read_exact(&mut [0])?;
    Ok(())
}

/// How often a host sent the first packet of a connection again: an answer to it was lost.
pub(super) fn begun_again(cluster: &Cluster, host: &str) -> u64 {
    let text = cluster.sh(host, "cat /proc/net/netstat");
    let mut lines = text.lines().filter_map(|line| line.strip_prefix("TcpExt: "));
    let (names, values) = (lines.next().unwrap(), lines.next().unwrap());
    let mut pairs = names.split(' ').zip(values.split(' '));
    pairs.find(|(name, _)| *name == "TCPSynRetrans").unwrap().1.parse().unwrap()
}
