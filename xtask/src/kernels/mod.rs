//! `cargo xtask test kernels`: Debian's kernels in qemu, with the programs, their test suite, and
//! two hosts with real traffic.
//!
//! The processor is emulated in software, for a machine that is virtual itself rarely lends its own.
//! A kernel is booted with a file system in memory that has our binaries and this machine's commands;
//! what the tests print comes back over a serial line. Nothing is installed but the emulator.

mod archive;
mod guest;
mod modules;

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, bail};

use self::guest::Run;
use crate::report::Report;
use crate::setup::{self, Kernel};
use crate::test::stream;
use crate::tools::{self, Need};

/// How long one kernel may take at most, in seconds.
const LIMIT: &str = "1500";
/// The test binaries that run in a guest.
const BINARIES: [&str; 2] = ["bpf", "kernels"];
/// Tests for kernels that are too old have this in their names, and no others.
const FOR_OLD: &str = "too_old";
/// Tests of what becomes of TCX links have this in their names. Where programs are clsact filters instead
/// there are none; what becomes of those is tested in the layer `faults`.
const OF_LINKS: &str = "formers::";
/// The one test of the others where there is no time for more.
const LOADED: &str = "every_program_is_loaded";

/// Processor, memory and devices: two processors, so that what is per processor is seen; nothing
/// else than two serial lines, the kernel's and ours.
const MACHINE: &str = "-accel tcg,thread=multi -cpu max -smp 2 -m 2048 -nodefaults -display none \
                       -no-reboot -serial";
/// What only makes an emulated kernel slower is off, and so are the watchdogs: on a busy machine the
/// guest's processors stand still for seconds. A panic ends the guest.
const KERNEL_ARGUMENTS: &str = "console=ttyS0 quiet loglevel=5 panic=-1 rdinit=/init nokaslr \
                                mitigations=off init_on_alloc=0 nowatchdog \
                                rcupdate.rcu_cpu_stall_suppress=1 apparmor=0 audit=0";

/// A kernel of Debian's.
struct Debian {
    /// The part of its version that says which it is; `newest` for what is newest today.
    label: &'static str,
    /// The suite it is taken from.
    suite: &'static str,
    /// How TC programs are attached there; `None` where the agent must refuse to run.
    tc: Option<&'static str>,
}

/// One that is too old, the oldest that is not, the first of Debian's with TCX, and the newest.
const KERNELS: &[Debian] = &[
    Debian { label: "5.10", suite: "bullseye", tc: None },
    Debian { label: "6.1", suite: "bookworm", tc: Some("clsact") },
    Debian { label: "6.12", suite: "trixie", tc: Some("tcx") },
    Debian { label: "newest", suite: "sid", tc: Some("tcx") },
];

/// How much is run.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Depth {
    /// Whether the agent starts, with all its programs, or refuses to.
    Start,
    /// Everything.
    All,
}

/// Boots the kernels one after the other. `filter` is a kernel's label, part of the names of tests,
/// or both with a colon between: `6.1:two_hosts`. What cannot be had is a skip.
///
/// # Errors
/// The tests do not compile, or a guest's files cannot be written.
pub(crate) fn run(depth: Depth, filter: Option<&str>, report: &mut Report) -> Result<()> {
    let is_label = |word: &str| KERNELS.iter().any(|kernel| kernel.label == word);
    let (label, test) = match filter.map(|filter| filter.split_once(':').unwrap_or((filter, ""))) {
        Some((label, test)) if is_label(label) => (Some(label), Some(test)),
        _ => (None, filter),
    };
    let chosen = KERNELS.iter().filter(|kernel| label.is_none_or(|label| kernel.label == label));
    let test = test.filter(|test| !test.is_empty());
    let test = if depth == Depth::Start { Some(LOADED) } else { test };
    if let Err(error) = tools::ensure(&[Need::Packages, Need::Emulator]) {
        for Debian { label, .. } in chosen {
            report.skipped_all(&format!("kernels: Linux {label}: {error:#}"));
        }
        return Ok(());
    }
    let folder = folder();
    fs::create_dir_all(&folder).with_context(|| format!("cannot make {}", folder.display()))?;
    let common = guest::files(&binaries()?)?;
    for debian in chosen {
        match setup::kernel(debian.suite) {
            Ok(kernel) => boot(debian, &kernel, &common, test, report)?,
            Err(error) => {
                report.skipped_all(&format!("kernels: Linux {}: {error:#}", debian.label));
            }
        }
    }
    Ok(())
}

/// Where kernels are kept, a guest's files while it runs, and what each kernel said last.
fn folder() -> PathBuf {
    tools::tools().join("kernels")
}

