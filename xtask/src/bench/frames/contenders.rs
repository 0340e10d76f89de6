//! Who gets frames, by which program, and where what became of them is counted.

use std::net::Ipv4Addr;
use std::rc::Rc;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use serde_json::Value;

use super::bpf::{Action, Program};
use super::packet::{Party, Vxlan, datagram};
use crate::lab::kernel_vxlan::{self, KernelVxlan};
use crate::lab::{CLIENT, Lab, UPLINK, wait_until};

/// Names of contenders that others are set in relation to.
pub(super) const KERNEL: &str = "kernel vxlan + bridge";
/// See [`KERNEL`].
pub(super) const TC: &str = "ovnet, TC";
/// See [`KERNEL`].
pub(super) const NOTHING: &str = "no VXLAN at all";

/// The network of ovnet's containers.
const NETWORK: &str = "frames";
/// How long records take to spread, and the first packets to arrive.
const SOON: Duration = Duration::from_secs(20);
/// Where frames come in, and from whom.
const RECEIVER: &str = "docker01";
const SENDER: &str = "docker02";
/// On the wire, but no VTEP.
const INTRUDER: Ipv4Addr = Ipv4Addr::new(192, 168, 1, 66);
/// A UDP port at which nobody listens.
const CLOSED_PORT: u16 = 4791;
/// The agent's UDP port.
const VXLAN_PORT: u16 = 4789;
/// The VNI of [`KernelVxlan`].
const KERNEL_VNI: u32 = 42;

/// What becomes of a contender's frames.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// Delivered to a container.
    Delivered,
    /// From an unknown VTEP: dropped where there is something that knows.
    Unknown,
    /// Only made and dropped by the program: what injecting itself costs.
    Floor,
}

impl Kind {
    /// What a table calls it.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Delivered => "frames into a container",
            Self::Unknown => "frames from an unknown VTEP",
            Self::Floor => "injection alone",
        }
    }
}

/// Where frames are counted.
#[derive(Clone, Debug)]
pub(super) enum End {
    /// Where they arrive at `eth0` of a sandbox, which drops them right there.
    Arrived {
        /// The sandbox.
        place: String,
    },
    /// By a program of ovnet.
    Verdict {
        /// The program's name.
        program: &'static str,
    },
    /// By the host's UDP, which has no socket for them.
    NoSocket,
    /// By nobody: the program that was run is known to drop.
    Nobody,
}

/// Somebody who gets frames.
pub(super) struct Contender {
    /// What a table calls it.
    pub(super) label: &'static str,
    /// What becomes of its frames.
    pub(super) kind: Kind,
    /// The host whose uplink they come in by.
    pub(super) host: &'static str,
    /// That uplink.
    pub(super) ifindex: u32,
    /// The XDP program that gets them.
    pub(super) program: Rc<Program>,
    /// The frame.
    pub(super) frame: Vec<u8>,
    /// Where they are counted.
    pub(super) end: End,
}

/// Makes networks, sandboxes and frames with this many bytes of inner UDP payload.
pub(super) fn set_up(lab: &Lab, payload: u16) -> Result<Vec<Contender>> {
    let ovnet = Target::ovnet(lab)?;
    let kernel = Target::kernel_vxlan(lab)?;
    let pass = Rc::new(Program::always(Action::Pass)?);
    let drop = Rc::new(Program::always(Action::Drop)?);
    let xdp = Rc::new(Program::of_id(ovnet.uplink.xdp.context("no XDP program on the uplink")?)?);
    let arrived = |target: &Target| End::Arrived { place: target.place.clone() };
    let contender = |label, kind, target: &Target, program: &Rc<Program>, frame, end| Contender {
        label,
        kind,
        host: target.host,
        ifindex: target.uplink.ifindex,
        program: Rc::clone(program),
        frame,
        end,
    };
    let verdict = |program| End::Verdict { program };
    let (known, unknown) = (ovnet.frame(payload), ovnet.unknown(payload));
    let closed = Target { port: CLOSED_PORT, ..kernel.clone() }.unknown(payload);
    let (delivered, trust) = (Kind::Delivered, Kind::Unknown);
    Ok(vec![
        contender("ovnet, XDP", delivered, &ovnet, &xdp, known.clone(), arrived(&ovnet)),
        contender(TC, delivered, &ovnet, &pass, known.clone(), arrived(&ovnet)),
        contender(KERNEL, delivered, &kernel, &pass, kernel.frame(payload), arrived(&kernel)),
        contender("ovnet, XDP", trust, &ovnet, &xdp, unknown.clone(), verdict("uplink_xdp")),
        contender(TC, trust, &ovnet, &pass, unknown, verdict("from_uplink")),
        contender(NOTHING, trust, &kernel, &pass, closed, End::NoSocket),
        contender(KERNEL, trust, &kernel, &pass, kernel.unknown(payload), arrived(&kernel)),
        contender("XDP_DROP at once", Kind::Floor, &ovnet, &drop, known, End::Nobody),
    ])
}

