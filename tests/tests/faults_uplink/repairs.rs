//! Everything that somebody else can break on a host is put right, and counted.

use std::{
    cell::RefCell,
    net::Ipv4Addr,
    panic::{AssertUnwindSafe, catch_unwind},
    time::{Duration, Instant},
};

use ovnet_common::abi::Program;
use ovnet_tests::{
    cluster::{Cluster, Steps, Stream, until, within},
    lab::Counters,
};
use xtask::lab::CLIENT;

use super::{
    download,
    edit::{self, Edit, Tables},
    host::{ADDRESS, HOST, endpoint, programs_are_ours, repaired, script, veth},
    probe::Probe,
};

/// Between the agent's repairs.
const INTERVAL: Duration = Duration::from_secs(1);
/// How long a repair may take beyond that, on a machine that does other things too.
const MARGIN: Duration = Duration::from_secs(4);
/// What a fault that loses packets may cost: at one each millisecond these are as many milliseconds.
const LOSS: usize = 3000;

/// The record of a host that comes and goes.
const LOST: &str = r#"{"v":1,"node":"docker09","vtep":"192.168.1.19","port":4789,"mtu":1500}"#;
const LOST_VTEP: Ipv4Addr = Ipv4Addr::new(192, 168, 1, 19);

/// What a fault may cost.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Loses {
    /// Not a packet.
    Nothing,
    /// Until the repair: what is broken carries every packet.
    UntilRepair,
}
use Loses::{Nothing, UntilRepair};

#[test]
fn what_somebody_breaks_is_repaired_and_counted() {
    let Some(cluster) = Cluster::up("repairs", |options| {
        options.hosts = 2;
        let arguments = ["--repair-interval", "1", "--host-grace", "2"];
        options.agent_args = arguments.map(str::to_owned).to_vec();
    }) else {
        return;
    };
    let steps = Steps::default();
    cluster.sh(HOST, "ovnet network create ov_net1");
    let t1 = cluster.sandbox("docker01", "t1", "--network ov_net1");
    let t2 = cluster.sandbox(HOST, "t2", "--network ov_net1 -p 90:80");
    cluster.wait_ping("docker01/t1", t2);
    download::serve(&cluster, "docker02/t2");
    cluster.wait_connected(HOST);
    let outside = cluster.lab.address(CLIENT).unwrap();
    cluster.wait_ping("docker02/t2", outside);
    // A host that nobody announced is removed once the agent is sure that nobody will.
    cluster.put_record("hosts/docker09", LOST);
    until("the host to be known", || cluster.vteps_of(HOST).contains(&LOST_VTEP).then_some(()));
    cluster.delete_record("hosts/docker09");
    until("the host to be gone", || (!cluster.vteps_of(HOST).contains(&LOST_VTEP)).then_some(()));
    let test = Test {
        probe: Probe::start(&cluster, "docker01/t1", "docker02/t2", t2),
        stream: Stream::start(&cluster.lab, "docker01/t1", "docker02/t2", t2),
        tables: edit::tables(&cluster),
        cluster: &cluster,
        outside,
        t2,
        failed: RefCell::default(),
    };
    assert!(cluster.status(HOST)["repairs"].as_object().unwrap().is_empty());

    steps.begin("tables, programs and pins");
    datapath(&test);
    steps.begin("rules and settings");
    rules_and_settings(&test);
    steps.begin("devices of the host");
    devices(&test);
    steps.begin("the sandbox's way out");
    way_out(&test);
    steps.begin("the sandbox's interface");
    interface(&test);
    steps.begin("strict reverse path filtering everywhere");
    reverse_path_filters(&test);
    steps.begin("sandboxes that vanish");
    let Test { stream, probe, failed, .. } = test;
    assert!(failed.borrow().is_empty(), "{:?}", failed.borrow());
    drop(probe);
    stream.must_be_whole();
    vanish(&cluster, t1);
}

struct Test<'a> {
    cluster: &'a Cluster,
    probe: Probe,
    stream: Stream,
    tables: Tables,
    /// The client outside.
    outside: Ipv4Addr,
    t2: Ipv4Addr,
    /// The faults after which not all was as it must be.
    failed: RefCell<Vec<String>>,
}

