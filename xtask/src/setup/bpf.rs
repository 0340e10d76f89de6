//! What compiles the eBPF programs: the source of `core`, LLVM and bpf-linker.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, bail};

use super::apt::{self, Apt};
use crate::{progress, tools};

/// The newest that builds with the pinned toolchain.
const LINKER_VERSION: &str = "0.13.0";
/// The LLVM of the pinned compiler: bpf-linker reads its bitcode, so it must not be an older one.
const LLVM: &str = "22";
/// What llvm-sys asks its prefix by.
const LLVM_PREFIX: &str = "LLVM_SYS_221_PREFIX";

/// Libraries that LLVM itself needs, and the Debian packages that they are in.
const LLVM_NEEDS: &[(&str, &str)] = &[
    ("libedit.so", "libedit2"),
    ("libffi.so", "libffi8"),
    ("libstdc++.so", "libstdc++6"),
    ("libxml2.so", "libxml2"),
    ("libz.so", "zlib1g"),
    ("libz3.so", "libz3-4"),
    ("libzstd.so", "libzstd1"),
];

/// Where the compiler looks for the source of `core`, when it is there.
pub(super) fn rust_src() -> Option<String> {
    let library = library(&sysroot().ok()?);
    library.join("core/src/lib.rs").is_file().then(|| library.display().to_string())
}

/// Brings rust-src by rustup, else from the distribution's package of the same version.
pub(super) fn install_rust_src() -> Result<String> {
    let toolchain = tools::toolchain();
    let by_rustup = format!("rustup component add rust-src --toolchain {toolchain}");
    if let Some(rustup) = tools::find("rustup") {
        let mut command = Command::new(rustup);
        command.args(["component", "add", "rust-src", "--toolchain", toolchain]);
        let log = tools::tools().join("log/rustup");
        if progress::run("adding rust-src", &mut command, &log).is_ok() {
            return Ok(by_rustup);
        }
    }
    rust_src_package().with_context(|| {
        format!("install it by `{by_rustup}`, or the rust-src of your distribution's compiler")
    })
}

/// Debian packages the source of each compiler it ships; it must be the version we compile with.
fn rust_src_package() -> Result<String> {
    let version = tools::output(rustc().arg("--version"))?;
    let version = version.split_whitespace().nth(1).context("rustc tells no version")?;
    let (package, found) = ["rust-src", "rust-web-src"]
        .into_iter()
        .find_map(|package| {
            let versions = Apt::machine().versions(package);
            versions
                .into_iter()
                .find(|v| v.starts_with(&format!("{version}+")))
                .map(|v| (package, v))
        })
        .with_context(|| format!("no package has the source of rustc {version}"))?;
    let wanted = format!("{package}={found}");
    let sysroot = sysroot()?;
    if sysroot.starts_with("/usr") {
        if !tools::is_root() {
            bail!("run as root: apt-get install {wanted}");
        }
        Apt::machine().install(&[&wanted])?;
        return Ok(format!("apt-get install {wanted}"));
    }
    let root = tools::tools().join("rust-src");
    apt::unpack(&[&wanted], &root)?;
    let source = root.join(format!("usr/src/rustc-{version}"));
    let link = sysroot.join("lib/rustlib/src/rust");
    let parent = link.parent().unwrap_or(&sysroot);
    fs::create_dir_all(parent).with_context(|| format!("cannot make {}", parent.display()))?;
    std::os::unix::fs::symlink(&source, &link)
        .with_context(|| format!("cannot link {} to {}", link.display(), source.display()))?;
    Ok(format!("from {wanted}"))
}

/// Path and version of the bpf-linker that a build takes, when it is the right one and runs.
pub(super) fn linker() -> Option<String> {
    let linker = tools::find("bpf-linker")?;
    let version = tools::output(Command::new(&linker).arg("--version")).ok()?;
    (version.split_whitespace().nth(1) == Some(LINKER_VERSION))
        .then(|| format!("{}, {LINKER_VERSION}", linker.display()))
}

/// Compiles bpf-linker against Debian's LLVM, both in the project's own folder.
pub(super) fn install_linker() -> Result<String> {
    let tools = tools::tools();
    let root = tools.join("llvm");
    let packages = [format!("libllvm{LLVM}"), format!("llvm-{LLVM}"), format!("llvm-{LLVM}-dev")];
    let packages: Vec<&str> = packages.iter().map(String::as_str).collect();
    // Of unknown version, or without what the trimming below removed.
    let _ = fs::remove_dir_all(&root);
    apt::unpack(&packages, &root).with_context(|| {
        format!(
            "put a bpf-linker {LINKER_VERSION} on PATH, built with LLVM {LLVM} or newer \
             (https://github.com/aya-rs/bpf-linker)"
        )
    })?;
    let library = llvm_library(&root)?;
    bring_what_llvm_needs(&library)?;
    compile_linker(&tools, &root, &library)?;
    trim(&root);
    Ok(format!("bpf-linker {LINKER_VERSION} compiled against {}", packages.join(" ")))
}

