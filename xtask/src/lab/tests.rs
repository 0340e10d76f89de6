//! The lab itself, without agents: what every test of more than one host stands on.

use std::net::TcpStream;
use std::path::Path;
use std::time::Duration;

use super::kernel_vxlan::KernelVxlan;
use super::measure::{self, Pin, Way};
use super::{Lab, Options, Process, Wire, prepare};

/// A lab without agents, or none where the test cannot run: it then says so.
fn lab(name: &str, change: impl FnOnce(&mut Options)) -> Option<Lab> {
    let mut options = Options { agents: false, hosts: 2, ..Options::test(name) };
    change(&mut options);
    if let Err(why) = prepare::require(&options) {
        assert_ne!(std::env::var("OVNET_REQUIRE_ALL").as_deref(), Ok("1"), "{name}: {why:#}");
        println!("SKIP {name}: {why:#}");
        return None;
    }
    Some(Lab::up(options).unwrap())
}

#[test]
fn hosts_reach_each_other_and_their_own_folders_only() {
    let Some(lab) = lab("lab-hosts", |_| {}) else { return };
    for place in ["docker01", "docker02", "client"] {
        for target in ["192.168.1.11", "192.168.1.12", "192.168.1.100"] {
            lab.exec(place, &["ping", "-c", "1", "-W", "2", target]).unwrap();
        }
        assert_eq!(lab.exec(place, &["uname", "-n"]).unwrap(), place);
        assert_eq!(lab.exec(place, &["ls", "/sys/class/net"]).unwrap(), "ens33\nlo");
    }
    let routes = lab.exec("docker01", &["ip", "route"]).unwrap();
    assert!(!routes.contains("default"), "the lab has a way out: {routes}");

    let make = "mkdir /sys/fs/bpf/ovnet && touch /run/mine /var/lib/ovnet/mine";
    lab.exec("docker01", &["sh", "-c", make]).unwrap();
    let look = "ls -d /sys/fs/bpf/ovnet /run/mine /var/lib/ovnet/mine 2>/dev/null | wc -l";
    assert_eq!(lab.exec("docker01", &["sh", "-c", look]).unwrap(), "3");
    assert_eq!(lab.exec("docker02", &["sh", "-c", look]).unwrap(), "0");
    assert!(!Path::new("/run/mine").exists() && !Path::new("/var/lib/ovnet/mine").exists());
}

#[test]
fn consul_answers_on_every_host_and_can_be_stopped_and_started() {
    let Some(lab) = lab("lab-consul", |_| {}) else { return };
    let consul = lab.consul().unwrap();
    let reaches = |place: &str| {
        let consul = consul.clone();
        lab.inside(place, move || Ok(TcpStream::connect(consul)?)).is_ok()
    };
    assert!(reaches("docker02") && reaches("client"));
    lab.stop_consul().unwrap();
    assert!(!reaches("docker02") && lab.consul_kind().is_none());
    lab.start_consul().unwrap();
    assert!(reaches("docker02"));
}

#[test]
fn jumbo_frames_pass_whole_where_the_wire_has_room() {
    let Some(lab) = lab("lab-jumbo", |options| options.mtu = 9000) else { return };
    let fits = ["ping", "-c", "1", "-W", "2", "-M", "do", "-s", "8972", "192.168.1.12"];
    lab.exec("docker01", &fits).unwrap();
    let too_long = ["ping", "-c", "1", "-W", "1", "-M", "do", "-s", "8973", "192.168.1.12"];
    lab.exec("docker01", &too_long).unwrap_err();
}

#[test]
fn both_wires_carry_tcp_and_the_kernels_vxlan() {
    for (name, wire) in [("lab-gso", Wire::Gso), ("lab-mtu", Wire::Mtu)] {
        let Some(lab) = lab(name, |options| options.wire = wire) else { return };
        let vxlan = KernelVxlan::up(&lab, &["docker01", "docker02"]).unwrap();
        let [from, to] = vxlan.members.as_slice() else { panic!("{vxlan:?}") };
        let (from, to, address) = (from.place(), to.place(), to.address);
        let way = Way { label: String::new(), from, to, address };
        let server = measure::serve(&lab, &way, Pin::None).unwrap();
        assert!(measure::throughput(&lab, &way, 1, Pin::None).unwrap() > 1e6);
        assert!(measure::ping(&lab, &way, Pin::None).unwrap().min > 0.0);
        drop(server);
        vxlan.down(&lab).unwrap();
        assert_eq!(lab.exec("docker01", &["ls", "/sys/class/net"]).unwrap(), "ens33\nlo");
    }
}

