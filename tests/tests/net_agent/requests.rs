//! What people type: networks, attaches and detaches, from all hosts at once.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::Ipv4Addr,
    thread,
    time::Duration,
};

use nix::sys::signal::Signal;
use ovnet_tests::cluster::{Cluster, Steps, text, until, within};
use serde_json::Value;

/// How soon a network that was created is usable on all hosts.
const USABLE: Duration = Duration::from_secs(1);
/// Rounds of attaching and detaching.
const ROUNDS: usize = 30;
/// Attaches started together, over all hosts.
const AT_ONCE: usize = 200;
const HOSTS: [&str; 3] = ["docker01", "docker02", "docker03"];

#[test]
fn requests_do_what_they_say_or_nothing() {
    let Some(cluster) = Cluster::up("requests", |_| {}) else { return };
    let steps = Steps::default();

    steps.begin("networks with and without options");
    let id = cluster.sh("docker02", "ovnet network create ov_net1");
    assert_eq!(id.len(), 36, "create prints the id: {id}");
    let options = "--subnet 172.19.0.0/24 --gateway 172.19.0.254 --ip-range 172.19.0.64/26 \
                   --aux-address router=172.19.0.64 --aux-address printer=172.19.0.66 --mtu 1300 \
                   --internal --label team=net -o com.example=1";
    cluster.sh("docker01", &format!("ovnet network create {options} ov_net3"));
    for host in HOSTS {
        let network = within(USABLE, &format!("ov_net3 to be seen on {host}"), || {
            Some(cluster.json(host, "network inspect ov_net3")[0].clone())
        });
        let expected = [
            ("subnet", "172.19.0.0/24"),
            ("gateway", "172.19.0.254"),
            ("ip_range", "172.19.0.64/26"),
            ("created_by", "docker01"),
        ];
        for (field, value) in expected {
            assert_eq!(network[field], value, "{field}");
        }
        assert_eq!(network["aux"]["printer"], "172.19.0.66");
        assert_eq!((&network["mtu"], &network["internal"]), (&1300.into(), &true.into()));
        assert_eq!(
            (&network["labels"]["team"], &network["options"]["com.example"]),
            (&"net".into(), &"1".into())
        );
        // Usable at once, on every host.
        cluster.sandbox(host, "a", "--network ov_net3");
    }
    let listed = cluster.sh("docker03", "ovnet network ls");
    assert!(listed.contains("ov_net1") && listed.contains("172.19.0.0/24"), "{listed}");
    let members = cluster.json("docker02", "network inspect ov_net3")[0]["endpoints"].clone();
    let addresses: BTreeSet<_> =
        members.as_array().unwrap().iter().map(|it| text(it, "address").unwrap()).collect();
    let expected = ["172.19.0.65", "172.19.0.67", "172.19.0.68"];
    assert_eq!(addresses, expected.into(), "from the range, without the aux addresses");
    assert_eq!(cluster.json("docker02", "endpoint ls --local")[0]["local"]["mtu"], 1300);
    cluster.wait_ping("docker01/a", "172.19.0.67".parse().unwrap());

    steps.begin("rm refuses while any host has an endpoint");
    for host in ["docker03", "docker02"] {
        cluster.sh(host, "ovnet detach a");
    }
    assert_eq!(
        cluster.refused("docker03", &["ovnet", "network", "rm", "ov_net3"]),
        "ovnet: network ov_net3 is in use: host docker01 has endpoint a (172.19.0.65) in it; \
         detach it first"
    );
    assert!(cluster.record("networks/ov_net3").is_some());
    cluster.sh("docker01", "ovnet detach a");
    cluster.sh("docker03", "ovnet network rm ov_net3");
    until("ov_net3 to be gone everywhere", || {
        let known = |host| cluster.json(host, "network ls").to_string().contains("ov_net3");
        (!HOSTS.into_iter().any(known)).then_some(())
    });
    assert!(cluster.records().keys().all(|it| !it.contains("172.19.0.0")));
    HOSTS.iter().for_each(|host| cluster.lab.remove_sandbox(host, "a").unwrap());

    steps.begin("two hosts create the same, and different, networks at once");
    let both = together(HOSTS[..2].iter(), |host| {
        let argv = ["ovnet", "network", "create", "ov_same"];
        cluster.lab.output(host, &argv, Duration::from_secs(30)).unwrap()
    });
    let told: Vec<_> = both.iter().filter(|it| !it.status.success()).collect();
    assert_eq!(told.len(), 1, "one is told that there is one already");
    let said = String::from_utf8_lossy(&told[0].stderr).into_owned();
    assert!(
        said.starts_with("ovnet: network ov_same exists already: created by docker0"),
        "{said}"
    );
    let names: Vec<String> = (0..9).map(|number| format!("ov_many{number}")).collect();
    together(names.iter().enumerate(), |(number, name)| {
        cluster.sh(HOSTS[number % 3], &format!("ovnet network create {name}"))
    });
    let networks = cluster.json("docker01", "network ls");
    let networks = networks.as_array().unwrap();
    assert_eq!(networks.len(), 11);
    for field in ["vni", "subnet", "id", "name"] {
        let values: BTreeSet<_> = networks.iter().map(|it| it[field].to_string()).collect();
        assert_eq!(values.len(), networks.len(), "each its own {field}");
    }
    for name in names.iter().map(String::as_str).chain(["ov_same"]) {
        cluster.sh("docker02", &format!("ovnet network rm {name}"));
    }

    churn(&cluster, &steps);
    every_verb_prints_json(&cluster, &steps);
    all_at_once(&cluster, &steps);
}

