//! What the agent knows of Consul's records at one moment.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::Ipv4Addr,
    time::Instant,
};

use anyhow::{Result, ensure};

use super::{
    folder::Follow,
    networks::{endpoint_key, network_key},
    schema::{EndpointRecord, EndpointState, HostRecord, NetworkRecord},
};

/// What Consul holds, as last read.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Snapshot {
    /// Hosts by name; `None` until they were read once.
    pub hosts: Option<BTreeMap<String, HostEntry>>,
    /// Networks by name; `None` until they were read once.
    pub networks: Option<BTreeMap<String, NetworkRecord>>,
    /// Endpoints by network id and address; no entry for a network whose endpoints were not read
    /// yet, or are not watched any more.
    pub endpoints: BTreeMap<String, BTreeMap<Ipv4Addr, EndpointRecord>>,
    /// What [`Self::identity`] is to the networks, to the endpoints of each network, by its id.
    pub endpoint_identities: BTreeMap<String, String>,
    /// Keys, without the prefix, of records above that Consul has lost and that only we still
    /// know. Their owners put them back; see [`Self::has_lost_network`].
    pub lost: BTreeSet<String>,
    /// Records there are now that cannot be read. Each was logged once.
    pub unreadable: usize,
    /// Names of networks among them: they are there all the same.
    pub unreadable_networks: BTreeSet<String>,
    /// Tells this Consul's networks from those of another, or of this one before it was wiped;
    /// `None` until they were read. Text to be compared, across restarts of the agent, too.
    pub identity: Option<String>,
    /// Keys, without the prefix, of records above that somebody else than their owner has written
    /// to. What they said before stands; their owners write it again.
    pub overwritten: BTreeSet<String>,
    /// When Consul was last found to have lost its data, or to have gone back in time.
    pub wiped: Option<Instant>,
    /// Ids of the networks whose endpoints were read before that.
    pub remembered: BTreeSet<String>,
    /// `connected`, or one line that says what is wrong.
    pub consul_state: String,
}

impl Snapshot {
    /// Whether this host is known here although Consul has lost its record.
    pub fn has_lost_host(&self, node: &str) -> bool {
        self.lost.contains(&format!("hosts/{node}"))
    }

    /// Whether this network is known here although Consul has lost its record.
    pub fn has_lost_network(&self, name: &str) -> bool {
        self.lost.contains(&network_key(name))
    }

    /// Whether this endpoint is known here although Consul has lost its record.
    pub fn has_lost_endpoint(&self, network_id: &str, address: Ipv4Addr) -> bool {
        self.lost.contains(&endpoint_key(network_id, address))
    }

    /// Whether somebody else has written to this network's record.
    pub fn has_overwritten_network(&self, name: &str) -> bool {
        self.overwritten.contains(&network_key(name))
    }

    /// Whether somebody else has written to this endpoint's record.
    pub fn has_overwritten_endpoint(&self, network_id: &str, address: Ipv4Addr) -> bool {
        self.overwritten.contains(&endpoint_key(network_id, address))
    }
}

/// A host and whether its lease stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostEntry {
    /// Its record.
    pub record: HostRecord,
    /// Whether a session holds the record; `false` is a lost lease.
    pub locked: bool,
}

/// A host's address may change at any time.
impl Follow for HostEntry {}

impl Follow for NetworkRecord {
    fn follows(&self, before: &Self) -> Result<()> {
        let what = |it: &Self| (it.id.clone(), it.vni, it.subnet, it.gateway);
        ensure!(
            what(self) == what(before),
            "it says id {}, VNI {}, subnet {} and gateway {} now, which never change: it was \
             overwritten, and what it said before stands",
            self.id,
            self.vni,
            self.subnet,
            self.gateway
        );
        Ok(())
    }
}

impl Follow for EndpointRecord {
    fn follows(&self, before: &Self) -> Result<()> {
        // What is only claimed may yet be given another MAC, and be announced.
        let settled = before.state == EndpointState::Up;
        ensure!(
            self.host == before.host
                && (!settled || (&self.mac, self.state) == (&before.mac, before.state)),
            "it says host {} and MAC {} now, host {} and MAC {} before, which never change: it was \
             overwritten, and what it said before stands",
            self.host,
            self.mac,
            before.host,
            before.mac
        );
        Ok(())
    }
}
