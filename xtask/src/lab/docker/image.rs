//! The image `busybox` of the lab: made from what this machine has, so that nothing is pulled.

use std::collections::BTreeSet;
use std::fs;
use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};
use std::process::{self, Command};
use std::thread;

use anyhow::{Context as _, Result};
use serde_json::json;

use super::super::prepare::tool_path;
use crate::tools;

/// Name of the image, so that `docker run … busybox` is what it is everywhere.
pub(super) const NAME: &str = "busybox";
/// The image in the target folder, as `docker load` takes it; made where it is not there yet.
pub(super) fn archive() -> Result<PathBuf> {
    let busybox = tool_path("busybox", "busybox-static")?;
    let iperf3 = tool_path("iperf3", "iperf3")?;
    let mut files = BTreeSet::from([busybox.clone(), iperf3.clone()]);
    for program in [&busybox, &iperf3] {
        files.extend(libraries(program)?);
    }
    let folder = tools::target().join("lab");
    let archive = folder.join(format!("{NAME}-{:016x}.tar", fingerprint(&files)?));
    if archive.is_file() {
        return Ok(archive);
    }
    // Threads and processes that come at once make it twice rather than wait; the last one stays.
    let thread = format!("{:?}", thread::current().id()).replace(['(', ')'], "");
    let stage = folder.join(format!("{NAME}-{}-{thread}", process::id()));
    let made = make(&stage, &busybox, &files).and_then(|new| Ok(fs::rename(new, &archive)?));
    made.with_context(|| format!("make {}", archive.display()))?;
    fs::remove_dir_all(&stage).with_context(|| format!("remove {}", stage.display()))?;
    Ok(archive)
}

/// Makes the image in a folder: its one layer, its settings, and the list of both.
fn make(stage: &Path, busybox: &Path, files: &BTreeSet<PathBuf>) -> Result<PathBuf> {
    let root = stage.join("root");
    lay_out(&root, busybox, files)?;
    let layer = stage.join("layer.tar");
    tools::output(Command::new("tar").arg("-C").arg(&root).arg("-cf").arg(&layer).arg("."))?;
    let sum = tools::output(Command::new("sha256sum").arg(&layer))?;
    let sum = sum.split(' ').next().unwrap_or_default();
    let architecture = match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    };
    let settings = json!({
        "architecture": architecture,
        "os": "linux",
        "config": {
            "Cmd": ["sh"],
            "Env": ["PATH=/bin"],
            // A shell ignores SIGTERM as process 1: each `docker stop` would take ten seconds.
            "StopSignal": "SIGKILL",
        },
        "rootfs": { "type": "layers", "diff_ids": [format!("sha256:{sum}")] },
    });
    let list = json!([{
        "Config": "config.json",
        "RepoTags": [format!("{NAME}:latest")],
        "Layers": ["layer.tar"],
    }]);
    fs::write(stage.join("config.json"), settings.to_string())?;
    fs::write(stage.join("manifest.json"), list.to_string())?;
    let image = stage.join("image.tar");
    let mut tar = Command::new("tar");
    tar.arg("-C").arg(stage).arg("-cf").arg(&image);
    tools::output(tar.args(["manifest.json", "config.json", "layer.tar"]))?;
    Ok(image)
}

/// The shared libraries of a program, and its loader; none where it is static.
fn libraries(program: &Path) -> Result<Vec<PathBuf>> {
    let output = Command::new("ldd").arg(program).output().context("cannot run ldd")?;
    // `libc.so.6 => /lib/x86_64-linux-gnu/libc.so.6 (0x…)`, `/lib64/ld-linux-x86-64.so.2 (0x…)`.
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let words = text.split_whitespace().filter(|word| word.starts_with('/'));
    // Of a static program it says "not a dynamic executable", in some versions with its name.
    Ok(words.filter(|word| word.contains(".so")).map(PathBuf::from).collect())
}

/// What tells one state of the files from another.
fn fingerprint(files: &BTreeSet<PathBuf>) -> Result<u64> {
    let mut hasher = DefaultHasher::new();
    for file in files {
        file.hash(&mut hasher);
        fs::read(file)
            .with_context(|| format!("cannot read {}", file.display()))?
            .hash(&mut hasher);
    }
    Ok(hasher.finish())
}

/// Lays out the image's files: the programs in `/bin` with busybox under all its names, libraries where
/// their loader looks for them.
fn lay_out(root: &Path, busybox: &Path, files: &BTreeSet<PathBuf>) -> Result<()> {
    let bin = root.join("bin");
    for folder in ["bin", "tmp", "etc", "root"] {
        fs::create_dir_all(root.join(folder))?;
    }
    fs::set_permissions(root.join("tmp"), fs::Permissions::from_mode(0o1777))?;
    for file in files {
        let is_library = file.to_string_lossy().contains(".so");
        let to = if is_library {
            root.join(file.strip_prefix("/").unwrap_or(file))
        } else {
            bin.join(file.file_name().unwrap_or_default())
        };
        fs::create_dir_all(to.parent().unwrap_or(root))?;
        fs::copy(file, to).with_context(|| format!("copy {}", file.display()))?;
    }
    for name in tools::output(Command::new(busybox).arg("--list"))?.lines() {
        let link = bin.join(name);
        if !link.exists() {
            symlink(NAME, link)?;
        }
    }
    Ok(())
}
