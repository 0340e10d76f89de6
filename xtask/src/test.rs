//! `cargo xtask test`: the layers of tests, and one summary over all of them.
//!
//! A layer is found by name: `tests/tests/<layer>*.rs`. What is skipped says so by a line
//! `SKIP name: why`; libtest counts such a test as passed, the summary here does not.

use std::env;
use std::fs;
use std::io::{Read as _, Write as _};
use std::process::{Command, ExitStatus, Stdio};
use std::time::Instant;

use anyhow::{Context as _, Result, bail};
use clap::ValueEnum;

use crate::kernels::{self, Depth};
use crate::report::Report;
use crate::tools::{self, Need};
use crate::{build_verb, progress};

/// Arguments of `cargo xtask test`.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Which tests.
    #[arg(value_enum, default_value_t = Layer::All)]
    layer: Layer,
    /// Only tests whose name contains this.
    filter: Option<String>,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Layer {
    /// Pure code and the documentation's examples; needs no privilege.
    Unit,
    /// The eBPF programs, one packet at a time, by BPF_PROG_TEST_RUN.
    Bpf,
    /// Hosts as network namespaces, real traffic.
    Net,
    /// A real Consul.
    Consul,
    /// Real Docker daemons, on hosts as namespaces.
    Docker,
    /// Whatever can fail, failing under running traffic.
    Faults,
    /// The programs, and hosts with traffic, on Debian's kernels in an emulator; takes minutes.
    Kernels,
    /// All of them; on other kernels only whether the agent starts there.
    All,
}

/// The layers in the order they are run: the quick ones first.
const LAYERS: &[Layer] = &[
    Layer::Unit,
    Layer::Bpf,
    Layer::Kernels,
    Layer::Consul,
    Layer::Net,
    Layer::Docker,
    Layer::Faults,
];

/// Runs the layers, and prints the summary last.
///
/// # Errors
/// A test failed, or was skipped although `OVNET_REQUIRE_ALL=1`, or a layer could not be run.
pub(crate) fn run(args: &Args) -> Result<()> {
    let layers: Vec<Layer> = match args.layer {
        Layer::All => LAYERS.to_vec(),
        one => vec![one],
    };
    let started = Instant::now();
    let mut report = Report::default();
    prepare(&layers)?;
    for layer in layers {
        println!("\n=== {} ===", layer.name());
        if layer == Layer::Kernels {
            let depth = if args.layer == Layer::All { Depth::Start } else { Depth::All };
            kernels::run(depth, args.filter.as_deref(), &mut report)?;
            continue;
        }
        for command in layer.commands(args.filter.as_deref())? {
            run_cargo(layer, command, &mut report)?;
        }
    }
    println!("\n=== summary, after {} ===", progress::duration(started.elapsed()));
    print!("{report}");
    let required = env::var("OVNET_REQUIRE_ALL").is_ok_and(|v| v == "1");
    if report.failed() > 0 {
        bail!("{} failed", report.failed());
    }
    if required && report.skipped() > 0 {
        bail!("OVNET_REQUIRE_ALL=1 asks for all tests, and {} skipped", report.skipped());
    }
    Ok(())
}

/// Brings the tools, and builds the binaries that the layers beyond `unit` run.
fn prepare(layers: &[Layer]) -> Result<()> {
    tools::ensure(tools::TO_BUILD)?;
    if layers == [Layer::Unit] {
        return Ok(());
    }
    if !tools::is_root() {
        eprintln!("note: not root: tests that need a privilege will be skipped, and say so");
    }
    // Tests skip or fail one by one for what is missing, which tells more than stopping here.
    let docker = layers.contains(&Layer::Docker).then_some(Need::Docker);
    for need in [Need::Packages, Need::Consul].into_iter().chain(docker) {
        if let Err(error) = tools::ensure(&[need]) {
            eprintln!("note: {error:#}");
        }
    }
    build_verb::agent(false)?;
    Ok(())
}

