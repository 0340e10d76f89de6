//! Running commands in hosts and sandboxes.

use std::fs::{self, File};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow, bail};
use nix::sched::{CloneFlags, setns};
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;

use super::host::Host;
use super::{Lab, READY, docker, patience, prepare, wait_until};

/// How long a command may take where nothing else is said.
const LIMIT: Duration = Duration::from_secs(60);

impl Lab {
    /// A command in a host (`docker01`) or a sandbox (`docker01/t1`), with the agent's binaries
    /// on its `PATH`; not bounded in time. A container counts as a sandbox: the command is then in
    /// its network, and in the host for all else.
    ///
    /// # Errors
    /// There is no such place.
    pub fn command(&self, place: &str, argv: &[&str]) -> Result<Command> {
        let (program, arguments) = argv.split_first().context("no command")?;
        let (host, sandbox) = self.place(place)?;
        let mut command = match sandbox {
            None => host.command(program),
            Some(netns) => {
                let mut command = host.command("nsenter");
                command.arg(format!("--net={}", netns.display())).args(["--", program]);
                command
            }
        };
        let options = self.options();
        let client = options.docker.then(prepare::docker_client_dir).flatten();
        let first = prepare::bin_dir(&options).ok().into_iter().chain(client);
        docker::own_client(&mut command);
        command.args(arguments).env("PATH", prepare::path(first));
        Ok(command)
    }

    /// Runs a command and gives its standard output, trimmed.
    ///
    /// # Errors
    /// It fails or takes more than a minute; what it wrote to standard error is told.
    pub fn exec(&self, place: &str, argv: &[&str]) -> Result<String> {
        let output = self.output(place, argv, LIMIT)?;
        if output.status.success() {
            return Ok(String::from_utf8_lossy(&output.stdout).trim_end().to_owned());
        }
        let all = [output.stderr.as_slice(), output.stdout.as_slice()].concat();
        let said = String::from_utf8_lossy(&all).trim().replace('\n', "; ");
        let shown = argv.join(" ");
        match output.status.code() {
            // What timeout(1) says with this code.
            Some(124 | 137) => {
                bail!("{place}: `{shown}` did not end within {} s: {said}", LIMIT.as_secs())
            }
            _ => bail!("{place}: `{shown}` failed ({}): {said}", output.status),
        }
    }

