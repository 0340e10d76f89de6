//! The sandboxes' bridge, and their ports on it.

use std::net::Ipv4Addr;

use ovnet_agent::{
    net::{GWBRIDGE, GatewaySpec, SandboxOffloads},
    repairs::{Repair, Repairs},
};

use super::{
    bridge,
    host::{Sandbox, ip, on_a_host},
    spec,
};

const OFFLOADS: SandboxOffloads = SandboxOffloads { gro: true, tx_checksum: true };
const GATEWAY: Ipv4Addr = Ipv4Addr::new(172, 18, 0, 1);

#[test]
fn the_bridge_is_made_once_and_set_right() {
    on_a_host("the_bridge_is_made_once_and_set_right", async |net| {
        let subnet = "172.18.0.0/16".parse().unwrap();
        let first = net.ensure_gwbridge(subnet, 1450, &mut Repairs::default()).await.unwrap();
        assert_eq!((first.name.as_str(), first.mac), (GWBRIDGE, [0x02, 0x42, 172, 18, 0, 1]));
        assert_eq!(first.address, "172.18.0.1/16".parse().unwrap());
        assert_eq!(net.gwbridge(GWBRIDGE).await.unwrap(), Some(first.clone()));
        assert_eq!(net.local_addresses().await.unwrap(), [GATEWAY], "without loopback");

        let good = async || {
            let shown = ip(&format!("-d address show {GWBRIDGE}"));
            for part in
                [",UP", "mtu 1450", "02:42:ac:12:00:01", "inet 172.18.0.1/16", "stp_state 0"]
            {
                assert!(shown.contains(part), "{part} in {shown}");
            }
            assert_eq!(shown.matches("inet ").count(), 1, "{shown}");
            for (key, value) in
                [("ipv4/conf/{}/forwarding", "1"), ("ipv6/conf/{}/disable_ipv6", "1")]
            {
                let key = key.replace("{}", GWBRIDGE);
                assert_eq!(net.sysctl(&key).await.as_deref(), Some(value), "{key}");
            }
            let all = net.sysctl("ipv4/conf/all/route_localnet").await;
            assert_eq!(all.as_deref(), Some("0"), "for the bridge only");
        };
        good().await;
        let conf = format!("/proc/sys/net/ipv4/conf/{GWBRIDGE}");
        for spoil in [
            "address delete 172.18.0.1/16 dev ovnet_gwbridge",
            "address add 10.9.0.1/24 dev ovnet_gwbridge",
            "link set ovnet_gwbridge down",
            "link set ovnet_gwbridge mtu 1400",
            "link set ovnet_gwbridge address 02:00:00:00:00:09",
            "link set ovnet_gwbridge type bridge stp_state 1",
        ] {
            ip(spoil);
            std::fs::write(format!("{conf}/forwarding"), "0").unwrap();
            for _ in 0..2 {
                assert_eq!(
                    net.ensure_gwbridge(subnet, 1450, &mut Repairs::default()).await.unwrap(),
                    first,
                    "{spoil}"
                );
                good().await;
            }
        }
        let setting = format!("ipv4/conf/{GWBRIDGE}/route_localnet");
        assert_eq!(net.sysctl(&setting).await.as_deref(), Some("0"), "without rules");
        for (allowed, value) in [(true, "1"), (true, "1"), (false, "0")] {
            net.route_loopback_to_gwbridge(allowed).await.unwrap();
            assert_eq!(net.sysctl(&setting).await.as_deref(), Some(value));
        }
        // Another subnet, within the old one: its address was a secondary one and went with it.
        ip("address add 172.18.4.1/16 dev ovnet_gwbridge");
        let other = net
            .ensure_gwbridge("172.18.4.0/16".parse().unwrap(), 1450, &mut Repairs::default())
            .await
            .unwrap();
        assert_eq!(other.index, first.index);

        ip(&format!("link delete {GWBRIDGE}"));
        assert_eq!(net.gwbridge(GWBRIDGE).await.unwrap(), None);
        ip(&format!("link add {GWBRIDGE} type veth"));
        let error = format!(
            "{:#}",
            net.ensure_gwbridge(subnet, 1450, &mut Repairs::default()).await.unwrap_err()
        );
        assert!(error.contains("ip link delete") && !error.contains('\n'), "{error}");
    });
}

