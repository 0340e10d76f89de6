//! Wrong input gets one line, a non-zero exit, and changes nothing. The lines are the users': they
//! are here word for word, so that whoever changes one reads it again.

use nix::sys::signal::Signal;
use ovnet_tests::cluster::{Cluster, Footprint, Steps, until};

/// The host without an agent of the lab, on which agents are started wrongly.
const BARE: &str = "docker02";
const AGENT: [&str; 5] = ["ovnet-agent", "--consul", "192.168.1.11:8500", "--node", "docker02"];
/// What a user has who is not root, as far as a command of the lab can be that.
const NOBODY: [&str; 4] = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"];

#[test]
fn wrong_input_is_refused_in_one_line_and_changes_nothing() {
    let Some(cluster) = Cluster::up("wrong", |options| options.hosts = 2) else { return };
    let steps = Steps::default();
    cluster.stop_agent(BARE, Signal::SIGTERM);
    cluster.sh(BARE, "ovnet-agent cleanup");
    assert_eq!(cluster.footprint(BARE), Footprint::default());

    starting_the_agent(&cluster, &steps);
    check_and_cleanup(&cluster, &steps);
    creating_networks(&cluster, &steps);
    attaching(&cluster, &steps);
}

/// What keeps an agent from starting.
fn starting_the_agent(cluster: &Cluster, steps: &Steps) {
    steps.begin("starting the agent");
    cluster.sh(BARE, "ip link add bare0 type bridge");
    cluster.sh(BARE, "ip link set bare0 up");
    cluster.sh(BARE, "ip link add down0 type bridge");
    cluster.sh(BARE, "ip address add 192.168.7.1/24 dev down0");
    cluster.sh(BARE, "ip link add many0 type bridge");
    cluster.sh(BARE, "ip address add 192.168.8.1/24 dev many0");
    cluster.sh(BARE, "ip address add 192.168.9.1/24 dev many0");
    cluster.sh(BARE, "ip link set many0 up");
    let records = cluster.records();
    let agent = |rest: &[&str]| cluster.refused(BARE, &[&AGENT[..], rest].concat());
    let cases = [
        ("eth7", "there is no such interface; those with an IPv4 address are down0, ens33, many0"),
        ("down0", "interface down0 is down: bring it up with `ip link set down0 up`"),
        (
            "bare0",
            "interface bare0 has no global IPv4 address: give it one (`ip address add`) or \
             advertise another interface",
        ),
        (
            "many0",
            "interface many0 has 2 global IPv4 addresses (192.168.8.1, 192.168.9.1): give the one \
             meant, as in `--advertise 192.168.8.1`",
        ),
        (
            "192.168.1.99",
            "no interface of this host has the address; those it has are 192.168.1.12 (ens33), \
             192.168.7.1 (down0), 192.168.8.1 (many0), 192.168.9.1 (many0)",
        ),
        (
            "lo",
            "lo is the loopback interface, which other hosts cannot reach: give the interface that \
             leads to them",
        ),
        (
            "fd00::1",
            "hosts speak IPv4 to each other in this version: give an IPv4 address or an interface \
             that has one",
        ),
    ];
    for (advertise, why) in cases {
        let said = agent(&["--advertise", advertise]);
        let expected = format!("ovnet-agent: cannot advertise '{advertise}': {why}");
        assert_eq!(sorted_addresses(&said), sorted_addresses(&expected));
    }
    let good = ["--advertise", "ens33"];
    assert_eq!(
        agent(&[&good[..], &["--bpffs", "/tmp/none"]].concat()),
        "ovnet-agent: /tmp/none is not on a bpffs: mount one with `mount -t bpf bpf /sys/fs/bpf`, \
         or choose another folder with --bpffs"
    );
    assert_eq!(
        agent(&[&good[..], &["--prefix", "a b"]].concat()),
        "ovnet-agent: part of the prefix \"a b\" is not 1 to 128 letters, digits, '_', '.' and \
         '-', beginning with a letter or digit"
    );
    let argv = ["ovnet-agent", "--consul", "ftp://192.168.1.11", "--advertise", "ens33"];
    assert_eq!(
        cluster.refused(BARE, &argv),
        "ovnet-agent: Consul address \"ftp://192.168.1.11\" is not host:port, http(s)://… or \
         consul://host:port"
    );
    let argv = [&NOBODY[..], &AGENT, &good].concat();
    assert_eq!(
        cluster.refused(BARE, &argv),
        "ovnet-agent: ovnet-agent must run as root: it loads programs and makes interfaces"
    );
    assert_eq!(
        cluster.refused("docker01", &[&AGENT[..], &good].concat()),
        "ovnet-agent: another agent has the socket /run/ovnet/ovnet.sock: stop it or choose \
         another --socket"
    );
    assert_eq!(
        cluster.refused(BARE, &["ovnet", "status"]),
        "ovnet: cannot reach the agent at /run/ovnet/ovnet.sock: is ovnet-agent running? (No such \
         file or directory (os error 2))"
    );
    for link in ["bare0", "down0", "many0"] {
        cluster.sh(BARE, &format!("ip link del {link}"));
    }
    assert_eq!(cluster.footprint(BARE), Footprint::default(), "refusing left something");
    assert_eq!(cluster.records(), records);
}

