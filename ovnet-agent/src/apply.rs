//! Carries out steps. Every failure is kept and the rest goes on; the next pass tries again.

use anyhow::Result;
use ovnet_common::abi::Program;

use crate::{
    datapath::{Datapath, Tables},
    diff::Op,
};

/// A step that failed, and why.
#[derive(Debug)]
pub struct Failure {
    /// The step.
    pub op: Op,
    /// The reason.
    pub error: anyhow::Error,
}

/// Carries the steps out on the kernel and, for each that worked, on `tables`, which so stay what
/// the kernel holds without being read again.
pub fn apply(datapath: &mut Datapath, tables: &mut Tables, ops: Vec<Op>) -> Vec<Failure> {
    let mut failures: Vec<Failure> = Vec::new();
    for op in ops {
        if failures.iter().any(|failure| forbids(&failure.op, &op)) {
            continue;
        }
        match step(datapath, &op) {
            Ok(()) => record(tables, &op),
            Err(error) => failures.push(Failure { op, error }),
        }
    }
    failures
}

/// Whether the failure of one step is a reason not to take another: a port must not be published to
/// where nothing translates the answers. It works through the kernel until the next pass.
fn forbids(failed: &Op, next: &Op) -> bool {
    match (failed, next) {
        (Op::Attach(attachment), Op::SetPublished(_, to)) => {
            attachment.program == Program::FromGwbridge && attachment.ifindex == to.ifindex
        }
        _ => false,
    }
}

fn step(datapath: &mut Datapath, op: &Op) -> Result<()> {
    match op {
        Op::SetConfig(value) => datapath.maps().set_config(*value),
        Op::SetHost(key, value) => datapath.maps().set_host(*key, *value),
        Op::SetNetwork(key, value) => datapath.maps().set_network(*key, *value),
        Op::SetEndpoint(key, value) => datapath.maps().set_endpoint(*key, *value),
        Op::SetPort(key, value) => datapath.maps().set_port(*key, *value),
        Op::SetPublished(key, value) => datapath.maps().set_published(*key, *value),
        Op::RemovePublished(key) => datapath.maps().remove_published(key),
        Op::Attach(attachment) => datapath.attach(attachment),
        Op::Detach(attachment) => datapath.detach(attachment),
        Op::RemoveLink(pin) => datapath.remove_link(pin),
        Op::RemoveEndpoint(key) => datapath.maps().remove_endpoint(key),
        Op::RemovePort(key) => datapath.maps().remove_port(*key),
        Op::RemoveNetwork(key) => datapath.maps().remove_network(*key),
        Op::RemoveHost(key) => datapath.maps().remove_host(key),
    }
}

/// Carries a step out on plain values.
pub(crate) fn record(tables: &mut Tables, op: &Op) {
    match op {
        Op::SetConfig(value) => tables.config = *value,
        Op::SetHost(key, value) => drop(tables.hosts.insert(*key, *value)),
        Op::SetNetwork(key, value) => drop(tables.networks.insert(*key, *value)),
        Op::SetEndpoint(key, value) => drop(tables.endpoints.insert(*key, *value)),
        Op::SetPort(key, value) => drop(tables.ports.insert(*key, *value)),
        Op::SetPublished(key, value) => drop(tables.published.insert(*key, *value)),
        Op::RemovePublished(key) => drop(tables.published.remove(key)),
        Op::RemoveEndpoint(key) => drop(tables.endpoints.remove(key)),
        Op::RemovePort(key) => drop(tables.ports.remove(key)),
        Op::RemoveNetwork(key) => drop(tables.networks.remove(key)),
        Op::RemoveHost(key) => drop(tables.hosts.remove(key)),
        Op::Attach(_) | Op::Detach(_) | Op::RemoveLink(_) => {}
    }
}

#[cfg(test)]
mod tests {
    use ovnet_common::published::{PublishedKey, PublishedValue};

    use super::*;
    use crate::datapath::Attachment;

    #[test]
    fn nothing_is_published_to_where_answers_are_not_translated() {
        let attach = |program, ifindex| {
            let interface = format!("ovnetg{ifindex}");
            Op::Attach(Attachment { program, ifindex, interface, xdp: None })
        };
        let publish = |ifindex| {
            let value = PublishedValue { ifindex, ..PublishedValue::default() };
            Op::SetPublished(PublishedKey::default(), value)
        };
        assert!(forbids(&attach(Program::FromGwbridge, 7), &publish(7)));
        assert!(!forbids(&attach(Program::FromGwbridge, 7), &publish(8)), "another's");
        assert!(!forbids(&attach(Program::FromContainer, 7), &publish(7)), "another program");
        let taken_back = Op::RemovePublished(PublishedKey::default());
        assert!(!forbids(&attach(Program::FromGwbridge, 7), &taken_back));
    }
}
