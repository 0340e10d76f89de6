//! `lab confined UNIT -- COMMAND`: runs a command with what a systemd unit takes from it, where there
//! is no systemd. So the agents of a lab are as confined as those of a user, and a test fails where
//! the unit takes too much.
//!
//! Each setting is carried out as systemd does it (`src/shared/seccomp-util.c`, `src/core/exec-invoke.c`).
//! One that restricts and that this does not know is an error: it would be in the unit and tested by
//! nobody.

use std::collections::{BTreeMap, BTreeSet};
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::Command;
use std::{env, fs};

use anyhow::{Context as _, Result, anyhow, bail};
use nix::libc;
use nix::sys::resource::{RLIM_INFINITY, Resource, getrlimit, setrlimit};
use nix::sys::stat::{Mode, umask};
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch, apply_filter,
};
use syscalls::Sysno;

/// Settings of a unit's `[Service]` that take nothing from the agent.
const NO_RESTRICTION: [&str; 14] = [
    "Type",
    "EnvironmentFile",
    "ExecStart",
    "TimeoutStartSec",
    "TimeoutStopSec",
    "Restart",
    "RestartSec",
    "KillMode",
    "StateDirectory",
    "StateDirectoryMode",
    "RuntimeDirectory",
    "RuntimeDirectoryPreserve",
    "OOMScoreAdjust",
    // Together with the filter itself.
    "SystemCallErrorNumber",
];

/// The capabilities by number, `linux/capability.h`.
const CAPABILITIES: [&str; 41] = [
    "CHOWN",
    "DAC_OVERRIDE",
    "DAC_READ_SEARCH",
    "FOWNER",
    "FSETID",
    "KILL",
    "SETGID",
    "SETUID",
    "SETPCAP",
    "LINUX_IMMUTABLE",
    "NET_BIND_SERVICE",
    "NET_BROADCAST",
    "NET_ADMIN",
    "NET_RAW",
    "IPC_LOCK",
    "IPC_OWNER",
    "SYS_MODULE",
    "SYS_RAWIO",
    "SYS_CHROOT",
    "SYS_PTRACE",
    "SYS_PACCT",
    "SYS_ADMIN",
    "SYS_BOOT",
    "SYS_NICE",
    "SYS_RESOURCE",
    "SYS_TIME",
    "SYS_TTY_CONFIG",
    "MKNOD",
    "LEASE",
    "AUDIT_WRITE",
    "AUDIT_CONTROL",
    "SETFCAP",
    "MAC_OVERRIDE",
    "MAC_ADMIN",
    "SYSLOG",
    "WAKE_ALARM",
    "BLOCK_SUSPEND",
    "AUDIT_READ",
    "PERFMON",
    "BPF",
    "CHECKPOINT_RESTORE",
];

/// The kinds of namespaces by their names in `RestrictNamespaces=`.
const NAMESPACES: [(&str, i32); 7] = [
    ("cgroup", libc::CLONE_NEWCGROUP),
    ("ipc", libc::CLONE_NEWIPC),
    ("net", libc::CLONE_NEWNET),
    ("mnt", libc::CLONE_NEWNS),
    ("pid", libc::CLONE_NEWPID),
    ("user", libc::CLONE_NEWUSER),
    ("uts", libc::CLONE_NEWUTS),
];

/// The settings of `[Service]`, each with its values in order.
type Settings = BTreeMap<String, Vec<String>>;

/// Confines this process as the unit says and becomes the command.
///
/// # Errors
/// The unit has a restriction that is not known here, or the kernel refuses one, or there is no such
/// command. It returns only then.
pub(super) fn run(unit: &Path, command: &[String]) -> Result<()> {
    let text = fs::read_to_string(unit).with_context(|| format!("read {}", unit.display()))?;
    let settings = service(&text);
    let filters = filters(&settings).with_context(|| unit.display().to_string())?;
    confine(&settings).with_context(|| unit.display().to_string())?;
    // What only the last of them forbids is needed to put the others in force.
    for filter in filters {
        apply_filter(&filter).context("restrict the system calls")?;
    }
    let (program, arguments) = command.split_first().context("no command")?;
    let error = Command::new(program).args(arguments).exec();
    Err(anyhow!(error).context(format!("run {program}")))
}

