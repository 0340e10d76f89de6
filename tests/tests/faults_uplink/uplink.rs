//! The uplink goes down, changes its MTU, MAC, name and address, and is replaced by another one.

use std::{
    net::Ipv4Addr,
    time::{Duration, Instant},
};

use ovnet_common::abi::Program;
use ovnet_tests::cluster::{Cluster, Footprint, Steps, Stream, until, within};

use super::{
    download::{self, Download},
    edit,
    host::{ADDRESS, HOST, make_uplink, neighbour, programs_are_ours, repaired, script},
    probe::{Cost, Probe},
};

/// How long traffic may take from when the uplink can be used to the first answer.
const RESUME: Duration = Duration::from_secs(3);
/// How many datagrams may be lost then, at one each millisecond: the kernel itself may take a second
/// to use a carrier that is back (`linkwatch_schedule_work`).
const LATE: usize = 2000;

#[test]
fn every_change_of_an_uplink_is_followed() {
    for xdp in [None, Some("native")] {
        let name = if xdp.is_some() { "uplink-xdp" } else { "uplink" };
        let Some(cluster) = Cluster::up(name, |options| {
            options.hosts = 2;
            options.xdp = xdp.map(str::to_owned);
            // Far longer than the test waits for anything: only events can tell of a change.
            options.agent_args =
                ["--repair-interval", "300", "--host-grace", "2"].map(str::to_owned).to_vec();
        }) else {
            return;
        };
        story(&cluster, xdp.is_some());
    }
}

fn story(cluster: &Cluster, xdp: bool) {
    let steps = Steps::default();
    cluster.sh(HOST, "ovnet network create ov_net1");
    let t1 = cluster.sandbox("docker01", "t1", "--network ov_net1");
    let t2 = cluster.sandbox(HOST, "t2", "--network ov_net1 -p 90:80");
    cluster.wait_ping("docker01/t1", t2);
    download::serve(cluster, "docker02/t2");
    let test = Test {
        cluster,
        xdp,
        t2,
        probe: Probe::start(cluster, "docker01/t1", "docker02/t2", t2),
        stream: Stream::start(&cluster.lab, "docker02/t2", "docker01/t1", t1),
        before: settled(cluster),
    };
    let download = Download::start(cluster, ADDRESS);
    let goes_on = || {
        test.stream.goes_on();
        download.goes_on();
    };

    steps.begin("down, and up");
    test.change("uplink down, and up", ADDRESS, "ens33", || {
        cluster.sh(HOST, "ip link set ens33 down");
        test.away("interface ens33 is down");
        cluster.sh(HOST, "ip link set ens33 up");
    });
    goes_on();

    steps.begin("its MTU smaller, larger, and as it was");
    if xdp {
        // The next pass finds it out, whatever the pin says.
        edit::detach(cluster, Program::UplinkXdp, "ens33");
    }
    for mtu in [1400, 9000, 1500] {
        let what = format!("MTU of the uplink set to {mtu}");
        test.change(&what, ADDRESS, "ens33", || {
            cluster.sh(HOST, &format!("ip link set ens33 mtu {mtu}"));
        });
        until("the sandbox, and the record, to follow", || {
            let record = cluster.record("hosts/docker02")?;
            let inner = cluster.sh("docker02/t2", "ip -o link show eth0");
            let follows = inner.contains(&format!(" mtu {} ", mtu - 50))
                && record.contains(&format!("\"mtu\":{mtu}"));
            follows.then_some(())
        });
        goes_on();
    }

    steps.begin("its MAC");
    let mac = "02:33:00:00:00:77";
    test.change("MAC of the uplink changed", ADDRESS, "ens33", || {
        cluster.sh(HOST, &format!("ip link set ens33 address {mac}"));
    });
    assert_eq!(neighbour(cluster, "docker01", ADDRESS), mac);
    goes_on();

    steps.begin("its name, and back");
    for (from, to) in [("ens33", "lan0"), ("lan0", "ens33")] {
        let what = format!("uplink {from} renamed to {to} (down meanwhile)");
        test.change(&what, ADDRESS, to, || {
            // Linux before 6.2 renames no interface that is up.
            script(cluster, &format!("ip link set {from} down; ip link set {from} name {to}"));
            cluster.sh(HOST, &format!("ip link set {to} up"));
        });
        let status = cluster.status(HOST);
        let told = status["errors"].to_string();
        assert_eq!(
            told.contains("give --advertise lan0 at the next start"),
            to == "lan0",
            "{told}"
        );
        goes_on();
    }

    steps.begin("deleted, and made again with another MAC");
    let mac = "02:33:00:00:00:78";
    test.change("uplink deleted, and made again with another MAC", ADDRESS, "ens33", || {
        cluster.sh(HOST, "ip link del ens33");
        test.away("there is no such interface");
        make_uplink(cluster, mac);
        if xdp {
            // As the lab's wire: what XDP sees must have its checksums.
            cluster.sh(HOST, "ethtool -K ens33 tx off");
        }
        script(
            cluster,
            &format!("ip address add {ADDRESS}/24 broadcast + dev ens33; ip link set ens33 up"),
        );
    });
    assert_eq!(neighbour(cluster, "docker01", ADDRESS), mac);
    goes_on();
    drop(download);

    steps.begin("its address");
    let other = Ipv4Addr::new(192, 168, 1, 52);
    test.change("address of the uplink changed", other, "ens33", || {
        script(
            cluster,
            &format!(
                "ip address del {ADDRESS}/24 dev ens33; ip address add {other}/24 broadcast + dev \
                 ens33"
            ),
        );
    });
    until("docker01 to forget the old VTEP", || {
        let vteps = cluster.vteps_of("docker01");
        (!vteps.contains(&ADDRESS) && vteps.contains(&other)).then_some(())
    });
    test.stream.goes_on();
    assert!(download::answers(cluster, other), "the published port, by the new address");

    steps.begin("the end");
    assert_eq!(repaired(cluster, "map-entry"), 0, "nobody edited anything");
    let Test { stream, .. } = test;
    stream.must_be_whole();
}

