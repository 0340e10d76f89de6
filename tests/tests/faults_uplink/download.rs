//! A connection to a published port by which the sandbox sends all the time.

use std::{
    io::{Read as _, Write as _},
    net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread::{self, JoinHandle},
    time::Duration,
};

use anyhow::Result;
use ovnet_tests::cluster::{Cluster, LIMIT, until};
use xtask::lab::CLIENT;

/// The port that is published, which leads to port 80.
pub(crate) const PORT: u16 = 90;
/// Bytes of a write.
const BLOCK: usize = 1000;
/// Between writes.
const PACE: Duration = Duration::from_millis(2);

/// Whoever connects is sent to until he goes. Ends with the process.
pub(crate) fn serve(cluster: &Cluster, place: &str) {
    let listener = cluster.lab.inside(place, || Ok(TcpListener::bind("0.0.0.0:80")?)).unwrap();
    thread::spawn(move || {
        for mut stream in listener.incoming().map_while(Result::ok) {
            thread::spawn(move || {
                let _ = stream.set_write_timeout(Some(LIMIT));
                while stream.write_all(&[7; BLOCK]).is_ok() {
                    thread::sleep(PACE);
                }
            });
        }
    });
}

/// A client outside the cluster that reads. Ended when dropped.
pub(crate) struct Download {
    received: Arc<AtomicU64>,
    stop: Arc<AtomicBool>,
    broke: Arc<Mutex<Option<String>>>,
    reader: Option<JoinHandle<()>>,
}

impl Download {
    /// Connects.
    pub(crate) fn start(cluster: &Cluster, to: Ipv4Addr) -> Self {
        let mut stream = connect(cluster, to).unwrap();
        let (received, stop) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicBool::new(false)));
        let broke = Arc::new(Mutex::new(None));
        let (count, stopping, told) =
            (Arc::clone(&received), Arc::clone(&stop), Arc::clone(&broke));
        let reader = thread::spawn(move || {
            let mut buffer = [0; BLOCK];
            while !stopping.load(Ordering::Relaxed) {
                match stream.read(&mut buffer) {
                    Ok(0) => return set(&told, "its end was closed".into()),
                    Ok(length) => _ = count.fetch_add(length as u64, Ordering::Relaxed),
                    Err(error) => return set(&told, error.to_string()),
                }
            }
        });
        let download = Self { received, stop, broke, reader: Some(reader) };
        download.goes_on();
        download
    }

    /// Waits until more came.
    pub(crate) fn goes_on(&self) {
        let wanted = self.received.load(Ordering::Relaxed) + 20 * BLOCK as u64;
        until("the published port's connection to go on", || {
            let broke = self.broke.lock().unwrap_or_else(PoisonError::into_inner).clone();
            assert_eq!(broke, None, "the published port's connection broke");
            (self.received.load(Ordering::Relaxed) >= wanted).then_some(())
        });
    }
}

impl Drop for Download {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(reader) = self.reader.take() {
            let _ = reader.join();
        }
    }
}

/// A connection from the client outside to the published port.
pub(crate) fn connect(cluster: &Cluster, to: Ipv4Addr) -> Result<TcpStream> {
    cluster.lab.inside(CLIENT, move || {
        let to = SocketAddr::from((to, PORT));
        let stream = TcpStream::connect_timeout(&to, Duration::from_secs(2))?;
        stream.set_read_timeout(Some(LIMIT))?;
        Ok(stream)
    })
}

/// Whether the port answers a new client.
pub(crate) fn answers(cluster: &Cluster, to: Ipv4Addr) -> bool {
    let Ok(mut stream) = connect(cluster, to) else { return false };
    let _ = stream.set_read_timeout(Some(Duration::from_secs(2)));
    stream.read_exact(&mut [0; BLOCK]).is_ok()
}

fn set(told: &Mutex<Option<String>>, why: String) {
    told.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(why);
}
