//! Disks, descriptors, maps and the bpffs run out under running traffic: the request that hits it is
//! told in one line, nothing of it is left, nothing that was there is lost, and it is over by itself.

use std::{collections::BTreeMap, fs, time::Duration};

use aya::maps::{HashMap, Map, MapData, MapError};
use ovnet_common::{
    abi::{
        EndpointKey, EndpointValue, HostValue, MAX_ENDPOINTS, MAX_HOSTS, MAX_NETWORKS, MAX_PORTS,
        NetworkValue, PortValue, mapped,
    },
    published::{MAX_PUBLISHED, PublishedKey, PublishedValue},
};
use ovnet_tests::cluster::{Cluster, Footprint, Ping, Steps, Stream, until};

/// Between repairs, in seconds: what a test puts into a map is there as long.
const REPAIR: &str = "8";
/// The host that runs out of things.
const HOST: &str = "docker01";

#[test]
fn what_runs_out_is_told_and_costs_nothing_else() {
    let Some(cluster) = Cluster::up("exhausted", |options| {
        options.hosts = 2;
        options.agent_args = ["--repair-interval", REPAIR].map(str::to_owned).to_vec();
    }) else {
        return;
    };
    let steps = Steps::default();
    for network in ["ov_net1", "ov_net2"] {
        cluster.sh("docker02", &format!("ovnet network create {network}"));
    }
    // A disk of its own for what the host remembers, which the machine's others do not fill.
    cluster.stop_agent(HOST, nix::sys::signal::Signal::SIGTERM);
    cluster.sh(HOST, "mkdir /run/small");
    cluster.sh(HOST, "mount -t tmpfs -o size=64k,mode=700 small /run/small");
    cluster.lab.start_agent(HOST, &["--state-dir", "/run/small"]).unwrap();
    cluster.wait_connected(HOST);
    let t1 = cluster.sandbox(HOST, "t1", "--network ov_net1 -p 90:80");
    let t2 = cluster.sandbox("docker02", "t2", "--network ov_net1");
    cluster.wait_ping("docker02/t2", t1);
    let ping = Ping::start(&cluster.lab, "docker02/t2", t1);
    let stream = Stream::start(&cluster.lab, "docker01/t1", "docker02/t2", t2);
    cluster.sh(HOST, "ip netns add t3");
    let goes_on = |what: &str| {
        ping.goes_on(50);
        stream.goes_on();
        assert!(ping.lost().is_empty(), "{what}: lost {:?}", ping.lost());
    };

    steps.begin("the disk of the state folder is full");
    fill_disk(&cluster);
    let said = refused(&cluster, "ov_net1");
    let told = "the disk is full: free some space under /run/small/endpoints";
    assert!(said.contains(told), "{said}");
    // What was there is not cut down to what fits.
    let file = cluster.lab.host(HOST).unwrap().root().join("run/small/endpoints");
    assert_eq!(fs::read_dir(&file).unwrap().count(), 1);
    let kept = fs::read_dir(&file).unwrap().next().unwrap().unwrap().path();
    let away = kept.with_extension("away");
    fs::rename(&kept, &away).unwrap();
    errors_tell(&cluster, told);
    goes_on("a full disk");
    cluster.sh(HOST, "rm /run/small/fill");
    recovers(&cluster, "ov_net1");
    until("the file to be written again", || {
        (fs::read(&kept).ok()? == fs::read(&away).unwrap()).then_some(())
    });
    fs::remove_file(away).unwrap();

    steps.begin("each map is full");
    full_maps(&cluster, &goes_on);

    steps.begin("the bpffs is read-only");
    cluster.sh(HOST, "mount -o remount,ro,bind /sys/fs/bpf");
    let said = refused(&cluster, "ov_net1");
    assert!(said.contains("pin the link as /sys/fs/bpf/ovnet"), "{said}");
    assert!(said.contains("Read-only file system"), "{said}");
    goes_on("a bpffs that is read-only");
    cluster.sh(HOST, "mount -o remount,rw,bind /sys/fs/bpf");
    recovers(&cluster, "ov_net1");

    stream.must_be_whole();
    let pings = ping.answered();
    ping.must_have_lost_none("something ran out");
    println!("MEASURED exhausted: 0 of {pings} pings and 0 of 1 connections lost");

    steps.begin("no memory for a map");
    cluster.stop_agent(HOST, nix::sys::signal::Signal::SIGTERM);
    let argv = ["ovnet-agent", "--consul", "192.168.1.11:8500", "--advertise", "ens33"];
    let huge = ["--conntrack-max", "4294967295"];
    let said = cluster.refused(HOST, &[&argv[..], &huge].concat());
    assert!(said.contains("--conntrack-max 4294967295 takes"), "{said}");
    assert!(said.ends_with("give fewer, or auto"), "{said}");
}

