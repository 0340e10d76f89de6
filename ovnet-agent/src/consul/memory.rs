//! What this host still knows of records that Consul does not have (invariant 7).
//!
//! A Consul that lost its data is filled again by the hosts, each with what is its own, and that
//! takes a moment. Whoever chose a VNI, a subnet or an address in that moment by what Consul has
//! alone would choose what is in use: two networks with one VNI would be one network.

use std::{net::Ipv4Addr, time::Duration};

use super::{
    Snapshot,
    networks::{endpoint_key, network_key},
    schema::{EndpointRecord, NetworkRecord},
    sentinel::Identity,
};

/// How long the hosts of a network are given to put back what a Consul lost, before an address is
/// chosen by somebody who does not know what there was.
pub(super) const PUT_BACK: Duration = Duration::from_secs(5);

impl Snapshot {
    /// Whether what Consul has of a network's endpoints, in networks of this `identity`, may lack some
    /// that nobody here knows of: its data was lost a moment ago, or before the watcher has noticed.
    pub(super) fn may_lack_endpoints(&self, network_id: &str, identity: Option<&Identity>) -> bool {
        let noticed = self.identity.is_none() || !differs(self.identity.as_deref(), identity);
        let recently = self.wiped.is_some_and(|at| at.elapsed() < PUT_BACK);
        match (noticed, recently) {
            (false, _) => !self.endpoints.contains_key(network_id),
            (true, true) => !self.remembered.contains(network_id),
            (true, false) => false,
        }
    }

    /// The networks known here that are not `there`, by name, where their absence is no deletion:
    /// `identity` is that of the folder in which they are missing.
    pub(super) fn doubtful_networks(
        &self,
        identity: Option<&Identity>,
        there: impl Fn(&str) -> bool,
    ) -> Vec<NetworkRecord> {
        let wiped = differs(self.identity.as_deref(), identity);
        let known = self.networks.iter().flatten();
        known
            .filter(|(name, _)| !there(name))
            .filter(|(name, _)| wiped || self.lost.contains(&network_key(name)))
            .map(|(_, network)| network.clone())
            .collect()
    }

    /// The same of a network's endpoints. Only a host that is in the network knows any.
    pub(super) fn doubtful_endpoints(
        &self,
        network_id: &str,
        identity: Option<&Identity>,
        there: impl Fn(Ipv4Addr) -> bool,
    ) -> Vec<EndpointRecord> {
        let read = self.endpoint_identities.get(network_id).map(String::as_str);
        let wiped = differs(read, identity);
        let known = self.endpoints.get(network_id).into_iter().flatten();
        known
            .filter(|(address, _)| !there(**address))
            .filter(|(address, _)| {
                wiped || self.lost.contains(&endpoint_key(network_id, **address))
            })
            .map(|(_, endpoint)| endpoint.clone())
            .collect()
    }
}

/// Whether a folder is not known to be the one that was read: another Consul's, or of this one
/// wiped. Of one that had no sentinel when it was read, nobody can say.
fn differs(read: Option<&str>, found: Option<&Identity>) -> bool {
    read.is_none_or(|read| found.is_none_or(|found| found.to_string() != read))
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;
    use crate::{consul::client::Entry, service::fake};

    fn identity(created: u64) -> Identity {
        Identity::of(&Entry {
            key: "networks/.keep".into(),
            value: b"word and more".into(),
            create_index: created,
            modify_index: 99,
            session: None,
        })
    }

    fn snapshot() -> Snapshot {
        let networks = ["a", "b"].map(|name| (name.to_owned(), fake::network(name, 4096)));
        Snapshot {
            networks: Some(networks.into()),
            identity: Some(identity(7).to_string()),
            ..Snapshot::default()
        }
    }

    fn names(networks: &[NetworkRecord]) -> Vec<&str> {
        networks.iter().map(|network| network.name.as_str()).collect()
    }

    #[test]
    fn what_is_missing_beside_the_sentinel_we_know_was_deleted() {
        let found = snapshot().doubtful_networks(Some(&identity(7)), |name| name == "a");
        assert_eq!(names(&found), [] as [&str; 0]);
    }

    #[test]
    fn what_a_wiped_consul_lacks_is_still_taken() {
        for wiped in [None, Some(identity(8))] {
            let found = snapshot().doubtful_networks(wiped.as_ref(), |name| name == "a");
            assert_eq!(names(&found), ["b"]);
        }
    }

    #[test]
    fn what_was_read_without_a_sentinel_is_still_taken_whatever_is_found() {
        let read = Snapshot { identity: None, ..snapshot() };
        for found in [None, Some(identity(7))] {
            assert_eq!(names(&read.doubtful_networks(found.as_ref(), |_| false)), ["a", "b"]);
        }
    }

    #[test]
    fn what_is_known_to_be_lost_is_still_taken() {
        let mut snapshot = snapshot();
        snapshot.lost.insert("networks/b".into());
        let found = snapshot.doubtful_networks(Some(&identity(7)), |_| false);
        assert_eq!(names(&found), ["b"]);
    }

    #[test]
    fn who_does_not_know_a_network_waits_for_those_who_do() {
        let mut known = snapshot();
        known.endpoints.insert("known".into(), [].into());
        let lacks = |known: &Snapshot, id: &str, created| {
            known.may_lack_endpoints(id, Some(identity(created)).as_ref())
        };
        // As it was, and wiped before the watcher has noticed.
        assert!(!lacks(&known, "other", 7) && !lacks(&known, "known", 7));
        assert!(lacks(&known, "other", 8) && !lacks(&known, "known", 8));
        assert!(known.may_lack_endpoints("other", None));
        // Noticed, and read since.
        known.identity = Some(identity(8).to_string());
        known.remembered.insert("known".into());
        known.endpoints.insert("other".into(), [].into());
        known.wiped = Instant::now().checked_sub(PUT_BACK / 2);
        assert!(lacks(&known, "other", 8) && !lacks(&known, "known", 8));
        known.wiped = Instant::now().checked_sub(PUT_BACK);
        assert!(!lacks(&known, "other", 8));
        assert!(!lacks(&Snapshot::default(), "other", 8), "nothing was read yet");
    }

    #[test]
    fn a_host_that_has_read_nothing_has_no_doubts() {
        let found = Snapshot::default().doubtful_networks(None, |_| false);
        assert_eq!(names(&found), [] as [&str; 0]);
    }
}
