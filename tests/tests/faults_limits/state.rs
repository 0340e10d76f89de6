//! The state folder: cut, emptied, overwritten and removed while the agent is away, and an agent
//! killed in the middle of attaches.

use std::{
    collections::BTreeSet,
    fs,
    process::Stdio,
    thread,
    time::{Duration, Instant},
};

use nix::sys::signal::Signal;
use ovnet_tests::cluster::{Cluster, Ping, Steps, Stream, text, until};
use serde_json::Value;

/// How often the agent is killed in the middle of attaches.
const KILLS: usize = 12;
/// Sandboxes that are attached at once.
const SANDBOXES: usize = 6;

#[test]
fn what_a_host_remembers_may_be_lost_and_nothing_else_is() {
    let Some(cluster) = Cluster::up("state", |options| {
        options.hosts = 2;
        options.durable_consul = true;
        options.agent_args = ["--repair-interval", "1"].map(str::to_owned).to_vec();
    }) else {
        return;
    };
    let steps = Steps::default();
    cluster.sh("docker02", "ovnet network create ov_net1");
    let t1 = cluster.sandbox("docker01", "t1", "--network ov_net1 -p 90:80");
    let t2 = cluster.sandbox("docker02", "t2", "--network ov_net1");
    cluster.wait_ping("docker02/t2", t1);
    let folder = cluster.lab.host("docker01").unwrap().root().join("var/lib/ovnet/endpoints");
    let before = local(&cluster);
    let id = text(&before[0], "id").unwrap().to_owned();
    let file = folder.join(format!("{id}.json"));
    let whole = fs::read(&file).unwrap();
    let ping = Ping::start(&cluster.lab, "docker02/t2", t1);
    let stream = Stream::start(&cluster.lab, "docker01/t1", "docker02/t2", t2);
    let at = (cluster.lab.address("docker01").unwrap(), 90).into();
    let port = published(&cluster, at);

    // Each with Consul there, and one with Consul away when the agent starts.
    let damages: [(&str, &dyn Fn()); 4] = [
        ("cut in its middle", &|| fs::write(&file, &whole[..whole.len() / 2]).unwrap()),
        ("empty", &|| fs::write(&file, "").unwrap()),
        ("of another endpoint", &|| {
            let other = String::from_utf8(whole.clone()).unwrap().replace(&id, "0123456789");
            fs::write(&file, other).unwrap();
        }),
        ("gone with its folder", &|| fs::remove_dir_all(folder.parent().unwrap()).unwrap()),
    ];
    for (round, (what, damage)) in damages.into_iter().enumerate() {
        steps.begin(&format!("the state file is {what} when the agent starts"));
        cluster.stop_agent("docker01", Signal::SIGKILL);
        damage();
        if round == 2 {
            cluster.lab.stop_consul().unwrap();
        }
        cluster.start_agent("docker01");
        if round == 2 {
            let errors = cluster.status("docker01")["errors"].to_string();
            let told = "what this host remembers of the endpoint behind ovnet";
            assert!(errors.contains(told), "{errors}");
            ping.goes_on(1500);
            stream.goes_on();
            port.goes_on();
            cluster.lab.start_consul().unwrap();
        }
        until("the endpoint to be recovered", || (local(&cluster) == before).then_some(()));
        until("its file to be written", || {
            let again: Value = serde_json::from_slice(&fs::read(&file).ok()?).ok()?;
            (again == serde_json::from_slice::<Value>(&whole).unwrap()).then_some(())
        });
        let aside = usize::from(what != "gone with its folder");
        assert_eq!(cluster.status("docker01")["state_files_set_aside"], aside, "{what}");
        cluster.wait_connected("docker01");
        let repairs = &cluster.status("docker01")["repairs"];
        assert_eq!(*repairs, serde_json::json!({}), "nothing had to be put back");
        ping.goes_on(100);
        stream.goes_on();
        port.goes_on();
        assert!(ping.lost().is_empty(), "{what}: lost {:?}", ping.lost());
    }
    steps.begin("the files are removed under the running agent");
    fs::remove_file(&file).unwrap();
    until("the file to be written again", || file.exists().then_some(()));

    killed_in_attaches(&cluster, &steps);
    port.must_be_whole();
    stream.must_be_whole();
    let pings = ping.answered();
    ping.must_have_lost_none("damaged state files");
    println!("MEASURED state files: 0 of {pings} pings and 0 of 2 connections lost");

    steps.begin("what was recovered can be detached");
    cluster.sh("docker01", "ovnet detach t1");
    assert_eq!(local(&cluster), Vec::<Value>::new());
    cluster.stop_agent("docker01", Signal::SIGTERM);
    cluster.sh("docker01", "ovnet-agent cleanup");
    assert_eq!(cluster.footprint("docker01").state, BTreeSet::new());
}

