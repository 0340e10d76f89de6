//! `cargo xtask setup`: brings what is missing and says what it did, one line per item.

mod apt;
mod bpf;
mod consul;
mod deny;
mod kernel;
mod packages;
mod sources;

use std::fs::File;
use std::io::IsTerminal as _;
use std::time::Instant;

use anyhow::{Context as _, Result, bail};
use nix::sys::statfs::{BPF_FS_MAGIC, statfs};

pub(crate) use self::kernel::{Kernel, kernel};
use self::packages::Purpose;
use crate::progress;
use crate::tools::{self, Need};

const ALL: &[Need] = &[
    Need::Compilers,
    Need::RustSrc,
    Need::BpfLinker,
    Need::CargoDeny,
    Need::Packages,
    Need::Docker,
    Need::Consul,
    Need::Emulator,
];

/// Brings everything; an item that cannot be had does not keep the others from coming.
///
/// # Errors
/// Something is still missing; each item has told what and what to do.
pub(crate) fn run() -> Result<()> {
    let mut missing = 0_usize;
    for need in ALL {
        match present(*need) {
            Some(found) => report("present", *need, &found),
            None => match install(*need) {
                Ok(()) => {}
                Err(error) => {
                    missing += 1;
                    report("MISSING", *need, &format!("{error:#}"));
                }
            },
        }
    }
    note_bpffs();
    match missing {
        0 => Ok(()),
        1 => bail!("one item is missing: see above"),
        n => bail!("{n} items are missing: see above"),
    }
}

/// Where the item is, or `None` when it is missing.
pub(crate) fn present(need: Need) -> Option<String> {
    match need {
        Need::RustSrc => bpf::rust_src(),
        Need::BpfLinker => bpf::linker(),
        Need::CargoDeny => deny::present(),
        Need::Compilers => packages::present(Purpose::Build),
        Need::Packages => packages::present(Purpose::Test),
        Need::Docker => packages::present(Purpose::Docker),
        Need::Consul => consul::present(),
        Need::Emulator => packages::present(Purpose::Emulate),
    }
}

/// Brings one item and prints one line about it.
///
/// # Errors
/// It cannot be had; the message says what to do about it.
pub(crate) fn install(need: Need) -> Result<()> {
    let _lock = lock()?;
    // Whoever held the lock may have brought it.
    if present(need).is_some() {
        return Ok(());
    }
    let started = Instant::now();
    let how = match need {
        Need::RustSrc => bpf::install_rust_src(),
        Need::BpfLinker => bpf::install_linker(),
        Need::CargoDeny => deny::install(),
        Need::Compilers => packages::install(Purpose::Build),
        Need::Packages => packages::install(Purpose::Test),
        Need::Docker => packages::install(Purpose::Docker),
        Need::Consul => consul::install(),
        Need::Emulator => packages::install(Purpose::Emulate),
    }?;
    if present(need).is_none() {
        bail!("it is still missing after: {how}");
    }
    report("installed", need, &format!("{how} ({})", progress::duration(started.elapsed())));
    Ok(())
}

/// The items in the words of whoever reads the messages.
pub(crate) fn name(need: Need) -> &'static str {
    match need {
        Need::RustSrc => "rust-src",
        Need::BpfLinker => "bpf-linker",
        Need::CargoDeny => "cargo-deny",
        Need::Compilers => "compilers",
        Need::Packages => "packages",
        Need::Docker => "docker",
        Need::Consul => "consul",
        Need::Emulator => "emulator",
    }
}

fn report(what: &str, need: Need, detail: &str) {
    line(what, name(need), detail);
}

fn line(what: &str, item: &str, detail: &str) {
    let colour = match what {
        "present" | "installed" => "32",
        "MISSING" => "31",
        _ => "33",
    };
    // Standard error: a verb's own output stays clean when it brings something first.
    if std::io::stderr().is_terminal() {
        eprintln!("\x1b[{colour}m{what:<9}\x1b[0m  {item:<10}  {detail}");
    } else {
        eprintln!("{what:<9}  {item:<10}  {detail}");
    }
}

/// Tests and lab mount a bpffs of their own; only an agent on this machine needs this one.
fn note_bpffs() {
    if statfs("/sys/fs/bpf").is_ok_and(|fs| fs.filesystem_type() == BPF_FS_MAGIC) {
        line("present", "bpffs", "/sys/fs/bpf");
    } else {
        let mount = "mount -t bpf bpf /sys/fs/bpf";
        line("note", "bpffs", &format!("not mounted; only an agent run by hand needs it: {mount}"));
    }
}

/// Two verbs started together must not install the same thing into the same folder.
fn lock() -> Result<File> {
    let folder = tools::tools();
    std::fs::create_dir_all(&folder)
        .with_context(|| format!("cannot make {}", folder.display()))?;
    let path = folder.join("lock");
    let file = File::create(&path).with_context(|| format!("cannot make {}", path.display()))?;
    if file.try_lock().is_err() {
        eprintln!("waiting for another `cargo xtask` that is installing");
        file.lock().with_context(|| format!("cannot lock {}", path.display()))?;
    }
    Ok(file)
}