    /// Runs a command for at most `limit` and gives all it did, whether it failed or not. One
    /// that takes longer, with [`patience`], is killed and has exit code 124 or 137.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn output(&self, place: &str, argv: &[&str], limit: Duration) -> Result<Output> {
        // Inside the host, so that not only the nsenter in front of the command ends.
        let limit = format!("{:.3}", patience(limit).as_secs_f64());
        let mut bounded = vec!["timeout", "--kill-after=1", &limit];
        bounded.extend(argv);
        self.command(place, &bounded)?
            .stdin(Stdio::null())
            .output()
            .with_context(|| format!("{place}: cannot run `{}`", argv.join(" ")))
    }

    /// Starts a command that goes on until the result is dropped. Its output is in `log` of the
    /// lab's folder, where one is given.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn spawn(&self, place: &str, argv: &[&str], log: Option<&str>) -> Result<Running> {
        let failed = || format!("{place}: cannot run `{}`", argv.join(" "));
        let mut command = self.command(place, argv)?;
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        if let Some(log) = log {
            let log = File::create(self.folder().join(log)).with_context(failed)?;
            command.stdout(log.try_clone().with_context(failed)?).stderr(log);
        }
        // A group of its own can be killed as a whole, nsenter and command.
        Ok(Running(command.process_group(0).spawn().with_context(failed)?))
    }

    /// Calls a function on a thread inside the network namespace of a host or sandbox. Sockets it
    /// opens belong there.
    ///
    /// # Errors
    /// The namespace cannot be entered, or the function fails.
    pub fn inside<T: Send + 'static>(
        &self,
        place: &str,
        call: impl FnOnce() -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let (host, sandbox) = self.place(place)?;
        let path = match sandbox {
            None => host.netns(),
            Some(netns) => host.root().join(netns.strip_prefix("/").unwrap_or(&netns)),
        };
        inside(&path, call).with_context(|| format!("inside {place}"))
    }

    /// Waits until somebody listens on a TCP port of a host or sandbox. It does not connect:
    /// iperf3 takes that for a client and resets the ones that come next.
    ///
    /// # Errors
    /// Nobody does for too long.
    pub fn wait_for_port(&self, place: &str, port: u16) -> Result<()> {
        let what = format!("somebody to listen on port {port}");
        self.inside(place, move || {
            wait_until(READY, || what.clone(), || Ok(is_listening(port)?.then_some(())))
        })
    }

    /// Waits until somebody receives on a UDP port of a host or sandbox.
    ///
    /// # Errors
    /// Nobody does for too long.
    pub fn wait_for_udp_port(&self, place: &str, port: u16) -> Result<()> {
        let what = format!("somebody to receive on port {port}");
        self.inside(place, move || {
            wait_until(READY, || what.clone(), || Ok(is_receiving(port)?.then_some(())))
        })
    }

    /// Splits `HOST[/SANDBOX]` and finds both: the sandbox by its network namespace, as a path in
    /// the host.
    pub(super) fn place(&self, place: &str) -> Result<(Host, Option<PathBuf>)> {
        let Some((host, name)) = place.split_once('/') else {
            return Ok((self.host(place)?, None));
        };
        let host = self.host(host)?;
        let netns = Path::new("/run/netns").join(name);
        if host.root().join("run/netns").join(name).exists() {
            return Ok((host, Some(netns)));
        }
        if self.options().docker
            && let Some(netns) = self.container_netns(&host.name, name)
        {
            return Ok((host, Some(netns)));
        }
        let host = host.name;
        bail!("no sandbox {name} on {host}: `cargo xtask lab run {host} {name} …` makes one");
    }
}

/// A command that runs in the lab until this is dropped.
pub struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        if let Ok(pid) = i32::try_from(self.0.id()) {
            // It may have ended by itself.
            let _ = killpg(Pid::from_raw(pid), Signal::SIGKILL);
        }
        let _ = self.0.wait();
    }
}

/// Whether a socket listens in this thread's network namespace.
fn is_listening(port: u16) -> Result<bool> {
    has_socket(&["tcp", "tcp6"], port, "0A")
}

/// Whether a socket receives datagrams of anyone in this thread's network namespace.
fn is_receiving(port: u16) -> Result<bool> {
    has_socket(&["udp", "udp6"], port, "07")
}

/// Whether one of the tables has a socket at this port in this state.
fn has_socket(tables: &[&str], port: u16, state: &str) -> Result<bool> {
    // Columns: number, local address:port, remote one, state, all hexadecimal.
    let wanted = format!(":{port:04X}");
    let listens = |line: &str| {
        let mut columns = line.split_whitespace().skip(1);
        columns.next().is_some_and(|local| local.ends_with(&wanted))
            && columns.nth(1) == Some(state)
    };
    for table in tables {
        let path = format!("/proc/thread-self/net/{table}");
        match fs::read_to_string(&path) {
            Ok(text) if text.lines().any(listens) => return Ok(true),
            Ok(_) => {}
            // A kernel without IPv6.
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            Err(error) => return Err(error).context(path),
        }
    }
    Ok(false)
}

fn inside<T: Send + 'static>(
    netns: &Path,
    call: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    let namespace =
        File::open(netns).with_context(|| format!("cannot open {}", netns.display()))?;
    // The thread ends with the call, so that no other work finds itself in the namespace.
    let thread = thread::spawn(move || {
        setns(namespace, CloneFlags::CLONE_NEWNET).context("cannot enter it")?;
        call()
    });
    thread.join().map_err(|_| anyhow!("the call panicked"))?
}
