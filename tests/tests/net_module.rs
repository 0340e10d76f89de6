//! The agent's `net` module against the kernel, in network namespaces made for each test.
//!
//! Needs root and `ip`. A namespace here has no name and no mount: it lives as long as the thread
//! that made it, so nothing is left behind, however a test ends.

#![allow(
    clippy::expect_used,
    clippy::panic,
    clippy::unwrap_used,
    reason = "a test panics with what it found; the lint knows #[test] functions, not helpers"
)]

#[path = "net_module/askers.rs"]
mod askers;
#[path = "net_module/firewall.rs"]
mod firewall;
#[path = "net_module/firewall_others.rs"]
mod firewall_others;
#[path = "net_module/gateway.rs"]
mod gateway;
#[path = "net_module/host.rs"]
mod host;
#[path = "net_module/published.rs"]
mod published;
#[path = "net_module/topology.rs"]
mod topology;

use std::{
    future::Future,
    net::Ipv4Addr,
    path::PathBuf,
    process::Command,
    time::{Duration, Instant},
};

use ovnet_agent::{
    check::{self, CheckInput, Level, Row},
    net::{EXTERNAL, Offload, SandboxOffloads, VethSpec},
    repairs::Repairs,
};

use host::{Sandbox, bridge, ip, on_a_host, skip, thread_namespace};

const HOST_END: &str = "ovnet0a000002";
const MAC: [u8; 6] = [0x02, 0x42, 10, 0, 0, 2];

#[test]
fn a_veth_pair_is_complete_on_both_sides() {
    on_a_host("a_veth_pair_is_complete_on_both_sides", async |net| {
        let sandbox = Sandbox::new();
        let veth = net.create_veth(&spec(&sandbox)).await.unwrap();

        assert_eq!(veth.ifname, "eth0");
        let host_end = net.link(HOST_END).await.unwrap().unwrap();
        assert_eq!((host_end.index, host_end.mtu, host_end.up), (veth.ifindex, 1450, true));
        assert_eq!(host_end.kind.as_deref(), Some("veth"));
        assert_eq!(host_end.driver.as_deref(), Some("veth"));
        assert_eq!(host_end.mac[0] & 3, 2, "locally administered: {:02x?}", host_end.mac);
        let conf = async |key: String| net.sysctl(&key).await;
        assert_eq!(conf(format!("ipv4/conf/{HOST_END}/forwarding")).await.unwrap(), "1");
        assert_eq!(conf(format!("ipv6/conf/{HOST_END}/disable_ipv6")).await.unwrap(), "1");

        let inner = sandbox.ip("-d address show eth0");
        for part in ["02:42:0a:00:00:02", "10.0.0.2/24", "mtu 1450", ",UP"] {
            assert!(inner.contains(part), "{part} in {inner}");
        }
        assert!(!inner.contains("inet6"), "no IPv6 on an IPv4 network: {inner}");
        assert!(sandbox.ip("link show lo").contains(",UP"), "the sandbox's lo is up");
        let offloads = net.endpoint_offloads(sandbox.path(), "eth0").await.unwrap();
        assert!(offloads.gro && !offloads.tx_checksum, "{offloads:?}");

        let second = VethSpec {
            host_ifname: "ovnet0a010002".into(),
            address: "10.1.0.2/24".parse().unwrap(),
            ..spec(&sandbox)
        };
        assert_eq!(net.create_veth(&second).await.unwrap().ifname, "eth1");

        for host_end in [HOST_END, "ovnet0a010002", "ovnet0a010002"] {
            net.delete_link(host_end).await.unwrap();
        }
        assert_eq!(sandbox.ip("-br link").lines().count(), 1, "only lo stays");
    });
}

#[test]
fn packets_pass_the_pair_both_ways() {
    on_a_host("packets_pass_the_pair_both_ways", async |net| {
        let sandbox = Sandbox::new();
        net.create_veth(&spec(&sandbox)).await.unwrap();
        ip(&format!("address add 10.0.0.1/24 dev {HOST_END}"));
        let ping = ["-c1", "-W5", "-s1422", "-Mdo", "10.0.0.2"];
        let Ok(output) = Command::new("ping").args(ping).output() else {
            return skip("packets_pass_the_pair_both_ways", "ping is not installed");
        };
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
    });
}