/// `ovnet-agent check` and `ovnet-agent cleanup`.
fn check_and_cleanup(cluster: &Cluster, steps: &Steps) {
    steps.begin("check");
    let check = ["ovnet-agent", "check", "--consul", "192.168.1.11:8500", "--advertise"];
    let table = cluster.run(BARE, &[&check[..], &["ens33"]].concat());
    assert!(table.starts_with("ITEM "), "{table}");
    let items = [
        "privileges",
        "kernel",
        "TC attachment",
        "kernel BTF",
        "BPF JIT",
        "BPF file system",
        "uplink",
        "uplink MTU",
        "XDP (auto)",
        "rp_filter",
        "Consul",
    ];
    for item in items {
        assert!(table.lines().any(|it| it.starts_with(&format!("{item} "))), "{item} in {table}");
    }
    assert!(table.contains("The agent can run on this host"), "{table}");
    let wrong = cluster
        .lab
        .output(BARE, &[&check[..], &["eth7"]].concat(), std::time::Duration::from_secs(20))
        .unwrap();
    let table = String::from_utf8_lossy(&wrong.stdout).into_owned();
    assert_eq!(wrong.status.code(), Some(1), "{table}");
    assert!(table.contains("The agent cannot run on this host: 1 failed."), "{table}");
    assert_eq!(cluster.footprint(BARE), Footprint::default(), "check made something");

    steps.begin("cleanup");
    let without = cluster.records();
    cluster.start_agent(BARE);
    cluster.wait_connected(BARE);
    cluster.sh(BARE, "ovnet network create ov_net1");
    cluster.sandbox(BARE, "t1", "--network ov_net1");
    let before = cluster.footprint(BARE);
    let cleanup = ["ovnet-agent", "cleanup", "--consul", "192.168.1.11:8500"];
    let said = cluster.refused(BARE, &cleanup);
    assert_eq!(
        said,
        "ovnet-agent: cannot clean up while the agent runs: stop it first: another agent has the \
         socket /run/ovnet/ovnet.sock: stop it or choose another --socket"
    );
    assert_eq!(cluster.footprint(BARE), before);
    cluster.stop_agent(BARE, Signal::SIGKILL);
    let printed = cluster.run(BARE, &cleanup);
    for part in ["removed  record", "removed  link ovnet-vx", "removed  pin", "removed  state"] {
        assert!(printed.contains(part), "{part} in {printed}");
    }
    assert_eq!(cluster.footprint(BARE), Footprint::default());
    let left: Vec<_> =
        cluster.records().into_keys().filter(|it| !without.contains_key(it)).collect();
    assert!(
        left.iter().all(|it| !it.starts_with("hosts/") && !it.starts_with("endpoints/")),
        "what is the host's is gone: {left:?}"
    );
    assert_eq!(cluster.run(BARE, &cleanup), "nothing of ovnet is on this host");
    cluster.lab.remove_sandbox(BARE, "t1").unwrap();
    cluster.sh("docker01", "ovnet network rm ov_net1");
}