#[test]
fn the_bridge_s_subnet_is_one_that_leads_nowhere_else() {
    on_a_host("the_bridge_s_subnet_is_one_that_leads_nowhere_else", async |net| {
        bridge("docker_gwbridge", &["172.18.0.1/16"]);
        let found = net.free_gwbridge_subnet(None).await.unwrap();
        assert_eq!(found, "172.19.0.0/16".parse().unwrap());
        let error = net.free_gwbridge_subnet(Some("172.18.4.0/24".parse().unwrap())).await;
        let error = error.unwrap_err().to_string();
        assert!(error.contains("docker_gwbridge") && !error.contains('\n'), "{error}");
        let wanted = "172.30.0.0/16".parse().unwrap();
        net.ensure_gwbridge(wanted, 1500, &mut Repairs::default()).await.unwrap();
        assert_eq!(net.free_gwbridge_subnet(None).await.unwrap(), wanted, "what it has");
        assert_eq!(net.free_gwbridge_subnet(Some(wanted)).await.unwrap(), wanted, "its own route");
    });
}

#[test]
fn a_gateway_port_is_isolated_and_has_the_default_route() {
    on_a_host("a_gateway_port_is_isolated_and_has_the_default_route", async |net| {
        net.ensure_gwbridge("172.18.0.0/16".parse().unwrap(), 1450, &mut Repairs::default())
            .await
            .unwrap();
        let sandbox = Sandbox::new();
        net.create_veth(&spec(&sandbox)).await.unwrap();
        assert!(!net.has_default_route(sandbox.path()).await.unwrap());
        let wanted = gateway_spec(&sandbox);
        let port = net.create_gateway_port(&wanted).await.unwrap();
        assert_eq!((port.ifname.as_str(), port.address), ("eth1", wanted.address.addr()));
        assert_eq!((port.bridge.as_str(), port.mac.as_str()), (GWBRIDGE, "02:42:ac:12:00:02"));
        assert!(net.has_default_route(sandbox.path()).await.unwrap());
        let good = || {
            let shown = ip("-d link show ovnetgw000001");
            for part in ["master ovnet_gwbridge", "isolated on", "learning on", ",UP", "mtu 1450"] {
                assert!(shown.contains(part), "{part} in {shown}");
            }
            let inner = sandbox.ip("address show eth1");
            for part in ["172.18.0.2/16", "02:42:ac:12:00:02", ",UP", "mtu 1450"] {
                assert!(inner.contains(part), "{part} in {inner}");
            }
            let route = sandbox.ip("route show default");
            assert!(route.starts_with("default via 172.18.0.1 dev eth1 "), "{route}");
            assert_eq!(route.lines().count(), 1, "{route}");
        };
        good();
        let mac = net.gwbridge(GWBRIDGE).await.unwrap().unwrap().mac;
        assert_eq!(mac, [0x02, 0x42, 172, 18, 0, 1], "ports do not change it");
        let found = net.find_gateway_port(sandbox.path(), GWBRIDGE).await.unwrap();
        assert_eq!(found.as_ref(), Some(&port));

        let repair = async || {
            let mut found = Repairs::default();
            net.repair_gateway_port(&wanted, &mut found).await.unwrap();
            found.of(Repair::GatewayPort)
        };
        assert_eq!(repair().await, 0, "as it was made");
        for spoil in [
            "link set ovnetgw000001 nomaster",
            "link set ovnetgw000001 type bridge_slave isolated off",
            "link set ovnetgw000001 down",
            "link set ovnetgw000001 mtu 1400",
        ] {
            ip(spoil);
            assert!(repair().await > 0, "{spoil}");
            good();
        }
        for spoil in [
            "link set eth1 down",
            "link set eth1 mtu 1300",
            "link set eth1 address 02:00:00:00:00:09",
            "address flush dev eth1",
            "route delete default",
        ] {
            sandbox.ip(spoil);
            assert!(repair().await > 0, "{spoil}");
            good();
            assert_eq!(repair().await, 0, "{spoil}");
            good();
        }
        // One that somebody put in its place is the sandbox's own affair.
        sandbox.ip("route replace default via 172.18.0.9");
        repair().await;
        assert!(sandbox.ip("route show default").contains("172.18.0.9"));

        let second = GatewaySpec {
            host_ifname: "ovnetgw000002".into(),
            address: "172.18.0.3/16".parse().unwrap(),
            ..wanted.clone()
        };
        let before = (ip("-br link"), sandbox.ip("-br link"));
        let error = format!("{:#}", net.create_gateway_port(&second).await.unwrap_err());
        assert!(error.contains("default route") && !error.contains('\n'), "{error}");
        let missing = GatewaySpec { bridge: "ovnet_none".into(), ..second };
        let error = format!("{:#}", net.create_gateway_port(&missing).await.unwrap_err());
        assert!(error.contains("ovnet_none"), "{error}");
        assert_eq!((ip("-br link"), sandbox.ip("-br link")), before, "nothing is left");

        net.delete_link("ovnetgw000001").await.unwrap();
        let error = net.repair_gateway_port(&wanted, &mut Repairs::default()).await;
        assert!(format!("{:#}", error.unwrap_err()).contains("ovnetgw000001"));
    });
}

