//! A Consul to test against: a real one or the stand-in, on loopback, gone with its owner.

#![allow(
    clippy::panic,
    clippy::unwrap_used,
    reason = "this is test code, and a panic names the line that failed"
)]

use std::{
    env,
    io::{Read as _, Write as _},
    net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream},
    os::unix::process::CommandExt as _,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use nix::sys::{prctl, signal::Signal};
use tempfile::TempDir;

/// How long a Consul may take until it has a leader.
const START_LIMIT: Duration = Duration::from_secs(30);

/// Where a real Consul is: `OVNET_CONSUL`, the folder of the project's own tools, or PATH.
pub fn find_consul() -> Option<PathBuf> {
    if let Some(path) = env::var_os("OVNET_CONSUL") {
        return Some(path.into());
    }
    let workspace = Path::new(env!("CARGO_MANIFEST_DIR")).parent()?;
    let tool = workspace.join("target/tools/bin/consul");
    if tool.is_file() {
        return Some(tool);
    }
    let path = env::var_os("PATH")?;
    env::split_paths(&path).map(|folder| folder.join("consul")).find(|path| path.is_file())
}

/// A real Consul: one server on loopback with ports of its own. Killed when dropped, and by the
/// kernel when the thread that started it ends.
#[derive(Debug)]
pub struct RealConsul {
    program: PathBuf,
    child: Option<Child>,
    ports: [u16; 3],
    /// Where a server that survives a restart keeps its data; the development mode keeps none.
    data: Option<TempDir>,
    /// The token that may do everything, where access is denied by default.
    master: Option<String>,
}

impl RealConsul {
    /// Starts one that keeps everything in memory. Where no Consul can be found this prints
    /// `SKIP test: why` and returns `None`, and panics where `OVNET_REQUIRE_ALL=1` is set.
    pub fn start() -> Option<Self> {
        Self::start_with(|| None, None)
    }

    /// Starts one that denies everything to whoever has no token; `master` may do everything.
    pub fn start_with_acl(master: &str) -> Option<Self> {
        Self::start_with(|| None, Some(master))
    }

    /// Starts one whose data survives [`Self::kill`] and [`Self::start_again`].
    pub fn start_durable() -> Option<Self> {
        Self::start_with(|| Some(tempfile::tempdir().unwrap()), None)
    }

    fn start_with(data: impl Fn() -> Option<TempDir>, master: Option<&str>) -> Option<Self> {
        let Some(program) = find_consul() else {
            skip("no Consul found: put one on PATH, or run `cargo xtask setup`");
            return None;
        };
        let mut last = None;
        // Between choosing ports and binding them another process may take one.
        for _ in 0..5 {
            let mut consul = Self {
                program: program.clone(),
                child: None,
                ports: free_ports(),
                data: data(),
                master: master.map(str::to_owned),
            };
            match consul.try_start() {
                Ok(()) => return Some(consul),
                Err(error) => last = Some(error),
            }
        }
        panic!("{} does not start: {:#}", program.display(), last.unwrap());
    }

    /// `address:port` of its HTTP API.
    pub fn address(&self) -> SocketAddr {
        (Ipv4Addr::LOCALHOST, self.ports[0]).into()
    }

    /// Kills it with SIGKILL and waits until it is gone.
    pub fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }

    /// Starts it at the same address: with its data where it keeps any, else empty.
    pub fn start_again(&mut self) {
        let deadline = Instant::now() + START_LIMIT;
        while let Err(error) = self.try_start() {
            assert!(Instant::now() < deadline, "Consul does not start again: {error:#}");
        }
    }

    fn try_start(&mut self) -> Result<()> {
        self.kill();
        let [http, serf, server] = self.ports.map(|port| port.to_string());
        let mut command = Command::new(&self.program);
        command
            .args(["agent", "-bind", "127.0.0.1", "-client", "127.0.0.1", "-log-level", "err"])
            .args(["-node", &format!("consul-{http}"), "-http-port", &http])
            .args(["-serf-lan-port", &serf, "-server-port", &server])
            .args(["-serf-wan-port", "-1", "-dns-port", "-1", "-grpc-port", "-1"])
            .args(["-hcl", "performance { raft_multiplier = 1 }"])
            .args(["-hcl", "disable_update_check = true"])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        match &self.data {
            None => command.arg("-dev"),
            Some(folder) => {
                command.args(["-server", "-bootstrap-expect", "1", "-data-dir"]).arg(folder.path())
            }
        };
        if let Some(master) = &self.master {
            command.args(["-hcl", &acl(master)]);
        }
        // SAFETY: prctl is a system call that is safe between fork and exec.
        unsafe {
            command.pre_exec(|| Ok(prctl::set_pdeathsig(Signal::SIGKILL)?));
        }
        let child = command.spawn().with_context(|| format!("run {}", self.program.display()))?;
        let child = self.child.insert(child);
        let deadline = Instant::now() + START_LIMIT;
        loop {
            if let Some(status) = child.try_wait()? {
                bail!("it ended at once: {status}");
            }
            let address = (Ipv4Addr::LOCALHOST, self.ports[0]).into();
            let ask = |method: &str, path: &str, body: &[u8]| {
                request_as(self.master.as_deref(), address, method, path, body)
            };
            if let Ok((200, leader)) = ask("GET", "/v1/status/leader", b"")
                && leader.contains(&b':')
                // A leader that has yet to catch up refuses writes.
                && matches!(ask("PUT", "/v1/kv/ready", b""), Ok((200, _)))
                && matches!(ask("DELETE", "/v1/kv/ready", b""), Ok((200, _)))
                && registered(ask)
            {
                return Ok(());
            }
            ensure!(Instant::now() < deadline, "no leader within {START_LIMIT:?}");
            thread::sleep(Duration::from_millis(50));
        }
    }
}