impl Test<'_> {
    /// Breaks something, and waits until it is repaired, counted, and all works.
    fn fault(&self, what: &str, kind: &str, loses: Loses, breaks: impl FnOnce(&Cluster)) {
        self.fault_until(what, kind, loses, breaks, || true);
    }

    /// As [`Test::fault`]; `holds` must be true again, too. What goes wrong is kept, so that the
    /// table is whole.
    fn fault_until(
        &self,
        what: &str,
        kind: &str,
        loses: Loses,
        breaks: impl FnOnce(&Cluster),
        holds: impl Fn() -> bool,
    ) {
        let done = catch_unwind(AssertUnwindSafe(|| {
            self.look(what, kind, loses, breaks, holds);
        }));
        if done.is_err() {
            println!("{what} | FAILED");
            self.failed.borrow_mut().push(what.to_owned());
        }
    }

    fn look(
        &self,
        what: &str,
        kind: &str,
        loses: Loses,
        breaks: impl FnOnce(&Cluster),
        holds: impl Fn() -> bool,
    ) {
        let (cluster, from) = (self.cluster, self.probe.next());
        let counters = Counters::now(&cluster.lab);
        let before = repaired(cluster, kind);
        let broken = Instant::now();
        breaks(cluster);
        within(INTERVAL + MARGIN, &format!("{what}: to be repaired and counted"), || {
            (repaired(cluster, kind) > before && holds()).then_some(())
        });
        let took = broken.elapsed();
        let counted = repaired(cluster, kind) - before;
        let cost = self.probe.cost(from, Instant::now());
        println!(
            "{what} | {kind} +{counted} | repaired after {:.2} s at most | {} lost",
            took.as_secs_f64(),
            cost.lost
        );
        self.stream.goes_on();
        within(INTERVAL + MARGIN, &format!("{what}: all to work"), || {
            let whole = download::answers(cluster, ADDRESS) && self.sandbox_gets_out();
            whole.then_some(())
        });
        until(&format!("{what}: no error to be left"), || {
            let errors = cluster.status(HOST)["errors"].clone();
            errors.as_array().is_some_and(Vec::is_empty).then_some(())
        });
        let limit = if loses == Nothing { 0 } else { LOSS };
        if cost.lost > limit {
            println!("{what}: counted meanwhile: {:?}", counters.since());
        }
        assert!(cost.lost <= limit, "{what} lost {} datagrams", cost.lost);
    }

    fn sandbox_gets_out(&self) -> bool {
        let ping = ["ping", "-c1", "-W1", &self.outside.to_string()];
        self.cluster.lab.exec("docker02/t2", &ping).is_ok()
    }
}

fn datapath(test: &Test<'_>) {
    let as_before = || edit::tables(test.cluster) == test.tables;
    for (what, how, loses) in [
        ("an entry more in each table", Edit::Add, Nothing),
        ("each entry of each table changed", Edit::Change, UntilRepair),
        ("each entry of each table removed", Edit::Remove, UntilRepair),
    ] {
        let before = repaired(test.cluster, "map-entry");
        let mut edited = 0;
        let breaks = |cluster: &Cluster| edited = edit::edit_tables(cluster, how);
        test.fault_until(what, "map-entry", loses, breaks, as_before);
        let counted = repaired(test.cluster, "map-entry") - before;
        assert!(counted >= edited, "{what}: {edited} edited, {counted} counted");
    }
    let ours = || programs_are_ours(test.cluster, "ens33", false);
    let container = veth(test.cluster, "t2");
    test.fault("from_uplink detached by force", "program", Nothing, |cluster| {
        edit::detach(cluster, Program::FromUplink, "ens33");
    });
    ours();
    test.fault("from_container detached by force", "program", UntilRepair, |cluster| {
        edit::detach(cluster, Program::FromContainer, &container);
    });
    test.fault("from_overlay detached by force", "program", Nothing, |cluster| {
        edit::detach(cluster, Program::FromOverlay, "ovnet-vx");
    });
    // Not part of the fault: the kernel stops the queues of a device while it is given a qdisc.
    test.cluster.sh(HOST, "tc qdisc add dev ens33 clsact");
    test.fault("another agent's clsact filter", "program", Nothing, edit::leave_filter);
    let filters = test.cluster.sh(HOST, "tc filter show dev ens33 ingress");
    assert!(!filters.contains("from_uplink"), "{filters}");
    let pins = test.cluster.footprint(HOST).pins;
    test.fault_until(
        "all pins removed",
        "pin",
        Nothing,
        |cluster| script(cluster, "rm -r /sys/fs/bpf/ovnet/v*"),
        || test.cluster.footprint(HOST).pins == pins,
    );
    ours();
}

