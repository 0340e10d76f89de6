//! What happens in a round, from a seed and nothing else.

use std::fmt;

use rand::{RngExt as _, SeedableRng as _, rngs::StdRng};

/// The hosts of the lab. The agent of the last one is never killed: its memory is what a long life
/// makes of it.
pub(crate) const HOSTS: [&str; 3] = ["docker01", "docker02", "docker03"];
/// Hosts whose agents are killed.
const MORTAL: usize = 2;
/// Sandboxes that come and go on each host.
pub(crate) const SANDBOXES: usize = 6;
/// Networks that come and go.
pub(crate) const NETWORKS: usize = 3;
/// What each host does in a round.
const ACTS: usize = 8;
/// The first host port that is asked for, and how many there are.
const PORTS: (u16, u16) = (9000, 8);

/// Something a user asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Act {
    /// Attach a new sandbox to a network, publishing its port 80 on a host port or none.
    Attach { sandbox: usize, network: usize, port: Option<u16> },
    /// Detach a sandbox and remove it.
    Stop { sandbox: usize },
    /// Remove a sandbox without a word to the agent.
    Vanish { sandbox: usize },
    /// Create a network.
    Create { network: usize },
    /// Remove a network.
    Remove { network: usize },
}

/// What goes wrong in a round, and is right again at its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Trouble {
    /// Nothing.
    None,
    /// An agent is killed and started again at once.
    AgentKilled(usize),
    /// An agent is stopped cleanly and started again at once.
    AgentStopped(usize),
    /// An agent is killed and away until everything else is done.
    AgentAway(usize),
    /// Two agents are killed together.
    AgentsKilled,
    /// Consul is killed and started again with its data.
    ConsulKilled,
    /// Consul is away until everything else is done.
    ConsulAway,
    /// Consul hangs while so many further acts run into it.
    ConsulHangs,
    /// Consul is killed and starts again without its data.
    ConsulWiped,
    /// Consul and an agent are killed, the agent starts first.
    BothKilled(usize),
}

/// One round.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Round {
    /// What each host does, one after the other; the hosts at the same time.
    pub(crate) acts: Vec<Vec<Act>>,
    /// What goes wrong meanwhile.
    pub(crate) trouble: Trouble,
    /// Which of the networks that come and go are there at its beginning.
    pub(crate) networks: Vec<usize>,
    /// When: after so many acts have begun, on all hosts together.
    pub(crate) after: usize,
}

impl fmt::Display for Round {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let acts: usize = self.acts.iter().map(Vec::len).sum();
        let host = |number: usize| HOSTS[number];
        match self.trouble {
            Trouble::None => write!(f, "{acts} acts")?,
            Trouble::AgentKilled(it) => write!(f, "{acts} acts, {}'s agent killed", host(it))?,
            Trouble::AgentStopped(it) => write!(f, "{acts} acts, {}'s agent stopped", host(it))?,
            Trouble::AgentAway(it) => write!(f, "{acts} acts, {}'s agent away", host(it))?,
            Trouble::AgentsKilled => write!(f, "{acts} acts, two agents killed")?,
            Trouble::ConsulKilled => write!(f, "{acts} acts, Consul killed")?,
            Trouble::ConsulAway => write!(f, "{acts} acts, Consul away")?,
            Trouble::ConsulHangs => write!(f, "{acts} acts, Consul hangs")?,
            Trouble::ConsulWiped => write!(f, "{acts} acts, Consul wiped")?,
            Trouble::BothKilled(it) => {
                write!(f, "{acts} acts, Consul and {}'s agent killed", host(it))?;
            }
        }
        write!(f, " at the {}th", self.after)
    }
}

/// The rounds of a seed.
pub(crate) struct Plan(StdRng);

impl Plan {
    /// The plan of a seed.
    pub(crate) fn new(seed: u64) -> Self {
        Self(StdRng::seed_from_u64(seed))
    }

    /// The next round.
    pub(crate) fn round(&mut self) -> Round {
        let acts: Vec<Vec<Act>> =
            HOSTS.iter().map(|_| (0..ACTS).map(|_| self.act()).collect()).collect();
        let trouble = self.trouble();
        let after = self.0.random_range(1..=ACTS * HOSTS.len() / 2);
        let networks = (0..NETWORKS).filter(|_| self.0.random_bool(0.8)).collect();
        Round { acts, trouble, networks, after }
    }

    fn act(&mut self) -> Act {
        let sandbox = self.0.random_range(0..SANDBOXES);
        let network = self.0.random_range(0..NETWORKS);
        match self.0.random_range(0..20) {
            0..10 => {
                let port =
                    self.0.random_bool(0.4).then(|| PORTS.0 + self.0.random_range(0..PORTS.1));
                Act::Attach { sandbox, network, port }
            }
            10..14 => Act::Stop { sandbox },
            14..16 => Act::Vanish { sandbox },
            16..19 => Act::Create { network },
            _ => Act::Remove { network },
        }
    }

    fn trouble(&mut self) -> Trouble {
        let host = self.0.random_range(0..MORTAL);
        match self.0.random_range(0..11) {
            0 => Trouble::None,
            1 | 2 => Trouble::AgentKilled(host),
            3 => Trouble::AgentStopped(host),
            4 => Trouble::AgentAway(host),
            5 => Trouble::AgentsKilled,
            6 => Trouble::ConsulKilled,
            7 => Trouble::ConsulAway,
            8 => Trouble::ConsulHangs,
            9 => Trouble::ConsulWiped,
            _ => Trouble::BothKilled(host),
        }
    }
}

#[test]
fn a_seed_always_gives_the_same_rounds() {
    let rounds = |seed| {
        let mut plan = Plan::new(seed);
        (0..50).map(|_| plan.round()).collect::<Vec<_>>()
    };
    assert_eq!(rounds(7), rounds(7));
    assert_ne!(rounds(7), rounds(8));
    let troubles: Vec<_> = rounds(7).iter().map(|round| round.trouble).collect();
    assert!(troubles.contains(&Trouble::ConsulHangs) && troubles.contains(&Trouble::AgentsKilled));
}