#[test]
fn sandboxes_are_made_once_and_removed_with_what_runs_in_them() {
    let Some(lab) = lab("lab-sandbox", |_| {}) else { return };
    lab.add_sandbox("docker01", "t1").unwrap();
    lab.add_sandbox("docker02", "t1").unwrap();
    let again = lab.add_sandbox("docker01", "t1").unwrap_err().to_string();
    assert!(again.contains("exists on docker01"), "{again}");
    assert_eq!(
        lab.exec("docker01/t1", &["ls", "/proc/sys/net/ipv4/conf"]).unwrap(),
        "all\ndefault\nlo"
    );

    let _sleeps = lab.spawn("docker01/t1", &["sleep", "1000"], None).unwrap();
    let pids = || lab.exec("docker01", &["ip", "netns", "pids", "t1"]).unwrap();
    super::wait_until(
        Duration::from_secs(5),
        || "sleep".into(),
        || Ok((!pids().is_empty()).then_some(())),
    )
    .unwrap();
    lab.remove_sandbox("docker01", "t1").unwrap();
    assert!(lab.sandboxes("docker01").unwrap().is_empty());
    let gone = lab.exec("docker01/t1", &["true"]).unwrap_err().to_string();
    assert!(gone.contains("no sandbox t1 on docker01"), "{gone}");
    assert_eq!(lab.sandboxes("docker02").unwrap(), ["t1"]);
}

#[test]
fn a_failed_command_tells_where_what_and_why() {
    let Some(lab) = lab("lab-errors", |_| {}) else { return };
    let error = lab.exec("docker02", &["sh", "-c", "echo broken >&2; exit 3"]).unwrap_err();
    let error = error.to_string();
    for part in ["docker02", "exit 3", "broken"] {
        assert!(error.contains(part), "{part} is not in: {error}");
    }
    let error = lab.exec("docker09", &["true"]).unwrap_err().to_string();
    assert!(error.contains("no host docker09"), "{error}");
    let slow = lab.output("docker01", &["sleep", "1000"], Duration::from_millis(100)).unwrap();
    assert_eq!(slow.status.code(), Some(124));
}

#[test]
fn a_lab_is_made_once_and_leaves_nothing() {
    let Some(lab) = lab("lab-down", |_| {}) else { return };
    let options = lab.options();
    let twice = Lab::up(options.clone()).err().unwrap().to_string();
    assert!(twice.contains("up already"), "{twice}");

    let holders: Vec<Process> = lab.state().hosts.iter().map(|host| host.holder).collect();
    let folder = lab.folder().to_owned();
    assert!(holders.iter().all(Process::is_alive) && folder.exists());
    drop(lab);
    assert!(!holders.iter().any(Process::is_alive) && !folder.exists());
    assert!(!Lab::remove_prefix(&options.prefix).unwrap(), "down again finds nothing");
}

#[test]
fn each_host_has_a_docker_of_its_own_that_leaves_nothing() {
    let Some(lab) = lab("lab-docker", |options| options.docker = true) else { return };
    let prefix = lab.options().prefix;
    let sleeps = ["run", "-itd", "--name", "t1", "busybox"];
    let [first, second] = ["docker01", "docker02"].map(|node| lab.docker(node, &sleeps).unwrap());
    assert_ne!(first, second);
    let links = lab.exec("docker01/t1", &["ls", "/proc/sys/net/ipv4/conf"]).unwrap();
    assert_eq!(links, "all\ndefault\neth0\nlo");
    let inside = |argv: &[&str]| lab.docker("docker01", &[&["exec", "t1"], argv].concat());
    assert_eq!(inside(&["hostname"]).unwrap(), first[..12]);
    inside(&["ping", "-c", "1", "-W", "2", "192.168.1.12"]).unwrap();
    inside(&["iperf3", "--version"]).unwrap();

    // Its settings are a file, read at the start; it goes on where it was.
    let mut config = super::docker_config(&lab.options());
    config["live-restore"] = true.into();
    lab.set_docker_config("docker01", &config).unwrap();
    lab.restart_docker("docker01", nix::sys::signal::Signal::SIGTERM).unwrap();
    lab.docker("docker01", &["start", "t1"]).unwrap();
    lab.restart_docker("docker01", nix::sys::signal::Signal::SIGKILL).unwrap();
    let running = ["inspect", "--format", "{{.State.Running}}", "t1"];
    assert_eq!(lab.docker("docker01", &running).unwrap(), "true");

    let groups = || super::cgroups::folders(&prefix);
    assert!(!groups().is_empty());
    drop(lab);
    assert_eq!(groups(), [] as [std::path::PathBuf; 0]);
}

#[test]
fn a_lab_bound_to_a_process_ends_with_it() {
    let Some(mut lab) = lab("lab-bound", |_| {}) else { return };
    let options = lab.options();
    let holders: Vec<Process> = lab.state().hosts.iter().map(|host| host.holder).collect();
    // What the kernel does when the process is killed.
    lab.lifelines.get_mut().unwrap().clear();
    let ended = || Ok((!holders.iter().any(Process::is_alive)).then_some(()));
    super::wait_until(Duration::from_secs(10), || "the hosts to end".into(), ended).unwrap();
    // The folder that such a process leaves is no obstacle for the next.
    drop(Lab::up(options).unwrap());
}
