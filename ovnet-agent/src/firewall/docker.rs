//! Others' rule that nothing is forwarded.
//!
//! Docker and ufw set the policy of the chain FORWARD of iptables to DROP. A verdict of our own
//! table cannot override that: a packet passes every table's chain of a hook, and one drop is
//! enough. So sandboxes' packets have to be accepted over there too. Docker itself speaks by the
//! program `iptables`, so the same program finds its rules, whether it writes them by the old
//! interface or by nftables.

use anyhow::{Result, bail};

use super::program::{self, Said};

/// Docker's chain for what administrators want to have decided before its own rules.
const USERS: &str = "DOCKER-USER";
const FORWARD: &str = "FORWARD";
/// Comment of our rules, by which they are found again.
const COMMENT: &str = "ovnet";

/// Has iptables accept what is forwarded from and to the bridge, where its policy is to drop;
/// whether a rule had to be added. Idempotent. Without the program there is nothing that drops.
pub async fn accept_forwarding(bridge: &str) -> Result<bool> {
    if program::find("iptables").is_none() {
        return Ok(false);
    }
    let chains = iptables(&["-S", FORWARD]).await?;
    if !chains.good {
        bail!("read the chain {FORWARD}: iptables says {}", chains.error);
    }
    if !drops(&chains.output) {
        return Ok(false);
    }
    let chain = if iptables(&["-S", USERS]).await?.good { USERS } else { FORWARD };
    let mut changed = false;
    for direction in ["-i", "-o"] {
        let rule =
            [chain, direction, bridge, "-m", "comment", "--comment", COMMENT, "-j", "ACCEPT"];
        if iptables(&[&["-C"], &rule[..]].concat()).await?.good {
            continue;
        }
        let said = iptables(&[&["-I"], &rule[..]].concat()).await?;
        if !said.good {
            bail!("accept what {bridge} forwards in {chain}: iptables says {}", said.error);
        }
        changed = true;
    }
    Ok(changed)
}

/// Takes the rules of [`accept_forwarding`] back, of whatever bridge; whether there were any.
pub async fn withdraw() -> Result<bool> {
    let mut any = false;
    if program::find("iptables").is_none() {
        return Ok(any);
    }
    for chain in [USERS, FORWARD] {
        let listed = iptables(&["-S", chain]).await?;
        // There is no such chain, or no filter at all.
        if !listed.good {
            continue;
        }
        for rule in ours(&listed.output) {
            let arguments: Vec<&str> = rule.iter().map(String::as_str).collect();
            let said = iptables(&[&["-D"], &arguments[..]].concat()).await?;
            if !said.good {
                bail!("delete a rule of {chain}: iptables says {}", said.error);
            }
            any = true;
        }
    }
    Ok(any)
}

/// Whether the policy is to drop, from what `iptables -S FORWARD` prints.
fn drops(listed: &str) -> bool {
    listed.lines().any(|line| line == "-P FORWARD DROP")
}

/// The chain and the matches of our rules, as `-D` takes them.
fn ours(listed: &str) -> Vec<Vec<String>> {
    let rules = listed.lines().filter_map(|line| line.strip_prefix("-A "));
    rules
        .map(|rule| rule.split(' ').map(|word| word.trim_matches('"').to_owned()).collect())
        .filter(|words: &Vec<String>| words.windows(2).any(|pair| pair == ["--comment", COMMENT]))
        .collect()
}

/// Waits for the lock that others may hold.
async fn iptables(arguments: &[&str]) -> Result<Said> {
    program::run("iptables", &[&["-w", "5"], arguments].concat(), &[]).await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_rules_with_our_comment_are_ours() {
        let listed = "-P FORWARD DROP\n\
                      -A FORWARD -i ovnet_gwbridge -m comment --comment ovnet -j ACCEPT\n\
                      -A FORWARD -o ovnet_gwbridge -m comment --comment \"ovnet\" -j ACCEPT\n\
                      -A FORWARD -i x -m comment --comment ovnet2 -j ACCEPT\n\
                      -A FORWARD -i ovnet -j ACCEPT\n";
        let rules = ours(listed);
        assert_eq!(rules.len(), 2, "{rules:?}");
        let words = "FORWARD -o ovnet_gwbridge -m comment --comment ovnet -j ACCEPT";
        assert_eq!(rules[1], words.split(' ').collect::<Vec<_>>());
    }

    #[test]
    fn the_policy_is_that_of_forward() {
        assert!(drops("-P FORWARD DROP\n-A FORWARD -j DOCKER-USER\n"));
        assert!(!drops("-P FORWARD ACCEPT\n-A FORWARD -j DROP\n"));
        assert!(!drops(""));
    }
}
