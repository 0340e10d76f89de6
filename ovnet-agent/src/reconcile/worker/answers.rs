//! What those who asked for an endpoint are told, and when.

use std::time::{Duration, Instant};

use anyhow::{Result, anyhow};
use ovnet_common::abi::mapped;
use tokio::sync::oneshot;

use super::Worker;
use crate::{apply::Failure, diff::Op, state::LocalEndpoint};

/// How long an attach waits for its network's other endpoints. After that it succeeds all the
/// same: the endpoint is wired, and the rest follows when Consul answers.
const FIRST_READ: Duration = Duration::from_secs(5);

/// An attach that is wired and waits for its network's endpoints to be read.
pub(super) struct Waiting {
    network: String,
    pub(super) until: Instant,
    reply: oneshot::Sender<Result<()>>,
}

impl Worker {
    /// Answers attaches that failed; the others wait for their network to be read.
    pub(super) fn answer_added(
        &mut self,
        added: Vec<(LocalEndpoint, oneshot::Sender<Result<()>>)>,
        failures: &[Failure],
    ) {
        for (endpoint, reply) in added {
            if !self.shared.view().local.contains_key(&endpoint.record.id) {
                let name = &endpoint.host_ifname;
                answer(reply, Err(anyhow!("{name} is gone: was its sandbox removed meanwhile?")));
            } else if let Some(failure) = failures.iter().find(|it| concerns(&it.op, &endpoint)) {
                answer(reply, Err(anyhow!("{:#}", failure.error)));
            } else {
                let (network, until) = (endpoint.network.id, Instant::now() + FIRST_READ);
                self.waiting.push(Waiting { network, until, reply });
            }
        }
    }

    pub(super) fn answer_waiting(&mut self) {
        let snapshot = self.shared.snapshots.borrow().clone();
        let now = Instant::now();
        for waiting in std::mem::take(&mut self.waiting) {
            let read = snapshot.endpoints.contains_key(&waiting.network);
            if read || waiting.until <= now {
                answer(waiting.reply, Ok(()));
            } else {
                self.waiting.push(waiting);
            }
        }
    }
}

/// Whether an endpoint cannot work without this step, or not without being trusted too far.
fn concerns(op: &Op, endpoint: &LocalEndpoint) -> bool {
    let vni = endpoint.network.vni;
    let gateway = endpoint.gateway.as_ref();
    match op {
        Op::SetConfig(_) => true,
        Op::SetNetwork(of, _) => *of == vni,
        Op::SetEndpoint(key, value) => key.vni == vni && value.ifindex != 0,
        Op::SetPort(_, value) if value.vni == 0 => {
            gateway.is_some_and(|it| mapped(it.address.octets()) == value.address)
        }
        Op::SetPort(_, value) => value.vni == vni,
        Op::Attach(attachment) => {
            attachment.interface == endpoint.host_ifname
                || gateway.is_some_and(|it| it.host_ifname == attachment.interface)
        }
        _ => false,
    }
}

/// Answers a request.
pub(super) fn answer<T>(reply: oneshot::Sender<Result<T>>, result: Result<T>) {
    // Whoever asked may have given up; the work is done all the same.
    let _ = reply.send(result);
}

#[cfg(test)]
mod tests;
