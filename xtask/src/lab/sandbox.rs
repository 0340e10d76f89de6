//! Sandboxes: named network namespaces in a host, as containers have.

use std::fs;
use std::net::Ipv4Addr;

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::Value;

use super::Lab;

impl Lab {
    /// Makes a sandbox and attaches it to a network, as `docker run` does; gives what
    /// `ovnet attach` printed. `attach` is passed on: `--network ov_net1 --ip 10.0.0.9`.
    ///
    /// # Errors
    /// The name is taken or the attach fails; the sandbox is then removed again.
    pub fn run_sandbox(&self, host: &str, name: &str, attach: &[&str]) -> Result<String> {
        self.add_sandbox(host, name)?;
        let mut argv = vec!["ovnet", "attach", "--netns", name];
        if !attach.iter().any(|argument| *argument == "--name" || argument.starts_with("--name=")) {
            argv.extend(["--name", name]);
        }
        argv.extend(attach);
        self.exec(host, &argv).inspect_err(|_| {
            // The first error is the one that tells.
            let _ = self.remove_sandbox(host, name);
        })
    }

    /// Detaches a sandbox from all its networks and removes it with everything that runs in it.
    ///
    /// # Errors
    /// There is none of this name, or the agent cannot detach it; it is removed all the same, as
    /// a container is whose network driver fails.
    pub fn stop_sandbox(&self, host: &str, name: &str) -> Result<()> {
        self.place(&format!("{host}/{name}"))?;
        let detached = self.exec(host, &["ovnet", "detach", "--netns", name]);
        self.remove_sandbox(host, name)?;
        detached.map(drop)
    }

    /// Makes a sandbox that is attached to nothing.
    ///
    /// # Errors
    /// The name is taken or cannot be one.
    pub fn add_sandbox(&self, host: &str, name: &str) -> Result<()> {
        ensure!(
            !name.is_empty() && !name.starts_with(['-', '.']) && !name.contains('/'),
            "a sandbox's name is that of a file, not {name:?}"
        );
        if self.sandboxes(host)?.iter().any(|existing| existing == name) {
            bail!(
                "sandbox {name} exists on {host}: `cargo xtask lab stop {host}/{name}` removes it, \
                 `cargo xtask lab exec {host} -- ovnet attach --netns {name} --network …` attaches \
                 it to another network"
            );
        }
        self.exec(host, &["ip", "netns", "add", name])?;
        self.exec(host, &["ip", "-n", name, "link", "set", "lo", "up"])?;
        Ok(())
    }

    /// Removes a sandbox with everything that runs in it, without a word to the agent.
    ///
    /// # Errors
    /// It cannot be removed.
    pub fn remove_sandbox(&self, host: &str, name: &str) -> Result<()> {
        // What runs in it would keep the namespace.
        let script = r#"pids=$(ip netns pids "$1"); for pid in $pids; do kill -9 "$pid"; done
                        ip netns del "$1""#;
        self.exec(host, &["sh", "-c", script, "sh", name]).map(drop)
    }

    /// The names of a host's sandboxes.
    ///
    /// # Errors
    /// There is no such host.
    pub fn sandboxes(&self, host: &str) -> Result<Vec<String>> {
        let folder = self.host(host)?.root().join("run/netns");
        let entries = fs::read_dir(&folder)
            .with_context(|| format!("the sandboxes of {host}: {}", folder.display()))?;
        let mut names: Vec<String> =
            entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok()).collect();
        names.sort();
        Ok(names)
    }

    /// The first address of a sandbox, or of a host, that is not the loopback's.
    ///
    /// # Errors
    /// It has none.
    pub fn sandbox_address(&self, place: &str) -> Result<Ipv4Addr> {
        let text =
            self.exec(place, &["ip", "-4", "-oneline", "address", "show", "scope", "global"])?;
        text.split_whitespace()
            .skip_while(|word| *word != "inet")
            .nth(1)
            .and_then(|address| address.split('/').next()?.parse().ok())
            .with_context(|| format!("{place} has no address"))
    }

    /// Runs `ovnet … --json` on a host and reads what it prints.
    ///
    /// # Errors
    /// It fails, or prints no JSON.
    pub fn ovnet_json(&self, host: &str, arguments: &[&str]) -> Result<Value> {
        let mut argv = vec!["ovnet"];
        argv.extend(arguments);
        argv.push("--json");
        let text = self.exec(host, &argv)?;
        serde_json::from_str(&text).with_context(|| format!("{host}: `{}`", argv.join(" ")))
    }
}
