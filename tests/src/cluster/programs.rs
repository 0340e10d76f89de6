//! Whether the programs are attached, looked at all the time.

use std::{
    fs::File,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::Duration,
};

use aya::programs::{ProgramError, SchedClassifier, TcAttachType};
use nix::sched::{CloneFlags, setns};

use super::Cluster;

/// How often it looks.
const EVERY: Duration = Duration::from_millis(1);

/// Looks every millisecond whether each interface has exactly its program at TCX ingress.
pub struct ProgramWatch {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<(usize, Vec<String>)>>,
}

impl ProgramWatch {
    /// Starts looking at interfaces of a host, each with the name of its program.
    pub fn start(cluster: &Cluster, host: &str, expected: &[(&str, &str)]) -> Self {
        let namespace = File::open(cluster.lab.host(host).unwrap().netns()).unwrap();
        let stop = Arc::new(AtomicBool::new(false));
        let stopping = Arc::clone(&stop);
        let expected: Vec<(String, String)> =
            expected.iter().map(|(a, b)| ((*a).to_owned(), (*b).to_owned())).collect();
        let thread = thread::spawn(move || {
            setns(namespace, CloneFlags::CLONE_NEWNET).unwrap();
            let (mut looks, mut wrong) = (0, Vec::new());
            while !stopping.load(Ordering::Relaxed) {
                for (interface, program) in &expected {
                    let found = names(interface);
                    if found.as_ref().ok() != Some(&vec![program.clone()]) {
                        wrong.push(format!("{interface} has {found:?}"));
                    }
                }
                looks += 1;
                thread::sleep(EVERY);
            }
            (looks, wrong)
        });
        Self { stop, thread: Some(thread) }
    }

    /// Ends it; not once may anything else have been there.
    pub fn must_have_seen_nothing_else(mut self) {
        self.stop.store(true, Ordering::Relaxed);
        let (looks, wrong) = self.thread.take().unwrap().join().unwrap();
        assert!(looks > 0);
        assert!(wrong.is_empty(), "{} of {looks} times: {:?}", wrong.len(), wrong.first());
    }
}

impl Drop for ProgramWatch {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

/// Names of the programs at TCX ingress of an interface, first to last.
///
/// The list has ids, and one that is replaced before it is opened is gone by then: that says nothing
/// of what is attached, so the list is read again.
fn names(interface: &str) -> Result<Vec<String>, String> {
    let mut attempts = 3;
    let programs = loop {
        attempts -= 1;
        match SchedClassifier::query_tcx(interface, TcAttachType::Ingress) {
            Ok((_, programs)) => break programs,
            Err(ProgramError::SyscallError(error))
                if attempts > 0
                    && error.call == "bpf_prog_get_fd_by_id"
                    && error.io_error.kind() == std::io::ErrorKind::NotFound => {}
            Err(error) => return Err(error.to_string()),
        }
    };
    Ok(programs.iter().map(|it| it.name_as_str().unwrap_or_default().to_owned()).collect())
}