fn rules_and_settings(test: &Test<'_>) {
    let cluster = test.cluster;
    let flush = |cluster: &Cluster| script(cluster, "nft flush ruleset");
    let rules = || cluster.sh(HOST, "nft list ruleset").contains("chain postrouting");
    test.fault_until("nft flush ruleset", "rules", Nothing, flush, rules);
    if cluster.lab.exec(HOST, &["sh", "-c", "iptables -S FORWARD"]).is_ok() {
        let opened =
            || cluster.sh(HOST, "iptables -S FORWARD").matches("ovnet_gwbridge").count() == 2;
        let close = |cluster: &Cluster| script(cluster, "iptables -P FORWARD DROP");
        test.fault_until("iptables drops what is forwarded", "rules", Nothing, close, opened);
        let flush = |cluster: &Cluster| script(cluster, "iptables -F FORWARD");
        test.fault_until("what opens FORWARD flushed", "rules", Nothing, flush, opened);
        script(cluster, "iptables -P FORWARD ACCEPT");
    }
    let t2 = veth(cluster, "t2");
    for (setting, value) in [
        // Of all interfaces at once; some hosts have it off anyway, and nothing happens then.
        ("ip_forward".to_owned(), "1 0"),
        (format!("conf/{t2}/forwarding"), "0"),
        ("conf/ovnet_gwbridge/route_localnet".to_owned(), "0"),
        ("conf/ens33/arp_notify".to_owned(), "0"),
    ] {
        let what = format!("net.ipv4.{} set to 0", setting.replace('/', "."));
        test.fault(&what, "sysctl", Nothing, |cluster| {
            let each =
                format!("for it in {value}; do echo $it > /proc/sys/net/ipv4/{setting}; done");
            script(cluster, &each);
        });
    }
    test.fault("neighbour entries flushed", "neighbour", Nothing, |cluster| {
        cluster.sh(HOST, "ip neigh flush dev ens33");
    });
}

fn devices(test: &Test<'_>) {
    test.fault("ovnet-vx deleted", "external-device", Nothing, |cluster| {
        cluster.sh(HOST, "ip link del ovnet-vx");
    });
    test.fault("ovnet-vx set down", "external-device", Nothing, |cluster| {
        cluster.sh(HOST, "ip link set ovnet-vx down");
    });
    test.fault("the bridge deleted", "gwbridge", Nothing, |cluster| {
        cluster.sh(HOST, "ip link del ovnet_gwbridge");
    });
    test.fault("the bridge's address removed", "gwbridge", Nothing, |cluster| {
        cluster.sh(HOST, "ip address flush dev ovnet_gwbridge");
    });
    test.fault("the bridge set down", "gwbridge", Nothing, |cluster| {
        cluster.sh(HOST, "ip link set ovnet_gwbridge down");
    });
}

fn way_out(test: &Test<'_>) {
    let ports = test.cluster.sh(HOST, "ip -o link show master ovnet_gwbridge");
    let port = ports.split(": ").nth(1).and_then(|it| it.split('@').next()).unwrap();
    test.fault("a gateway port deleted", "gateway-port", Nothing, |cluster| {
        cluster.sh(HOST, &format!("ip link del {port}"));
    });
    test.fault("a gateway port taken from its bridge", "gateway-port", Nothing, |cluster| {
        cluster.sh(HOST, &format!("ip link set {port} nomaster"));
    });
    for (what, change) in [
        ("its inner end down", "link set eth1 down"),
        ("its inner end without address", "address flush dev eth1"),
        ("the default route removed", "route del default"),
    ] {
        let what = format!("a gateway port: {what}");
        test.fault(&what, "gateway-port", Nothing, |cluster| {
            cluster.sh(HOST, &format!("ip -n t2 {change}"));
        });
    }
}

fn interface(test: &Test<'_>) {
    let (cluster, t2) = (test.cluster, veth(test.cluster, "t2"));
    let shown = || {
        let inner = cluster.lab.exec(HOST, &["ip", "-n", "t2", "address", "show", "eth0"]);
        let inner = inner.unwrap_or_default();
        // Not its number, which another interface of the name has otherwise.
        inner.split_once(": ").map(|(_, rest)| rest.to_owned()).unwrap_or_default()
    };
    let has = [&format!("inet {}/24", test.t2), "mtu 1450", "UP", "02:42:0a:00:00:"];
    let whole = || has.iter().all(|part| shown().contains(*part));
    assert!(whole(), "{}", shown());
    for (what, place, change) in [
        ("its inner end without address", "-n t2", "address flush dev eth0"),
        ("its inner end with another MAC", "-n t2", "link set eth0 address 02:00:00:00:00:09"),
        ("its inner end with another MTU", "-n t2", "link set eth0 mtu 1300"),
        ("its inner end down", "-n t2", "link set eth0 down"),
        ("its host end down", "", &format!("link set {t2} down")),
        ("its host end with another MTU", "", &format!("link set {t2} mtu 1300")),
        ("deleted from the host", "", &format!("link del {t2}")),
        ("deleted in the sandbox", "-n t2", "link del eth0"),
    ] {
        let loses = if what.contains("MTU") { Nothing } else { UntilRepair };
        let what = format!("an endpoint's veth: {what}");
        let breaks = |cluster: &Cluster| _ = cluster.sh(HOST, &format!("ip {place} {change}"));
        test.fault_until(&what, "veth", loses, breaks, whole);
    }
    assert_eq!(cluster.status(HOST)["local_endpoints"], 1);
}