/// Networks that cannot be.
fn creating_networks(cluster: &Cluster, steps: &Steps) {
    steps.begin("creating networks");
    cluster.sh("docker01", "ovnet network create --subnet 10.5.0.0/24 ov_net1");
    let before = cluster.footprints();
    let cases = [
        (
            "--subnet 10.5.0.128/25 ov_net2",
            "subnet 10.5.0.128/25 overlaps 10.5.0.0/24 of network ov_net1: choose another one",
        ),
        (
            "--subnet 192.168.0.0/16 ov_net2",
            "subnet 192.168.0.0/16 overlaps the route to 192.168.1.0/24 of this host, whose \
             traffic it would take: choose another one",
        ),
        (
            "--subnet 10.6.0.0/24 --gateway 10.7.0.1 ov_net2",
            "gateway 10.7.0.1 is not a host address of subnet 10.6.0.0/24",
        ),
        (
            "--subnet 10.6.0.0/24 --ip-range 10.7.0.0/25 ov_net2",
            "ip range 10.7.0.0/25 is not inside subnet 10.6.0.0/24",
        ),
        (
            "--subnet 10.6.0.0/24 --aux-address a=10.6.0.1 --gateway 10.6.0.1 ov_net2",
            "aux address a=10.6.0.1 is the network's gateway",
        ),
        (
            "--subnet 10.6.0.1/24 ov_net2",
            "subnet 10.6.0.1/24 has host bits set: did you mean 10.6.0.0/24?",
        ),
        ("--subnet 10.6.0.0/31 ov_net2", "subnet 10.6.0.0/31 is not between /8 and /30 in size"),
        (
            "--gateway 10.6.0.1 ov_net2",
            "network ov_net2: a gateway, ip range or aux address needs a --subnet to lie in",
        ),
        ("--mtu 100 ov_net2", "mtu 100 is not between 576 and 65535"),
        (
            "ov/net",
            "network name \"ov/net\" is not 1 to 128 letters, digits, '_', '.' and '-', beginning \
             with a letter or digit",
        ),
        ("ov_net1", "network ov_net1 exists already: created by docker01 with subnet 10.5.0.0/24"),
    ];
    for (arguments, line) in cases {
        let argv: Vec<_> =
            ["ovnet", "network", "create"].into_iter().chain(arguments.split(' ')).collect();
        assert_eq!(cluster.refused("docker01", &argv), format!("ovnet: {line}"), "{arguments}");
    }
    assert_eq!(
        cluster.refused("docker01", &["ovnet", "network", "rm", "ov_none"]),
        "ovnet: no network ov_none: see `ovnet network ls`, or create it"
    );
    assert_eq!(cluster.footprints(), before);
}