/// Attaches, detaches and failures leave what was before.
fn churn(cluster: &Cluster, steps: &Steps) {
    steps.begin("attach and detach, over and over");
    let places: Vec<_> = HOSTS.iter().map(|host| (*host, "churn")).collect();
    for (host, name) in &places {
        cluster.lab.add_sandbox(host, name).unwrap();
        // One endpoint stays on each host: what it needs is no leftover.
        cluster.sandbox(host, "stays", "--network ov_net1 --ifname net0");
    }
    settle(cluster);
    let before = cluster.footprints();
    together(places.iter(), |(host, name)| {
        for _ in 0..ROUNDS {
            cluster
                .sh(host, &format!("ovnet attach --network ov_net1 --netns {name} --name {name}"));
            cluster.sh(host, &format!("ovnet detach {name}"));
        }
    });
    until_same(cluster, &before);

    steps.begin("attaches that fail");
    let stays = cluster.json("docker01", "endpoint ls --local")[0].clone();
    let taken = text(&stays, "address").unwrap().to_owned();
    for wrong in [
        "--network ov_net1 --netns churn --name a/b",
        &format!("--network ov_net1 --netns churn --ip {taken}"),
        "--network ov_net1 --netns missing",
        "--network ov_net1 --netns churn --ifname lo",
        "--network ov_none --netns churn",
        "--network ov_net1 --netns stays",
    ] {
        for host in HOSTS {
            let argv: Vec<_> = ["ovnet", "attach"].into_iter().chain(wrong.split(' ')).collect();
            cluster.refused(host, &argv);
        }
    }
    let taken = "ip -n churn link add taken0 type veth peer name taken1";
    cluster.sh("docker01", taken);
    let argv = "ovnet attach --network ov_net1 --netns churn --ifname taken0";
    cluster.refused("docker01", &argv.split(' ').collect::<Vec<_>>());
    until_same(cluster, &before);

    steps.begin("the agent is killed in the middle of attaches");
    for round in 0..4 {
        let host = "docker02";
        let _attach = cluster
            .lab
            .spawn(host, &["ovnet", "attach", "--network", "ov_net1", "--netns", "churn"], None)
            .unwrap();
        // Each round a little further into the attach: its record, its interface, its file.
        let folder = cluster.lab.host(host).unwrap().root();
        let stage = || match round {
            0 => true,
            1 => cluster.records().len() > before.1.len(),
            2 => cluster.footprint(host).links.len() > before.0[host].links.len(),
            _ => std::fs::read_dir(folder.join("var/lib/ovnet/endpoints")).unwrap().count() > 1,
        };
        until(&format!("stage {round} of an attach"), || stage().then_some(()));
        cluster.stop_agent(host, Signal::SIGKILL);
        cluster.start_agent(host);
        cluster.wait_connected(host);
        // An attach that was cut is there whole or not at all. Its client saw it fail.
        let local = cluster.json(host, "endpoint ls --local");
        if local.as_array().unwrap().len() > 1 {
            cluster.sh(host, "ovnet detach --netns churn");
        }
        until_same(cluster, &before);
    }

    steps.begin("a veth pair and a claim of an agent that was killed between them");
    cluster.stop_agent("docker02", Signal::SIGKILL);
    let left = "ip link add ovnet0123abcd type veth peer name eth9 netns churn";
    cluster.sh("docker02", left);
    cluster.sh("docker02", "ip link add ovnetmine type bridge");
    let network = stays["network"].as_str().unwrap().to_owned();
    let id = cluster.json("docker01", &format!("network inspect {network}"))[0]["id"].clone();
    let claim = "{\"v\":1,\"id\":\"0123abcd\",\"address\":\"10.0.0.200\",\"mac\":\
                 \"02:42:0a:00:00:c8\",\"host\":\"docker02\",\"names\":[],\"state\":\"reserved\"}";
    cluster.put_record(&format!("endpoints/{}/10.0.0.200", id.as_str().unwrap()), claim);
    cluster.start_agent("docker02");
    until("the leftover interface to go", || {
        (!cluster.footprint("docker02").links.contains("ovnet0123abcd")).then_some(())
    });
    assert!(cluster.footprint("docker02").links.contains("ovnetmine"), "it is no endpoint's");
    cluster.sh("docker02", "ip link del ovnetmine");
    until_same(cluster, &before);
    for (host, name) in &places {
        cluster.lab.remove_sandbox(host, name).unwrap();
    }
}