struct Test<'a> {
    cluster: &'a Cluster,
    xdp: bool,
    t2: Ipv4Addr,
    probe: Probe,
    stream: Stream,
    before: Footprint,
}

impl Test<'_> {
    /// Makes a change, which is complete and leaves the uplink usable when `make` returns, and looks
    /// at all that must follow.
    fn change(&self, what: &str, address: Ipv4Addr, uplink: &str, make: impl FnOnce()) {
        let after = self.probe.next();
        make();
        let usable = Instant::now();
        let cost = self.probe.cost(after, usable);
        let Cost { lost, lost_when_usable, first } = cost;
        let path = if self.xdp { "XDP" } else { "TC" };
        let first = first.as_secs_f64() * 1000.0;
        println!(
            "{what} | {path} | {lost} lost, {lost_when_usable} after it was usable; first \
             answer after {first:.1} ms"
        );
        assert!(cost.first < RESUME && lost_when_usable <= LATE, "{what}: {cost:?}");
        within(RESUME, "docker01 to know the VTEP", || {
            (self.cluster.endpoints_of("docker01").get(&self.t2) == Some(&address)).then_some(())
        });
        // The other host may hear of it before the pass that follows the change is over.
        within(RESUME, "the status to follow", || {
            let status = self.cluster.status(HOST);
            (status["vtep"] == address.to_string() && status["uplink"] == uplink).then_some(())
        });
        programs_are_ours(self.cluster, uplink, self.xdp);
        if uplink == "ens33" {
            self.cluster.wait_connected(HOST);
        }
        assert_eq!(self.cluster.footprint(HOST).links, self.before.links);
    }

    /// Waits until the agent says that the uplink is away, and for a while; nothing else goes.
    fn away(&self, why: &str) {
        until(&format!("the agent to say that {why}"), || {
            let errors = self.cluster.status(HOST)["errors"].to_string();
            errors.contains(why).then_some(())
        });
        for _ in 0..5 {
            let now = self.cluster.footprint(HOST);
            assert_eq!(now.entries, self.before.entries, "while the uplink is away");
            assert_eq!((&now.links, &now.state), (&self.before.links, &self.before.state));
            let errors = self.cluster.status(HOST)["errors"].to_string();
            assert_eq!(errors.matches("cannot advertise").count(), 1, "{errors}");
            assert!(!errors.contains("attach"), "one line says it: {errors}");
        }
    }
}

/// What the host has once everything is in place.
fn settled(cluster: &Cluster) -> Footprint {
    cluster.wait_connected(HOST);
    until("the host to stay as it is", || {
        let first = cluster.footprint(HOST);
        (cluster.footprint(HOST) == first).then_some(first)
    })
}
