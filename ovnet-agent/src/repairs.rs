//! What of this host somebody else broke and the agent put right, counted by kind. Pure.
//!
//! What changes because Consul, a request or the uplink says so is no repair; only what was as it
//! must be, and then was not.

use std::{collections::BTreeMap, fmt};

use serde::{Deserialize, Serialize};

/// A kind of repair. [`Repair::label`] is its name in `ovnet status` and in metrics.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Repair {
    /// An entry of a map that was removed, changed or added by hand.
    MapEntry,
    /// A program that was detached from its interface, or detached and attached anew by another.
    Program,
    /// The pin of a map or link that was removed.
    Pin,
    /// An endpoint's veth pair: deleted, or its address, MAC, MTU, offloads or state changed.
    Veth,
    /// A sandbox's port of `ovnet_gwbridge`: the same of that pair, its bridge, its default route.
    GatewayPort,
    /// The bridge `ovnet_gwbridge`: deleted, or its address, MAC, MTU or state changed.
    Gwbridge,
    /// The device `ovnet-vx`: deleted, set down, or otherwise than it must be.
    ExternalDevice,
    /// The kernel's rules: the table `ip ovnet`, or what opens the chain FORWARD of iptables.
    Rules,
    /// A setting below `/proc/sys/net`.
    Sysctl,
    /// A next hop that the kernel was told to keep resolved, and forgot.
    Neighbour,
    /// An endpoint whose sandbox vanished: it was withdrawn.
    Sandbox,
}

impl Repair {
    /// Every kind.
    pub const ALL: [Self; 11] = [
        Self::MapEntry,
        Self::Program,
        Self::Pin,
        Self::Veth,
        Self::GatewayPort,
        Self::Gwbridge,
        Self::ExternalDevice,
        Self::Rules,
        Self::Sysctl,
        Self::Neighbour,
        Self::Sandbox,
    ];

    /// Its name, as it is serialized.
    pub const fn label(self) -> &'static str {
        match self {
            Self::MapEntry => "map-entry",
            Self::Program => "program",
            Self::Pin => "pin",
            Self::Veth => "veth",
            Self::GatewayPort => "gateway-port",
            Self::Gwbridge => "gwbridge",
            Self::ExternalDevice => "external-device",
            Self::Rules => "rules",
            Self::Sysctl => "sysctl",
            Self::Neighbour => "neighbour",
            Self::Sandbox => "sandbox",
        }
    }
}

/// How many repairs of each kind there were. Serialized as a map of those that were.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Repairs(BTreeMap<Repair, u64>);

impl Repairs {
    /// Counts one.
    pub fn add(&mut self, kind: Repair) {
        self.add_many(kind, 1);
    }

    /// Counts so many.
    pub fn add_many(&mut self, kind: Repair, count: u64) {
        if count > 0 {
            *self.0.entry(kind).or_insert(0) += count;
        }
    }

    /// Counts one where something had to be changed.
    pub fn add_if(&mut self, kind: Repair, changed: bool) {
        self.add_many(kind, u64::from(changed));
    }

    /// Counts what another one counted.
    pub fn merge(&mut self, other: Self) {
        for (kind, count) in other.0 {
            self.add_many(kind, count);
        }
    }

    /// How many of a kind.
    pub fn of(&self, kind: Repair) -> u64 {
        self.0.get(&kind).copied().unwrap_or(0)
    }

    /// How many of all kinds.
    pub fn total(&self) -> u64 {
        self.0.values().sum()
    }
}

/// As `4 (map-entry 3, rules 1)`, or `none`.
impl fmt::Display for Repairs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0.is_empty() {
            return f.write_str("none");
        }
        let kinds: Vec<String> =
            self.0.iter().map(|(kind, count)| format!("{} {count}", kind.label())).collect();
        write!(f, "{} ({})", self.total(), kinds.join(", "))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kind_is_written_as_its_label() {
        for kind in Repair::ALL {
            let json = serde_json::to_value(kind).unwrap();
            assert_eq!(json, kind.label());
            assert_eq!(serde_json::from_value::<Repair>(json).unwrap(), kind);
        }
    }

    #[test]
    fn what_was_repaired_is_counted_by_kind() {
        let mut all = Repairs::default();
        assert_eq!((all.to_string().as_str(), all.total()), ("none", 0));
        all.add_if(Repair::Veth, false);
        assert_eq!(serde_json::to_string(&all).unwrap(), "{}");
        all.add(Repair::Rules);
        let mut more = Repairs::default();
        more.add_many(Repair::MapEntry, 2);
        more.add_if(Repair::Rules, true);
        all.merge(more);
        assert_eq!(all.to_string(), "4 (map-entry 2, rules 2)");
        assert_eq!((all.of(Repair::Rules), all.of(Repair::Veth)), (2, 0));
        assert_eq!(serde_json::to_string(&all).unwrap(), r#"{"map-entry":2,"rules":2}"#);
    }
}