/// `--json` of every verb is JSON.
fn every_verb_prints_json(cluster: &Cluster, steps: &Steps) {
    steps.begin("every verb prints JSON");
    cluster.lab.add_sandbox("docker01", "json").unwrap();
    let network = cluster.json("docker01", "network create ov_json");
    assert_eq!(network["name"], "ov_json");
    let attached = cluster.json("docker01", "attach --network ov_json --netns json --name j1");
    assert_eq!(attached["names"][0], "j1");
    assert_eq!(attached["local"]["ifname"], "eth0");
    for list in ["network ls", "network inspect ov_json", "endpoint ls", "host ls", "counters"] {
        assert!(cluster.json("docker01", list).is_array(), "{list}");
    }
    assert_eq!(cluster.json("docker01", "status")["node"], "docker01");
    let mut monitor = cluster.lab.command("docker01", &["ovnet", "monitor", "--json"]).unwrap();
    let mut monitor = monitor.stdout(std::process::Stdio::piped()).spawn().unwrap();
    let output = monitor.stdout.take().unwrap();
    let line = thread::spawn(move || {
        use std::io::BufRead as _;
        let mut line = String::new();
        std::io::BufReader::new(output).read_line(&mut line).unwrap();
        line
    });
    until("a drop to be shown", || {
        // Nobody has this address, so packets to it are dropped.
        let neighbour = "ip neigh replace 10.0.1.99 lladdr 02:42:0a:00:01:63 dev eth0";
        cluster.sh("docker01/json", neighbour);
        let ping = ["ping", "-c1", "-W1", "10.0.1.99"];
        let _ = cluster.lab.output("docker01/json", &ping, Duration::from_secs(5));
        line.is_finished().then_some(())
    });
    // Its nsenter ends with it, the reader with both.
    let _ = monitor.kill();
    let _ = monitor.wait();
    let line: Value = serde_json::from_str(&line.join().unwrap()).unwrap();
    assert_eq!(line["program"], "from_container", "{line}");
    let detached = cluster.json("docker01", "detach j1");
    assert_eq!(detached["endpoints"][0]["network"], "ov_json");
    let removed = cluster.json("docker01", "network rm ov_json");
    assert!(removed.to_string().contains("ov_json"), "{removed}");
    cluster.lab.remove_sandbox("docker01", "json").unwrap();
}

