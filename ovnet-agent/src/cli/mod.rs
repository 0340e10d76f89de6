//! The client `ovnet`: asks the agent, prints what it answers.
//!
//! [`args`] is what is typed, `render` what is printed; this file is what lies between.

pub mod args;
mod render;
mod table;

use std::{
    io::{self, Write},
    process::ExitCode,
};

use anyhow::{Context as _, Result, bail};
use clap::Parser as _;
use serde::Serialize;

use self::args::{
    AttachArgs, Cli, CreateArgs, DetachArgs, EndpointVerb, HostVerb, NetworkVerb, Verb,
};
use crate::{
    api::{
        client::Client,
        types::{Attach, CreateNetwork, Detach, EndpointView},
    },
    publish::{PublishedPort, spec},
    service::one_line,
};

/// `ovnet`: reads the command line, does it, and returns what to exit with: 0, 1 for anything that
/// failed, 2 for a command line that makes no sense.
pub async fn main() -> ExitCode {
    // Prints usage and exits with 2 by itself where there is something wrong with it.
    let cli = Cli::parse();
    let (mut out, mut errors) = (io::stdout(), io::stderr());
    match run(cli, &mut out, &mut errors).await {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) if is_broken_pipe(&error) => {
            // `ovnet monitor | head` has what it wanted.
            ExitCode::SUCCESS
        }
        Err(error) => {
            // Nothing is left to tell where standard error is closed too.
            drop(complain(&mut errors, &error));
            ExitCode::FAILURE
        }
    }
}

/// Does what the command line says. `Ok(false)`: part of it failed and `errors` says what.
pub async fn run(cli: Cli, out: &mut impl Write, errors: &mut impl Write) -> Result<bool> {
    let Cli { socket, json, verb } = cli;
    let client = Client::new(socket);
    match verb {
        Verb::Network(verb) => return network(&client, verb, json, out, errors).await,
        Verb::Attach(args) => {
            let wanted = attach(args);
            let endpoint = client.attach(&wanted).await?;
            if json {
                print_json(out, &endpoint)?;
            } else {
                writeln!(out, "{}", endpoint.record.address)?;
                write!(out, "{}", render::ports(&chosen_ports(&wanted, &endpoint)))?;
            }
        }
        Verb::Detach(DetachArgs { endpoint, network, netns }) => {
            let detached =
                client.detach(&Detach { network, netns: netns.map(from_here), endpoint }).await?;
            for warning in &detached.warnings {
                writeln!(errors, "ovnet: warning: {warning}")?;
            }
            if json {
                print_json(out, &detached)?;
            } else {
                for endpoint in &detached.endpoints {
                    let record = &endpoint.record;
                    writeln!(out, "{}", record.names.first().unwrap_or(&record.id))?;
                }
            }
        }
        Verb::Port { endpoint, private_port } => {
            let mut ports = client.ports(&endpoint).await?;
            if let Some(private) = private_port {
                ports.retain(|it| {
                    (it.protocol, it.container_port) == (private.protocol, private.port)
                });
                if ports.is_empty() {
                    bail!(
                        "{endpoint} has no published port {private}: see `ovnet port {endpoint}`"
                    );
                }
            }
            if json {
                print_json(out, &ports)?;
            } else if private_port.is_some() {
                write!(out, "{}", render::host_ports(&ports))?;
            } else {
                write!(out, "{}", render::ports(&ports))?;
            }
        }
        Verb::Endpoint(EndpointVerb::Ls { network, local, quiet, no_trunc }) => {
            let endpoints = client.endpoints(network.as_deref(), local).await?;
            if json {
                print_json(out, &endpoints)?;
            } else if quiet {
                print_ids(out, endpoints.iter().map(|it| it.record.id.as_str()), no_trunc)?;
            } else {
                write!(out, "{}", render::endpoints(&endpoints, no_trunc))?;
            }
        }
        Verb::Host(HostVerb::Ls) => {
            let hosts = client.hosts().await?;
            if json {
                print_json(out, &hosts)?;
            } else {
                write!(out, "{}", render::hosts(&hosts))?;
            }
        }
        Verb::Status => {
            let status = client.status().await?;
            if json {
                print_json(out, &status)?;
            } else {
                write!(out, "{}", render::status(&status))?;
            }
        }
        Verb::Counters { all } => {
            let mut counters = client.counters().await?;
            if json {
                counters.retain(|it| all || it.packets != 0);
                print_json(out, &counters)?;
            } else {
                write!(out, "{}", render::counters(&counters, all))?;
            }
        }
        Verb::Monitor => monitor(&client, json, out).await?,
    }
    Ok(true)
}

