//! The picture that `cargo xtask lab status` prints.

use anyhow::Result;
use serde_json::Value;

use super::{CLIENT, Lab};

impl Lab {
    /// Hosts, agents, networks and endpoints, as text.
    ///
    /// # Errors
    /// The lab itself cannot be read; agents that do not answer are part of the picture.
    pub fn picture(&self) -> Result<String> {
        let options = self.options();
        let wire = format!("{:?}", options.wire).to_lowercase();
        let consul = self.consul_kind().unwrap_or_else(|| "stopped".to_owned());
        let mut picture = format!(
            "wire {wire}, MTU {}; Consul at {}: {consul}; logs in {}\n\n",
            options.mtu,
            self.consul()?,
            self.folder().display()
        );

        let mut head =
            row(&["HOST", "ADDRESS", "PID", "AGENT", "CONSUL", "TC", "XDP", "SANDBOXES"]);
        if options.docker {
            head.extend(row(&["DOCKER", "CONTAINERS"]));
        }
        let mut hosts = vec![head];
        let mut answering = None;
        for name in self.nodes().into_iter().chain([CLIENT.to_owned()]) {
            let host = self.host(&name)?;
            let agent = self.agent(&name);
            // An agent that was started by hand is known by its socket only.
            let listens = host.root().join("run/ovnet/ovnet.sock").exists();
            let asked = agent.is_some() || listens;
            let status = asked.then(|| self.ovnet_json(&name, &["status"]));
            let field = |field: &str| match &status {
                Some(Ok(status)) => text(status, field),
                _ => "-".to_owned(),
            };
            let state = match (&agent, &status) {
                (Some(agent), Some(Ok(_))) => format!("{} up", agent.pid),
                (Some(agent), _) => format!("{} silent", agent.pid),
                (None, Some(Ok(_))) => "up, by hand".to_owned(),
                _ if self.state().agents.contains_key(&name) => "ended".to_owned(),
                _ => "-".to_owned(),
            };
            if matches!(status, Some(Ok(_))) {
                answering.get_or_insert(name.clone());
            }
            let mut cells = vec![
                name.clone(),
                self.address(&name)?.to_string(),
                host.holder.pid.to_string(),
                state,
                field("consul_state"),
                field("tc"),
                field("xdp"),
                self.sandboxes(&name)?.join(" "),
            ];
            if options.docker {
                let docker = self.docker_process(&name);
                cells.push(docker.map_or("-".to_owned(), |docker| format!("{} up", docker.pid)));
                cells.push(docker.map_or_else(String::new, |_| self.containers(&name)));
            }
            hosts.push(cells);
        }
        picture.push_str(&table(&hosts));

        if let Some(host) = answering {
            let networks = self.ovnet_json(&host, &["network", "ls"]);
            let columns = ["name", "vni", "subnet", "gateway", "created_by"];
            picture.push_str(&section("NETWORK", &columns, networks));
            let endpoints = self.ovnet_json(&host, &["endpoint", "ls"]);
            let columns = ["names", "network", "address", "mac", "host", "state"];
            picture.push_str(&section("ENDPOINT", &columns, endpoints));
        }
        Ok(picture)
    }

    /// The names of a host's running containers.
    fn containers(&self, node: &str) -> String {
        let names = self.docker(node, &["ps", "--format", "{{.Names}}"]);
        names.map_or_else(|_| "Docker is silent".to_owned(), |names| names.replace('\n', " "))
    }
}

/// A table of the fields of JSON objects, the first one under its own title.
fn section(title: &str, columns: &[&str], rows: Result<Value>) -> String {
    let rows = match rows {
        Ok(rows) => rows,
        Err(error) => return format!("\n{title}: {error:#}\n"),
    };
    let head = columns.iter().skip(1).map(|column| column.to_uppercase());
    let mut lines = vec![[title.to_owned()].into_iter().chain(head).collect::<Vec<_>>()];
    for object in rows.as_array().into_iter().flatten() {
        lines.push(columns.iter().map(|column| text(object, column)).collect());
    }
    format!("\n{}", table(&lines))
}

/// A field as people read it.
fn text(object: &Value, field: &str) -> String {
    match object.get(field) {
        None | Some(Value::Null) => "-".to_owned(),
        Some(Value::String(text)) => text.clone(),
        Some(Value::Array(items)) => {
            let items: Vec<&str> = items.iter().filter_map(Value::as_str).collect();
            items.join(",")
        }
        Some(other) => other.to_string(),
    }
}

fn row(cells: &[&str]) -> Vec<String> {
    cells.iter().map(|cell| (*cell).to_owned()).collect()
}

/// Lines up columns, as Docker's tables are.
pub(crate) fn table(rows: &[Vec<String>]) -> String {
    let columns = rows.iter().map(Vec::len).max().unwrap_or_default();
    let width = |column: usize| {
        rows.iter().filter_map(|row| row.get(column)).map(|c| c.chars().count()).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..columns).map(width).collect();
    let mut text = String::new();
    for row in rows {
        let line: String =
            row.iter().zip(&widths).map(|(cell, width)| format!("{cell:width$}   ")).collect();
        text.push_str(line.trim_end());
        text.push('\n');
    }
    text
}
