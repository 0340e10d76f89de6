//! What the demo types, and what it looks at.

use std::net::Ipv4Addr;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::Value;

use crate::lab::measure::Way;
use crate::lab::{Lab, table, wait_until};

/// Sandboxes of the first network: host and name.
pub(super) const TESTS: [(&str, &str); 3] =
    [("docker01", "t1"), ("docker02", "t2"), ("docker03", "t3")];
/// Sandboxes of the second network.
const OTHERS: [(&str, &str); 2] = [("docker01", "u1"), ("docker02", "u2")];
/// How long something may take to be seen on another host. It should take less than a second.
pub(super) const SEEN: Duration = Duration::from_secs(10);

/// Types commands in a lab as on the hosts' terminals.
pub(super) struct Session<'a> {
    lab: &'a Lab,
}

impl<'a> Session<'a> {
    pub(super) fn new(lab: &'a Lab) -> Self {
        Self { lab }
    }

    /// A network made on docker02 is there on docker03, and a sandbox on each host joins it.
    pub(super) fn network(&self) -> Result<()> {
        self.wait_for_hosts()?;
        self.types("docker01", "ovnet host ls")?;
        self.types("docker02", "ovnet network create ov_net1")?;
        let made = Instant::now();
        self.wait_for_network("docker03", "ov_net1")?;
        self.types("docker03", "ovnet network ls")?;
        println!("(on docker03 after {} ms)", made.elapsed().as_millis());
        for (host, name) in TESTS {
            self.run(host, name, &["--network", "ov_net1"])?;
        }
        self.types("docker01/t1", "ip -4 -brief address")?;
        self.types("docker03", "ovnet endpoint ls")
    }

    /// Everyone pings everyone, in a table.
    pub(super) fn everyone_pings(&self) -> Result<()> {
        println!("\nEveryone pings everyone; the mean of three round trips:\n");
        let addresses = self.addresses(&TESTS)?;
        let title = TESTS.iter().zip(&addresses).map(|((_, name), a)| format!("{name} {a}"));
        let mut rows = vec![[String::new()].into_iter().chain(title).collect::<Vec<_>>()];
        let mut lost = Vec::new();
        for (host, name) in TESTS {
            let mut row = vec![format!("{name} on {host}")];
            for (address, (_, target)) in addresses.iter().zip(TESTS) {
                row.push(match self.ping(&format!("{host}/{name}"), *address, "3") {
                    Ok(milliseconds) => format!("{milliseconds} ms"),
                    Err(error) => {
                        lost.push(format!("{name} to {target}: {error:#}"));
                        "lost".to_owned()
                    }
                });
            }
            rows.push(row);
        }
        print!("{}", table(&rows));
        ensure!(lost.is_empty(), "not everyone reaches everyone: {}", lost.join("; "));
        Ok(())
    }

    /// A second network works, and does not reach the first even where it has a route to it.
    pub(super) fn isolation(&self) -> Result<()> {
        println!("\nA second network does not reach the first:\n");
        self.types("docker01", "ovnet network create ov_net2")?;
        for (host, name) in OTHERS {
            self.wait_for_network(host, "ov_net2")?;
            self.run(host, name, &["--network", "ov_net2"])?;
        }
        let place = "docker01/u1";
        let others = self.addresses(&OTHERS)?;
        let neighbour = others.last().context("no second sandbox")?;
        let time = self.ping(place, *neighbour, "1").context("u1 does not reach u2")?;
        println!("{place} $ ping {neighbour}        # u2, the same network\n{time} ms");
        for (address, (_, name)) in self.addresses(&TESTS)?.into_iter().zip(TESTS) {
            // Without a route the sandbox's own kernel would refuse, which proves nothing.
            self.lab
                .exec(place, &["ip", "route", "replace", &address.to_string(), "dev", "eth0"])?;
            println!("{place} $ ping {address}        # {name}, with a route to it");
            if self.ping(place, address, "1").is_ok() {
                bail!("u1 of ov_net2 reaches {name} of ov_net1: the networks are not separate");
            }
            println!("no answer, as it should be");
        }
        Ok(())
    }

    /// The way from t1 to t2.
    pub(super) fn way(&self) -> Result<Way> {
        let [(from, t1), (to, t2), _] = TESTS;
        let addresses = self.addresses(&TESTS)?;
        Ok(Way {
            label: "ovnet".to_owned(),
            from: format!("{from}/{t1}"),
            to: format!("{to}/{t2}"),
            address: *addresses.get(1).context("t2 has no address")?,
        })
    }

    /// Runs a command line and prints it and what it says, as a terminal does.
    pub(super) fn types(&self, place: &str, line: &str) -> Result<()> {
        println!("{place} $ {line}");
        let said = self.lab.exec(place, &["sh", "-c", line])?;
        if !said.is_empty() {
            println!("{said}");
        }
        Ok(())
    }

    /// Runs a command line that is to be refused, and prints it and why it is.
    pub(super) fn types_in_vain(&self, place: &str, line: &str) -> Result<()> {
        println!("{place} $ {line}");
        let output = self.lab.output(place, &["sh", "-c", line], SEEN)?;
        ensure!(!output.status.success(), "`{line}` on {place} is not refused");
        print!("{}", String::from_utf8_lossy(&output.stderr));
        Ok(())
    }

    /// Makes a sandbox and attaches it.
    pub(super) fn run(&self, host: &str, name: &str, attach: &[&str]) -> Result<()> {
        println!("$ cargo xtask lab run {host} {name} {}", attach.join(" "));
        println!("{}", self.lab.run_sandbox(host, name, attach)?);
        Ok(())
    }

    pub(super) fn wait_for_hosts(&self) -> Result<()> {
        let nodes = self.lab.nodes();
        wait_until(
            SEEN,
            || format!("{} to see each other", nodes.join(", ")),
            || {
                for node in &nodes {
                    let hosts = self.lab.ovnet_json(node, &["host", "ls"])?;
                    if nodes.iter().any(|other| !lists(&hosts, "node", other)) {
                        return Ok(None);
                    }
                }
                Ok(Some(()))
            },
        )
    }

    fn wait_for_network(&self, host: &str, network: &str) -> Result<()> {
        wait_until(
            SEEN,
            || format!("{host} to see {network}"),
            || {
                let networks = self.lab.ovnet_json(host, &["network", "ls"])?;
                Ok(lists(&networks, "name", network).then_some(()))
            },
        )
    }

    fn addresses(&self, sandboxes: &[(&str, &str)]) -> Result<Vec<Ipv4Addr>> {
        let address =
            |(host, name): &(&str, &str)| self.lab.sandbox_address(&format!("{host}/{name}"));
        sandboxes.iter().map(address).collect()
    }

    /// Gives the mean round trip in milliseconds.
    fn ping(&self, place: &str, address: Ipv4Addr, count: &str) -> Result<String> {
        let address = address.to_string();
        let argv = ["ping", "-n", "-q", "-c", count, "-i", "0.05", "-W", "1", &address];
        let said = self.lab.exec(place, &argv)?;
        let mean = said.lines().last().and_then(|line| line.split('/').nth(4));
        mean.map(str::to_owned).with_context(|| format!("ping said: {said}"))
    }
}

/// Whether a list of JSON objects has one with this value in this field.
fn lists(list: &Value, field: &str, value: &str) -> bool {
    let is = |object: &Value| object.get(field).and_then(Value::as_str) == Some(value);
    list.as_array().is_some_and(|list| list.iter().any(is))
}
