//! The kernel's packet filter: the table `ip ovnet`, and a word with Docker's rules.
//!
//! The fast path does without; this is for sandboxes' way out, and for whatever of a published port
//! the programs pass on. The table is replaced as a whole and read back, so what others change in
//! it is put right.

mod docker;
mod expression;
mod program;
mod ruleset;

use std::{collections::BTreeMap, sync::Arc};

use anyhow::{Context as _, Result, bail};
use nftables::schema::Nftables;
use serde_json::Value;
use tokio::sync::Mutex;

pub use docker::{accept_forwarding, withdraw};
pub use ruleset::{Egress, Mapping, Rules, batch};

use crate::check::{Level, Row};
use ruleset::TABLE;

/// The table `ip ovnet` of the network namespace of the thread that calls. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub struct Firewall {
    /// Held while the table is looked at and replaced.
    alone: Arc<Mutex<()>>,
}

impl Firewall {
    /// Makes the table hold these rules; whether it had to be changed. What is as it must be is
    /// not touched, so its counters go on. Fails where there is no `nft`, or it refuses.
    pub async fn ensure(&self, rules: &Rules) -> Result<bool> {
        let _alone = self.alone.lock().await;
        let wanted = batch(rules);
        if shape().await? == Some(ruleset::shape(&wanted)) {
            return Ok(false);
        }
        apply(&wanted).await.context("set the rules of the table ip ovnet")?;
        Ok(true)
    }

    /// Deletes the table; one that is not there is no error. Where there is no `nft` there is none.
    pub async fn remove(&self) -> Result<()> {
        let _alone = self.alone.lock().await;
        if !Self::available() || shape().await?.is_none() {
            return Ok(());
        }
        apply(&ruleset::removal()).await.context("delete the table ip ovnet")
    }

    /// Whether the table is there, whatever it holds.
    pub async fn exists(&self) -> Result<bool> {
        let _alone = self.alone.lock().await;
        Ok(Self::available() && shape().await?.is_some())
    }

    /// Whether this host has the program `nft`, which all of this needs.
    pub fn available() -> bool {
        program::find("nft").is_some()
    }
}

/// The row of `ovnet-agent check`. The overlay itself needs no rules, so this never fails.
pub async fn row() -> Row {
    const FOR: &str = "for --egress on and for published ports where BPF passes a packet on";
    let row = |level, value: String, advice: String| Row { item: "nftables", value, level, advice };
    if !Firewall::available() {
        return row(Level::Warn, "no program nft".into(), format!("install nftables: it is {FOR}"));
    }
    match program::run("nft", &["--version"], &[]).await {
        Ok(said) if said.good => {
            // As `nftables v1.0.6 (Lester Gooch #5)`.
            let version = said.output.split(' ').nth(1).unwrap_or_default().trim().to_owned();
            row(Level::Ok, version, String::new())
        }
        Ok(said) => row(Level::Warn, "nft fails".into(), format!("it is {FOR}: {}", said.error)),
        Err(error) => row(Level::Warn, "nft fails".into(), format!("it is {FOR}: {error:#}")),
    }
}

/// The chains of the table with how many rules each has; `None` where there is no table. With the
/// chain that is named after the rules this tells what a table holds, short of a rule that somebody
/// replaced by another.
async fn shape() -> Result<Option<BTreeMap<String, usize>>> {
    let said = nft(&["-j", "list", "table", "ip", TABLE], &[]).await?;
    if !said.good {
        if said.error.contains("No such file or directory") {
            return Ok(None);
        }
        bail!("read the table ip ovnet: {}", said.error);
    }
    let listed: Value = serde_json::from_str(&said.output).context("read what nft lists")?;
    Ok(Some(shape_of(&listed)))
}

/// Read by hand: a newer nft may tell things that the crate's types refuse.
fn shape_of(listed: &Value) -> BTreeMap<String, usize> {
    let mut shape = BTreeMap::new();
    for object in listed["nftables"].as_array().into_iter().flatten() {
        if let Some(chain) = object["chain"]["name"].as_str() {
            shape.entry(chain.to_owned()).or_insert(0);
        } else if let Some(chain) = object["rule"]["chain"].as_str() {
            *shape.entry(chain.to_owned()).or_insert(0) += 1;
        }
    }
    shape
}

async fn apply(batch: &Nftables<'_>) -> Result<()> {
    let input = serde_json::to_vec(batch).context("write rules for nft")?;
    let said = nft(&["-j", "-f", "-"], &input).await?;
    if !said.good {
        bail!("nft refuses: {}", said.error);
    }
    Ok(())
}

async fn nft(arguments: &[&str], input: &[u8]) -> Result<program::Said> {
    if !Firewall::available() {
        bail!("there is no program nft on this host: install nftables");
    }
    program::run("nft", arguments, input).await
}