fn fill_disk(cluster: &Cluster) {
    let fill = "dd if=/dev/zero of=/run/small/fill bs=4k oflag=append conv=notrunc; true";
    cluster.run(HOST, &["sh", "-c", fill]);
}

/// An attach that must be refused, and leave nothing.
fn refused(cluster: &Cluster, network: &str) -> String {
    let before = settled(cluster);
    let argv = ["ovnet", "attach", "--network", network, "--netns", "/run/netns/t3"];
    let said = cluster.refused(HOST, &argv);
    until("nothing of it to be left", || (settled(cluster) == before).then_some(()));
    said
}

/// What there is of ovnet on the host, and in Consul.
fn settled(cluster: &Cluster) -> (Footprint, BTreeMap<String, String>) {
    let footprint = cluster.footprint(HOST);
    // The maps are what the tests here fill.
    (Footprint { entries: Default::default(), ..footprint }, cluster.records())
}

fn errors_tell(cluster: &Cluster, what: &str) {
    until(&format!("the status to tell {what:?}"), || {
        cluster.status(HOST)["errors"].to_string().contains(what).then_some(())
    });
}

/// Waits until all is well, and attaches and detaches again.
fn recovers(cluster: &Cluster, network: &str) {
    cluster.wait_connected(HOST);
    let argv = ["ovnet", "attach", "--network", network, "--netns", "/run/netns/t3"];
    until("an attach to work again", || cluster.lab.exec(HOST, &argv).ok());
    cluster.sh(HOST, "ovnet detach --netns /run/netns/t3");
}

/// Fills each map by hand, as far as it goes.
fn full_maps(cluster: &Cluster, goes_on: &dyn Fn(&str)) {
    let address = |number: u32| mapped(number.to_be_bytes());
    // Not those in use: 240.0.0.0/4 is nobody's.
    let key = |number: u32| address(0xf000_0000 + number);
    let fills: [(&str, u32, &str, &dyn Fn()); 5] = [
        ("NETWORKS", MAX_NETWORKS, "ov_net2", &|| {
            fill(cluster, "NETWORKS", |number| (0x80_0000 + number, NetworkValue::default()));
        }),
        ("ENDPOINTS", MAX_ENDPOINTS, "ov_net1", &|| {
            let key = |number| EndpointKey { vni: 1, address: key(number) };
            fill(cluster, "ENDPOINTS", |number| (key(number), EndpointValue::default()));
        }),
        ("PORTS", MAX_PORTS, "ov_net1", &|| {
            fill(cluster, "PORTS", |number| (0x4000_0000 + number, PortValue::default()));
        }),
        ("HOSTS", MAX_HOSTS, "", &|| {
            fill(cluster, "HOSTS", |number| (key(number), HostValue::default()));
        }),
        ("PUBLISHED", MAX_PUBLISHED, "", &|| {
            let key = |number| PublishedKey { address: key(number), ..PublishedKey::default() };
            fill(cluster, "PUBLISHED", |number| (key(number), PublishedValue::default()));
        }),
    ];
    for (name, room, network, fill_it) in fills {
        // The repair takes out what is put in, and may come in between.
        let said = until(&format!("{name} to be full"), || {
            fill_it();
            if network.is_empty() {
                return Some(String::new());
            }
            let argv = ["ovnet", "attach", "--network", network, "--netns", "/run/netns/t3"];
            let output = cluster.lab.output(HOST, &argv, Duration::from_secs(60)).unwrap();
            if output.status.success() {
                cluster.sh(HOST, "ovnet detach --netns /run/netns/t3");
                return None;
            }
            Some(String::from_utf8_lossy(&output.stderr).into_owned())
        });
        if !network.is_empty() {
            let told = format!("the map {name} is full: it has room for {room} ");
            assert!(said.contains(&told) && said.lines().count() == 1, "{said}");
        }
        goes_on(name);
        recovers(cluster, if network.is_empty() { "ov_net1" } else { network });
    }
}

/// Enters things into a pinned map of the host until it is full.
fn fill<K: aya::Pod, V: aya::Pod>(cluster: &Cluster, name: &str, entry: impl Fn(u32) -> (K, V)) {
    let bpffs = cluster.lab.host(HOST).unwrap().root().join("sys/fs/bpf/ovnet");
    let pin = ovnet_agent::datapath::versioned(&bpffs).join("maps").join(name);
    let map = Map::HashMap(MapData::from_pin(pin).unwrap());
    let mut map: HashMap<MapData, K, V> = map.try_into().unwrap();
    for number in 0..=MAX_ENDPOINTS {
        let (key, value) = entry(number);
        match map.insert(key, value, 0) {
            Ok(()) => {}
            Err(MapError::SyscallError(error))
                if error.io_error.raw_os_error() == Some(libc::E2BIG) =>
            {
                return;
            }
            Err(error) => panic!("{error}"),
        }
    }
    panic!("{name} has room for more than there is");
}
