//! Runs `nft` and `iptables`: in the calling thread's network namespace, for so long and no longer.

use std::{io::ErrorKind, path::PathBuf, process::Stdio, time::Duration};

use anyhow::{Context as _, Result, bail};
use tokio::{io::AsyncWriteExt as _, process::Command};

/// How long a program may take.
const PATIENCE: Duration = Duration::from_secs(10);

/// What a program that ran said.
pub(super) struct Said {
    /// Whether it ended with 0.
    pub(super) good: bool,
    /// Its standard output.
    pub(super) output: String,
    /// Its standard error, in one line.
    pub(super) error: String,
}

/// Where a program is, in `PATH` and where distributions have what root runs: a service's `PATH`
/// may lack that.
pub(super) fn find(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let folders = std::env::split_paths(&path).chain(["/usr/sbin".into(), "/sbin".into()]);
    folders.map(|folder| folder.join(program)).find(|path| path.is_file())
}

/// Runs a program with this on its standard input. An error where it does not exist, does not end
/// in time and is killed, or cannot be spoken to; that it failed is told in [`Said`].
pub(super) async fn run(program: &str, arguments: &[&str], input: &[u8]) -> Result<Said> {
    let Some(path) = find(program) else {
        bail!("there is no program {program} on this host");
    };
    let mut command = Command::new(path);
    command
        .args(arguments)
        // Their output is read, so it must not be in the user's language.
        .env("LC_ALL", "C")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true);
    let talk = async {
        let mut child = command.spawn()?;
        if let Some(mut stdin) = child.stdin.take() {
            match stdin.write_all(input).await {
                // It ended without reading all, and says why itself.
                Err(error) if error.kind() == ErrorKind::BrokenPipe => {}
                written => written?,
            }
        }
        child.wait_with_output().await
    };
    let shown = || format!("run {program} {}", arguments.join(" "));
    let Ok(talked) = tokio::time::timeout(PATIENCE, talk).await else {
        bail!("{program} did not end within {} s and was killed", PATIENCE.as_secs());
    };
    let output = talked.with_context(shown)?;
    let error = String::from_utf8_lossy(&output.stderr);
    let error: Vec<&str> = error.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
    Ok(Said {
        good: output.status.success(),
        output: String::from_utf8_lossy(&output.stdout).into_owned(),
        error: error.join("; "),
    })
}