#[test]
fn docker_s_port_of_a_container_is_found() {
    on_a_host("docker_s_port_of_a_container_is_found", async |net| {
        let (sandbox, other) = (Sandbox::new(), Sandbox::new());
        let find = async |netns| net.find_gateway_port(netns, "docker_gwbridge").await.unwrap();
        assert_eq!(find(sandbox.path()).await, None, "no bridge");
        bridge("docker_gwbridge", &["172.18.0.1/16"]);
        net.create_veth(&spec(&sandbox)).await.unwrap();
        assert_eq!(find(sandbox.path()).await, None, "an interface that is no port of it");
        for (sandbox, name, address) in
            [(&sandbox, "vethaaaaaaa", "172.18.0.5/16"), (&other, "vethbbbbbbb", "172.18.0.6/16")]
        {
            let docker = ovnet_agent::net::VethSpec {
                host_ifname: name.into(),
                mac: [0x02, 0x42, 172, 18, 0, 5],
                address: address.parse().unwrap(),
                ..spec(sandbox)
            };
            net.create_veth(&docker).await.unwrap();
            ip(&format!("link set {name} master docker_gwbridge"));
        }
        let port = find(sandbox.path()).await.unwrap();
        assert_eq!((port.host_ifname.as_str(), port.ifname.as_str()), ("vethaaaaaaa", "eth1"));
        assert_eq!(port.address, Ipv4Addr::new(172, 18, 0, 5));
        assert_eq!(port.mac, "02:42:ac:12:00:05");
        let port = find(other.path()).await.unwrap();
        assert_eq!((port.host_ifname.as_str(), port.ifname.as_str()), ("vethbbbbbbb", "eth0"));
        other.ip("address flush dev eth0");
        assert_eq!(find(other.path()).await, None, "no address yet");
    });
}

pub(crate) fn gateway_spec(sandbox: &Sandbox) -> GatewaySpec {
    GatewaySpec {
        bridge: GWBRIDGE.into(),
        host_ifname: "ovnetgw000001".into(),
        netns: sandbox.path().into(),
        ifname: None,
        mac: [0x02, 0x42, 172, 18, 0, 2],
        address: "172.18.0.2/16".parse().unwrap(),
        gateway: GATEWAY,
        mtu: 1450,
        offloads: OFFLOADS,
    }
}