#[test]
fn a_pair_that_cannot_be_made_changes_nothing() {
    on_a_host("a_pair_that_cannot_be_made_changes_nothing", async |net| {
        let sandbox = Sandbox::new();
        sandbox.ip("link add eth0 type bridge");
        sandbox.ip("address add 10.0.0.9/24 dev eth0");
        ip("link add taken type bridge");
        let good = spec(&sandbox);
        let own = PathBuf::from(thread_namespace());
        let wrong = [
            (VethSpec { ifname: Some("eth0".into()), ..good.clone() }, "--ifname"),
            (VethSpec { ifname: Some("sixteen-bytes-xx".into()), ..good.clone() }, "16 bytes"),
            (VethSpec { ifname: Some("a/b".into()), ..good.clone() }, "'/'"),
            (VethSpec { host_ifname: "taken".into(), ..good.clone() }, "taken on this host"),
            (VethSpec { host_ifname: "".into(), ..good.clone() }, "no interface name"),
            (VethSpec { address: "10.0.0.9/24".parse().unwrap(), ..good.clone() }, "eth0"),
            (VethSpec { netns: "/run/netns/ovnet-none".into(), ..good.clone() }, "ip netns list"),
            (
                VethSpec { netns: "/proc/self/status".into(), ..good.clone() },
                "no network namespace",
            ),
            (VethSpec { netns: own, ..good.clone() }, "host's own"),
            (VethSpec { mtu: 67, ..good.clone() }, "67 bytes"),
            (VethSpec { mac: [1, 0, 0, 0, 0, 0], ..good.clone() }, "MAC"),
        ];
        let before = (ip("-br link"), sandbox.ip("-br address"));
        for (spec, part) in wrong {
            let error = format!("{:#}", net.create_veth(&spec).await.unwrap_err());
            assert!(error.contains(part) && !error.contains('\n'), "{part} in {error}");
            assert_eq!((ip("-br link"), sandbox.ip("-br address")), before, "after: {error}");
        }
        assert_eq!(net.create_veth(&good).await.unwrap().ifname, "eth1");
    });
}

#[test]
fn giving_up_at_any_moment_leaves_nothing() {
    on_a_host("giving_up_at_any_moment_leaves_nothing", async |net| {
        let sandbox = Sandbox::new();
        let before = (ip("-br link"), sandbox.ip("-br link"));
        let mut polls = 1;
        loop {
            let finished = poll_times(net.create_veth(&spec(&sandbox)), polls).await;
            if let Some(result) = finished {
                result.unwrap();
                break;
            }
            // By the same socket: what was asked before this is carried out before this.
            let deadline = Instant::now() + Duration::from_secs(10);
            while net.link(HOST_END).await.unwrap().is_some() {
                assert!(Instant::now() < deadline, "given up after {polls} polls, the pair stays");
            }
            // `lo` may have become UP at the very end, which is no trace of the endpoint.
            let names = |links: &str| -> Vec<String> {
                links.lines().map(|line| line.split(' ').next().unwrap().into()).collect()
            };
            let now = (ip("-br link"), sandbox.ip("-br link"));
            assert_eq!((names(&now.0), names(&now.1)), (names(&before.0), names(&before.1)));
            polls += 1;
        }
        assert!(polls > 10, "given up at {polls} moments");
    });
}

#[test]
fn many_pairs_at_once_get_names_of_their_own() {
    on_a_host("many_pairs_at_once_get_names_of_their_own", async |net| {
        const COUNT: u8 = 40;
        let sandbox = Sandbox::new();
        let mut tasks = tokio::task::JoinSet::new();
        for number in 0..COUNT {
            let spec = VethSpec {
                host_ifname: format!("ovnet{number:08x}"),
                address: format!("10.0.{number}.2/24").parse().unwrap(),
                ..spec(&sandbox)
            };
            let net = net.clone();
            tasks.spawn(async move { net.create_veth(&spec).await.unwrap().ifname });
        }
        let mut names = tasks.join_all().await;
        names.sort();
        names.dedup();
        assert_eq!(names.len(), usize::from(COUNT), "{names:?}");
    });
}