impl Layer {
    fn name(self) -> &'static str {
        match self {
            Self::Unit => "unit",
            Self::Bpf => "bpf",
            Self::Net => "net",
            Self::Consul => "consul",
            Self::Docker => "docker",
            Self::Faults => "faults",
            Self::Kernels => "kernels",
            Self::All => "all",
        }
    }

    /// The cargo commands of the layer.
    fn commands(self, filter: Option<&str>) -> Result<Vec<Command>> {
        let mut selections: Vec<Vec<String>> = Vec::new();
        let words = |text: &str| text.split(' ').map(str::to_owned).collect::<Vec<_>>();
        if self == Self::Unit {
            selections.push(words("--workspace --exclude ovnet-tests"));
            selections.push(words("--package ovnet-tests --lib"));
        } else {
            let binaries = binaries(self)?;
            if binaries.is_empty() {
                println!("no tests/tests/{}*.rs yet", self.name());
                return Ok(Vec::new());
            }
            let mut selection = words("--package ovnet-tests");
            for binary in binaries {
                selection.extend(["--test".to_owned(), binary]);
            }
            selections.push(selection);
        }
        if self == Self::Docker && filter.is_none() {
            // What other versions of Docker send was recorded, and is replayed without one.
            selections.push(words("--package ovnet-agent --lib docker::plugin"));
        }
        let command = |selection| {
            let mut command = tools::cargo();
            command.args(["test", "--no-fail-fast"]).args::<Vec<String>, _>(selection);
            command.args(filter).args(["--", "--show-output"]);
            // Traffic and timing of one test must not starve another's; Consul takes two, and so
            // does Docker, whose tests wait much.
            match self {
                Self::Net | Self::Faults => _ = command.arg("--test-threads=1"),
                Self::Consul | Self::Docker => _ = command.arg("--test-threads=2"),
                Self::Unit | Self::Bpf | Self::Kernels | Self::All => {}
            }
            command
        };
        Ok(selections.into_iter().map(command).collect())
    }
}

/// The test binaries of a layer, by the names of their files.
fn binaries(layer: Layer) -> Result<Vec<String>> {
    let folder = tools::workspace().join("tests/tests");
    let mut found = Vec::new();
    for entry in fs::read_dir(&folder).into_iter().flatten() {
        let path = entry.with_context(|| format!("reading {}", folder.display()))?.path();
        let is_test = path.extension().is_some_and(|e| e == "rs") || path.join("main.rs").is_file();
        let Some(name) = path.file_stem().and_then(|name| name.to_str()).filter(|_| is_test) else {
            continue;
        };
        let Some(of) = LAYERS.iter().skip(1).find(|layer| name.starts_with(layer.name())) else {
            bail!(
                "{} is in no layer: its name starts with none of bpf, consul, net, docker, faults, \
                 kernels",
                path.display()
            );
        };
        if *of == layer {
            found.push(name.to_owned());
        }
    }
    found.sort();
    Ok(found)
}

/// Runs one cargo command. One that fails without saying which test did counts as a failure.
fn run_cargo(layer: Layer, command: Command, report: &mut Report) -> Result<()> {
    let shown = tools::show(&command);
    let failed_before = report.failed();
    let status = stream(layer.name(), command, report, &mut |_| {})?;
    if !status.success() && report.failed() == failed_before {
        // It did not compile, or a test took its whole process down.
        report.broken(layer.name(), &format!("`{shown}` ended with {status}"));
    }
    Ok(())
}

/// Runs a command that prints what test binaries do, and shows that as it comes, but for the
/// captured output of tests that passed, which is read for SKIP lines only. Each whole line is also
/// given to `look`.
///
/// # Errors
/// The command cannot be started, or its output not be read. That it fails is no error.
pub(crate) fn stream(
    layer: &str,
    mut command: Command,
    report: &mut Report,
    look: &mut dyn FnMut(&str),
) -> Result<ExitStatus> {
    let shown = tools::show(&command);
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .with_context(|| format!("cannot run `{shown}`"))?;
    let mut pipe = child.stdout.take().context("cargo has no standard output")?;
    let mut out = std::io::stdout();
    let mut chunk = [0; 4096];
    let mut line = Vec::new();
    // How much of the line has been shown before its end came.
    let mut ahead = 0;
    loop {
        let read = pipe.read(&mut chunk).with_context(|| format!("reading from `{shown}`"))?;
        if read == 0 {
            // A test that took its process down leaves a line without an end.
            let rest = String::from_utf8_lossy(&line);
            report.line(layer, rest.trim_end());
            break;
        }
        for byte in chunk.iter().take(read) {
            line.push(*byte);
            if *byte == b'\n' {
                let text = String::from_utf8_lossy(&line);
                look(text.trim_end());
                if report.line(layer, text.trim_end()) {
                    out.write_all(line.get(ahead..).unwrap_or_default())?;
                }
                line.clear();
                ahead = 0;
            }
        }
        // One thread: libtest names a test before it runs it, which shows what hangs.
        if line.starts_with(b"test ") && report.shows() {
            out.write_all(line.get(ahead..).unwrap_or_default())?;
            ahead = line.len();
        }
        out.flush()?;
    }
    report.end_of_binary(layer);
    child.wait().with_context(|| format!("waiting for `{shown}`"))
}
