//! House rules that no compiler knows.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};

use super::Findings;
use crate::tools;

/// Lines of a file that are worth a warning, and those that are too many.
const LONG: usize = 400;
const TOO_LONG: usize = 500;

/// Clients that only one folder of the agent may name, so that the rest can be tested without.
const BOUNDARIES: &[(&str, &[&str])] = &[
    ("datapath", &["aya", "aya_log", "aya_obj"]),
    ("consul", &["consulrs", "rustify", "rustify_derive"]),
    ("net", &["rtnetlink", "netlink_packet_route", "netlink_sys", "ethtool", "genetlink"]),
    ("docker", &["bollard"]),
    ("firewall", &["nftables"]),
];

/// A crate takes the workspace's lints only when it says so.
pub(super) fn lint_settings() -> Result<Findings> {
    let mut findings = Findings::default();
    for manifest in files("toml")? {
        if manifest.file_name().is_none_or(|name| name != "Cargo.toml") {
            continue;
        }
        let text = read(&manifest)?;
        let is_crate = text.contains("[package]");
        if is_crate && !text.contains("[lints]\nworkspace = true") {
            findings
                .errors
                .push(format!("{} lacks `[lints]` with `workspace = true`", shown(&manifest)));
        }
    }
    Ok(findings)
}

/// A file that cannot be read at one sitting does too much.
pub(super) fn file_lengths() -> Result<Findings> {
    let mut findings = Findings::default();
    for file in files("rs")? {
        let lines = read(&file)?.lines().count();
        let line = format!("{} has {lines} lines", shown(&file));
        if lines > TOO_LONG {
            findings.errors.push(format!("{line}, more than {TOO_LONG}"));
        } else if lines > LONG {
            findings.warnings.push(format!("{line}, more than {LONG}"));
        }
    }
    Ok(findings)
}

/// Each outside interface has one folder that speaks to it.
pub(super) fn boundaries() -> Result<Findings> {
    let mut findings = Findings::default();
    let agent = tools::workspace().join("ovnet-agent/src");
    for file in files("rs")?.iter().filter(|file| file.starts_with(&agent)) {
        for (number, line) in read(file)?.lines().enumerate() {
            for (folder, crates) in BOUNDARIES {
                if file.starts_with(agent.join(folder)) {
                    continue;
                }
                if let Some(name) = crates.iter().find(|name| names(line, name)) {
                    findings.errors.push(format!(
                        "{}:{} names {name}, which belongs under ovnet-agent/src/{folder}/",
                        shown(file),
                        number + 1
                    ));
                }
            }
        }
    }
    Ok(findings)
}

/// Whether a line of code uses a crate by its path.
fn names(line: &str, name: &str) -> bool {
    let code = line.split("//").next().unwrap_or_default();
    code.match_indices(&format!("{name}::")).any(|(at, _)| {
        let before = code.get(..at).unwrap_or_default().chars().next_back();
        before.is_none_or(|c| !c.is_alphanumeric() && c != '_')
            // `crate::consul::aya::` would be a module of ours.
            && !code.get(..at).unwrap_or_default().ends_with("crate::")
    })
}

/// The project's files with an extension: all folders but the build's and hidden ones.
fn files(extension: &str) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    let mut folders = vec![tools::workspace().to_owned()];
    while let Some(folder) = folders.pop() {
        let entries =
            fs::read_dir(&folder).with_context(|| format!("reading {}", folder.display()))?;
        for entry in entries {
            let path = entry.with_context(|| format!("reading {}", folder.display()))?.path();
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            if path.is_symlink() || name.starts_with('.') || name == "target" {
                continue;
            }
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|found| found == extension) {
                found.push(path);
            }
        }
    }
    found.sort();
    Ok(found)
}

fn read(path: &Path) -> Result<String> {
    fs::read_to_string(path).with_context(|| format!("reading {}", path.display()))
}

fn shown(path: &Path) -> String {
    path.strip_prefix(tools::workspace()).unwrap_or(path).display().to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_crate_is_named_by_a_path_that_starts_with_it() {
        assert!(names("use aya::maps::Map;", "aya"));
        assert!(names("fn f(m: &aya::Ebpf) {}", "aya"));
        assert!(!names("use papaya::HashMap;", "aya"));
        assert!(!names("// as aya::Ebpf does", "aya"));
        assert!(!names("use crate::consul::Consul;", "consulrs"));
    }
}