/// What a hardened host, or systemd, sets: nothing has to be repaired, and what goes by the kernel
/// still arrives.
fn reverse_path_filters(test: &Test<'_>) {
    let cluster = test.cluster;
    let strict = "for each in /proc/sys/net/ipv4/conf/*/rp_filter; do echo 1 > $each; done";
    let after = test.probe.next();
    script(cluster, strict);
    cluster.run("docker01", &["sh", "-ec", strict]);
    // Fragments go by ovnet-vx, both ways.
    for (from, to) in [("docker01/t1", test.t2), ("docker02/t2", test.outside)] {
        cluster.run(from, &["ping", "-c3", "-W2", "-s", "4000", &to.to_string()]);
    }
    assert!(download::answers(cluster, ADDRESS), "the programs' way to the port");
    for address in [Ipv4Addr::LOCALHOST, ADDRESS] {
        let asked = cluster.lab.inside(HOST, move || {
            let to = std::net::SocketAddr::from((address, download::PORT));
            let mut stream = std::net::TcpStream::connect_timeout(&to, MARGIN)?;
            stream.set_read_timeout(Some(MARGIN))?;
            Ok(std::io::Read::read(&mut stream, &mut [0; 100])?)
        });
        assert!(asked.unwrap() > 0, "the kernel's way to the port, by {address}");
    }
    assert!(test.sandbox_gets_out());
    let cost = test.probe.cost(after, Instant::now());
    println!("rp_filter set to 1 everywhere | nothing to repair | {} lost", cost.lost);
    assert_eq!(cost.lost, 0);
}

#[test]
fn filters_are_repaired_where_there_is_no_tcx() {
    let Some(cluster) = Cluster::up("filters", |options| {
        options.hosts = 2;
        let arguments = ["--repair-interval", "1", "--force-clsact"];
        options.agent_args = arguments.map(str::to_owned).to_vec();
    }) else {
        return;
    };
    cluster.sh(HOST, "ovnet network create ov_net1");
    cluster.sandbox("docker01", "t1", "--network ov_net1");
    let t2 = cluster.sandbox(HOST, "t2", "--network ov_net1");
    cluster.wait_ping("docker01/t1", t2);
    let probe = Probe::start(&cluster, "docker01/t1", "docker02/t2", t2);
    for (interface, program) in
        [("ens33".to_owned(), "from_uplink"), (veth(&cluster, "t2"), "from_container")]
    {
        let (from, before) = (probe.next(), repaired(&cluster, "program"));
        let filters = || cluster.sh(HOST, &format!("tc filter show dev {interface} ingress"));
        assert!(filters().contains(program), "{}", filters());
        cluster.sh(HOST, &format!("tc filter del dev {interface} ingress"));
        within(INTERVAL + MARGIN, &format!("{program} to be back, and counted"), || {
            let back = filters().contains(program);
            (back && repaired(&cluster, "program") == before + 1).then_some(())
        });
        let lost = probe.cost(from, Instant::now()).lost;
        println!("{program}'s filter removed | clsact | program +1 | {lost} lost");
        assert!(lost <= if program == "from_uplink" { 0 } else { LOSS }, "{lost}");
    }
    // What is as it must be is no repair, however often it is looked at.
    let repairs = cluster.status(HOST)["repairs"].clone();
    cluster.sh(HOST, "ping -c 30 -i 0.1 192.168.1.11");
    assert_eq!(cluster.status(HOST)["repairs"], repairs);
}

/// The record goes with the sandbox; a new sandbox of the name gets nothing that nobody asked for.
fn vanish(cluster: &Cluster, t1: Ipv4Addr) {
    for again in [false, true] {
        let before = repaired(cluster, "sandbox");
        let gone = cluster.sandbox(HOST, "gone", "--network ov_net1");
        cluster.wait_ping("docker02/gone", t1);
        cluster.lab.remove_sandbox(HOST, "gone").unwrap();
        if again {
            cluster.sh(HOST, "ip netns add gone");
        }
        within(INTERVAL + MARGIN, "the endpoint to be withdrawn, and counted", || {
            let announced = cluster.records().keys().any(|it| it.ends_with(&format!("/{gone}")));
            let known = cluster.endpoints_of("docker01").contains_key(&gone);
            let counted = repaired(cluster, "sandbox") == before + 1;
            (!announced && !known && counted && endpoint(cluster, "gone").is_null()).then_some(())
        });
        let kind = if again { "deleted, and another made of its name" } else { "deleted" };
        println!("a sandbox {kind} | sandbox +1 | withdrawn everywhere");
    }
    let inside = cluster.sh(HOST, "ip -n gone -o link");
    assert_eq!(inside.lines().count(), 1, "loopback alone: {inside}");
}