/// Builds what runs in the guests; gives each with its path below cargo's folder there.
fn binaries() -> Result<Vec<(String, PathBuf)>> {
    let mut command = tools::cargo();
    command.args(["test", "--package", "ovnet-tests", "--no-run"]);
    command.args(["--message-format", "json-render-diagnostics"]);
    command.args(BINARIES.iter().flat_map(|name| ["--test", *name]));
    let messages = tools::output(&mut command).context("the tests do not compile")?;
    let mut built = Vec::new();
    for message in messages.lines() {
        let message: serde_json::Value = serde_json::from_str(message).context("cargo's answer")?;
        let name = message.pointer("/target/name").and_then(|name| name.as_str());
        let executable = message.get("executable").and_then(|path| path.as_str());
        if let (Some(name), Some(executable)) = (name, executable)
            && BINARIES.contains(&name)
        {
            built.push((format!("debug/deps/{name}"), PathBuf::from(executable)));
        }
    }
    if built.len() != BINARIES.len() {
        bail!("cargo built {} of the binaries {}", built.len(), BINARIES.join(", "));
    }
    for name in ["ovnet-agent", "ovnet"] {
        built.push((format!("debug/{name}"), tools::target().join("debug").join(name)));
    }
    // The stand-in for Consul, which takes less of a slow processor than a real one.
    built.push(("debug/xtask".to_owned(), env::current_exe().context("find this program")?));
    Ok(built)
}

/// Boots one kernel and reads what its tests say.
fn boot(
    debian: &Debian,
    kernel: &Kernel,
    common: &[u8],
    test: Option<&str>,
    report: &mut Report,
) -> Result<()> {
    let Debian { label, tc, .. } = debian;
    let shown = tc.map_or("the agent must refuse it".to_owned(), |tc| format!("TC by {tc}"));
    println!("\n--- Linux {} ({shown}) ---", kernel.release);
    let folder = folder();
    // Two of these may run at once.
    let image = folder.join(format!("guest-{}.cpio", std::process::id()));
    let console = folder.join(format!("console-{label}.log"));
    let modules = modules::wanted(&kernel.modules)?;
    let own = guest::tests(&modules, &[("OVNET_TC", tc.unwrap_or("none"))], &runs(debian, test));
    fs::write(&image, [common, &own].concat())
        .with_context(|| format!("cannot write {}", image.display()))?;
    let layer = format!("kernels {label}");
    let mut ended = false;
    let status = stream(&layer, emulate(kernel, &image, &console)?, report, &mut |line| {
        ended |= line == guest::ENDED;
    })?;
    if !ended {
        let console = console.display();
        report.broken(&layer, &format!("the guest did not end by itself ({status}): {console}"));
    }
    for line in complaints(&console) {
        report.broken(&layer, &format!("the kernel says: {line}"));
    }
    fs::remove_file(&image).with_context(|| format!("remove {}", image.display()))
}

/// What is run on a kernel: everything but what is for older ones, or only that.
fn runs(debian: &Debian, test: Option<&str>) -> Vec<Run> {
    let run = |name: &str, arguments: &[&str], filter: Option<&str>| Run {
        name: name.to_owned(),
        arguments: arguments.iter().copied().chain(filter).map(str::to_owned).collect(),
    };
    match debian.tc {
        None => vec![run("kernels", &[], Some(FOR_OLD))],
        Some(tc) => {
            // Two labs would compete for two slow processors.
            let labs = run("kernels", &["--test-threads=1", "--skip", FOR_OLD], test);
            let skipped: &[&str] = if tc == "tcx" { &[] } else { &["--skip", OF_LINKS] };
            vec![run("bpf", skipped, test), labs]
        }
    }
}

fn emulate(kernel: &Kernel, image: &Path, console: &Path) -> Result<Command> {
    let qemu = tools::find("qemu-system-x86_64").context("qemu is not installed")?;
    // It takes all the processor it gets, for minutes: whatever else there is goes first.
    let mut command = Command::new("nice");
    command.args(["-n", "5", "timeout", "--kill-after=5", LIMIT]).arg(qemu);
    command.args(MACHINE.split_whitespace());
    command.arg(format!("file:{}", console.display())).args(["-serial", "stdio"]);
    command.arg("-kernel").arg(&kernel.image).arg("-initrd").arg(image);
    command.args(["-append", KERNEL_ARGUMENTS]);
    Ok(command)
}

/// Lines of a kernel's log that tell of a mistake in the kernel, or of ours that it noticed.
fn complaints(console: &Path) -> Vec<String> {
    let log = fs::read(console).unwrap_or_default();
    let log = String::from_utf8_lossy(&log);
    let is_bad = |line: &&str| {
        ["BUG:", "Oops", "WARNING:", "Kernel panic"].iter().any(|word| line.contains(word))
    };
    log.lines().filter(is_bad).map(|line| line.trim().to_owned()).collect()
}