async fn network(
    client: &Client,
    verb: NetworkVerb,
    json: bool,
    out: &mut impl Write,
    errors: &mut impl Write,
) -> Result<bool> {
    let mut all_well = true;
    match verb {
        NetworkVerb::Create(args) => {
            let network = client.create_network(&create(args)).await?;
            if json {
                print_json(out, &network)?;
            } else {
                writeln!(out, "{}", network.id)?;
            }
        }
        NetworkVerb::Ls { quiet, no_trunc } => {
            let networks = client.networks().await?;
            if json {
                print_json(out, &networks)?;
            } else if quiet {
                print_ids(out, networks.iter().map(|it| it.id.as_str()), no_trunc)?;
            } else {
                write!(out, "{}", render::networks(&networks, no_trunc))?;
            }
        }
        // As Docker does: an array of those found, a line for each that is not.
        NetworkVerb::Inspect { networks } => {
            let mut found = Vec::new();
            for name in networks {
                match client.network(&name).await {
                    Ok(network) => found.push(network),
                    Err(error) => {
                        complain(errors, &error)?;
                        all_well = false;
                    }
                }
            }
            print_json(out, &found)?;
        }
        NetworkVerb::Rm { networks } => {
            let mut removed = Vec::new();
            for name in networks {
                match client.remove_network(&name).await {
                    Ok(network) if json => removed.push(network),
                    Ok(_) => writeln!(out, "{name}")?,
                    Err(error) => {
                        complain(errors, &error)?;
                        all_well = false;
                    }
                }
            }
            if json {
                print_json(out, &removed)?;
            }
        }
    }
    Ok(all_well)
}

async fn monitor(client: &Client, json: bool, out: &mut impl Write) -> Result<()> {
    let mut monitor = client.monitor().await?;
    while let Some(line) = monitor.next().await? {
        if json {
            writeln!(out, "{}", serde_json::to_string(&line).context("print JSON")?)?;
        } else {
            writeln!(out, "{}", render::monitor(&line))?;
        }
        // Whoever reads this through a pipe wants it now.
        out.flush()?;
    }
    Ok(())
}

fn create(args: CreateArgs) -> CreateNetwork {
    let CreateArgs { subnet, gateway, ip_range, aux_address, mtu, internal, label, opt, name } =
        args;
    CreateNetwork {
        name,
        subnet,
        gateway,
        ip_range,
        aux: aux_address.into_iter().collect(),
        mtu,
        internal,
        options: opt.into_iter().collect(),
        labels: label.into_iter().collect(),
    }
}

fn attach(args: AttachArgs) -> Attach {
    let AttachArgs { network, netns, ip, name, alias, ifname, publish, publish_all, expose } = args;
    let netns = from_here(netns);
    Attach { network, netns, ip, name, aliases: alias, ifname, publish, publish_all, expose }
}

/// The published ports that whoever asked for them cannot know.
fn chosen_ports(wanted: &Attach, endpoint: &EndpointView) -> Vec<PublishedPort> {
    let Some(local) = &endpoint.local else { return Vec::new() };
    // The agent read it before; a newer one may read more, and then everything is told.
    let requests = spec::requests(&wanted.publish, wanted.publish_all, &wanted.expose);
    spec::chosen(&requests.unwrap_or_default(), &local.ports).copied().collect()
}

/// A relative path means one from the client's folder, which the agent does not know.
fn from_here(netns: String) -> String {
    if !netns.contains('/') {
        return netns;
    }
    std::path::absolute(&netns)
        .ok()
        .and_then(|path| path.into_os_string().into_string().ok())
        .unwrap_or(netns)
}

fn print_ids<'a>(
    out: &mut impl Write,
    ids: impl Iterator<Item = &'a str>,
    whole: bool,
) -> Result<()> {
    for id in ids {
        writeln!(out, "{}", if whole { id } else { table::short(id) })?;
    }
    Ok(())
}

/// JSON with four spaces, as Docker prints it.
fn print_json(out: &mut impl Write, value: &impl Serialize) -> Result<()> {
    let formatter = serde_json::ser::PrettyFormatter::with_indent(b"    ");
    let mut text = Vec::new();
    value
        .serialize(&mut serde_json::Serializer::with_formatter(&mut text, formatter))
        .context("print JSON")?;
    text.push(b'\n');
    out.write_all(&text)?;
    Ok(())
}

fn complain(errors: &mut impl Write, error: &anyhow::Error) -> Result<()> {
    writeln!(errors, "ovnet: {}", one_line(error))?;
    Ok(())
}

fn is_broken_pipe(error: &anyhow::Error) -> bool {
    let io_error = error.chain().find_map(|cause| cause.downcast_ref::<io::Error>());
    io_error.is_some_and(|error| error.kind() == io::ErrorKind::BrokenPipe)
}

#[cfg(test)]
mod tests;
