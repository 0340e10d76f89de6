//! What a lab can be asked to be.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::wire::Wire;

/// How a lab is to be made.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Options {
    /// Tells labs apart that exist at the same time: letters, digits and dashes.
    pub prefix: String,
    /// Hosts in the cluster, 1 to 80.
    pub hosts: u8,
    /// MTU of the wire in bytes.
    pub mtu: u32,
    /// What the wire carries.
    pub wire: Wire,
    /// `--xdp` of the agents; their own default where absent.
    pub xdp: Option<String>,
    /// Whether to start an agent on each host.
    pub agents: bool,
    /// Consul as the agents are told of it; the lab's own, at its address, where absent.
    #[serde(default)]
    pub consul_at: Option<String>,
    /// Further arguments of every agent.
    pub agent_args: Vec<String>,
    /// Where `ovnet-agent` and `ovnet` are; see [`super::default_bin_dir`] where absent.
    pub bin_dir: Option<PathBuf>,
    /// Run the development stand-in even where there is a Consul.
    pub stand_in: bool,
    /// Whether Consul keeps its data over a restart, as a server does, and not in memory only.
    pub durable_consul: bool,
    /// Further arguments of Consul.
    #[serde(default)]
    pub consul_args: Vec<String>,
    /// Whether to start a Docker daemon on each host.
    pub docker: bool,
    /// Whether containers go on while their Docker daemon is stopped, from the lab's start.
    pub live_restore: bool,
    /// Whether Docker asks the agent for leave before it removes a network: without an agent it then
    /// does nothing at all.
    pub guard: bool,
    /// How long the lab lasts.
    pub life: Life,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            prefix: "lab".to_owned(),
            hosts: 3,
            mtu: 1500,
            wire: Wire::default(),
            xdp: None,
            agents: true,
            consul_at: None,
            agent_args: Vec::new(),
            bin_dir: None,
            stand_in: false,
            durable_consul: false,
            consul_args: Vec::new(),
            docker: false,
            live_restore: false,
            guard: false,
            life: Life::Bound,
        }
    }
}

impl Options {
    /// The defaults, for a test: a lab of its own, whatever else runs on the machine.
    pub fn test(name: &str) -> Self {
        Self { prefix: format!("{name}-{}", std::process::id()), ..Self::default() }
    }
}

/// How long a lab lasts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Life {
    /// As long as the process that made it, even if that is killed.
    Bound,
    /// Until it is taken down.
    Stays,
}
