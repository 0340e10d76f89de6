//! Consul on its worst days, under running traffic: it fails in every way there is, it asks who is
//! there, its records lie. Forwarding never changes, and afterwards the cluster converges.
//!
//! `OVNET_FAULT_SECONDS` lengthens each outage, which in a run of all tests is a few seconds.

#![allow(
    clippy::panic,
    clippy::unwrap_used,
    reason = "a test panics with what it found; the lint knows #[test] functions, not helpers"
)]

mod leader;
mod lies;
mod outages;
mod secure;

use std::{
    collections::BTreeMap,
    net::Ipv4Addr,
    time::{Duration, Instant},
};

use ovnet_tests::cluster::{Cluster, Footprint, Ping, Stream, until, within};

/// Within what the cluster must have converged after Consul answers again.
const CONVERGED: Duration = Duration::from_secs(5);

/// How long a fault lasts.
fn outage() -> Duration {
    let seconds = std::env::var("OVNET_FAULT_SECONDS").ok().and_then(|it| it.parse().ok());
    Duration::from_secs(seconds.unwrap_or(4))
}

/// Three hosts with a container each on one network, and traffic between them all the time: a
/// ping and a TCP stream each way round.
struct Busy {
    cluster: Cluster,
    pings: Vec<Ping>,
    streams: Vec<Stream>,
    /// What each host had when all was well.
    footprints: BTreeMap<String, Footprint>,
    /// What Consul had.
    records: BTreeMap<String, String>,
    /// Sandboxes attached so far to prove that the cluster works.
    proofs: usize,
}

impl Busy {
    fn start(cluster: Cluster) -> Self {
        cluster.sh("docker02", "ovnet network create ov_net1");
        let nodes = cluster.lab.nodes();
        let addresses: Vec<Ipv4Addr> =
            nodes.iter().map(|node| cluster.sandbox(node, "t", "--network ov_net1")).collect();
        let places: Vec<String> = nodes.iter().map(|node| format!("{node}/t")).collect();
        for from in &places {
            addresses.iter().for_each(|to| cluster.wait_ping(from, *to));
        }
        for node in &nodes {
            // What a proof attaches in the middle of a fault must not begin by making a namespace.
            cluster.lab.add_sandbox(node, "proof").unwrap();
            cluster.wait_connected(node);
        }
        let (mut pings, mut streams) = (Vec::new(), Vec::new());
        for from in 0..places.len() {
            let to = (from + 1) % places.len();
            pings.push(Ping::start(&cluster.lab, &places[from], addresses[to]));
            streams.push(Stream::start(&cluster.lab, &places[from], &places[to], addresses[to]));
        }
        let (footprints, records) = cluster.footprints();
        Self { cluster, pings, streams, footprints, records, proofs: 0 }
    }

    /// Everything flows, nothing was lost so far, and each host has exactly what it had.
    fn goes_on(&self) {
        self.flows();
        for (node, before) in &self.footprints {
            assert_eq!(&self.cluster.footprint(node), before, "what {node} has changed");
        }
    }

    /// Everything flows, nothing was lost so far, and each host has all that it had, if more.
    fn goes_on_among_others(&self) {
        self.flows();
        for (node, before) in &self.footprints {
            let now = self.cluster.footprint(node).entries;
            assert!(now.is_superset(&before.entries), "{node} has {now:?}, had {before:?}");
        }
    }

    /// Everything flows, and nothing was lost so far.
    fn flows(&self) {
        self.pings.iter().for_each(|ping| ping.goes_on(50));
        self.streams.iter().for_each(Stream::goes_on);
        for ping in &self.pings {
            assert!(ping.lost().is_empty(), "lost: {:?}", ping.lost());
        }
    }

    /// Whether each host has exactly what it had.
    fn is_as_it_was(&self) -> bool {
        self.footprints.iter().all(|(node, before)| self.cluster.footprint(node) == *before)
    }

    /// [`Self::goes_on`] for as long as an outage lasts.
    fn goes_on_for_an_outage(&self) {
        let end = Instant::now() + outage();
        self.goes_on();
        while Instant::now() < end {
            self.goes_on();
        }
    }

    /// Waits until the cluster has converged, which must be within [`CONVERGED`] of `healed`: every
    /// record is back as it was, every agent says that all is well, and an endpoint attached now is
    /// an entry of the maps of all the others. Says how long it took.
    fn must_converge(&mut self, fault: &str, healed: Instant) {
        self.must_converge_on(&self.cluster.lab.nodes(), fault, healed);
    }

    /// [`Self::must_converge`] for some of the hosts: another's agent has no Consul.
    fn must_converge_on(&mut self, nodes: &[String], fault: &str, healed: Instant) {
        let left = || CONVERGED.saturating_sub(healed.elapsed());
        let (cluster, before) = (&self.cluster, &self.records);
        within(left(), &format!("all records to be back after {fault}"), || {
            (cluster.records() == *before).then_some(())
        });
        let records = healed.elapsed();
        let node = &nodes[self.proofs % nodes.len()];
        self.proofs += 1;
        let attach = ["ovnet", "attach", "--network", "ov_net1", "--netns", "proof"];
        let address: Ipv4Addr = within(left(), &format!("an attach after {fault}"), || {
            cluster.lab.exec(node, &attach).ok()?.trim().parse().ok()
        });
        for other in nodes {
            within(left(), &format!("{other} to know the new endpoint after {fault}"), || {
                cluster.endpoints_of(other).contains_key(&address).then_some(())
            });
        }
        for node in nodes {
            let what = format!("{node} to say that all is well after {fault}");
            within(left(), &what, || cluster.is_connected(node).then_some(()));
        }
        println!(
            "         converged after {fault}: records in {:.2} s, all in {:.2} s",
            records.as_secs_f64(),
            healed.elapsed().as_secs_f64()
        );
        cluster.sh(node, "ovnet detach --netns proof");
        until("the proof to be forgotten", || {
            let knows = |other: &String| cluster.endpoints_of(other).contains_key(&address);
            (!nodes.iter().any(knows)).then_some(())
        });
        self.goes_on();
    }

    /// Ends it: nothing was lost in the whole time.
    fn must_have_lost_none(self) {
        self.goes_on();
        let pings: usize = self.pings.iter().map(Ping::answered).sum();
        println!("         {pings} pings answered, none lost; {} streams", self.streams.len());
        for ping in self.pings {
            ping.must_have_lost_none("of the whole time");
        }
        self.streams.into_iter().for_each(Stream::must_be_whole);
    }
}
