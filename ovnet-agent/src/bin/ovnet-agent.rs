//! The agent; see [`ovnet_agent::agent`].

use std::{io::IsTerminal as _, process::ExitCode};

use clap::Parser as _;
use ovnet_agent::{
    activation, agent,
    config::{Arguments, LogFormat},
};
use tracing_subscriber::{EnvFilter, filter::LevelFilter};

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    start_log(arguments.run.as_ref().map_or(LogFormat::Text, |config| config.log_format));
    // Before there are threads: it changes the environment.
    let passed = match activation::plugin_listener() {
        Ok(passed) => passed,
        Err(error) => {
            eprintln!("ovnet-agent: {error:#}");
            return ExitCode::FAILURE;
        }
    };
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("ovnet-agent: cannot start: {error}");
            return ExitCode::FAILURE;
        }
    };
    let result = runtime.block_on(agent::main(arguments, passed));
    // A blocking call that hangs must not keep a stop from ending.
    runtime.shutdown_timeout(std::time::Duration::from_secs(1));
    match result {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("ovnet-agent: {error:#}");
            ExitCode::FAILURE
        }
    }
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
