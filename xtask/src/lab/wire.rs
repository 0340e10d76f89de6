//! The wire: a switch that connects the hosts' `ens33`, and what it does to packets.

use std::io::Write as _;
use std::net::Ipv4Addr;
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, bail};
use clap::ValueEnum;
use serde::{Deserialize, Serialize};

use super::Options;
use super::host::Host;

/// What the wire carries.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Wire {
    /// Veth as it is: packets of up to 64 KiB that nobody segments or checksums.
    #[default]
    Gso,
    /// Packets of at most the MTU with finished checksums, merged again by the receiver (GRO),
    /// as with a physical wire.
    Mtu,
}

/// The name of the hosts' interface.
pub const UPLINK: &str = "ens33";

/// Makes the switch and connects hosts to it.
pub(super) fn connect(switch: &Host, hosts: &[&Host], options: &Options) -> Result<()> {
    let bridge = format!(
        "link add name br0 type bridge stp_state 0 mcast_snooping 0 forward_delay 0\n\
         link set dev br0 mtu {} up\n",
        options.mtu
    );
    batch(switch, &bridge).context("make the switch")?;
    plug(switch, hosts, options)
}

/// Connects hosts to the switch.
pub(super) fn plug(switch: &Host, hosts: &[&Host], options: &Options) -> Result<()> {
    let Options { mtu, wire, .. } = *options;
    let mut plugs = String::new();
    for host in hosts {
        let mac = mac(host.address.unwrap_or(Ipv4Addr::UNSPECIFIED));
        let (port, pid) = (&host.name, host.holder.pid);
        plugs.push_str(&format!(
            "link add name {port} mtu {mtu} type veth peer name {UPLINK} address {mac} \
             mtu {mtu} netns {pid}\n\
             link set dev {port} master br0 up\n"
        ));
    }
    // The host's process number means something only in the machine's PID namespace, so `ip`
    // enters nothing but the switch's network namespace.
    batch(switch, &plugs).context("connect the hosts to the switch")?;
    for host in hosts {
        if let Some(address) = host.address {
            let up = format!(
                "address add {address}/24 broadcast + dev {UPLINK}\nlink set dev {UPLINK} up\n"
            );
            batch(host, &up).with_context(|| format!("configure {UPLINK} of {}", host.name))?;
        }
        if wire == Wire::Mtu {
            ethtool(host, UPLINK, SENDS_PACKETS)?;
            ethtool(host, UPLINK, &["gro", "on"])?;
            ethtool(switch, &host.name, SENDS_PACKETS)?;
            ethtool(switch, &host.name, &["gro", "off"])?;
        } else if sees_packets(options.xdp.as_deref()) {
            ethtool(host, UPLINK, FINISHES_CHECKSUMS)?;
        }
    }
    Ok(())
}

/// Whether this XDP sees what the wire carries before the kernel has made something of it.
fn sees_packets(xdp: Option<&str>) -> bool {
    matches!(xdp, Some("native" | "generic"))
}

/// Has the sending stack finish checksums. Veth leaves that to whoever needs them, and tells so in
/// what XDP does not see; no physical wire carries such a packet.
const FINISHES_CHECKSUMS: &[&str] = &["tx", "off"];

/// Has the sending stack finish checksums and segment, also inside a tunnel: with only `tso` and
/// `gso` off, veth would still pass tunnel packets on whole.
const SENDS_PACKETS: &[&str] = &[
    "tx",
    "off",
    "tso",
    "off",
    "gso",
    "off",
    "tx-udp_tnl-segmentation",
    "off",
    "tx-udp_tnl-csum-segmentation",
    "off",
    "tx-udp-segmentation",
    "off",
];

/// Locally administered, and readable in a trace: the address is in it.
fn mac(address: Ipv4Addr) -> String {
    let [a, b, c, d] = address.octets();
    format!("02:33:{a:02x}:{b:02x}:{c:02x}:{d:02x}")
}

/// Runs `ip` commands in a host's network namespace, all with one process.
pub(super) fn batch(host: &Host, lines: &str) -> Result<()> {
    let mut child = Command::new("nsenter")
        .arg(format!("--net={}", host.netns().display()))
        .args(["--", "ip", "-batch", "-"])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .context("run ip")?;
    if let Some(mut input) = child.stdin.take() {
        input.write_all(lines.as_bytes()).context("give ip its commands")?;
    }
    let output = child.wait_with_output().context("run ip")?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        bail!("ip in {}: {}", host.name, said.trim().replace('\n', "; "));
    }
    Ok(())
}

fn ethtool(host: &Host, interface: &str, settings: &[&str]) -> Result<()> {
    let output = Command::new("nsenter")
        .arg(format!("--net={}", host.netns().display()))
        .args(["--", "ethtool", "-K", interface])
        .args(settings)
        .output()
        .context("run ethtool")?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        let settings = settings.join(" ");
        bail!("ethtool -K {interface} {settings} in {}: {}", host.name, said.trim());
    }
    Ok(())
}
