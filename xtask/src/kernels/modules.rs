//! Which of a kernel's modules its guest loads, and in which order.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, bail};

use crate::tools;

/// What the agent, the lab and the tests take that Debian builds as modules. A host loads them by
/// itself when something asks for them; a guest, which has neither modprobe nor its tables, at once.
const WANTED: [&str; 14] = [
    "veth",
    "vxlan",
    "bridge",
    "br_netfilter",
    "nf_tables",
    "nft_chain_nat",
    "nft_nat",
    "nft_masq",
    "nft_ct",
    "nft_fib_ipv4",
    "nf_conntrack_netlink",
    "cls_bpf",
    "sch_ingress",
    "dummy",
];

/// A module: its name, and what the kernel is given to load it.
pub(super) type Module = (String, Vec<u8>);

/// The wanted modules below a folder and what they depend on, each after what it depends on. One
/// that is not there is built in, or a test will tell that it is missing.
///
/// # Errors
/// A file cannot be read, or unpacked.
pub(super) fn wanted(folder: &Path) -> Result<Vec<Module>> {
    let mut files = BTreeMap::new();
    collect(folder, &mut files)?;
    let mut modules = Vec::new();
    for name in WANTED {
        add(name, &files, &mut modules)?;
    }
    if modules.is_empty() {
        bail!("{} has none of the modules a test needs", folder.display());
    }
    Ok(modules)
}

fn add(name: &str, files: &BTreeMap<String, PathBuf>, modules: &mut Vec<Module>) -> Result<()> {
    let Some(file) = files.get(name) else { return Ok(()) };
    if modules.iter().any(|(known, _)| known == name) {
        return Ok(());
    }
    let content = unpacked(file)?;
    for needed in depends(&content) {
        add(&needed, files, modules)?;
    }
    modules.push((name.to_owned(), content));
    Ok(())
}

/// All modules below a folder by their names, in which the kernel takes `-` for `_`.
fn collect(folder: &Path, files: &mut BTreeMap<String, PathBuf>) -> Result<()> {
    let entries = fs::read_dir(folder).with_context(|| format!("list {}", folder.display()))?;
    for entry in entries {
        let path = entry.with_context(|| format!("list {}", folder.display()))?.path();
        if path.is_dir() {
            collect(&path, files)?;
        } else if let Some((name, _)) =
            path.file_name().and_then(|name| name.to_str()?.split_once(".ko"))
        {
            files.insert(name.replace('-', "_"), path.clone());
        }
    }
    Ok(())
}

/// The module itself: Debian has compressed them since its version 13.
fn unpacked(file: &Path) -> Result<Vec<u8>> {
    let unpacker = match file.extension().and_then(|extension| extension.to_str()) {
        Some("xz") => "xz",
        Some("zst") => "zstd",
        Some("gz") => "gzip",
        _ => return fs::read(file).with_context(|| format!("cannot read {}", file.display())),
    };
    let program = tools::find(unpacker).with_context(|| format!("{unpacker} is not installed"))?;
    let output = Command::new(program).arg("-dc").arg(file).output();
    let output = output.with_context(|| format!("run {unpacker}"))?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        bail!("{unpacker} of {}: {}", file.display(), said.trim());
    }
    Ok(output.stdout)
}

/// What a module says of itself in its section `.modinfo`: `depends=a,b` between zeroes.
fn depends(module: &[u8]) -> Vec<String> {
    const MARK: &[u8] = b"\0depends=";
    let Some(at) = module.windows(MARK.len()).position(|window| window == MARK) else {
        return Vec::new();
    };
    let list = module.get(at + MARK.len()..).unwrap_or_default();
    let list = list.split(|byte| *byte == 0).next().unwrap_or_default();
    let names = String::from_utf8_lossy(list);
    let names = names.split(',').filter(|name| !name.is_empty());
    names.map(|name| name.replace('-', "_")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_module_depends_on_is_read_from_itself() {
        let module = b"\x7fELF\0license=GPL\0depends=udp_tunnel,ip6-udp-tunnel\0retpoline=Y\0";
        assert_eq!(depends(module), ["udp_tunnel", "ip6_udp_tunnel"]);
        assert_eq!(depends(b"\0license=GPL\0depends=\0"), [""; 0]);
        assert_eq!(depends(b"no module"), [""; 0]);
    }

    #[test]
    fn a_module_comes_after_what_it_depends_on_and_once() {
        let folder = std::env::temp_dir().join(format!("ovnet-modules-{}", std::process::id()));
        fs::create_dir_all(folder.join("net")).unwrap();
        for (file, needs) in
            [("net/vxlan.ko", "udp-tunnel"), ("udp_tunnel.ko", ""), ("veth.ko", "")]
        {
            fs::write(folder.join(file), format!("\0depends={needs}\0")).unwrap();
        }
        let found = wanted(&folder);
        fs::remove_dir_all(&folder).unwrap();
        let names: Vec<String> = found.unwrap().into_iter().map(|(name, _)| name).collect();
        assert_eq!(names, ["veth", "udp_tunnel", "vxlan"]);
    }
}
