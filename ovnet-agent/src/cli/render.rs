//! What people read, made from what the API answers. Pure.

use std::time::Duration;

use ovnet_common::{abi::Program, verdict};

use super::table::{Table, human_bytes, short};
use crate::{
    api::types::{CounterView, EndpointView, HostView, MonitorLine, MonitorView, PathView, Status},
    consul::schema::{EndpointState, NetworkRecord},
    publish::PublishedPort,
};

/// `ovnet network ls`.
pub(super) fn networks(networks: &[NetworkRecord], whole_ids: bool) -> String {
    let mut table = Table::new(["NETWORK ID", "NAME", "VNI", "SUBNET", "GATEWAY", "CREATED BY"]);
    for it in networks {
        table.row([
            id(&it.id, whole_ids),
            it.name.clone(),
            it.vni.to_string(),
            it.subnet.to_string(),
            it.gateway.to_string(),
            it.created_by.clone(),
        ]);
    }
    table.render()
}

/// `ovnet endpoint ls`.
pub(super) fn endpoints(endpoints: &[EndpointView], whole_ids: bool) -> String {
    let mut table = Table::new([
        "ENDPOINT ID",
        "NETWORK",
        "ADDRESS",
        "HOST",
        "NAMES",
        "STATE",
        "SANDBOX",
        "INTERFACE",
        "PORTS",
        "TX",
        "RX",
    ]);
    for EndpointView { record, network, local } in endpoints {
        let local = local.as_ref();
        table.row([
            id(&record.id, whole_ids),
            network.clone(),
            record.address.to_string(),
            record.host.clone(),
            record.names.join(","),
            match record.state {
                EndpointState::Reserved => "reserved",
                EndpointState::Up => "up",
            }
            .to_owned(),
            local.map_or("-".to_owned(), |it| it.netns.clone()),
            local.map_or("-".to_owned(), |it| it.ifname.clone()),
            local.map_or("-".to_owned(), |it| short_ports(&it.ports)),
            local.map_or("-".to_owned(), |it| human_bytes(it.tx_bytes)),
            local.map_or("-".to_owned(), |it| human_bytes(it.rx_bytes)),
        ]);
    }
    table.render()
}

/// `ovnet port NAME`, as `docker port` prints it: `80/tcp -> 0.0.0.0:90`.
pub(super) fn ports(ports: &[PublishedPort]) -> String {
    let line = |it: &PublishedPort| {
        let PublishedPort { protocol, host_address, host_port, container_port } = it;
        format!("{container_port}/{protocol} -> {host_address}:{host_port}\n")
    };
    ports.iter().map(line).collect()
}

/// `ovnet port NAME PORT`: where it is published.
pub(super) fn host_ports(ports: &[PublishedPort]) -> String {
    ports.iter().map(|it| format!("{}:{}\n", it.host_address, it.host_port)).collect()
}

/// The ports of a listing, as `docker ps` prints them: `0.0.0.0:90->80/tcp`, and those that follow
/// each other on both sides as one range.
fn short_ports(ports: &[PublishedPort]) -> String {
    let follows = |a: &PublishedPort, b: &PublishedPort| {
        (a.protocol, a.host_address) == (b.protocol, b.host_address)
            && a.host_port.checked_add(1) == Some(b.host_port)
            && a.container_port.checked_add(1) == Some(b.container_port)
    };
    let range = |first: u16, last: u16| {
        if first == last { first.to_string() } else { format!("{first}-{last}") }
    };
    let mut sorted = ports.to_vec();
    sorted.sort();
    let shown: Vec<_> = sorted
        .chunk_by(follows)
        .filter_map(|run| Some((run.first()?, run.last()?)))
        .map(|(first, last)| {
            format!(
                "{}:{}->{}/{}",
                first.host_address,
                range(first.host_port, last.host_port),
                range(first.container_port, last.container_port),
                first.protocol
            )
        })
        .collect();
    shown.join(", ")
}

/// `ovnet host ls`. A star marks the host that answers, as Docker marks its own node.
pub(super) fn hosts(hosts: &[HostView]) -> String {
    let mut table = Table::new(["HOST", "VTEP", "PORT", "MTU", "STATE", "PATH", "AGENT"]);
    for it in hosts {
        table.row([
            if it.this { format!("{} *", it.node) } else { it.node.clone() },
            it.vtep.to_string(),
            it.port.to_string(),
            it.mtu.to_string(),
            it.state.clone(),
            it.path.as_ref().map_or("-".to_owned(), path),
            if it.agent.is_empty() { "-".to_owned() } else { it.agent.clone() },
        ]);
    }
    table.render()
}