/// Kills the agent at moments spread over a round of attaches and detaches. After each start what is
/// remembered, what is in the kernel and what is in Consul agree.
fn killed_in_attaches(cluster: &Cluster, steps: &Steps) {
    steps.begin("the agent is killed in the middle of attaches and detaches");
    let names: Vec<String> = (0..SANDBOXES).map(|number| format!("k{number}")).collect();
    for name in &names {
        cluster.sh("docker01", &format!("ip netns add {name}"));
    }
    let mut cut = BTreeSet::new();
    for round in 0..KILLS {
        let clients: Vec<_> = names
            .iter()
            .map(|name| {
                let netns = format!("/run/netns/{name}");
                let attach = ["ovnet", "attach", "--network", "ov_net1", "--netns", &netns];
                let detach = ["ovnet", "detach", "--netns", &netns];
                let argv = if round % 2 == 0 { &attach[..] } else { &detach[..] };
                let mut command = cluster.lab.command("docker01", argv).unwrap();
                command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
                command.spawn().unwrap()
            })
            .collect();
        // The moment is what is tried out here, not what is waited for.
        let moment = Instant::now() + Duration::from_millis(25 * (round as u64 + 1));
        thread::sleep(moment - Instant::now());
        cluster.stop_agent("docker01", Signal::SIGKILL);
        for mut client in clients {
            client.wait().unwrap();
        }
        let files = cluster.footprint("docker01").state;
        cut.insert(files.iter().filter(|it| it.ends_with(".json")).count());
        cluster.start_agent("docker01");
        cluster.wait_connected("docker01");
        agree(cluster, round);
    }
    println!("    files of endpoints at the kills: {cut:?}");
    for name in &names {
        // One may be detached already.
        let argv = ["ovnet", "detach", "--netns", &format!("/run/netns/{name}")];
        let _ = cluster.lab.exec("docker01", &argv);
        cluster.sh("docker01", &format!("ip netns del {name}"));
    }
    until("the sandboxes to be forgotten", || (local(cluster).len() == 1).then_some(()));
}

/// Waits until files, endpoints, veths, map entries and Consul's records are of the same endpoints.
fn agree(cluster: &Cluster, round: usize) {
    let look = || {
        let local = local(cluster);
        let ids: BTreeSet<String> =
            local.iter().map(|it| it["id"].as_str().unwrap().to_owned()).collect();
        let footprint = cluster.footprint("docker01");
        let files: BTreeSet<String> = footprint
            .state
            .iter()
            .filter_map(|it| it.strip_prefix("endpoints/").filter(|name| !name.is_empty()))
            .map(str::to_owned)
            .collect();
        let expected: BTreeSet<String> = ids.iter().map(|id| format!("{id}.json")).collect();
        let is_veth = |name: &&String| name.len() == "ovnet".len() + 8;
        let veths: BTreeSet<String> = footprint.links.iter().filter(is_veth).cloned().collect();
        let wired: BTreeSet<String> = ids.iter().map(|id| format!("ovnet{}", &id[..8])).collect();
        let records: BTreeSet<String> = cluster
            .records()
            .into_iter()
            .filter(|(key, value)| key.starts_with("endpoints/") && value.contains("docker01"))
            .map(|(_, value)| text(&serde_json::from_str(&value).unwrap(), "id").unwrap().into())
            .collect();
        let here = cluster.endpoints_of("docker01").into_values();
        let here = here.filter(|vtep| vtep.is_unspecified()).count();
        (files, expected, veths, wired, records, ids, here)
    };
    let mut last = look();
    let agreed = |it: &(_, _, _, _, BTreeSet<String>, BTreeSet<String>, usize)| {
        it.0 == it.1 && it.2 == it.3 && it.4 == it.5 && it.6 == it.5.len()
    };
    let deadline = Instant::now() + Duration::from_secs(30);
    while !agreed(&last) {
        assert!(Instant::now() < deadline, "round {round}: {last:#?}");
        last = look();
    }
}

/// This host's endpoints without what moves: counters.
fn local(cluster: &Cluster) -> Vec<Value> {
    let mut endpoints = cluster.json("docker01", "endpoint ls --local").as_array().unwrap().clone();
    for endpoint in &mut endpoints {
        let local = endpoint["local"].as_object_mut().unwrap();
        local.retain(|field, _| !field.starts_with("rx_") && !field.starts_with("tx_"));
    }
    endpoints
}

/// A connection to the published port of `t1` that must go on.
fn published(cluster: &Cluster, at: std::net::SocketAddr) -> Stream {
    let listen = ([0, 0, 0, 0], 80).into();
    Stream::start_published(&cluster.lab, "client", "docker01/t1", listen, at)
}
