//! `ovnet-agent check`: what this host has and lacks, in one table.
//!
//! It changes nothing. A row that fails is something the agent cannot run without; a warning costs
//! speed, or needs the operator's eye.

mod network;

use std::{
    fmt::Write as _,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context as _, Result, anyhow, bail};
use nix::sys::statfs::{BPF_FS_MAGIC, statfs};

use crate::{config::Dns, datapath, docker, firewall, net::Net};

/// How long the probe of Consul may take.
const CONSUL: Duration = Duration::from_secs(5);
/// The oldest kernel that the agent runs on. XDP in several buffers came with 5.18, the tunnel key's
/// local address with 5.19, and 6.1 is the long-term kernel after them, which is tested.
const OLDEST: (u32, u32) = (6, 1);

/// What the agent would be started with.
#[derive(Clone, Debug)]
pub struct CheckInput {
    /// `--consul`, as shown; without credentials.
    pub consul: String,
    /// `--advertise`.
    pub advertise: String,
    /// `--bpffs`.
    pub bpffs: PathBuf,
    /// `--vxlan-port`.
    pub vxlan_port: u16,
    /// `--dns`.
    pub dns: Dns,
}

/// How a row is judged.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Level {
    /// As it should be.
    Ok,
    /// Works, but not as well as it could.
    Warn,
    /// The agent cannot run.
    Fail,
}

/// One line of the table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Row {
    /// What was looked at.
    pub item: &'static str,
    /// What was found.
    pub value: String,
    /// How that is judged.
    pub level: Level,
    /// What to do; empty where nothing is.
    pub advice: String,
}

/// Looks at everything, prints the table, and says whether the agent can run here.
///
/// `consul` is the probe of Consul: an error is the one line that says why it is not usable.
pub async fn run(
    input: &CheckInput,
    consul: impl Future<Output = Result<(), String>>,
) -> Result<bool> {
    let rows = rows(input, consul).await?;
    print!("{}", render(&rows));
    Ok(rows.iter().all(|row| row.level != Level::Fail))
}

/// Looks at everything. An error only where the host cannot even be looked at.
pub async fn rows(
    input: &CheckInput,
    consul: impl Future<Output = Result<(), String>>,
) -> Result<Vec<Row>> {
    let net = Net::open()?;
    let mut rows = vec![privileges(), kernel(), tc(), btf(), jit(&net).await, bpffs(&input.bpffs)];
    match net.uplink(&input.advertise).await {
        Ok(uplink) => {
            rows.push(ok("uplink", format!("{} {}", uplink.link.name, uplink.address)));
            network::uplink_rows(&net, &uplink, &mut rows).await;
        }
        Err(error) => rows.push(fail("uplink", input.advertise.clone(), format!("{error:#}"))),
    }
    rows.push(network::vxlan_port(&net, input.vxlan_port).await?);
    rows.push(network::forwarding(&net).await);
    rows.push(network::picks_up_connections(&net).await);
    rows.push(firewall::row().await);
    rows.extend(docker::setup::row(&net, input.dns).await);
    rows.push(match tokio::time::timeout(CONSUL, consul).await {
        Ok(Ok(())) => ok("Consul", input.consul.clone()),
        Ok(Err(why)) => fail("Consul", input.consul.clone(), why),
        Err(_) => fail(
            "Consul",
            input.consul.clone(),
            format!("no answer within {} s: is the address right?", CONSUL.as_secs()),
        ),
    });
    Ok(rows)
}

/// The table, with a last line that says the outcome.
pub fn render(rows: &[Row]) -> String {
    let length = |text: &str| text.chars().count();
    let items = rows.iter().map(|row| length(row.item)).max().unwrap_or(0).max(4);
    let values = rows.iter().map(|row| length(&row.value)).max().unwrap_or(0).max(5);
    let mut text = String::new();
    let mut line = |item: &str, value: &str, state: &str, advice: &str| {
        let line = format!("{item:items$}   {value:values$}   {state:5}   {advice}");
        // Writing to a string cannot fail.
        let _ = writeln!(text, "{}", line.trim_end());
    };
    line("ITEM", "VALUE", "STATE", "WHAT TO DO");
    for row in rows {
        let state = match row.level {
            Level::Ok => "ok",
            Level::Warn => "warn",
            Level::Fail => "fail",
        };
        line(row.item, &row.value, state, &row.advice);
    }
    let count = |level| rows.iter().filter(|row| row.level == level).count();
    let _ = match (count(Level::Fail), count(Level::Warn)) {
        (0, 0) => writeln!(text, "\nThe agent can run on this host."),
        (0, warnings) => {
            writeln!(text, "\nThe agent can run on this host; {warnings} to look at.")
        }
        (failures, _) => {
            writeln!(text, "\nThe agent cannot run on this host: {failures} failed.")
        }
    };
    text
}

fn privileges() -> Row {
    const ITEM: &str = "privileges";
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let missing = missing_capabilities(&status);
    if missing.is_empty() {
        return ok(ITEM, "sufficient");
    }
    let value = format!("lacks {}", missing.join(", "));
    fail(ITEM, value, "run it as root, or give it these capabilities")
}

/// Which of the needed capabilities are not in effect, from the text of `/proc/<pid>/status`.
fn missing_capabilities(status: &str) -> Vec<&'static str> {
    // Numbers of include/uapi/linux/capability.h. SYS_ADMIN is what entering a container's
    // namespace asks for.
    const NEEDED: [(&str, u32); 4] =
        [("CAP_NET_ADMIN", 12), ("CAP_SYS_ADMIN", 21), ("CAP_PERFMON", 38), ("CAP_BPF", 39)];
    let effective = status
        .lines()
        .find_map(|line| line.strip_prefix("CapEff:"))
        .and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok())
        .unwrap_or(0);
    let lacks = |bit: u32| effective & (1 << bit) == 0;
    NEEDED.iter().filter(|(_, bit)| lacks(*bit)).map(|(name, _)| *name).collect()
}