#[test]
fn the_mtu_changes_on_both_ends_or_on_none() {
    on_a_host("the_mtu_changes_on_both_ends_or_on_none", async |net| {
        let sandbox = Sandbox::new();
        net.create_veth(&spec(&sandbox)).await.unwrap();
        let both = async || {
            let inner = sandbox.ip("link show eth0");
            let inner = inner.split("mtu ").nth(1).unwrap().split(' ').next().unwrap().to_owned();
            (net.link(HOST_END).await.unwrap().unwrap().mtu, inner.parse::<u32>().unwrap())
        };
        for mtu in [8950, 1400, 1400] {
            net.set_endpoint_mtu(HOST_END, sandbox.path(), mtu).await.unwrap();
            assert_eq!(both().await, (mtu, mtu));
        }
        for (host_end, mtu) in [("ovnetnone", 1500), (HOST_END, 70_000)] {
            net.set_endpoint_mtu(host_end, sandbox.path(), mtu).await.unwrap_err();
            assert_eq!(both().await, (1400, 1400));
        }
    });
}

#[test]
fn the_host_side_is_repaired() {
    on_a_host("the_host_side_is_repaired", async |net| {
        let sandbox = Sandbox::new();
        net.create_veth(&spec(&sandbox)).await.unwrap();
        ip(&format!("link set {HOST_END} down"));
        for _ in 0..2 {
            net.prepare_endpoint_host_side(HOST_END, &mut Repairs::default()).await.unwrap();
            assert!(net.link(HOST_END).await.unwrap().unwrap().up);
        }
        let error =
            net.prepare_endpoint_host_side("ovnetnone", &mut Repairs::default()).await.unwrap_err();
        assert!(error.to_string().contains("ovnetnone"), "{error:#}");
    });
}

#[test]
fn offloads_are_set_inside_a_namespace_and_on_the_host() {
    on_a_host("offloads_are_set_inside_a_namespace_and_on_the_host", async |net| {
        let sandbox = Sandbox::new();
        net.create_veth(&spec(&sandbox)).await.unwrap();
        for (gro, tx_checksum) in [(false, true), (true, true), (true, true), (true, false)] {
            let wanted = SandboxOffloads { gro, tx_checksum };
            net.set_endpoint_offloads(HOST_END, sandbox.path(), wanted).await.unwrap();
            let read = net.endpoint_offloads(sandbox.path(), "eth0").await.unwrap();
            assert_eq!((read.gro, read.tx_checksum), (gro, tx_checksum), "{read:?}");
        }
        for on in [true, false] {
            net.set_offload(HOST_END, Offload::Gro, on).unwrap();
            assert_eq!(net.offloads(HOST_END).unwrap().gro, on);
        }
        let error = net.set_offload("ovnetnone", Offload::Gro, true).unwrap_err();
        assert!(format!("{error:#}").contains("ethtool -K ovnetnone gro on"), "{error:#}");
    });
}

#[test]
fn the_uplink_is_an_interface_or_an_address() {
    on_a_host("the_uplink_is_an_interface_or_an_address", async |net| {
        bridge("ens33", &["192.168.1.11/24"]);
        bridge("two", &["10.1.0.1/24", "10.2.0.1/24"]);
        bridge("none", &[]);
        ip("link add off0 type bridge");
        ip("address add 10.3.0.1/24 dev off0");
        // Neither scope makes an address one that other hosts can use.
        ip("address add 169.254.1.1/16 dev none scope link");

        for given in ["ens33", "192.168.1.11"] {
            let uplink = net.uplink(given).await.unwrap();
            assert_eq!(uplink.link.name, "ens33");
            assert_eq!(uplink.address, Ipv4Addr::new(192, 168, 1, 11));
            assert_eq!(uplink.link.mtu, 1500);
            assert_eq!(uplink.link.driver.as_deref(), Some("bridge"));
        }
        assert_eq!(net.uplink("10.2.0.1").await.unwrap().link.name, "two");
        for (given, part) in [
            ("ens34", "no such interface"),
            ("two", "2 global IPv4 addresses (10.1.0.1, 10.2.0.1)"),
            ("none", "no global IPv4 address"),
            ("off0", "ip link set off0 up"),
            ("10.3.0.1", "ip link set off0 up"),
            ("10.9.9.9", "no interface of this host"),
            ("lo", "loopback"),
        ] {
            let error = format!("{:#}", net.uplink(given).await.unwrap_err());
            assert!(error.contains(part) && !error.contains('\n'), "{given}: {error}");
        }
        ip("link delete ens33");
        net.uplink("ens33").await.unwrap_err();
        assert_eq!(net.link("ens33").await.unwrap(), None);
    });
}

