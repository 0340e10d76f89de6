//! What Docker's calls do: `networks` for the driver's and the IPAM's calls about networks,
//! `addresses`, `endpoints`, and `guard` for what Docker asks leave for.
//!
//! Every call is carried out to its end even where Docker hangs up, is bounded in time, and may
//! come twice: Docker repeats a call whose connection broke. Nothing here asks Docker anything.

mod addresses;
mod endpoints;
mod guard;
mod networks;
mod side;
#[cfg(test)]
mod tests;

use std::{sync::Arc, time::Duration};

use anyhow::{Result, anyhow};
use tokio::sync::Notify;

pub use self::side::HostSide;

use super::book::Book;
use crate::service::{Records, Refusal, Service, Wiring};

/// How long one call may wait for Consul: `docker run` is to fail within five seconds where Consul
/// is gone, and a call before this one has used some of them.
const CONSUL_DEADLINE: Duration = Duration::from_secs(4);
/// The same where Consul is known not to answer: a Docker that starts asks for every address its
/// containers had, one after the other.
const AWAY_DEADLINE: Duration = Duration::from_secs(1);
/// How long an address may be without an endpoint before nobody wants it any more: Docker makes the
/// endpoint in the same breath.
const RESERVATION_LIFE: Duration = Duration::from_secs(60);
/// Our address spaces: a network whose pool is of another has another IPAM driver.
pub const ADDRESS_SPACES: [&str; 2] = ["ovnet-local", "ovnet-global"];

/// Carries Docker's calls out. Clones share everything.
#[derive(Debug)]
pub struct Driver<R, W> {
    shared: Arc<Shared<R, W>>,
}

#[derive(Debug)]
struct Shared<R, W> {
    service: Service<R, W>,
    book: Book,
    /// A network was made and waits for its name.
    created: Arc<Notify>,
    /// A network got its name.
    named: Notify,
    /// Held while a network gets its name or goes: the one must not overtake the other.
    naming: tokio::sync::Mutex<()>,
}

impl<R, W> Clone for Driver<R, W> {
    fn clone(&self) -> Self {
        Self { shared: Arc::clone(&self.shared) }
    }
}

impl<R: Records, W: Wiring> Driver<R, W> {
    /// A driver for this host's Docker.
    pub fn new(service: Service<R, W>, book: Book) -> Self {
        let (created, named) = (Arc::default(), Notify::new());
        Self {
            shared: Arc::new(Shared { service, book, created, named, naming: Default::default() }),
        }
    }

    /// What is remembered of Docker's networks.
    pub fn book(&self) -> &Book {
        &self.shared.book
    }

    fn records(&self) -> &R {
        self.shared.service.records()
    }

    fn wiring(&self) -> &W {
        self.shared.service.wiring()
    }

    /// Bounds a call to Consul, and says in one line what it means when Consul does not answer.
    async fn in_time<T>(&self, what: &str, call: impl Future<Output = Result<T>>) -> Result<T> {
        // A Consul known to be away is asked once more, but not waited for.
        let deadline = match self.wiring().status().consul_state.as_str() {
            "connected" => CONSUL_DEADLINE,
            _ => AWAY_DEADLINE,
        };
        match tokio::time::timeout(deadline, call).await {
            Ok(result) => result,
            Err(_) => {
                let status = self.wiring().status();
                let state = match status.consul_state.as_str() {
                    // The watch has not noticed yet.
                    "connected" => String::new(),
                    problem => format!(" ({problem})"),
                };
                Err(anyhow!(
                    "{what}: Consul at {} does not answer{state}; what runs goes on, try again \
                     when it is back",
                    status.consul
                ))
            }
        }
    }

    /// Once in a while: what Docker asked for and then forgot is given back.
    pub async fn tidy(&self) {
        self.book().pages().created.retain(|_, it| it.since.elapsed() < RESERVATION_LIFE);
        self.forget_stale_claims().await;
        self.forget_stale_reservations().await;
    }
}

fn unknown_network(docker: &str) -> anyhow::Error {
    let short = docker.get(..12).unwrap_or(docker);
    Refusal::not_found(format!(
        "the ovnet agent of this host does not know Docker's network {short}: remove it with \
         `docker network rm {short}` and create it anew"
    ))
}