/// The way to a host: `reachable in 0.12ms`, `unreachable for 37s`.
fn path(path: &PathView) -> String {
    let PathView { path, seconds, round_trip_us } = path;
    match (path.as_str(), round_trip_us) {
        ("unknown", _) => "-".to_owned(),
        ("reachable", Some(us)) => format!("reachable in {}.{:02}ms", us / 1000, us % 1000 / 10),
        _ => format!("{path} for {seconds}s"),
    }
}

/// `ovnet counters`: by program and then by number, as the verdicts are numbered.
pub(super) fn counters(counters: &[CounterView], all: bool) -> String {
    let mut shown: Vec<_> = counters.iter().filter(|it| all || it.packets != 0).collect();
    shown.sort_by_key(|it| (program_number(&it.program), code(&it.verdict)));
    let mut table = Table::new(["PROGRAM", "VERDICT", "PACKETS", "BYTES"]);
    for it in shown {
        table.row([
            it.program.clone(),
            it.verdict.clone(),
            it.packets.to_string(),
            human_bytes(it.bytes),
        ]);
    }
    table.render()
}

/// `ovnet status`, as `docker info` looks.
pub(super) fn status(status: &Status) -> String {
    let Status {
        node,
        agent,
        uplink,
        vtep,
        uplink_mtu,
        consul,
        consul_state,
        xdp,
        tc,
        hosts,
        networks,
        local_endpoints,
        published_ports,
        flow_entries,
        flow_capacity,
        repairs,
        unreadable_records,
        state_files_set_aside,
        peers,
        warnings,
        errors,
    } = status;
    let reached = peers.iter().filter(|it| it.path.path == "reachable").count();
    let asked = peers.len();
    let vtep = vtep.map_or("none".to_owned(), |vtep| vtep.to_string());
    let mut text = format!(
        "Host: {node}\n\
         Agent: {agent}\n\
         Uplink: {uplink} (VTEP {vtep}, MTU {uplink_mtu})\n\
         Consul: {consul} ({consul_state})\n\
         TC: {tc}\n\
         XDP: {xdp}\n\
         Hosts: {hosts}\n\
         Networks: {networks}\n\
         Local endpoints: {local_endpoints}\n\
         Published ports: {published_ports} (flow entries {flow_entries} of {flow_capacity})\n\
         Repairs: {repairs}\n\
         Unreadable records: {unreadable_records}\n\
         State files set aside: {state_files_set_aside}\n\
         Peers: {reached} of {asked} reachable\n"
    );
    for (title, lines) in [("Warnings", warnings), ("Errors", errors)] {
        if lines.is_empty() {
            text.push_str(&format!("{title}: none\n"));
        } else {
            text.push_str(&format!("{title}:\n"));
        }
        for line in lines {
            text.push_str(&format!(" {line}\n"));
        }
    }
    text
}

/// A line of `ovnet monitor`, without its newline.
pub(super) fn monitor(line: &MonitorLine) -> String {
    match line {
        MonitorLine::Missed { missed } => format!("{missed} drops missed: they came too fast"),
        MonitorLine::Drop(MonitorView {
            timestamp_ns,
            program,
            reason,
            ifindex,
            interface,
            length,
            summary,
            data: _,
        }) => {
            let since_boot = Duration::from_nanos(*timestamp_ns);
            let interface =
                if interface.is_empty() { format!("ifindex {ifindex}") } else { interface.clone() };
            format!(
                "{}.{:06} {program} {interface} {reason} {length} bytes: {summary}",
                since_boot.as_secs(),
                since_boot.subsec_micros()
            )
        }
    }
}

fn id(id: &str, whole: bool) -> String {
    if whole { id } else { short(id) }.to_owned()
}

/// Programs in the order packets meet them; a newer agent's come last.
fn program_number(name: &str) -> usize {
    Program::ALL.iter().position(|it| it.name() == name).unwrap_or(usize::MAX)
}

fn code(label: &str) -> u16 {
    (0..=u8::MAX).find(|code| verdict::label(*code) == Some(label)).map_or(u16::MAX, u16::from)
}

#[cfg(test)]
mod tests;
