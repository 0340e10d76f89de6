//! What Consul has lost: what was known of it, and what of it nobody puts back.

use std::{collections::BTreeSet, time::Instant};

use super::{super::memory::PUT_BACK, Records, Subject, Watch, Watched};

impl Watch {
    /// Notes that Consul has lost its data, and what was read before.
    pub(super) fn remember(&mut self) {
        let read = self.watched.iter().filter_map(|(subject, it)| match (subject, &it.records) {
            (Subject::Endpoints(id), Records::Endpoints(folder)) if folder.was_read() => Some(id),
            _ => None,
        });
        let read: BTreeSet<String> = read.cloned().collect();
        // Each folder finds out for itself. What was read meanwhile is not what was there before.
        match self.wiped {
            Some(at) if at.elapsed() < PUT_BACK => self.remembered.retain(|id| read.contains(id)),
            _ => self.remembered = read,
        }
        self.wiped = Some(Instant::now());
    }

    /// Forgets the endpoints that Consul has lost and whose hosts have had the time to put them back.
    pub(super) fn give_up_orphans(&mut self) {
        let due = self.orphans.update(self.to_be_put_back(), Instant::now());
        if due.is_empty() {
            return;
        }
        for (subject, watched) in &mut self.watched {
            if let Records::Endpoints(endpoints) = &mut watched.records {
                let folder = subject.folder();
                endpoints.give_up(|name| due.contains(&format!("{folder}{name}")));
            }
        }
        self.publish();
    }

    /// The keys of endpoints that Consul has lost, of hosts that are announced again in networks that
    /// are there again. None while anything cannot be read.
    fn to_be_put_back(&self) -> BTreeSet<String> {
        let (hosts, networks) =
            (self.watched.get(&Subject::Hosts), self.watched.get(&Subject::Networks));
        let (Some(Records::Hosts(hosts)), Some(Records::Networks(networks))) =
            (hosts.map(|it| &it.records), networks.map(|it| &it.records))
        else {
            return BTreeSet::new();
        };
        if self.watched.values().any(|it| it.problem.is_some() || it.bare > 0) {
            return BTreeSet::new();
        }
        let away: BTreeSet<&str> = hosts.kept().collect();
        let announced: BTreeSet<&str> = hosts
            .records()
            .filter(|(name, host)| host.locked && !away.contains(name))
            .map(|(name, _)| name)
            .collect();
        let lost: BTreeSet<&str> = networks.kept().collect();
        let there: BTreeSet<&str> = networks
            .records()
            .filter(|(name, _)| !lost.contains(name))
            .map(|(_, network)| network.id.as_str())
            .collect();
        let mut keys = BTreeSet::new();
        for (subject, Watched { records, .. }) in &self.watched {
            let (Subject::Endpoints(id), Records::Endpoints(endpoints)) = (subject, records) else {
                continue;
            };
            if !there.contains(id.as_str()) {
                continue;
            }
            let kept: BTreeSet<&str> = endpoints.kept().collect();
            let orphans = endpoints.records().filter(|(name, record)| {
                kept.contains(name) && announced.contains(record.host.as_str())
            });
            keys.extend(orphans.map(|(name, _)| format!("{}{name}", subject.folder())));
        }
        keys
    }
}