#[test]
fn the_external_device_is_made_once_and_anew_when_it_must() {
    on_a_host("the_external_device_is_made_once_and_anew_when_it_must", async |net| {
        let first = net.ensure_external(4789, &mut Repairs::default()).await.unwrap();
        assert_eq!((first.name.as_str(), first.up), (EXTERNAL, true));
        assert!(first.mtu >= 9000, "{first:?}");
        assert!(net.offloads(EXTERNAL).unwrap().gro);
        let shown = ip(&format!("-d address show {EXTERNAL}"));
        for part in ["external", "dstport 4789", "nolearning", "udp6zerocsumrx"] {
            assert!(shown.contains(part), "{part} in {shown}");
        }
        assert!(!shown.contains("inet6"), "{shown}");

        assert_eq!(
            net.ensure_external(4789, &mut Repairs::default()).await.unwrap(),
            first,
            "made once"
        );
        ip(&format!("link set {EXTERNAL} down mtu 1400"));
        assert_eq!(
            net.ensure_external(4789, &mut Repairs::default()).await.unwrap(),
            first,
            "set right in place"
        );

        let other = net.ensure_external(8472, &mut Repairs::default()).await.unwrap();
        assert_ne!(other.index, first.index, "another port is another device");
        assert!(ip(&format!("-d link show {EXTERNAL}")).contains("dstport 8472"));

        for link in
            ["type bridge", "type vxlan id 7 dstport 8472 dev lo", "type vxlan external gbp"]
        {
            ip(&format!("link delete {EXTERNAL}"));
            ip(&format!("link add {EXTERNAL} {link}"));
            net.ensure_external(8472, &mut Repairs::default()).await.unwrap();
            let shown = ip(&format!("-d link show {EXTERNAL}"));
            assert!(shown.contains("external") && !shown.contains("gbp"), "{shown}");
        }
    });
}

#[test]
fn a_port_that_is_taken_is_told_with_its_owner() {
    on_a_host("a_port_that_is_taken_is_told_with_its_owner", async |net| {
        for foreign in ["id 42", "external", "external gbp"] {
            ip(&format!("link add theirs type vxlan {foreign} dstport 4789"));
            ip("link set theirs up");
            let error = format!(
                "{:#}",
                net.ensure_external(4789, &mut Repairs::default()).await.unwrap_err()
            );
            assert!(error.contains("vxlan device theirs"), "{foreign}: {error}");
            assert_eq!(net.link(EXTERNAL).await.unwrap(), None, "{foreign}: nothing half made");
            ip("link delete theirs");
        }
        let socket = std::net::UdpSocket::bind("0.0.0.0:4789").unwrap();
        let error =
            format!("{:#}", net.ensure_external(4789, &mut Repairs::default()).await.unwrap_err());
        assert!(error.contains("another program") && error.contains("4789"), "{error}");
        drop(socket);
        // A child that another test's thread is just starting may hold a copy until it execs.
        let deadline = Instant::now() + Duration::from_secs(10);
        while let Err(error) = net.ensure_external(4789, &mut Repairs::default()).await {
            assert!(Instant::now() < deadline, "{error:#}");
        }
    });
}

#[test]
fn changes_of_addresses_and_interfaces_are_noticed() {
    on_a_host("changes_of_addresses_and_interfaces_are_noticed", async |net| {
        bridge("ens33", &[]);
        let mut changes = net.changes().unwrap();
        for change in [
            "address add 192.168.1.11/24 dev ens33",
            "address delete 192.168.1.11/24 dev ens33",
            "link set ens33 mtu 1400",
            "link set ens33 down",
            "link delete ens33",
        ] {
            ip(change);
            let noticed = tokio::time::timeout(Duration::from_secs(10), changes.recv()).await;
            assert_eq!(noticed.expect(change), Some(()), "{change}");
        }
        // A burst is not a notice each.
        for number in 0..30 {
            ip(&format!("link add burst{number} type bridge"));
        }
        changes.recv().await.unwrap();
        let mut notices = 1;
        while tokio::time::timeout(Duration::from_millis(500), changes.recv()).await.is_ok() {
            notices += 1;
        }
        assert!(notices < 20, "{notices} notices of 30 interfaces");
    });
}