fn service(text: &str) -> Settings {
    let mut settings = Settings::new();
    let mut section = "";
    for line in text.lines().map(str::trim).filter(|line| !line.starts_with('#')) {
        if line.starts_with('[') {
            section = line;
        } else if let Some((key, value)) = line.split_once('=').filter(|_| section == "[Service]") {
            settings.entry(key.to_owned()).or_default().push(value.to_owned());
        }
    }
    settings
}

/// All words of a setting's values.
fn words<'a>(settings: &'a Settings, key: &str) -> impl Iterator<Item = &'a str> {
    settings.get(key).into_iter().flatten().flat_map(|value| value.split_whitespace())
}

fn is_on(settings: &Settings, key: &str) -> bool {
    words(settings, key).last().is_some_and(|it| matches!(it, "yes" | "true" | "on" | "1"))
}

/// All that is no filter of system calls.
fn confine(settings: &Settings) -> Result<()> {
    for key in settings.keys().filter(|key| !NO_RESTRICTION.contains(&key.as_str())) {
        match key.as_str() {
            "UMask" => {
                let mask = words(settings, key).last().unwrap_or_default();
                let mask = u32::from_str_radix(mask, 8).context("UMask=")?;
                umask(Mode::from_bits_truncate(mask));
            }
            "LimitNOFILE" => limit(settings, key, Resource::RLIMIT_NOFILE)?,
            "LimitMEMLOCK" => limit(settings, key, Resource::RLIMIT_MEMLOCK)?,
            "CapabilityBoundingSet" => bound(settings)?,
            "NoNewPrivileges" if is_on(settings, key) => {
                nix::sys::prctl::set_no_new_privs().context("NoNewPrivileges=")?;
            }
            "RestrictNamespaces"
            | "RestrictAddressFamilies"
            | "SystemCallFilter"
            | "SystemCallArchitectures"
            | "LockPersonality"
            | "MemoryDenyWriteExecute"
            | "RestrictRealtime"
            | "RestrictSUIDSGID"
            | "NoNewPrivileges" => {}
            other => bail!("{other}= is tested by nobody: teach the lab what it takes away"),
        }
    }
    Ok(())
}

fn limit(settings: &Settings, key: &str, resource: Resource) -> Result<()> {
    let value = words(settings, key).last().unwrap_or_default();
    let value = match value {
        "infinity" => RLIM_INFINITY,
        number => number.parse().with_context(|| format!("{key}={number}"))?,
    };
    // A machine that allows less than the unit asks for has it so.
    let (_, hard) = getrlimit(resource).with_context(|| format!("{key}="))?;
    let value = value.min(hard);
    setrlimit(resource, value, value).with_context(|| format!("{key}="))
}

/// Takes all capabilities that are not named, from this process and from whatever it becomes: root
/// that executes a program has those of its bounding set.
fn bound(settings: &Settings) -> Result<()> {
    let mut kept = BTreeSet::new();
    for name in words(settings, "CapabilityBoundingSet") {
        let number = CAPABILITIES.iter().position(|it| name.strip_prefix("CAP_") == Some(it));
        kept.insert(number.with_context(|| format!("CapabilityBoundingSet= has {name:?}"))?);
    }
    for number in (0..CAPABILITIES.len()).filter(|number| !kept.contains(number)) {
        // SAFETY: PR_CAPBSET_DROP takes a number and no pointer.
        let dropped = unsafe { libc::prctl(libc::PR_CAPBSET_DROP, number, 0, 0, 0) };
        // EINVAL is a capability that this kernel does not have.
        if dropped != 0 && nix::errno::Errno::last() != nix::errno::Errno::EINVAL {
            bail!("drop a capability: {}", nix::errno::Errno::last());
        }
    }
    Ok(())
}

