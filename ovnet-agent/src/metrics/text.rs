//! The numbers as text of Prometheus, version 0.0.4. Pure. A name, once given, stays: people build
//! alarms on it.

use std::{fmt, time::Duration};

use anyhow::{Context as _, Result};
use ovnet_common::verdict::DropReason;
use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeMetric, prometheus_text},
    metrics::{counter::ConstCounter, gauge::ConstGauge},
    registry::Registry,
};

use super::Numbers;
use crate::{peers::State, repairs::Repair};

/// How long Consul may be silent while it is well: this host's lease is renewed every 5 s, and a
/// request has 10 s.
const SILENCE: Duration = Duration::from_secs(15);

/// Labels with their values.
type Labels = Vec<(&'static str, String)>;

impl Numbers {
    /// The whole page.
    pub(super) fn text(self) -> Result<String> {
        let mut registry = Registry::default();
        registry.register_collector(Box::new(self));
        let mut text = String::new();
        prometheus_text::encode(&mut text, &registry).context("write the metrics")?;
        Ok(text)
    }
}

impl Collector for Numbers {
    fn encode(&self, encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let mut page = Page(encoder);
        self.agent(&mut page)?;
        self.datapath(&mut page)?;
        self.peers(&mut page)?;
        self.consul(&mut page)?;
        self.process(&mut page)
    }
}

impl Numbers {
    fn agent(&self, page: &mut Page<'_>) -> fmt::Result {
        let Self { status, activity, .. } = self;
        let labels = vec![("node", status.node.clone()), ("version", status.agent.clone())];
        page.gauges("ovnet_agent_info", "Always 1.", [(labels, 1)])?;
        let count = |number: usize| u64::try_from(number).unwrap_or(u64::MAX);
        for (name, help, value) in [
            ("ovnet_hosts", "Hosts known, this one included.", status.hosts),
            ("ovnet_networks", "Networks known.", status.networks),
            ("ovnet_local_endpoints", "Endpoints on this host.", status.local_endpoints),
            ("ovnet_published_ports", "Ports published on this host.", status.published_ports),
            (
                "ovnet_unreadable_records",
                "Records in Consul that cannot be read.",
                status.unreadable_records,
            ),
            (
                "ovnet_state_files_set_aside",
                "State files that could not be read when the agent started.",
                status.state_files_set_aside,
            ),
            ("ovnet_errors", "Errors of the last pass; see `ovnet status`.", status.errors.len()),
        ] {
            page.gauge(name, help, count(value))?;
        }
        page.counters(
            "ovnet_reconcile_passes",
            "Passes over what is and what should be, by how they ended.",
            [("done", activity.passes), ("failed", activity.failed_passes)]
                .map(|(result, passes)| (vec![("result", result.to_owned())], passes)),
        )?;
        page.counter(
            "ovnet_reconcile_failed_steps",
            "Changes to the kernel that failed and were left to the next pass.",
            activity.failed_steps,
        )?;
        page.counters(
            "ovnet_repairs",
            "What somebody else broke and the agent put right, by kind.",
            Repair::ALL
                .map(|kind| (vec![("kind", kind.label().to_owned())], status.repairs.of(kind))),
        )
    }

    fn datapath(&self, page: &mut Page<'_>) -> fmt::Result {
        let of = |value: fn(&crate::api::types::CounterView) -> u64| {
            let labels = |it: &crate::api::types::CounterView| {
                vec![("program", it.program.clone()), ("verdict", it.verdict.clone())]
            };
            self.counters.iter().map(move |it| (labels(it), value(it)))
        };
        page.counters(
            "ovnet_program_packets",
            "Packets by program and verdict; a GSO packet is one.",
            of(|it| it.packets),
        )?;
        page.counters(
            "ovnet_program_bytes",
            "Bytes of frame by program and verdict.",
            of(|it| it.bytes),
        )?;
        page.counters(
            "ovnet_dropped_packets",
            "Packets dropped, by reason.",
            DropReason::ALL.iter().map(|reason| {
                let of_all = self.counters.iter().filter(|it| it.verdict == reason.label());
                let labels = vec![("reason", reason.label().to_owned())];
                (labels, of_all.map(|it| it.packets).sum())
            }),
        )?;
        let flows = ("CONNTRACK", self.status.flow_entries, self.status.flow_capacity);
        let maps = || self.activity.tables.into_iter().chain([flows]);
        let labels = |map: &str| vec![("map", map.to_owned())];
        page.gauges(
            "ovnet_map_entries",
            "Entries of a map; of flows there are two per connection.",
            maps().map(|(map, entries, _)| (labels(map), entries)),
        )?;
        page.gauges(
            "ovnet_map_capacity",
            "How many entries a map can have.",
            maps().map(|(map, _, capacity)| (labels(map), capacity)),
        )
    }

    fn peers(&self, page: &mut Page<'_>) -> fmt::Result {
        page.gauges(
            "ovnet_peers",
            "Hosts asked whether VXLAN gets through to them, by what is known.",
            State::ALL.map(|state| {
                let count = self.peers.values().filter(|it| it.state == state).count();
                (vec![("path", state.name().to_owned())], u64::try_from(count).unwrap_or(0))
            }),
        )?;
        let labels =
            |node: &str, vtep| vec![("peer", node.to_owned()), ("vtep", format!("{vtep}"))];
        let known = self.peers.iter().filter(|(_, it)| it.state != State::Unknown);
        let of = |value: fn(State) -> bool| {
            known.clone().map(move |(node, it)| (labels(node, it.vtep), value(it.state).into()))
        };
        page.gauges(
            "ovnet_peer_reachable",
            "Whether VXLAN gets through to a host and back.",
            of(|state| state != State::Unreachable),
        )?;
        page.gauges(
            "ovnet_peer_full_size_reachable",
            "Whether packets of the uplinks' MTU do, too.",
            of(|state| state == State::Reachable),
        )?;
        page.floats(
            "ovnet_peer_round_trip_seconds",
            "How long the last answer of a host took.",
            known.clone().filter_map(|(node, it)| {
                Some((labels(node, it.vtep), it.round_trip?.as_secs_f64()))
            }),
        )?;
        page.counter("ovnet_probes_sent", "Questions sent to peers.", self.probes.sent)?;
        page.counter("ovnet_probes_answered", "Those answered in time.", self.probes.answered)
    }

    fn consul(&self, page: &mut Page<'_>) -> fmt::Result {
        // A query that waits for news says nothing for more than a minute.
        let answers = self.consul.answered_ago.is_some_and(|ago| ago < SILENCE);
        page.gauge(
            "ovnet_consul_connected",
            "Whether Consul is read without errors and answered in the last 15 s.",
            u64::from(answers && self.status.consul_state == "connected"),
        )?;
        page.counter(
            "ovnet_consul_requests",
            "Requests to Consul that ended.",
            self.consul.requests,
        )?;
        page.counter(
            "ovnet_consul_request_failures",
            "Those without an answer, refused, or answered with an error of Consul's.",
            self.consul.failures,
        )?;
        let ago = self.consul.answered_ago.map(|it| (Vec::new(), it.as_secs_f64()));
        page.floats(
            "ovnet_consul_last_answer_age_seconds",
            "Since the last good answer of Consul.",
            ago,
        )
    }

    fn process(&self, page: &mut Page<'_>) -> fmt::Result {
        let process = &self.process;
        let whole = |value| [(Labels::new(), value)];
        page.float_counter(
            "process_cpu_seconds",
            "Processor time used, in seconds.",
            process.cpu_seconds,
        )?;
        page.gauge("process_resident_memory_bytes", "Memory in RAM.", process.resident_bytes)?;
        page.gauge("process_virtual_memory_bytes", "Address space.", process.virtual_bytes)?;
        page.gauge("process_open_fds", "Open file descriptors.", process.open_fds)?;
        if let Some(most) = process.max_fds {
            page.gauge("process_max_fds", "How many it may have open.", most)?;
        }
        page.gauge("process_threads", "Threads.", process.threads)?;
        page.floats(
            "process_start_time_seconds",
            "When it started, in seconds since 1970.",
            whole(process.start_seconds),
        )
    }
}

/// The page under construction. The name of a counter is given without `_total`.
struct Page<'a>(DescriptorEncoder<'a>);