/// How many frames were counted so far where this contender's are.
pub(super) fn counted(lab: &Lab, contender: &Contender) -> Result<u64> {
    let host = contender.host;
    match &contender.end {
        End::Nobody => Ok(0),
        End::Arrived { place } => {
            let argv = ["nft", "-j", "list", "counter", "netdev", "frames", "arrived"];
            let text = lab.exec(place, &argv)?;
            let counters: Value =
                serde_json::from_str(&text).with_context(|| format!("{place}: {argv:?}"))?;
            let listed = counters.get("nftables").and_then(Value::as_array);
            listed
                .and_then(|all| all.iter().find_map(|it| it.pointer("/counter/packets")?.as_u64()))
                .with_context(|| format!("{place}: no counter in {text}"))
        }
        End::Verdict { program } => {
            let counters = lab.ovnet_json(host, &["counters", "--all"])?;
            let lines = counters.as_array().map(Vec::as_slice).unwrap_or_default();
            let ours = lines.iter().find(|line| {
                let is = |field, value| line.get(field).and_then(Value::as_str) == Some(value);
                is("program", *program) && is("verdict", "unknown-vtep")
            });
            Ok(ours.and_then(|line| line.get("packets")?.as_u64()).unwrap_or(0))
        }
        End::NoSocket => {
            let text = lab.exec(host, &["cat", "/proc/net/snmp"])?;
            no_ports(&text).with_context(|| format!("{host}: no UDP in /proc/net/snmp"))
        }
    }
}

/// `NoPorts` of UDP: a line of names, then one of numbers.
fn no_ports(snmp: &str) -> Option<u64> {
    let mut lines = snmp.lines().filter_map(|line| line.strip_prefix("Udp: "));
    let (names, numbers) = (lines.next()?, lines.next()?);
    let at = names.split(' ').position(|name| name == "NoPorts")?;
    numbers.split(' ').nth(at)?.parse().ok()
}

/// Whom frames are for.
#[derive(Clone, Debug)]
struct Target {
    host: &'static str,
    uplink: Link,
    from_host: Party,
    to_host: Party,
    port: u16,
    vni: u32,
    from: Party,
    to: Party,
    /// The sandbox that receives.
    place: String,
}

/// What `ip` tells of an interface.
#[derive(Clone, Copy, Debug)]
struct Link {
    ifindex: u32,
    mac: [u8; 6],
    xdp: Option<u32>,
}

impl Target {
    /// A container of ovnet, and one on another host that may send to it.
    fn ovnet(lab: &Lab) -> Result<Self> {
        lab.exec(RECEIVER, &["ovnet", "network", "create", NETWORK])?;
        for (host, name) in [(RECEIVER, "t1"), (SENDER, "t2")] {
            wait_until(
                SOON,
                || format!("{host} to see network {NETWORK}"),
                || {
                    let networks = lab.ovnet_json(host, &["network", "ls"])?;
                    Ok(vni(&networks).map(drop))
                },
            )?;
            lab.run_sandbox(host, name, &["--network", NETWORK])?;
        }
        let vni = vni(&lab.ovnet_json(RECEIVER, &["network", "ls"])?).context("no VNI")?;
        let (from, to) = (format!("{SENDER}/t2"), format!("{RECEIVER}/t1"));
        Self::between(lab, RECEIVER, SENDER, VXLAN_PORT, vni, &from, &to)
    }

    /// The same of the kernel, on a host that ovnet is not on: no program and no rule of it is in
    /// the way.
    fn kernel_vxlan(lab: &Lab) -> Result<Self> {
        let network = KernelVxlan::up(lab, &[CLIENT, SENDER])?;
        let [to, from] = network.members.as_slice() else { bail!("not two members") };
        // As it is where nothing has loaded br_netfilter: what is measured is the bridge alone. And
        // the bridge knows the container for as long as it takes.
        let script = r#"file=/proc/sys/net/bridge/bridge-nf-call-iptables
                        if [ -e $file ]; then echo 0 > $file; fi
                        bridge fdb replace "$1" dev kve0 master static"#;
        let mac = octets(link(lab, &to.place(), "eth0")?.mac);
        lab.exec(CLIENT, &["sh", "-e", "-c", script, "sh", &mac])?;
        let (from, to) = (from.place(), to.place());
        Self::between(lab, CLIENT, SENDER, kernel_vxlan::PORT, KERNEL_VNI, &from, &to)
    }

