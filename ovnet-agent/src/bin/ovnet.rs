//! `ovnet`: the client of the agent on this host. See [`ovnet_agent::cli`].

use std::process::ExitCode;

fn main() -> ExitCode {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    match runtime {
        Ok(runtime) => runtime.block_on(ovnet_agent::cli::main()),
        Err(error) => {
            eprintln!("ovnet: cannot start: {error}");
            ExitCode::FAILURE
        }
    }
}