#[test]
fn routes_are_the_destinations_that_lead_somewhere() {
    on_a_host("routes_are_the_destinations_that_lead_somewhere", async |net| {
        bridge("ens33", &["192.168.1.11/24"]);
        ip("route add 10.5.0.0/16 via 192.168.1.1");
        ip("route add 10.6.0.0/16 dev ens33 table 1000");
        ip("route add default via 192.168.1.1");
        ip("route add blackhole 10.0.0.0/8");
        let routes: Vec<String> =
            net.routes().await.unwrap().iter().map(ToString::to_string).collect();
        assert_eq!(routes, ["10.5.0.0/16", "10.6.0.0/16", "192.168.1.0/24"]);
    });
}

#[test]
fn the_check_tells_what_a_host_lacks() {
    on_a_host("the_check_tells_what_a_host_lacks", async |net| {
        bridge("ens33", &["192.168.1.11/24"]);
        let input = |advertise: &str| CheckInput {
            consul: "192.168.1.11:8500".into(),
            advertise: advertise.into(),
            bpffs: "/proc/none".into(),
            vxlan_port: 4789,
            dns: Default::default(),
        };
        let find = |rows: &[Row], item: &str| {
            rows.iter().find(|row| row.item == item).unwrap_or_else(|| panic!("{rows:?}")).clone()
        };
        let rows = check::rows(&input("ens33"), async { Ok(()) }).await.unwrap();
        for (item, value) in [
            ("privileges", "sufficient"),
            ("uplink", "ens33 192.168.1.11"),
            ("uplink MTU", "1500 (endpoints get 1450)"),
            ("XDP (auto)", "off, bridge"),
            ("VXLAN port", "4789, free"),
            ("Consul", "192.168.1.11:8500"),
        ] {
            let row = find(&rows, item);
            assert_eq!((row.value.as_str(), row.level), (value, Level::Ok), "{row:?}");
        }
        assert_eq!(find(&rows, "BPF file system").level, Level::Fail);

        std::fs::write("/proc/sys/net/ipv4/conf/ens33/rp_filter", "1").unwrap();
        ip("link add theirs type vxlan id 42 dstport 4789");
        let rows = check::rows(&input("ens33"), async { Err("refused".into()) }).await.unwrap();
        assert_eq!(find(&rows, "rp_filter").level, Level::Warn);
        assert!(find(&rows, "VXLAN port").advice.contains("ip link delete theirs"));
        assert_eq!(find(&rows, "Consul").advice, "refused");
        ip("link delete theirs");

        net.ensure_external(4789, &mut Repairs::default()).await.unwrap();
        let rows = check::rows(&input("ens34"), async { Ok(()) }).await.unwrap();
        assert_eq!(find(&rows, "VXLAN port").level, Level::Ok);
        let uplink = find(&rows, "uplink");
        assert!(uplink.level == Level::Fail && uplink.advice.contains("no such interface"));
        print!("{}", check::render(&rows));
    });
}

fn spec(sandbox: &Sandbox) -> VethSpec {
    VethSpec {
        host_ifname: HOST_END.into(),
        netns: sandbox.path().into(),
        ifname: None,
        mac: MAC,
        address: "10.0.0.2/24".parse().unwrap(),
        mtu: 1450,
        offloads: SandboxOffloads { gro: true, tx_checksum: false },
    }
}

/// Polls a future so many times and then drops it; its output where it was ready by then.
async fn poll_times<T>(future: impl Future<Output = T>, times: usize) -> Option<T> {
    let mut future = std::pin::pin!(future);
    let mut left = times;
    std::future::poll_fn(|context| {
        if left == 0 {
            return std::task::Poll::Ready(None);
        }
        left -= 1;
        let polled = future.as_mut().poll(context).map(Some);
        if left == 0 && polled.is_pending() {
            return std::task::Poll::Ready(None);
        }
        polled
    })
    .await
}