    fn between(
        lab: &Lab,
        host: &'static str,
        sender: &str,
        port: u16,
        vni: u32,
        from: &str,
        to: &str,
    ) -> Result<Self> {
        let uplink = link(lab, host, UPLINK)?;
        let party = |place: &str, interface: &str| {
            let address = lab.sandbox_address(place)?;
            anyhow::Ok(Party { mac: link(lab, place, interface)?.mac, address })
        };
        let target = Self {
            host,
            uplink,
            from_host: party(sender, UPLINK)?,
            to_host: Party { mac: uplink.mac, address: lab.address(host)? },
            port,
            vni,
            from: party(from, "eth0")?,
            to: party(to, "eth0")?,
            place: to.to_owned(),
        };
        let address = target.to.address.to_string();
        wait_until(
            SOON,
            || format!("{from} to reach {to}"),
            || {
                let ping = ["ping", "-n", "-c", "1", "-W", "1", &address];
                let output = lab.output(from, &ping, SOON)?;
                Ok(output.status.success().then_some(()))
            },
        )?;
        // At the first hook of the container's own interface, for all alike: what a container does
        // with its packets is not what is compared.
        lab.exec(to, &["nft", COUNT_AND_DROP])?;
        Ok(target)
    }

    fn frame(&self, payload: u16) -> Vec<u8> {
        self.frame_from(self.from_host, payload)
    }

    /// The same by somebody who is no host of the overlay.
    fn unknown(&self, payload: u16) -> Vec<u8> {
        self.frame_from(Party { address: INTRUDER, ..self.from_host }, payload)
    }

    fn frame_from(&self, from: Party, payload: u16) -> Vec<u8> {
        let Self { to_host: to, port, vni, .. } = *self;
        Vxlan { from, to, port, vni }.around(&datagram(self.from, self.to, payload))
    }
}

const COUNT_AND_DROP: &str = r#"
add table netdev frames
add counter netdev frames arrived
add chain netdev frames arrive { type filter hook ingress device "eth0" priority 0; }
add rule netdev frames arrive counter name "arrived" drop
"#;

fn vni(networks: &Value) -> Option<u32> {
    let is_ours = |it: &&Value| it.get("name").and_then(Value::as_str) == Some(NETWORK);
    let vni = networks.as_array()?.iter().find(is_ours)?.get("vni")?.as_u64()?;
    u32::try_from(vni).ok()
}

fn link(lab: &Lab, place: &str, interface: &str) -> Result<Link> {
    let text = lab.exec(place, &["ip", "-j", "link", "show", "dev", interface])?;
    read_link(&text).with_context(|| format!("{place}: {interface} is {text}"))
}

fn read_link(text: &str) -> Option<Link> {
    let links: Value = serde_json::from_str(text).ok()?;
    let link = links.get(0)?;
    let number = |pointer| u32::try_from(link.pointer(pointer)?.as_u64()?).ok();
    let mut mac = [0; 6];
    let mut bytes = link.get("address")?.as_str()?.split(':');
    for byte in &mut mac {
        *byte = u8::from_str_radix(bytes.next()?, 16).ok()?;
    }
    Some(Link { ifindex: number("/ifindex")?, mac, xdp: number("/xdp/prog/id") })
}

fn octets(mac: [u8; 6]) -> String {
    mac.map(|byte| format!("{byte:02x}")).join(":")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_interface_is_read_with_its_xdp_program() {
        let text = r#"[{"ifindex":7,"ifname":"ens33","xdp":{"mode":1,"prog":{"id":99}},
                        "address":"02:00:00:00:01:0b"}]"#;
        let link = read_link(text).unwrap();
        assert_eq!((link.ifindex, link.xdp), (7, Some(99)));
        assert_eq!(octets(link.mac), "02:00:00:00:01:0b");
        assert_eq!(
            read_link(r#"[{"ifindex":7,"address":"02:00:00:00:01:0b"}]"#).unwrap().xdp,
            None
        );
        assert!(read_link("[]").is_none());
    }

    #[test]
    fn what_found_no_socket_is_read_by_its_name() {
        let snmp = "Ip: Forwarding\nIp: 1\nUdp: InDatagrams NoPorts InErrors\nUdp: 5 17 0\n";
        assert_eq!(no_ports(snmp), Some(17));
        assert_eq!(no_ports("Udp: InDatagrams\nUdp: 5\n"), None);
    }
}
