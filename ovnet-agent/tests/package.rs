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
    let clean = output.status.success() && about_ours(&said).is_empty();
    assert!(clean, "{}: {said}", output.status);
}

/// What is said about these units: systemd reads the units they name, too, and warns of what is
/// wrong with the host's own.
fn about_ours(said: &str) -> Vec<&str> {
    said.lines().filter(|line| line.contains("ovnet-agent")).collect()
}

#[test]
fn warnings_about_other_units_are_passed_over() {
    let other = "/lib/systemd/system/dbus.socket:5: ListenStream= references a path below legacy \
                 directory /var/run/, updating /var/run/dbus -> /run/dbus.";
    let ours =
        "/tmp/x/ovnet-agent.service:9: Unknown key name 'Tpye' in section 'Service', ignoring.";
    assert!(about_ours(other).is_empty());
    assert_eq!(about_ours(&format!("{other}\n{ours}\n")), [ours]);
}

/// All values of a setting, in order.
fn settings<'a>(unit: &'a str, key: &str) -> Vec<&'a str> {
    let lines = unit.lines().filter_map(|line| line.split_once('='));
    lines.filter(|(name, _)| *name == key).map(|(_, value)| value).collect()
}

#[test]
fn the_agent_has_time_to_end_what_is_under_way_and_to_withdraw() {
    let text = include_str!("../package/ovnet-agent.service");
    let seconds: Vec<u32> =
        settings(text, "TimeoutStopSec").iter().map(|it| it.parse().unwrap()).collect();
    // Ten seconds for requests and five for Consul, and some for a slow host.
    assert!(matches!(seconds[..], [seconds] if seconds >= 20), "{seconds:?}");
}

#[test]
fn the_agent_stays_in_the_mount_namespace_of_the_host_and_may_write_settings() {
    let text = include_str!("../package/ovnet-agent.service");
    for key in [
        "PrivateTmp",
        "PrivateDevices",
        "PrivateMounts",
        "PrivateNetwork",
        "ProtectSystem",
        "ProtectHome",
        "ProtectKernelTunables",
        "ProtectControlGroups",
        "ProtectProc",
        "ReadOnlyPaths",
        "InaccessiblePaths",
    ] {
        assert!(settings(text, key).is_empty(), "{key}");
    }
    assert_eq!(settings(text, "RestrictNamespaces"), ["net"]);
    let capabilities = settings(text, "CapabilityBoundingSet").join(" ");
    for needed in ["NET_ADMIN", "NET_RAW", "NET_BIND_SERVICE", "BPF", "SYS_ADMIN", "SYS_PTRACE"] {
        let needed = format!("CAP_{needed}");
        assert!(capabilities.split(' ').any(|it| it == needed), "{needed}");
    }
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