fn release() -> String {
    nix::sys::utsname::uname()
        .map(|name| name.release().to_string_lossy().into_owned())
        .unwrap_or_default()
}

/// Major and minor number of a kernel's release, as `6.18.44-cloud`.
fn version(release: &str) -> Option<(u32, u32)> {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit());
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

fn kernel() -> Row {
    let release = release();
    match (version(&release), recent_enough(&release)) {
        (Some(_), Ok(())) => ok("kernel", release),
        (Some(_), Err(error)) => fail("kernel", release, format!("{error:#}")),
        (None, _) => warn("kernel", release, "this release has no number that can be read"),
    }
}

/// Refuses a kernel that the programs are not written for, before anything is made.
pub fn require_kernel() -> Result<()> {
    let release = release();
    recent_enough(&release)
        .with_context(|| format!("Linux {release} is too old"))
        .map_err(|error| anyhow!("{error:#}, see `ovnet-agent check`"))
}

/// A release whose number cannot be read is given the benefit of the doubt.
fn recent_enough(release: &str) -> Result<()> {
    if version(release).is_some_and(|version| version < OLDEST) {
        bail!("{}.{} is the oldest kernel that works", OLDEST.0, OLDEST.1);
    }
    Ok(())
}

fn tc() -> Row {
    if datapath::has_tcx() {
        return ok("TC attachment", "tcx");
    }
    warn(
        "TC attachment",
        "clsact",
        "Linux 6.6 has tcx, where other programs cannot displace the agent's",
    )
}

fn btf() -> Row {
    if Path::new("/sys/kernel/btf/vmlinux").exists() {
        return ok("kernel BTF", "present");
    }
    warn(
        "kernel BTF",
        "absent",
        "mount /sys, or take a kernel with CONFIG_DEBUG_INFO_BTF: tools cannot show the maps' types",
    )
}

async fn jit(net: &Net) -> Row {
    const ITEM: &str = "BPF JIT";
    // Only the machine's first network namespace has this setting.
    match net.sysctl("core/bpf_jit_enable").await.as_deref() {
        None => ok(ITEM, "not shown in this namespace"),
        Some("0") => {
            warn(ITEM, "off", "programs are interpreted: sysctl -w net.core.bpf_jit_enable=1")
        }
        Some(_) => ok(ITEM, "on"),
    }
}

fn bpffs(folder: &Path) -> Row {
    const ITEM: &str = "BPF file system";
    let shown = folder.display().to_string();
    let kind = folder.ancestors().find_map(|folder| statfs(folder).ok());
    if kind.is_some_and(|kind| kind.filesystem_type() == BPF_FS_MAGIC) {
        return ok(ITEM, shown);
    }
    let value = format!("none at {shown}");
    fail(ITEM, value, "mount -t bpf bpf /sys/fs/bpf, or give --bpffs a folder below a mounted one")
}

fn ok(item: &'static str, value: impl Into<String>) -> Row {
    Row { item, value: value.into(), level: Level::Ok, advice: String::new() }
}

fn warn(item: &'static str, value: impl Into<String>, advice: impl Into<String>) -> Row {
    Row { item, value: value.into(), level: Level::Warn, advice: advice.into() }
}

fn fail(item: &'static str, value: impl Into<String>, advice: impl Into<String>) -> Row {
    Row { item, value: value.into(), level: Level::Fail, advice: advice.into() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn releases_are_compared_by_their_numbers() {
        assert_eq!(version("6.18.44-fc-v657"), Some((6, 18)));
        assert_eq!(version("5.15.0-1023-aws"), Some((5, 15)));
        assert_eq!(version("6.6"), Some((6, 6)));
        assert_eq!(version("six"), None);
        assert!(version("5.9.1") < Some(OLDEST) && version("6.12.0") > Some(OLDEST));
    }

    #[test]
    fn a_kernel_too_old_is_refused_and_one_without_number_is_not() {
        for old in ["6.0.19", "5.15.0-1023-aws", "5.4.0-182-generic", "4.19.0-27-amd64"] {
            assert_eq!(
                format!("{:#}", recent_enough(old).unwrap_err()),
                "6.1 is the oldest kernel that works"
            );
        }
        for good in ["6.1.0-18-amd64", "6.18.44", "10.0.0", "six"] {
            recent_enough(good).unwrap();
        }
    }

    #[test]
    fn missing_capabilities_are_named() {
        assert_eq!(missing_capabilities("CapEff:\t000001ffffffffff\n"), [""; 0]);
        assert_eq!(missing_capabilities("CapEff:\t0000000000201000\n"), ["CAP_PERFMON", "CAP_BPF"]);
        assert_eq!(missing_capabilities("").len(), 4);
    }

    #[test]
    fn the_table_lines_up_and_tells_the_outcome() {
        let rows = [ok("kernel", "6.18"), fail("Consul", "10.0.0.1:8500", "start it")];
        assert_eq!(
            render(&rows),
            "ITEM     VALUE           STATE   WHAT TO DO\n\
             kernel   6.18            ok\n\
             Consul   10.0.0.1:8500   fail    start it\n\
             \n\
             The agent cannot run on this host: 1 failed.\n"
        );
        assert!(render(&rows[..1]).ends_with("can run on this host.\n"));
        assert!(render(&[warn("a", "b", "c")]).ends_with("; 1 to look at.\n"));
    }

    #[test]
    fn a_folder_that_is_not_there_yet_counts_as_its_parent() {
        assert_eq!(bpffs(Path::new("/proc/ovnet/none")).level, Level::Fail);
    }
}
