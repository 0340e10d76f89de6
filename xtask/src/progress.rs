//! Long steps: one line that tells what goes on and for how long.

use std::fs::File;
use std::io::{BufRead as _, BufReader, IsTerminal as _, Read, Write as _};
use std::path::Path;
use std::process::{Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};

use crate::tools;

/// How often the line is drawn again on a terminal.
const FRAME: Duration = Duration::from_millis(100);
/// How often a line is printed where there is no terminal, as in CI.
const REPORT: Duration = Duration::from_secs(10);
/// How many of the last lines are shown when a command fails.
const TAIL: usize = 15;

/// What a command did.
pub(crate) struct Outcome {
    /// How it ended.
    pub(crate) status: ExitStatus,
    /// All lines it wrote, to standard output and standard error, as they came.
    pub(crate) lines: Vec<String>,
}

/// Runs a command and shows what it does in one line; keeps its output.
///
/// # Errors
/// The command cannot be started. That it fails is no error here.
pub(crate) fn watch(label: &str, command: &mut Command) -> Result<Outcome> {
    let started = Instant::now();
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("{label}: cannot run `{}`", tools::show(command)))?;

    let lines = Arc::new(Mutex::new(Vec::new()));
    let readers: Vec<_> = [
        child.stdout.take().map(|pipe| collect(pipe, &lines)),
        child.stderr.take().map(|pipe| collect(pipe, &lines)),
    ]
    .into_iter()
    .flatten()
    .collect();

    let terminal = std::io::stderr().is_terminal();
    let mut reported = started;
    let status = loop {
        if let Some(status) = child.try_wait().with_context(|| format!("{label}: waiting"))? {
            break status;
        }
        if terminal {
            draw(label, started.elapsed(), &last(&lines));
        } else if reported.elapsed() >= REPORT {
            reported = Instant::now();
            eprintln!("  {label}: {} s: {}", started.elapsed().as_secs(), last(&lines));
        }
        thread::sleep(FRAME);
    };
    if terminal {
        clear();
    }
    for reader in readers {
        // A reader ends with its pipe; one that panicked has nothing more to give.
        let _ = reader.join();
    }
    let lines = std::mem::take(&mut *lines.lock().unwrap_or_else(PoisonError::into_inner));
    Ok(Outcome { status, lines })
}

/// Runs a command as [`watch`] does, and keeps what it wrote in `log`.
///
/// # Errors
/// The command cannot be started or fails; its last lines are printed first.
pub(crate) fn run(label: &str, command: &mut Command, log: &Path) -> Result<()> {
    let Outcome { status, lines } = watch(label, command)?;
    if let Some(folder) = log.parent() {
        std::fs::create_dir_all(folder)
            .with_context(|| format!("cannot make {}", folder.display()))?;
    }
    let mut file = File::create(log).with_context(|| format!("cannot write {}", log.display()))?;
    writeln!(file, "{}\n{}", tools::show(command), lines.join("\n"))
        .with_context(|| format!("cannot write {}", log.display()))?;
    if status.success() {
        return Ok(());
    }
    for line in lines.iter().skip(lines.len().saturating_sub(TAIL)) {
        eprintln!("  | {line}");
    }
    bail!("{label} failed ({status}): all it said is in {}", log.display());
}

/// Seconds as people read them: `0.3 s`, `12 s`, `1 min 15 s`.
pub(crate) fn duration(took: Duration) -> String {
    match took.as_secs() {
        0..10 => format!("{:.1} s", took.as_secs_f32()),
        seconds @ 10..60 => format!("{seconds} s"),
        seconds => format!("{} min {:02} s", seconds / 60, seconds % 60),
    }
}

fn collect<R: Read + Send + 'static>(
    pipe: R,
    lines: &Arc<Mutex<Vec<String>>>,
) -> thread::JoinHandle<()> {
    let lines = Arc::clone(lines);
    thread::spawn(move || {
        let mut pipe = BufReader::new(pipe);
        let mut line = Vec::new();
        // Not `lines()`: a tool's output need not be UTF-8, and stopping to read would block it.
        while pipe.read_until(b'\n', &mut line).is_ok_and(|read| read > 0) {
            let text = String::from_utf8_lossy(&line).trim_end().to_owned();
            lines.lock().unwrap_or_else(PoisonError::into_inner).push(text);
            line.clear();
        }
    })
}

fn last(lines: &Mutex<Vec<String>>) -> String {
    let lines = lines.lock().unwrap_or_else(PoisonError::into_inner);
    lines.iter().rev().find(|line| !line.is_empty()).cloned().unwrap_or_default()
}

fn draw(label: &str, elapsed: Duration, last: &str) {
    // Longer lines would wrap and then not be cleared.
    let last: String = last.trim().chars().filter(|c| !c.is_control()).take(50).collect();
    eprint!("\r\x1b[2K  {label} {} \x1b[2m{last}\x1b[0m", duration(elapsed));
    let _ = std::io::stderr().flush();
}

fn clear() {
    eprint!("\r\x1b[2K");
    let _ = std::io::stderr().flush();
}
