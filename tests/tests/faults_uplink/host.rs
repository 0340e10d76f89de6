//! What these tests look at on a host, and do to it.

use std::{net::Ipv4Addr, process::Command};

use ovnet_tests::cluster::{Cluster, ProgramWatch, text, until};
use serde_json::Value;

/// The host that everything happens to.
pub(crate) const HOST: &str = "docker02";
/// Its address.
pub(crate) const ADDRESS: Ipv4Addr = Ipv4Addr::new(192, 168, 1, 12);

/// Runs a script on the host.
pub(crate) fn script(cluster: &Cluster, text: &str) {
    cluster.run(HOST, &["sh", "-ec", text]);
}

/// What the host's agent says of one of its endpoints; `null` where it has none of the name.
pub(crate) fn endpoint(cluster: &Cluster, name: &str) -> Value {
    let all = cluster.json(HOST, "endpoint ls --local");
    let found = all.as_array().unwrap().iter().find(|it| it["names"][0] == name);
    found.cloned().unwrap_or_default()
}

/// The host's end of an endpoint's veth.
pub(crate) fn veth(cluster: &Cluster, name: &str) -> String {
    text(&endpoint(cluster, name)["local"], "host_ifname").unwrap().to_owned()
}

/// ifindex of one of the host's interfaces.
pub(crate) fn ifindex(cluster: &Cluster, interface: &str) -> Option<u32> {
    let shown = cluster.lab.exec(HOST, &["ip", "-o", "link", "show", interface]).ok()?;
    shown.split(':').next()?.trim().parse().ok()
}

/// Waits until exactly our programs are on the uplink, and no pin of another interface is left.
pub(crate) fn programs_are_ours(cluster: &Cluster, uplink: &str, xdp: bool) {
    let index = ifindex(cluster, uplink).unwrap();
    let mut expected = vec![format!("from_uplink-{index}")];
    expected.extend(xdp.then(|| format!("uplink_xdp-{index}-native")));
    until(&format!("the pins of the uplink to be {expected:?}"), || {
        let pins = cluster.footprint(HOST).pins;
        let names = pins.iter().filter_map(|pin| pin.rsplit('/').next());
        let of_uplink =
            |name: &&str| name.starts_with("from_uplink") || name.starts_with("uplink_");
        let mut names: Vec<&str> = names.filter(of_uplink).collect();
        names.sort_unstable();
        (names == expected).then_some(())
    });
    if xdp {
        let shown = cluster.sh(HOST, &format!("ip -d link show {uplink}"));
        assert_eq!(shown.matches("prog/xdp").count(), 1, "{shown}");
    }
    let watch = ProgramWatch::start(cluster, HOST, &[(uplink, "from_uplink")]);
    // Long enough for some hundred looks.
    cluster.sh(HOST, "ping -c 3 -i 0.1 -W 1 192.168.1.11");
    watch.must_have_seen_nothing_else();
}

/// Makes the uplink and the switch's end of it anew, as when a card is replaced. It is down and has
/// no address.
pub(crate) fn make_uplink(cluster: &Cluster, mac: &str) {
    let (host, switch) = (cluster.lab.host(HOST).unwrap(), cluster.lab.host("switch").unwrap());
    let pid = host.holder.pid;
    let lines = format!(
        "ip link add name {HOST} mtu 1500 type veth peer name ens33 address {mac} mtu 1500 netns \
         {pid} && ip link set dev {HOST} master br0 up"
    );
    // Only the network namespace: the number of the host's process means something in the machine's
    // PID namespace alone.
    let mut command = Command::new("nsenter");
    command.arg(format!("--net={}", switch.netns().display()));
    let output = command.args(["--", "sh", "-ec", &lines]).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

/// How often the host's agent repaired something of a kind.
pub(crate) fn repaired(cluster: &Cluster, kind: &str) -> u64 {
    cluster.status(HOST)["repairs"][kind].as_u64().unwrap_or(0)
}

/// The MAC that another host sends to for the address.
pub(crate) fn neighbour(cluster: &Cluster, host: &str, address: Ipv4Addr) -> String {
    let shown = cluster.sh(host, &format!("ip neigh show {address} dev ens33"));
    shown.split("lladdr ").nth(1).and_then(|it| it.split(' ').next()).unwrap_or_default().into()
}