/// The filters, in the order they are put in force.
fn filters(settings: &Settings) -> Result<Vec<BpfProgram>> {
    let mut filters = Vec::new();
    let mut add = |rules: Rules, error: i32| -> Result<()> {
        if !rules.is_empty() {
            filters.push(compile(rules, SeccompAction::Allow, denied(error)?)?);
        }
        Ok(())
    };
    if settings.contains_key("RestrictAddressFamilies") {
        add(address_families(settings)?, libc::EAFNOSUPPORT)?;
    }
    let mut rules = Rules::new();
    let mut absent = Rules::new();
    if settings.contains_key("RestrictNamespaces") {
        namespaces(settings, &mut rules)?;
        // Its flags are behind a pointer, which no filter sees.
        absent.insert(Sysno::clone3.id().into(), Vec::new());
    }
    if is_on(settings, "MemoryDenyWriteExecute") {
        deny(&mut rules, Sysno::mmap, 2, 6)?;
        deny(&mut rules, Sysno::mprotect, 2, 4)?;
        deny(&mut rules, Sysno::pkey_mprotect, 2, 4)?;
        deny(&mut rules, Sysno::shmat, 2, 0o100_000)?;
    }
    if is_on(settings, "RestrictRealtime") {
        for policy in [libc::SCHED_FIFO, libc::SCHED_RR, libc::SCHED_DEADLINE] {
            let condition = condition(1, SeccompCmpOp::Eq, u64::try_from(policy)?)?;
            rule(&mut rules, Sysno::sched_setscheduler, vec![condition])?;
        }
        rules.insert(Sysno::sched_setattr.id().into(), Vec::new());
    }
    if is_on(settings, "RestrictSUIDSGID") {
        for (call, argument) in [
            (Sysno::fchmod, 1),
            (Sysno::fchmodat, 2),
            (Sysno::mkdirat, 2),
            (Sysno::mknodat, 2),
            (Sysno::openat, 3),
        ] {
            deny(&mut rules, call, argument, 0o4000)?;
            deny(&mut rules, call, argument, 0o2000)?;
        }
        #[cfg(target_arch = "x86_64")]
        for (call, argument) in [(Sysno::chmod, 1), (Sysno::mkdir, 1), (Sysno::mknod, 1)] {
            deny(&mut rules, call, argument, 0o4000)?;
            deny(&mut rules, call, argument, 0o2000)?;
        }
        absent.insert(Sysno::openat2.id().into(), Vec::new());
    }
    if is_on(settings, "LockPersonality") {
        // That of Linux itself, and the question what it is.
        let native = condition(0, SeccompCmpOp::Ne, 0)?;
        let asked = condition(0, SeccompCmpOp::Ne, 0xffff_ffff)?;
        rule(&mut rules, Sysno::personality, vec![native, asked])?;
    }
    add(rules, libc::EPERM)?;
    add(absent, libc::ENOSYS)?;
    filters.extend(system_calls(settings)?);
    Ok(filters)
}

type Rules = BTreeMap<i64, Vec<SeccompRule>>;

/// `SystemCallFilter=`: first what is allowed, then, behind `~`, what is not after all.
fn system_calls(settings: &Settings) -> Result<Option<BpfProgram>> {
    let Some(lines) = settings.get("SystemCallFilter") else { return Ok(None) };
    let Some(groups) = groups()? else { return Ok(None) };
    // Without these nothing runs, so systemd allows them always.
    let mut allowed = BTreeSet::new();
    expand("@default", &groups, &mut allowed)?;
    for line in lines {
        let (removes, names) = match line.strip_prefix('~') {
            Some(names) => (true, names),
            None => (false, line.as_str()),
        };
        let mut named = BTreeSet::new();
        for name in names.split_whitespace() {
            expand(name, &groups, &mut named)?;
        }
        if removes {
            allowed = &allowed - &named;
        } else {
            allowed.extend(named);
        }
    }
    // Other architectures' have no number here.
    let numbers = allowed.iter().filter_map(|name| name.parse::<Sysno>().ok());
    let rules = numbers.map(|call| (i64::from(call.id()), Vec::new())).collect();
    let error = words(settings, "SystemCallErrorNumber").last();
    anyhow::ensure!(error == Some("EPERM"), "SystemCallErrorNumber= is {error:?} and not EPERM");
    compile(rules, denied(libc::EPERM)?, SeccompAction::Allow).map(Some)
}