impl Page<'_> {
    fn gauge(&mut self, name: &str, help: &str, value: u64) -> fmt::Result {
        self.gauges(name, help, [(Labels::new(), value)])
    }

    fn gauges(
        &mut self,
        name: &str,
        help: &str,
        values: impl IntoIterator<Item = (Labels, u64)>,
    ) -> fmt::Result {
        let values = values.into_iter().map(|(labels, value)| (labels, ConstGauge::new(value)));
        self.family(name, help, values)
    }

    fn floats(
        &mut self,
        name: &str,
        help: &str,
        values: impl IntoIterator<Item = (Labels, f64)>,
    ) -> fmt::Result {
        let values = values.into_iter().map(|(labels, value)| (labels, ConstGauge::new(value)));
        self.family(name, help, values)
    }

    fn counter(&mut self, name: &str, help: &str, value: u64) -> fmt::Result {
        self.counters(name, help, [(Labels::new(), value)])
    }

    fn counters(
        &mut self,
        name: &str,
        help: &str,
        values: impl IntoIterator<Item = (Labels, u64)>,
    ) -> fmt::Result {
        let values = values.into_iter().map(|(labels, value)| (labels, ConstCounter::new(value)));
        self.family(name, help, values)
    }

    fn float_counter(&mut self, name: &str, help: &str, value: f64) -> fmt::Result {
        self.family(name, help, [(Labels::new(), ConstCounter::new(value))])
    }

    fn family<M: EncodeMetric>(
        &mut self,
        name: &str,
        help: &str,
        values: impl IntoIterator<Item = (Labels, M)>,
    ) -> fmt::Result {
        let mut values = values.into_iter().peekable();
        // A name without a value says nothing.
        let Some((_, first)) = values.peek() else { return Ok(()) };
        let mut metric = self.0.encode_descriptor(name, help, None, first.metric_type())?;
        for (labels, value) in values {
            match labels.is_empty() {
                true => value.encode(metric.encode_family(&Labels::new())?)?,
                false => value.encode(metric.encode_family(&labels)?)?,
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
