//! The systemd units of the package, as systemd itself reads them.

use std::{fs, path::Path, process::Command};

const BINARY: &str = "/usr/local/bin/ovnet-agent";

#[test]
fn systemd_finds_nothing_wrong_with_the_units() {
    let name = "systemd_finds_nothing_wrong_with_the_units";
    if Command::new("systemd-analyze").arg("--version").output().is_err() {
        println!("SKIP {name}: `systemd-analyze` (systemd) is not installed");
        let required = std::env::var_os("OVNET_REQUIRE_ALL").is_some_and(|value| value == "1");
        assert!(!required, "{name}: systemd-analyze is not installed");
        return;
    }
    let package = Path::new(env!("CARGO_MANIFEST_DIR")).join("package");
    let folder = tempfile::tempdir().unwrap();
    let mut verify = Command::new("systemd-analyze");
    verify.args(["verify", "--man=no"]);
    for unit in ["ovnet-agent.socket", "ovnet-agent.service"] {
        // It looks for the program, which is not installed here, at the path that is given.
        let text = fs::read_to_string(package.join(unit)).unwrap();
        let text = text.replace(BINARY, env!("CARGO_BIN_EXE_ovnet-agent"));
        let copy = folder.path().join(unit);
        fs::write(&copy, text).unwrap();
        verify.arg(copy);
    }
    let output = verify.output().unwrap();
    let said = [output.stdout, output.stderr].concat();
    let said = String::from_utf8_lossy(&said);
    // Unknown settings are warnings, which it does not fail for.
    assert!(output.status.success() && said.trim().is_empty(), "{}: {said}", output.status);
}

#[test]
fn the_socket_is_where_docker_looks_and_named_as_the_agent_asks() {
    let text = include_str!("../package/ovnet-agent.socket");
    for line in ["ListenStream=/run/docker/plugins/ovnet.sock", "FileDescriptorName=plugin"] {
        assert!(text.lines().any(|it| it == line), "{line}");
    }
}

#[test]
fn the_options_of_the_example_are_those_the_agent_has() {
    let text = include_str!("../package/ovnet-agent.default");
    let options = text.lines().find_map(|line| line.strip_prefix("OVNET_ARGS=")).unwrap();
    let words = options.trim_matches('"').split(' ');
    let arguments = std::iter::once("ovnet-agent").chain(words);
    let read = <ovnet_agent::config::Arguments as clap::Parser>::try_parse_from(arguments);
    assert!(read.is_ok(), "{read:?}");
}