/// Attaches started together all succeed and get different addresses; a full subnet says so.
fn all_at_once(cluster: &Cluster, steps: &Steps) {
    steps.begin("200 sandboxes");
    cluster.sh("docker01", "ovnet network create --subnet 10.99.0.0/24 ov_big");
    let mut sandboxes: BTreeMap<&str, Vec<String>> = BTreeMap::new();
    for number in 0..AT_ONCE {
        sandboxes.entry(HOSTS[number % 3]).or_default().push(format!("s{number}"));
    }
    for (host, names) in &sandboxes {
        let script: String = names.iter().map(|name| format!("netns add {name}\n")).collect();
        cluster.run(host, &["sh", "-ec", &format!("printf '{script}' | ip -batch -")]);
    }
    steps.begin("200 attaches at once");
    together(sandboxes.iter(), |(host, names)| {
        // All of a host are started before any is waited for.
        let script = format!(
            "for name in {}; do ovnet attach --network ov_big --netns $name --name $name & \
             pids=\"$pids $!\"; done; for pid in $pids; do wait $pid; done",
            names.join(" ")
        );
        cluster.run(host, &["sh", "-ec", &script])
    });
    let endpoints = cluster.json("docker01", "endpoint ls --network ov_big");
    let endpoints = endpoints.as_array().unwrap();
    let addresses: BTreeSet<Ipv4Addr> =
        endpoints.iter().map(|it| text(it, "address").unwrap().parse().unwrap()).collect();
    assert_eq!((endpoints.len(), addresses.len()), (AT_ONCE, AT_ONCE));
    until("all hosts to know all of them", || {
        HOSTS
            .iter()
            .all(|host| {
                let known = cluster.endpoints_of(host);
                addresses.iter().all(|address| known.contains_key(address))
            })
            .then_some(())
    });
    let last = *addresses.last().unwrap();
    cluster.wait_ping("docker01/s0", last);

    steps.begin("all detached at once");
    together(sandboxes.iter(), |(host, _)| {
        let script = "for name in $(ip netns list | grep -o '^s[0-9]*$\\|^s[0-9]* '); do \
                      ovnet detach --netns $name & pids=\"$pids $!\"; done; \
                      for pid in $pids; do wait $pid; done";
        cluster.run(host, &["sh", "-ec", script])
    });
    cluster.sh("docker03", "ovnet network rm ov_big");

    steps.begin("a full subnet");
    cluster.sh("docker01", "ovnet network create --subnet 10.98.0.0/30 ov_small");
    let attach = |host, name: &str| {
        let argv = ["ovnet", "attach", "--network", "ov_small", "--netns", name];
        cluster.lab.output(host, &argv, Duration::from_secs(30)).unwrap()
    };
    let tries = together([("docker01", "s0"), ("docker02", "s1")].iter(), |(host, name)| {
        attach(host, name).status.success()
    });
    assert_eq!(tries.iter().filter(|it| **it).count(), 1, "a /30 has room for one endpoint");
    assert_eq!(
        cluster.refused("docker03", &["ovnet", "attach", "--network", "ov_small", "--netns", "s2"]),
        "ovnet: network ov_small is full: no free address in 10.98.0.0/30; detach an endpoint, or \
         use a network with a larger subnet"
    );
}

/// Does something for each at once; panics where one did.
fn together<I: Send, T: Send>(
    items: impl Iterator<Item = I>,
    work: impl Fn(I) -> T + Sync,
) -> Vec<T> {
    thread::scope(|scope| {
        let work = &work;
        let threads: Vec<_> = items.map(|item| scope.spawn(move || work(item))).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

type Footprints = (BTreeMap<String, ovnet_tests::cluster::Footprint>, BTreeMap<String, String>);

/// Waits until every host knows every endpoint that is announced.
fn settle(cluster: &Cluster) {
    until("all hosts to know the same", || {
        let known: BTreeSet<Vec<Ipv4Addr>> =
            HOSTS.iter().map(|host| cluster.endpoints_of(host).into_keys().collect()).collect();
        let announced = cluster.records().keys().filter(|it| it.starts_with("endpoints/")).count();
        (known.len() == 1 && known.first()?.len() == announced).then_some(())
    });
}

/// Waits until everything is as it was. Others learn of a detach a moment later.
fn until_same(cluster: &Cluster, before: &Footprints) {
    let mut last = None;
    let same = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        until("everything to be as before", || {
            let now = cluster.footprints();
            let same = now == *before;
            last = Some(now);
            same.then_some(())
        });
    }));
    if same.is_err() {
        let last = last.unwrap();
        for (host, footprint) in &last.0 {
            assert_eq!(footprint, &before.0[host], "{host}");
        }
        assert_eq!(last.1, before.1, "the records");
        panic!("it became as before just now");
    }
}
