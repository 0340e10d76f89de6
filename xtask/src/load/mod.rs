//! `cargo xtask load`: servers and clients that a benchmark and the demo start inside hosts and
//! sandboxes of the lab. Hidden: nobody types these.
//!
//! They do as little as they can beside the calls into the kernel, because they share processors
//! with what is measured. A client says what it counted in one line of JSON.

mod round_trip;
mod tcp;
mod udp;
mod web;

use std::net::{Ipv4Addr, SocketAddrV4};
use std::time::Duration;

use anyhow::{Context as _, Result};
use clap::Subcommand;
use serde::{Deserialize, Serialize};

pub(crate) use self::round_trip::RoundTrips;

/// Bytes of a request, of an answer, and of a datagram's payload where nothing else is said.
const PAYLOAD: usize = 64;

/// Arguments of `cargo xtask load`.
#[derive(clap::Args)]
pub(crate) struct Args {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// Answer one request of 64 bytes per connection, and close.
    TcpServer {
        /// Port to listen on, at every address.
        port: u16,
    },
    /// Connect, ask, read the answer to its end, close, again and again.
    TcpClient {
        /// Address and port of the server.
        server: SocketAddrV4,
        /// Connections at a time.
        #[arg(long, default_value_t = 32)]
        connections: usize,
        /// For how long, in milliseconds.
        #[arg(long, default_value_t = 2000)]
        milliseconds: u64,
    },
    /// Count datagrams from the first one on, and say how many came.
    UdpServer {
        /// Port to receive on, at every address.
        port: u16,
        /// For how long to count, in milliseconds.
        #[arg(long, default_value_t = 2000)]
        milliseconds: u64,
    },
    /// Send datagrams as fast as they can be sent.
    UdpClient {
        /// Address and port of the server.
        server: SocketAddrV4,
        /// Bytes of a datagram's payload.
        #[arg(long, default_value_t = PAYLOAD)]
        size: usize,
        /// For how long, in milliseconds.
        #[arg(long, default_value_t = 2000)]
        milliseconds: u64,
    },
    /// Answer each byte with itself, by TCP and by UDP.
    RoundTripServer {
        /// Port to listen on, at every address.
        port: u16,
    },
    /// Send a byte and wait for the answer, again and again, and say how long it took.
    RoundTripClient {
        /// Address and port of the server.
        server: SocketAddrV4,
        /// By UDP, not by TCP.
        #[arg(long)]
        udp: bool,
        /// For how long, in milliseconds.
        #[arg(long, default_value_t = 2000)]
        milliseconds: u64,
    },
    /// A web server whose only page says who asks.
    WebServer {
        /// Port to listen on, at every address.
        port: u16,
    },
}

/// What a client or a server of datagrams counted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Count {
    /// Connections that were answered to the end, or datagrams sent or received.
    pub(crate) done: u64,
    /// Connections that failed, or datagrams that could not be sent.
    pub(crate) failed: u64,
    /// How long it counted.
    pub(crate) seconds: f64,
}

impl Count {
    /// What was done in a second.
    pub(crate) fn rate(&self) -> f64 {
        // Counts of seconds are far below 2^52.
        #[allow(clippy::cast_precision_loss, reason = "a count of seconds is exact in an f64")]
        let done = self.done as f64;
        if self.seconds > 0.0 { done / self.seconds } else { 0.0 }
    }
}

/// Carries out a verb of `cargo xtask load`.
///
/// # Errors
/// The port is taken, or the kernel refuses something else; a server that does not answer is a
/// count of failures.
pub(crate) fn run(args: Args) -> Result<()> {
    let any = |port| SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, port);
    let count = match args.verb {
        Verb::TcpServer { port } => return tcp::serve(any(port)),
        Verb::WebServer { port } => return web::serve(any(port)),
        Verb::TcpClient { server, connections, milliseconds } => {
            tcp::ask(server, connections, Duration::from_millis(milliseconds))?
        }
        Verb::UdpServer { port, milliseconds } => {
            udp::count(any(port), Duration::from_millis(milliseconds))?
        }
        Verb::UdpClient { server, size, milliseconds } => {
            udp::send(server, size, Duration::from_millis(milliseconds))?
        }
        Verb::RoundTripServer { port } => return round_trip::serve(any(port)),
        Verb::RoundTripClient { server, udp, milliseconds } => {
            let ask = if udp { round_trip::ask_by_udp } else { round_trip::ask_by_tcp };
            return say(&ask(server, Duration::from_millis(milliseconds))?);
        }
    };
    say(&count)
}

fn say(counted: &impl Serialize) -> Result<()> {
    println!("{}", serde_json::to_string(counted).context("write the count")?);
    Ok(())
}
