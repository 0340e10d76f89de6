//! Debian packages: downloaded and unpacked into the project's own folder, or installed.
//!
//! Only [`Apt::install`] changes the machine, and nothing here changes its package sources.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, bail};

use crate::{progress, tools};

/// apt with a certain configuration.
pub(super) struct Apt {
    /// A configuration file read after the machine's own.
    config: Option<PathBuf>,
    /// Who this is, for messages and the name of the log.
    label: String,
}

impl Apt {
    /// apt as the machine has it.
    pub(super) fn machine() -> Self {
        Self { config: None, label: "apt".to_owned() }
    }

    /// apt with package lists and a cache of its own under the tools folder, for which one need
    /// not be root. `sources` is in the deb822 format of apt's `*.sources` files; without it the
    /// machine's own sources are read.
    pub(super) fn private(name: &str, sources: Option<&str>) -> Result<Self> {
        let root = tools::tools().join("apt").join(name);
        for folder in ["state/lists/partial", "cache/archives/partial", "sources"] {
            let folder = root.join(folder);
            fs::create_dir_all(&folder)
                .with_context(|| format!("cannot make {}", folder.display()))?;
        }
        let mut config = format!(
            "Dir::State \"{0}/state\";\n\
             Dir::State::status \"/var/lib/dpkg/status\";\n\
             Dir::Cache \"{0}/cache\";\n\
             Acquire::Languages \"none\";\n\
             // The download user of apt may not look into a home folder.\n\
             APT::Sandbox::User \"root\";\n\
             // Container images hook a cleaning of the machine's own cache in here.\n\
             #clear APT::Update::Post-Invoke;\n\
             #clear APT::Update::Post-Invoke-Success;\n",
            root.display()
        );
        if let Some(sources) = sources {
            config.push_str(&format!(
                "Dir::Etc::sourcelist \"/dev/null\";\n\
                 Dir::Etc::sourceparts \"{0}/sources\";\n\
                 Dir::Etc::preferencesparts \"/dev/null\";\n",
                root.display()
            ));
            write(&root.join("sources/ovnet.sources"), sources)?;
        }
        let file = root.join("apt.conf");
        write(&file, &config)?;
        Ok(Self { config: Some(file), label: format!("apt-{name}") })
    }

    /// Reads the package lists again.
    pub(super) fn update(&self) -> Result<()> {
        let mut command = self.get();
        command.args(["-o", "APT::Update::Error-Mode=any", "update"]);
        progress::run("reading package lists", &mut command, &self.log("update"))
    }

    /// Whether apt knows each of the packages (`name` or `name=version`) in any version.
    pub(super) fn knows(&self, packages: &[&str]) -> bool {
        packages.iter().all(|package| {
            let name = package.split('=').next().unwrap_or_default();
            let mut command = self.command("apt-cache");
            command.args(["policy", name]).env("LC_ALL", "C");
            tools::output(&mut command).is_ok_and(|policy| {
                policy.lines().any(|line| {
                    line.trim().strip_prefix("Candidate: ").is_some_and(|v| v != "(none)")
                })
            })
        })
    }

    /// The versions that apt knows of a package, newest first.
    pub(super) fn versions(&self, package: &str) -> Vec<String> {
        let mut command = self.command("apt-cache");
        let known = tools::output(command.args(["madison", package])).unwrap_or_default();
        known.lines().filter_map(|line| Some(line.split('|').nth(1)?.trim().to_owned())).collect()
    }

    /// What a package cannot do without: the names in its `Depends`, alternatives and versions left
    /// out.
    pub(super) fn depends(&self, package: &str) -> Vec<String> {
        let mut command = self.command("apt-cache");
        let shown = tools::output(command.args(["show", "--no-all-versions", package]));
        let shown = shown.unwrap_or_default();
        let depends = shown.lines().find_map(|line| line.strip_prefix("Depends: "));
        let names = depends.unwrap_or_default().split(", ");
        names.filter_map(|name| name.split_whitespace().next()).map(str::to_owned).collect()
    }

    /// Downloads the packages (`name` or `name=version`) and unpacks them below `root`.
    pub(super) fn unpack(&self, packages: &[&str], root: &Path) -> Result<()> {
        let debs = tools::tools().join("apt/debs");
        // What an interrupted run left is of unknown version.
        let _ = fs::remove_dir_all(&debs);
        fs::create_dir_all(&debs).with_context(|| format!("cannot make {}", debs.display()))?;
        let mut command = self.get();
        command.args(["-o", "APT::Sandbox::User=root", "download"]).args(packages);
        command.current_dir(&debs);
        let label = format!("downloading {}", packages.join(" "));
        progress::run(&label, &mut command, &self.log("download"))?;
        for entry in fs::read_dir(&debs).with_context(|| format!("reading {}", debs.display()))? {
            unpack_file(&entry?.path(), root)?;
        }
        fs::remove_dir_all(&debs).with_context(|| format!("removing {}", debs.display()))
    }

    /// Installs packages on the machine, without recommended ones. Needs root.
    pub(super) fn install(&self, packages: &[&str]) -> Result<()> {
        if !self.knows(packages) {
            self.update()?;
        }
        if self.try_install(packages).is_err() {
            // The lists may name versions that the mirror has replaced.
            self.update()?;
            self.try_install(packages)?;
        }
        Ok(())
    }

    fn try_install(&self, packages: &[&str]) -> Result<()> {
        let mut command = self.get();
        command.args(["-y", "--no-install-recommends", "install"]).args(packages);
        command.args(["-o", "DPkg::Lock::Timeout=120"]);
        let label = format!("installing {}", packages.join(" "));
        progress::run(&label, &mut command, &self.log("install"))
    }

    fn get(&self) -> Command {
        let mut command = self.command("apt-get");
        command.args(["-o", "Acquire::Retries=3"]);
        command
    }

    fn command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        command.env("DEBIAN_FRONTEND", "noninteractive");
        if let Some(config) = &self.config {
            command.arg("-c").arg(config);
        }
        command
    }

    fn log(&self, verb: &str) -> PathBuf {
        tools::tools().join(format!("log/{}-{verb}", self.label))
    }
}

/// Downloads packages with the machine's package lists or, where these do not know them or are
/// out of date, with fresh ones of our own; unpacks them below `root`.
pub(super) fn unpack(packages: &[&str], root: &Path) -> Result<()> {
    if tools::find("apt-get").is_none() || tools::find("dpkg").is_none() {
        bail!("there is no apt here");
    }
    let machine = Apt::machine();
    if machine.knows(packages) && machine.unpack(packages, root).is_ok() {
        return Ok(());
    }
    let fresh = Apt::private("fresh", None)?;
    fresh.update()?;
    if !fresh.knows(packages) {
        bail!("this machine's package sources do not have {}", packages.join(", "));
    }
    fresh.unpack(packages, root)
}

/// Unpacks a package file below `root`, without installing it.
pub(super) fn unpack_file(deb: &Path, root: &Path) -> Result<()> {
    fs::create_dir_all(root).with_context(|| format!("cannot make {}", root.display()))?;
    let name = deb.file_name().unwrap_or_default().to_string_lossy();
    let mut command = Command::new("dpkg");
    command.arg("-x").arg(deb).arg(root);
    progress::run(&format!("unpacking {name}"), &mut command, &tools::tools().join("log/unpack"))
}

/// Writes only when it changes something: apt reads its lists again when a source is newer.
fn write(path: &Path, text: &str) -> Result<()> {
    if fs::read_to_string(path).is_ok_and(|old| old == text) {
        return Ok(());
    }
    fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))
}
