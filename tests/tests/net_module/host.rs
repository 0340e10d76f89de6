//! Hosts and sandboxes of these tests: namespaces that end with their threads.

use std::{
    os::unix::process::CommandExt as _,
    path::{Path, PathBuf},
    process::Command,
    sync::mpsc,
    thread::JoinHandle,
};

use nix::sched::{CloneFlags, unshare};
use ovnet_agent::net::Net;

/// Runs a test on a thread of its own, in a network namespace of its own, which is the host.
pub(crate) fn on_a_host(name: &str, test: impl AsyncFnOnce(Net) + Send + 'static) {
    if !nix::unistd::geteuid().is_root() {
        return skip(name, "it needs root");
    }
    if Command::new("ip").arg("-V").output().is_err() {
        return skip(name, "`ip` (iproute2) is not installed");
    }
    let test = std::thread::spawn(move || {
        unshare(CloneFlags::CLONE_NEWNET).unwrap();
        ip("link set lo up");
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async { test(Net::open().unwrap()).await });
    });
    if let Err(panic) = test.join() {
        std::panic::resume_unwind(panic);
    }
}

pub(crate) fn skip(name: &str, why: &str) {
    println!("SKIP {name}: {why}");
    assert!(std::env::var_os("OVNET_REQUIRE_ALL").is_none_or(|v| v != "1"), "{name}: {why}");
}

type Work = Box<dyn FnOnce() + Send>;

/// A sandbox: a namespace that a waiting thread keeps, and that ends with this value.
pub(crate) struct Sandbox {
    path: PathBuf,
    work: Option<mpsc::Sender<Work>>,
    thread: Option<JoinHandle<()>>,
}

impl Sandbox {
    pub(crate) fn new() -> Self {
        let (ready, path) = mpsc::channel();
        let (work, received) = mpsc::channel::<Work>();
        let thread = std::thread::spawn(move || {
            unshare(CloneFlags::CLONE_NEWNET).unwrap();
            ready.send(thread_namespace()).unwrap();
            for work in received {
                work();
            }
        });
        let path = path.recv().unwrap().into();
        Self { path, work: Some(work), thread: Some(thread) }
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Runs `ip` inside; what it printed.
    pub(crate) fn ip(&self, arguments: &str) -> String {
        let arguments = arguments.to_owned();
        self.run(move || ip(&arguments))
    }

    /// Runs something inside; sockets it opens stay there.
    pub(crate) fn run<T: Send + 'static>(&self, work: impl FnOnce() -> T + Send + 'static) -> T {
        let (answer, output) = mpsc::channel();
        let work = Box::new(move || {
            // Nobody waits for the answer of a test that has failed.
            let _ = answer.send(work());
        });
        self.work.as_ref().unwrap().send(work).unwrap();
        output.recv().unwrap_or_else(|_| panic!("it failed in the sandbox"))
    }
}

impl Drop for Sandbox {
    fn drop(&mut self) {
        drop(self.work.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

pub(crate) fn thread_namespace() -> String {
    format!("/proc/{}/task/{}/ns/net", std::process::id(), nix::unistd::gettid())
}

/// Runs `ip` in the calling thread's namespace; what it printed.
pub(crate) fn ip(arguments: &str) -> String {
    let mut command = Command::new("ip");
    command.args(arguments.split(' ')).process_group(0);
    let output = command.output().unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "ip {arguments}: {errors}");
    String::from_utf8(output.stdout).unwrap()
}

pub(crate) fn bridge(name: &str, addresses: &[&str]) {
    ip(&format!("link add {name} type bridge"));
    ip(&format!("link set {name} up"));
    for address in addresses {
        ip(&format!("address add {address} dev {name}"));
    }
}
