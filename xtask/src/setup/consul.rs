//! A real Consul: on PATH, from a file, from apt, or from an older Debian suite.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail};

use super::apt::{self, Apt};
use super::sources::{self, Mirror};
use crate::tools;

/// The last Debian release that has Consul under a free licence.
const SUITE: &str = "bullseye";
/// Names a package file to take Consul from, for machines without a network.
const FILE: &str = "OVNET_CONSUL_DEB";
const BY_HAND: &str = "put a consul binary on PATH (https://developer.hashicorp.com/consul/install), \
                       or name a Debian package file in OVNET_CONSUL_DEB";

/// Path and version of the Consul that is there.
pub(super) fn present() -> Option<String> {
    let consul = tools::find("consul")?;
    let said = tools::output(std::process::Command::new(&consul).arg("version")).ok()?;
    Some(format!("{}, {}", consul.display(), said.lines().next().unwrap_or_default()))
}

/// Brings Consul by the first way that works.
pub(super) fn install() -> Result<String> {
    let root = tools::tools().join("consul");
    let how = unpack(&root).context(BY_HAND)?;
    let from = root.join("usr/bin/consul");
    let bin = tools::tools().join("bin");
    fs::create_dir_all(&bin).with_context(|| format!("cannot make {}", bin.display()))?;
    fs::rename(&from, bin.join("consul"))
        .with_context(|| format!("{how}: no consul in it at {}", from.display()))?;
    fs::remove_dir_all(&root).with_context(|| format!("removing {}", root.display()))?;
    Ok(how)
}

fn unpack(root: &Path) -> Result<String> {
    let _ = fs::remove_dir_all(root);
    if let Some(file) = env::var_os(FILE).filter(|file| !file.is_empty()) {
        let file = PathBuf::from(file);
        if !file.is_file() {
            bail!("{FILE} names {}, which is no file", file.display());
        }
        apt::unpack_file(&file, root)?;
        return Ok(format!("unpacked from {}", file.display()));
    }
    if tools::find("apt-get").is_none() {
        bail!("there is no apt to take it from");
    }
    let machine = Apt::machine();
    if machine.knows(&["consul"]) {
        machine.unpack(&["consul"], root)?;
        return Ok("from this machine's package sources".to_owned());
    }
    let Mirror { uri, signed_by } = sources::debian_mirror()?;
    let source = format!(
        "Types: deb\nURIs: {uri}\nSuites: {SUITE}\nComponents: main\nSigned-By: {signed_by}\n"
    );
    let older = Apt::private(SUITE, Some(&source))?;
    older.update().with_context(|| format!("{uri} {SUITE}"))?;
    older.unpack(&["consul"], root)?;
    Ok(format!("from {uri} {SUITE}"))
}