fn compile_linker(tools: &Path, root: &Path, library: &Path) -> Result<()> {
    let prefix = root.join(format!("usr/lib/llvm-{LLVM}"));
    let folder = library.parent().context("libLLVM has no folder")?;
    let below = folder.strip_prefix(tools).context("LLVM is outside the tools folder")?;
    let path = env::join_paths(
        std::iter::once(prefix.join("bin")).chain(env::split_paths(&tools::path())),
    )
    .context("the project's path has a colon in it, which PATH cannot hold")?;
    let build = tools.join("build");
    let mut command = tools::cargo();
    command
        .args(["install", "bpf-linker", "--version", LINKER_VERSION, "--locked", "--force"])
        .args(["--no-default-features", "--features", &format!("llvm-{LLVM}")])
        .arg("--root")
        .arg(tools)
        .env("LLVM_PREFIX", &prefix)
        .env(LLVM_PREFIX, &prefix)
        .env("PATH", path)
        // Relative to the binary, so that the folder can be copied to another checkout.
        .env("RUSTFLAGS", format!("-C link-arg=-Wl,-rpath,$ORIGIN/../{}", below.display()))
        .env("CARGO_TARGET_DIR", &build);
    let log = tools.join("log/bpf-linker");
    progress::run(&format!("compiling bpf-linker {LINKER_VERSION}"), &mut command, &log)?;
    fs::remove_dir_all(&build).with_context(|| format!("removing {}", build.display()))
}

/// The shared library, which lies in a folder named by the architecture.
fn llvm_library(root: &Path) -> Result<PathBuf> {
    let lib = root.join("usr/lib");
    let folders = fs::read_dir(&lib).with_context(|| format!("reading {}", lib.display()))?;
    folders
        .flatten()
        .filter_map(|folder| fs::read_dir(folder.path()).ok())
        .flat_map(|files| files.flatten().map(|file| file.path()))
        .find(|path| {
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            // The other folder has links of this name.
            name.starts_with(&format!("libLLVM.so.{LLVM}")) && !path.is_symlink()
        })
        .with_context(|| format!("no libLLVM.so.{LLVM} in {}", lib.display()))
}

fn bring_what_llvm_needs(library: &Path) -> Result<()> {
    let linked = tools::output(Command::new("ldd").arg(library))?;
    let missing: Vec<&str> =
        linked.lines().filter(|line| line.contains("not found")).map(str::trim).collect();
    if missing.is_empty() {
        return Ok(());
    }
    let packages: Vec<&str> = LLVM_NEEDS
        .iter()
        .filter(|(library, _)| missing.iter().any(|line| line.starts_with(library)))
        .map(|(_, package)| *package)
        .collect();
    if packages.is_empty() {
        bail!("LLVM {LLVM} cannot be run here: {}", missing.join(", "));
    }
    if !tools::is_root() {
        bail!("run as root: apt-get install --no-install-recommends {}", packages.join(" "));
    }
    Apt::machine().install(&packages)
}

/// Half a gigabyte that only compiling bpf-linker needs. That some stays behind is no error.
fn trim(root: &Path) {
    let lib = root.join(format!("usr/lib/llvm-{LLVM}/lib"));
    for file in fs::read_dir(lib).into_iter().flatten().flatten() {
        if file.path().extension().is_some_and(|extension| extension == "a") {
            let _ = fs::remove_file(file.path());
        }
    }
    for folder in ["usr/include", "usr/share"] {
        let _ = fs::remove_dir_all(root.join(folder));
    }
}

fn library(sysroot: &Path) -> PathBuf {
    sysroot.join("lib/rustlib/src/rust/library")
}

fn sysroot() -> Result<PathBuf> {
    tools::output(rustc().args(["--print", "sysroot"])).map(PathBuf::from)
}

/// The compiler that aya-build takes for the programs: rustup's pinned one, else the only one.
fn rustc() -> Command {
    match tools::find("rustup") {
        Some(rustup) => {
            let mut command = Command::new(rustup);
            command.args(["run", tools::toolchain(), "rustc"]);
            command
        }
        None => Command::new("rustc"),
    }
}
