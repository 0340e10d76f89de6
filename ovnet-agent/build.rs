//! Compiles the eBPF programs into `OUT_DIR/ovnet-ebpf`, which the agent embeds.
//!
//! The programs are built by the pinned stable toolchain, which must be told to allow
//! `-Z build-std`. Setting `RUSTC_BOOTSTRAP` here keeps that away from all other crates.

use std::env;
use std::ffi::{OsStr, OsString};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, anyhow, bail};
use aya_build::{Package, Toolchain};

const PROGRAMS: &str = "ovnet-ebpf";

fn main() {
    if let Err(error) = build() {
        // Cargo shows this as one error line, without the build script's whole output.
        println!("cargo::error={}", format!("{error:#}").replace('\n', "; "));
    }
}

fn build() -> Result<()> {
    println!("cargo::rerun-if-env-changed=AYA_BUILD_SKIP");
    println!("cargo::rerun-if-env-changed=CARGO_TARGET_DIR");
    println!("cargo::rerun-if-changed=build.rs");
    let workspace = Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .context("the agent's crate is not in a workspace")?;

    if env::var("AYA_BUILD_SKIP").is_ok_and(|v| v == "1" || v.eq_ignore_ascii_case("true")) {
        let folder = env::var_os("OUT_DIR").context("OUT_DIR is not set")?;
        let object = Path::new(&folder).join(PROGRAMS);
        println!("cargo::warning=AYA_BUILD_SKIP is set: this agent has no eBPF programs");
        return fs::write(&object, b"").with_context(|| format!("writing {}", object.display()));
    }

    let pin = workspace.join("rust-toolchain.toml");
    println!("cargo::rerun-if-changed={}", pin.display());
    let text = fs::read_to_string(&pin).with_context(|| format!("reading {}", pin.display()))?;
    let toolchain = text
        .lines()
        .find_map(|line| line.strip_prefix("channel = \"")?.strip_suffix('"'))
        .with_context(|| format!("{} has no channel", pin.display()))?;

    let path = path(workspace)?;
    let missing = missing(&path, toolchain);
    if !missing.is_empty() {
        bail!(
            "the eBPF programs need {}, which this machine lacks: run `cargo xtask setup`",
            missing.join(" and ")
        );
    }

    // SAFETY: the build script has no other thread yet.
    unsafe {
        env::set_var("RUSTC_BOOTSTRAP", "1");
        env::set_var("PATH", &path);
        // Its progress would be repeated as warnings of the agent by every build after this one.
        env::set_var("CARGO_TERM_QUIET", "true");
    }
    let programs = Package { name: PROGRAMS, root_dir: "../ovnet-ebpf", ..Package::default() };
    aya_build::build_ebpf([programs], Toolchain::Custom(toolchain)).map_err(|error| {
        // The whole command, which is of use only to whoever looks into the build itself.
        println!("cargo::warning={}", format!("{error:#}").replace('\n', "; "));
        anyhow!("the eBPF programs do not compile: the warnings above say why")
    })
}

/// `PATH` with the folders first that `cargo xtask setup` puts its tools in.
fn path(workspace: &Path) -> Result<OsString> {
    let mut folders = Vec::new();
    if let Some(target) = env::var_os("CARGO_TARGET_DIR") {
        folders.push(PathBuf::from(target).join("tools/bin"));
    }
    folders.push(workspace.join("target/tools/bin"));
    folders.extend(env::split_paths(&env::var_os("PATH").unwrap_or_default()));
    env::join_paths(folders).context("a folder of the build has a colon in its name")
}

/// The names of what is not there.
fn missing(path: &OsStr, toolchain: &str) -> Vec<&'static str> {
    let find = |name: &str| {
        env::split_paths(path).map(|folder| folder.join(name)).find(|file| file.is_file())
    };
    let mut missing = Vec::new();
    match find("bpf-linker") {
        Some(linker) => println!("cargo::rerun-if-changed={}", linker.display()),
        None => missing.push("bpf-linker"),
    }
    // As aya-build does: by rustup where there is one, else the compiler that is there.
    let mut rustc = match find("rustup") {
        Some(rustup) => {
            let mut command = Command::new(rustup);
            command.args(["run", toolchain, "rustc"]);
            command
        }
        None => Command::new(env::var_os("RUSTC").unwrap_or_else(|| "rustc".into())),
    };
    let has_source = rustc.args(["--print", "sysroot"]).output().is_ok_and(|output| {
        let sysroot = String::from_utf8_lossy(&output.stdout).trim().to_owned();
        Path::new(&sysroot).join("lib/rustlib/src/rust/library/core/src/lib.rs").is_file()
    });
    if !has_source {
        missing.push("rust-src");
    }
    missing
}