/// Attaches that cannot be.
fn attaching(cluster: &Cluster, steps: &Steps) {
    steps.begin("attaching");
    cluster.sandbox("docker01", "t1", "--network ov_net1");
    cluster.lab.add_sandbox("docker01", "t2").unwrap();
    cluster.sh("docker01", "ip -n t2 link add taken0 type veth peer name taken1");
    cluster.run("docker01", &["sh", "-ec", "> /run/netns/file"]);
    cluster.sh("docker01", "ovnet network create --subnet 10.7.0.0/30 ov_small");
    cluster.sandbox("docker01", "t3", "--network ov_small");
    let before = cluster.footprints();
    let cases = [
        (
            "--network ov_none --netns t2",
            "no network ov_none: see `ovnet network ls`, or create it",
        ),
        (
            "--network ov_net1 --netns t2 --ip 10.5.0.2",
            "address 10.5.0.2 of network ov_net1 is taken by endpoint t1 on host docker01",
        ),
        (
            "--network ov_net1 --netns t2 --ip 10.6.0.2",
            "10.6.0.2 is not inside subnet 10.5.0.0/24 of network ov_net1",
        ),
        (
            "--network ov_net1 --netns t2 --ip 10.5.0.1",
            "10.5.0.1 is taken: it is the gateway of network ov_net1",
        ),
        (
            "--network ov_net1 --netns t2 --ip 10.5.0.255",
            "10.5.0.255 is not a host address: it is the broadcast address of subnet 10.5.0.0/24 \
             of network ov_net1",
        ),
        (
            "--network ov_net1 --netns missing",
            "there is no network namespace at /run/netns/missing: `ip netns list` shows those \
             with a name, and `/proc/<pid>/ns/net` is a process's own",
        ),
        (
            "--network ov_net1 --netns file",
            "/run/netns/file is a file, but no network namespace: give the path of one",
        ),
        (
            "--network ov_net1 --netns t2 --ifname taken0",
            "there is an interface taken0 in /run/netns/t2 already: choose another name with --ifname",
        ),
        (
            "--network ov_net1 --netns t2 --ifname sixteen_letters_",
            "interface name \"sixteen_letters_\" is not possible: 1 to 15 characters, no spaces, \
             slashes or colons, and not lo",
        ),
        (
            "--network ov_net1 --netns t2 --name a/b",
            "endpoint name \"a/b\" is not 1 to 128 letters, digits, '_', '.' and '-', beginning \
             with a letter or digit",
        ),
        (
            "--network ov_net1 --netns t1",
            "sandbox /run/netns/t1 is in network ov_net1 already, as t1 with address 10.5.0.2: \
             detach it first",
        ),
        (
            "--network ov_small --netns t2",
            "network ov_small is full: no free address in 10.7.0.0/30; detach an endpoint, or use \
             a network with a larger subnet",
        ),
    ];
    for (arguments, line) in cases {
        let argv: Vec<_> = ["ovnet", "attach"].into_iter().chain(arguments.split(' ')).collect();
        assert_eq!(cluster.refused("docker01", &argv), format!("ovnet: {line}"), "{arguments}");
    }
    let own = "ovnet attach --network ov_net1 --netns /proc/self/ns/net";
    let said = cluster.refused("docker01", &own.split(' ').collect::<Vec<_>>());
    assert!(said.contains("is the host's own network namespace"), "{said}");
    assert_eq!(
        cluster.refused("docker01", &["ovnet", "detach", "nobody"]),
        "ovnet: no endpoint of this host has name or id nobody: see `ovnet endpoint ls --local`"
    );
    assert_eq!(
        cluster.refused("docker01", &[&NOBODY[..], &["ovnet", "status"]].concat()),
        "ovnet: cannot reach the agent at /run/ovnet/ovnet.sock: only root may; try sudo"
    );
    until("everything to be as before", || (cluster.footprints() == before).then_some(()));

    steps.begin("no Consul");
    cluster.lab.stop_consul().unwrap();
    for argv in ["ovnet network create ov_net2", "ovnet attach --network ov_net1 --netns t2"] {
        let said = cluster.refused("docker01", &argv.split(' ').collect::<Vec<_>>());
        assert_eq!(
            said,
            "ovnet: cannot reach Consul at 192.168.1.11:8500: Connection refused (os error 111)"
        );
    }
    assert_eq!(cluster.footprint("docker01"), before.0["docker01"]);
}

/// Lists of addresses come in the order of interfaces' numbers, which is not what is tested.
fn sorted_addresses(line: &str) -> Vec<String> {
    let mut words: Vec<_> = line.split([' ', ',']).map(str::to_owned).collect();
    words.sort();
    words
}
