//! Which steps of a pass put right what somebody else broke, and which only follow a change. Pure.

use std::collections::BTreeSet;

use crate::{
    datapath::{Attachment, Tables},
    diff::Op,
    repairs::Repair,
};

/// What was as it had to be after the last pass, and what was found now.
#[derive(Debug)]
pub(super) struct Drift<'a> {
    /// The tables as the agent wrote them last.
    pub(super) written: &'a Tables,
    /// The tables as they were found.
    pub(super) found: &'a Tables,
    /// The attachments that were in force and are no more.
    pub(super) lost: &'a BTreeSet<Attachment>,
}

impl Drift<'_> {
    /// The repair that a step is; `None` where it brings something new.
    pub(super) fn repair(&self, op: &Op) -> Option<Repair> {
        let (written, found) = (self.written, self.found);
        let edited = match op {
            Op::SetConfig(_) => written.config != found.config,
            Op::SetHost(key, _) | Op::RemoveHost(key) => {
                written.hosts.get(key) != found.hosts.get(key)
            }
            Op::SetNetwork(key, _) | Op::RemoveNetwork(key) => {
                written.networks.get(key) != found.networks.get(key)
            }
            Op::SetEndpoint(key, _) | Op::RemoveEndpoint(key) => {
                written.endpoints.get(key) != found.endpoints.get(key)
            }
            Op::SetPort(key, _) | Op::RemovePort(key) => {
                written.ports.get(key) != found.ports.get(key)
            }
            Op::SetPublished(key, _) | Op::RemovePublished(key) => {
                written.published.get(key) != found.published.get(key)
            }
            Op::Attach(attachment) => {
                return self.lost.contains(attachment).then_some(Repair::Program);
            }
            Op::Detach(_) | Op::RemoveLink(_) => false,
        };
        edited.then_some(Repair::MapEntry)
    }
}

#[cfg(test)]
mod tests {
    use ovnet_common::abi::{HostValue, Program, mapped};

    use super::*;

    #[test]
    fn only_what_was_right_and_is_not_is_a_repair() {
        let (mine, theirs, new) = ([10, 0, 0, 1], [10, 0, 0, 2], [10, 0, 0, 3]);
        let tables = |hosts: &[[u8; 4]]| Tables {
            hosts: hosts.iter().map(|it| (mapped(*it), HostValue::default())).collect(),
            ..Tables::default()
        };
        let (written, found) = (tables(&[mine]), tables(&[theirs]));
        let on = |ifindex| Attachment {
            program: Program::FromUplink,
            ifindex,
            interface: "ens33".into(),
            xdp: None,
        };
        let lost = BTreeSet::from([on(2)]);
        let drift = Drift { written: &written, found: &found, lost: &lost };
        let set = |host| drift.repair(&Op::SetHost(mapped(host), HostValue::default()));
        assert_eq!(set(mine), Some(Repair::MapEntry), "removed by hand");
        assert_eq!(set(new), None, "a host that was announced");
        let remove = |host| drift.repair(&Op::RemoveHost(mapped(host)));
        assert_eq!(remove(theirs), Some(Repair::MapEntry), "added by hand");
        assert_eq!(drift.repair(&Op::Attach(on(2))), Some(Repair::Program));
        assert_eq!(drift.repair(&Op::Attach(on(3))), None, "another interface");
        assert_eq!(drift.repair(&Op::SetConfig(written.config)), None);
    }
}
