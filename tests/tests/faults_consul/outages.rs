//! Consul is away, broken, slow or confused.

use std::{
    net::SocketAddr,
    time::{Duration, Instant},
};

use ovnet_tests::{
    cluster::{Cluster, Steps, until},
    fault_proxy::{Fault, FaultProxy},
};
use xtask::lab::CONSUL_DATA;

use crate::Busy;

/// Where the proxy listens on docker01.
const PROXY: u16 = 8555;

/// Faults, and whether the agents then can not talk to Consul at all.
const FAULTS: [(&str, Fault, bool); 7] = [
    ("Consul refusing connections", Fault::Refuse, true),
    ("Consul hanging", Fault::Hang, true),
    ("Consul answering 500", Fault::Error500, true),
    ("Consul answering 1 s late", Fault::Slow(Duration::from_secs(1)), false),
    ("Consul dripping its answers", Fault::Drip(Duration::from_millis(10)), false),
    ("Consul's index going backwards", Fault::IndexBack, false),
    ("connections cut in the middle of an answer", Fault::Cut, true),
];

#[test]
fn forwarding_goes_on_whatever_consul_does_and_the_cluster_converges_afterwards() {
    let Some(cluster) = Cluster::up("outages", |options| {
        options.durable_consul = true;
        options.consul_at = Some(format!("192.168.1.11:{PROXY}"));
        // Whatever is put back is so by an event and not by the timer.
        options.agent_args = ["--repair-interval", "600"].map(str::to_owned).to_vec();
    }) else {
        return;
    };
    let consul: SocketAddr = cluster.lab.consul().unwrap().parse().unwrap();
    let proxy = FaultProxy::start(&cluster.lab, "docker01", PROXY, consul);
    let steps = Steps::default();
    cluster.lab.nodes().iter().for_each(|node| cluster.wait_connected(node));
    let mut busy = Busy::start(cluster);

    for (name, fault, broken) in FAULTS {
        steps.begin(name);
        proxy.set(fault);
        let lab = &busy.cluster.lab;
        // A name that nobody has: writing it is what fails.
        let create = ["ovnet", "network", "create", "half"];
        let attach = ["ovnet", "attach", "--network", "ov_net1", "--netns", "proof"];
        if broken {
            for node in lab.nodes() {
                until(&format!("{node} to say what is wrong"), || {
                    (!busy.cluster.is_connected(&node)).then_some(())
                });
            }
        }
        if fault == Fault::Cut {
            writes_under_cuts(&busy, &proxy);
        } else if broken {
            // Each takes its time where Consul hangs.
            let tried = if fault == Fault::Hang { 1 } else { 2 };
            for (node, argv) in [("docker02", &create[..]), ("docker03", &attach)][..tried].iter() {
                steps.begin(&argv[..3].join(" "));
                let said = busy.cluster.refused(node, argv);
                assert!(said.contains(&format!("192.168.1.11:{PROXY}")), "{said}");
                println!("         {said}");
            }
            steps.begin("traffic goes on");
        } else {
            // Late, but done.
            let address = busy.cluster.run("docker03", &attach).trim().parse().unwrap();
            for node in lab.nodes() {
                until(&format!("{node} to know what was attached"), || {
                    busy.cluster.endpoints_of(&node).contains_key(&address).then_some(())
                });
            }
            busy.cluster.sh("docker03", "ovnet detach --netns proof");
            until("it to be forgotten everywhere", || busy.is_as_it_was().then_some(()));
        }
        if fault != Fault::Refuse {
            until("the fault to be met", || (proxy.met() > 10).then_some(()));
        }
        let (asked, since) = (proxy.requests(), Instant::now());
        busy.goes_on_for_an_outage();
        let asked = (proxy.requests() - asked) as f64 / since.elapsed().as_secs_f64();
        println!("         {} requests met it, {asked:.1} in a second", proxy.met());
        assert!(asked < 30.0, "three agents asked {asked} times in a second");
        let healed = Instant::now();
        proxy.set(Fault::None);
        busy.must_converge(name, healed);
    }

    steps.begin("Consul killed and started again");
    busy.cluster.lab.stop_consul().unwrap();
    busy.goes_on_for_an_outage();
    busy.cluster.lab.start_consul().unwrap();
    busy.must_converge("Consul's death", Instant::now());

    steps.begin("Consul's data wiped");
    busy.cluster.lab.stop_consul().unwrap();
    busy.cluster.sh("docker01", &format!("rm -r {CONSUL_DATA}"));
    busy.goes_on_for_an_outage();
    busy.cluster.lab.start_consul().unwrap();
    busy.must_converge("the loss of all of Consul's data", Instant::now());

    steps.begin("Consul's data wiped too quickly for anybody to miss it");
    busy.cluster.lab.stop_consul().unwrap();
    busy.cluster.sh("docker01", &format!("rm -r {CONSUL_DATA}"));
    busy.cluster.lab.start_consul().unwrap();
    busy.must_converge("the quick loss of all of Consul's data", Instant::now());

    steps.begin("the end");
    busy.must_have_lost_none();
}

/// Networks made and endpoints attached while answers are cut. Where only the answer to the write is,
/// the agent finds out what became of it. Where all are from then on it cannot, and refuses in one
/// line; what it refused leaves nothing behind once Consul answers again.
fn writes_under_cuts(busy: &Busy, proxy: &FaultProxy) {
    let cluster = &busy.cluster;
    let attach = ["ovnet", "attach", "--network", "ov_net1", "--netns", "proof"];
    let create = ["ovnet", "network", "create", "half"];
    proxy.set(Fault::CutWrites);
    cluster.run("docker02", &create);
    cluster.run("docker03", &attach);
    cluster.sh("docker03", "ovnet detach --netns proof");
    cluster.sh("docker02", "ovnet network rm half");
    assert!(proxy.met() > 3, "the agents wrote nothing");
    for (node, argv) in [("docker02", &create[..]), ("docker03", &attach)] {
        proxy.set(Fault::CutFromWrite);
        let said = cluster.refused(node, argv);
        println!("         {said}");
        // What it may have written is there for a moment.
        proxy.set(Fault::None);
        until("nothing to be left of what was refused", || {
            (busy.is_as_it_was() && cluster.records() == busy.records).then_some(())
        });
    }
    proxy.set(Fault::Cut);
    println!("         {}", cluster.refused("docker02", &create));
    println!("         {}", cluster.refused("docker03", &attach));
}
