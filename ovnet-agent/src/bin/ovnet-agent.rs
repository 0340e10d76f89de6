//! The agent; see [`ovnet_agent::agent`].

use std::{io::IsTerminal as _, os::unix::net::UnixListener, process::ExitCode, time::Duration};

use clap::Parser as _;
use ovnet_agent::{
    activation, agent,
    config::{Arguments, LogFormat},
    docker,
    service::one_line,
};
use tracing_subscriber::{EnvFilter, filter::LevelFilter};

/// How long an agent that cannot run answers Docker before it ends.
const REFUSING: Duration = Duration::from_secs(1);

fn main() -> ExitCode {
    // Before there are threads: it changes the environment.
    let passed = match activation::plugin_listener() {
        Ok(passed) => passed,
        Err(error) => {
            eprintln!("ovnet-agent: {error:#}");
            return ExitCode::FAILURE;
        }
    };
    let spare = passed.as_ref().and_then(|socket| socket.try_clone().ok());
    let arguments = match Arguments::try_parse() {
        Ok(arguments) => arguments,
        Err(error) => {
            if error.use_stderr() {
                refuse_docker(spare, "its arguments are wrong: see its journal");
            }
            error.exit();
        }
    };
    start_log(arguments.run.as_ref().map_or(LogFormat::Text, |config| config.log_format));
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("ovnet-agent: cannot start: {error}");
            return ExitCode::FAILURE;
        }
    };
    let result = runtime.block_on(agent::main(arguments, passed));
    // A blocking call that hangs must not keep a stop from ending.
    runtime.shutdown_timeout(Duration::from_secs(1));
    match result {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("ovnet-agent: {error:#}");
            refuse_docker(spare, &one_line(&error));
            ExitCode::FAILURE
        }
    }
}

/// Answers what waits in a socket that systemd passed before the agent ends without serving it:
/// Docker itself would not start as long as it waits.
fn refuse_docker(socket: Option<UnixListener>, why: &str) {
    let Some(socket) = socket else { return };
    let Ok(runtime) = tokio::runtime::Builder::new_current_thread().enable_all().build() else {
        return;
    };
    let line = format!("ovnet-agent cannot run: {why}");
    let refusing = docker::plugin::refuse(socket, line);
    // Its errors are told already, by what made the agent end.
    let _ = runtime.block_on(async { tokio::time::timeout(REFUSING, refusing).await });
}

fn start_log(format: LogFormat) {
    let filter = EnvFilter::builder()
        .with_default_directive(LevelFilter::INFO.into())
        .from_env_lossy()
        // They log each request at level info and each failure several times at level error; we
        // say what failed ourselves, once.
        .add_directive("consulrs=off".parse().unwrap_or_else(|_| LevelFilter::INFO.into()))
        .add_directive("rustify=off".parse().unwrap_or_else(|_| LevelFilter::INFO.into()));
    let log = tracing_subscriber::fmt()
        .with_env_filter(filter)
        // A file or the journal keeps colours as garbage between the words.
        .with_ansi(std::io::stderr().is_terminal())
        .with_writer(std::io::stderr);
    match format {
        LogFormat::Text => log.init(),
        LogFormat::Json => log.json().init(),
    }
}