/// The groups of system calls as this machine's systemd has them.
fn groups() -> Result<Option<BTreeMap<String, Vec<String>>>> {
    let output = Command::new("systemd-analyze").args(["syscall-filter", "--no-pager"]).output();
    let output = match output {
        Ok(output) => output,
        Err(error) if env::var("OVNET_REQUIRE_ALL").is_ok_and(|it| it == "1") => {
            return Err(error)
                .context("run systemd-analyze, which knows the groups of system calls");
        }
        Err(_) => {
            eprintln!("note: no systemd-analyze: SystemCallFilter= of the unit is not in force");
            return Ok(None);
        }
    };
    let mut groups: BTreeMap<String, Vec<String>> = BTreeMap::new();
    let mut group = String::new();
    for line in String::from_utf8_lossy(&output.stdout).lines() {
        let item = line.trim().trim_start_matches("\u{1b}[0m");
        if item.is_empty() || item.starts_with('#') {
            continue;
        }
        if line.starts_with('@') {
            item.clone_into(&mut group);
        } else if line.starts_with(' ') {
            groups.entry(group.clone()).or_default().push(item.to_owned());
        }
    }
    anyhow::ensure!(groups.contains_key("@default"), "systemd-analyze tells no groups");
    Ok(Some(groups))
}

fn expand(
    name: &str,
    groups: &BTreeMap<String, Vec<String>>,
    into: &mut BTreeSet<String>,
) -> Result<()> {
    if !name.starts_with('@') {
        into.insert(name.to_owned());
        return Ok(());
    }
    let members = groups.get(name).with_context(|| format!("there is no group {name}"))?;
    members.iter().try_for_each(|member| expand(member, groups, into))
}

fn address_families(settings: &Settings) -> Result<Rules> {
    let mut conditions = Vec::new();
    for name in words(settings, "RestrictAddressFamilies") {
        let family = match name {
            "AF_UNIX" => libc::AF_UNIX,
            "AF_NETLINK" => libc::AF_NETLINK,
            "AF_INET" => libc::AF_INET,
            "AF_INET6" => libc::AF_INET6,
            "AF_PACKET" => libc::AF_PACKET,
            other => bail!("RestrictAddressFamilies= has {other:?}"),
        };
        conditions.push(condition(0, SeccompCmpOp::Ne, u64::try_from(family)?)?);
    }
    let mut rules = Rules::new();
    rule(&mut rules, Sysno::socket, conditions)?;
    Ok(rules)
}

fn namespaces(settings: &Settings, rules: &mut Rules) -> Result<()> {
    let kept: Vec<&str> = words(settings, "RestrictNamespaces").collect();
    for (_, flag) in NAMESPACES.iter().filter(|(name, _)| !kept.contains(name)) {
        let flag = u64::try_from(*flag)?;
        deny(rules, Sysno::clone, 0, flag)?;
        deny(rules, Sysno::unshare, 0, flag)?;
        deny(rules, Sysno::setns, 1, flag)?;
    }
    // Any kind, whatever the descriptor is of.
    let any = condition(1, SeccompCmpOp::Eq, 0)?;
    rule(rules, Sysno::setns, vec![any])
}

/// Denies a call whose argument has all these bits.
fn deny(rules: &mut Rules, call: Sysno, argument: u8, bits: u64) -> Result<()> {
    let has = condition(argument, SeccompCmpOp::MaskedEq(bits), bits)?;
    rule(rules, call, vec![has])
}

fn rule(rules: &mut Rules, call: Sysno, conditions: Vec<SeccompCondition>) -> Result<()> {
    rules.entry(call.id().into()).or_default().push(SeccompRule::new(conditions)?);
    Ok(())
}

fn condition(argument: u8, operator: SeccompCmpOp, value: u64) -> Result<SeccompCondition> {
    Ok(SeccompCondition::new(argument, SeccompCmpArgLen::Dword, operator, value)?)
}

fn denied(error: i32) -> Result<SeccompAction> {
    Ok(SeccompAction::Errno(u32::try_from(error)?))
}

fn compile(rules: Rules, others: SeccompAction, these: SeccompAction) -> Result<BpfProgram> {
    let arch = TargetArch::try_from(env::consts::ARCH).context("filters for this machine")?;
    Ok(SeccompFilter::new(rules, others, these, arch)?.try_into()?)
}