/// Whether the server is in its own catalog, which it enters some time after it leads: before, it
/// answers 500 to whoever creates a session.
fn registered(ask: impl Fn(&str, &str, &[u8]) -> Result<(u16, Vec<u8>)>) -> bool {
    let Ok((200, answer)) = ask("PUT", "/v1/session/create", b"{}") else { return false };
    let session: Option<serde_json::Value> = serde_json::from_slice(&answer).ok();
    let id = session.as_ref().and_then(|it| it["ID"].as_str()).unwrap_or_default();
    let path = format!("/v1/session/destroy/{id}");
    matches!(ask("PUT", &path, b""), Ok((200, _)))
}

/// Configuration of a Consul that denies everything to whoever has no token.
pub fn acl(master: &str) -> String {
    format!("acl {{ enabled = true default_policy = \"deny\" tokens {{ master = \"{master}\" }} }}")
}

impl Drop for RealConsul {
    fn drop(&mut self) {
        self.kill();
    }
}

/// The stand-in on a loopback port, in a runtime of its own so that killing it closes every
/// connection as the death of a process does.
#[derive(Debug)]
pub struct StandIn {
    address: SocketAddr,
    runtime: Option<tokio::runtime::Runtime>,
}

impl StandIn {
    /// Starts one at a free port.
    pub fn start() -> Self {
        let mut stand_in = Self { address: (Ipv4Addr::LOCALHOST, 0).into(), runtime: None };
        stand_in.start_again();
        stand_in
    }

    /// `address:port` of its HTTP API.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Ends it and with it everything it held.
    pub fn kill(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }

    /// Starts it at the same address, empty.
    pub fn start_again(&mut self) {
        self.kill();
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .unwrap();
        let (bound, address) = std::sync::mpsc::channel();
        let wanted = self.address;
        runtime.spawn(async move {
            // The killed one's connections may take a moment to let go of the port.
            let deadline = Instant::now() + START_LIMIT;
            let listener = loop {
                match tokio::net::TcpListener::bind(wanted).await {
                    Ok(listener) => break listener,
                    Err(error) => assert!(Instant::now() < deadline, "bind {wanted}: {error}"),
                }
                tokio::time::sleep(Duration::from_millis(20)).await;
            };
            bound.send(listener.local_addr().unwrap()).unwrap();
            xtask::stand_in::serve(listener).await.unwrap();
        });
        self.address = address.recv_timeout(START_LIMIT).unwrap();
        self.runtime = Some(runtime);
    }
}

impl Drop for StandIn {
    fn drop(&mut self) {
        self.kill();
    }
}

/// One HTTP request to a Consul, for what a person does with `consul kv` or `curl`: the status and
/// the body. Blocks, for 90 seconds at most.
pub fn request(
    address: SocketAddr,
    method: &str,
    path: &str,
    body: &[u8],
) -> Result<(u16, Vec<u8>)> {
    request_as(None, address, method, path, body)
}

/// [`request`] with an ACL token.
pub fn request_as(
    token: Option<&str>,
    address: SocketAddr,
    method: &str,
    path: &str,
    body: &[u8],
) -> Result<(u16, Vec<u8>)> {
    let mut stream = TcpStream::connect_timeout(&address, Duration::from_secs(3))?;
    stream.set_read_timeout(Some(Duration::from_secs(90)))?;
    // HTTP/1.0 spares us chunked bodies and kept connections.
    let token = token.map(|token| format!("X-Consul-Token: {token}\r\n")).unwrap_or_default();
    let length = body.len();
    let head = format!("{method} {path} HTTP/1.0\r\n{token}Content-Length: {length}\r\n\r\n");
    stream.write_all(&[head.as_bytes(), body].concat())?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer)?;
    let end = answer.windows(4).position(|bytes| bytes == b"\r\n\r\n").context("no HTTP answer")?;
    let status = std::str::from_utf8(&answer[..end])?.split(' ').nth(1).context("no status")?;
    Ok((status.parse()?, answer.split_off(end + 4)))
}

/// Prints that the running test is skipped, or fails it where everything is required.
pub fn skip(why: &str) {
    let thread = thread::current();
    let name = thread.name().unwrap_or("a test");
    assert!(
        env::var("OVNET_REQUIRE_ALL").as_deref() != Ok("1"),
        "{name} would be skipped, and OVNET_REQUIRE_ALL=1 is set: {why}"
    );
    println!("SKIP {name}: {why}");
}

fn free_ports() -> [u16; 3] {
    // All are held until all are chosen, so that they differ.
    let listeners: [TcpListener; 3] =
        std::array::from_fn(|_| TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap());
    listeners.map(|listener| listener.local_addr().unwrap().port())
}
