//! The records under the prefix in Consul, and nothing else: JSON in, JSON out, no I/O.
//!
//! These records are an interface: an operator may write one by hand with `consul kv put`, and a
//! newer agent may add fields. Readers ignore unknown fields and skip what they cannot read
//! (invariant 8). A record of a newer version is skipped even where its JSON happens to fit: the
//! version is raised only when the meaning of a field changes, so guessing could forward packets
//! to the wrong place. Additions that an old reader may ignore do not raise it.

use std::{collections::BTreeMap, net::Ipv4Addr};

use anyhow::{Context as _, Result, bail, ensure};
use ipnet::Ipv4Net;
use ovnet_common::vxlan::PROBE_VNI;
use serde::{Deserialize, Serialize};

/// Version of the records this agent writes, their field `v`.
pub const VERSION: u32 = 1;
/// The first VNI handed out.
pub const FIRST_VNI: u32 = 4096;
/// The last VNI there is (24 bits).
pub const LAST_VNI: u32 = 0x00ff_ffff;

/// `hosts/<node>`: a machine that runs the agent, written by itself under a session's lock.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostRecord {
    /// Version of the record, [`VERSION`].
    pub v: u32,
    /// The host's name, also the end of its key.
    pub node: String,
    /// The address of `--advertise`: the outer address of its VXLAN packets.
    pub vtep: Ipv4Addr,
    /// UDP port it receives VXLAN on, host byte order.
    #[serde(default = "default_port")]
    pub port: u16,
    /// MTU of its uplink in bytes.
    #[serde(default = "default_mtu")]
    pub mtu: u32,
    /// Version of its agent; empty for a host announced by hand.
    #[serde(default)]
    pub agent: String,
}

/// `networks/<name>`: a named virtual network, claimed with its VNI and subnet in one transaction.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetworkRecord {
    /// Version of the record, [`VERSION`].
    pub v: u32,
    /// UUID of the network.
    pub id: String,
    /// Its name, also the end of its key.
    pub name: String,
    /// VXLAN network identifier.
    pub vni: u32,
    /// The network's subnet.
    pub subnet: Ipv4Net,
    /// Address of the gateway, inside the subnet; never an endpoint's.
    pub gateway: Ipv4Addr,
    /// Part of the subnet that addresses are chosen from.
    #[serde(default)]
    pub ip_range: Option<Ipv4Net>,
    /// Named addresses that belong to the network, never to an endpoint.
    #[serde(default)]
    pub aux: BTreeMap<String, Ipv4Addr>,
    /// MTU of the endpoints; the uplink's minus 50 where absent.
    #[serde(default)]
    pub mtu: Option<u32>,
    /// No egress and no published ports.
    #[serde(default)]
    pub internal: bool,
    /// Driver options, as Docker's `-o`.
    #[serde(default)]
    pub options: BTreeMap<String, String>,
    /// Labels, as Docker's `--label`.
    #[serde(default)]
    pub labels: BTreeMap<String, String>,
    /// Name of the host that created it.
    #[serde(default)]
    pub created_by: String,
}

/// `pending/<node>/<id>`: a subnet and a VNI claimed for a network whose name is not known yet, as
/// Docker makes them. Only the host that claimed them reads and writes it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PendingRecord {
    /// Version of the record, [`VERSION`].
    pub v: u32,
    /// UUID of the network, also the end of its key.
    pub id: String,
    /// Name of the host that claimed it.
    pub host: String,
    /// The VNI claimed.
    pub vni: u32,
    /// The subnet claimed.
    pub subnet: Ipv4Net,
    /// Part of the subnet that addresses are to be chosen from.
    #[serde(default)]
    pub ip_range: Option<Ipv4Net>,
}

/// Whether an endpoint exists or only its address is claimed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum EndpointState {
    /// The address is claimed; there is no endpoint yet.
    Reserved,
    /// The endpoint exists.
    #[default]
    Up,
}

/// `endpoints/<network id>/<address>`: creating this key with `cas=0` is the address allocation.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct EndpointRecord {
    /// Version of the record, [`VERSION`].
    pub v: u32,
    /// Id of the endpoint: 64 hexadecimal digits as Docker's, or a UUID.
    pub id: String,
    /// Its address, also the end of its key.
    pub address: Ipv4Addr,
    /// Its MAC address as `02:42:0a:00:00:02`.
    pub mac: String,
    /// Name of the host it is on.
    pub host: String,
    /// Name and aliases.
    #[serde(default)]
    pub names: Vec<String>,
    /// See [`EndpointState`].
    #[serde(default)]
    pub state: EndpointState,
}

impl HostRecord {
    /// Reads the value of `hosts/<node>`. The error says what is wrong with it, in one line.
    pub fn parse(node: &str, value: &[u8]) -> Result<Self> {
        let record: Self = parse_json(value)?;
        check_name("host name", &record.node)?;
        ensure!(record.node == node, "its node {:?} is not the {node:?} of its key", record.node);
        let vtep = record.vtep;
        ensure!(
            !vtep.is_unspecified() && !vtep.is_multicast() && !vtep.is_broadcast(),
            "its vtep {vtep} is not the address of a host"
        );
        ensure!(record.port != 0, "its port is 0");
        ensure!(MTUS.contains(&record.mtu), "its mtu {} is not between 576 and 65535", record.mtu);
        Ok(record)
    }
}

impl NetworkRecord {
    /// Reads the value of `networks/<name>`. The error says what is wrong with it, in one line.
    pub fn parse(name: &str, value: &[u8]) -> Result<Self> {
        let record: Self = parse_json(value)?;
        check_name("network name", &record.name)?;
        ensure!(record.name == name, "its name {:?} is not the {name:?} of its key", record.name);
        check_name("network id", &record.id)?;
        check_vni(record.vni)?;
        check_network(&record)?;
        Ok(record)
    }
}

impl PendingRecord {
    /// Reads the value of `pending/<node>/<id>`. The error says what is wrong with it, in one line.
    pub fn parse(id: &str, value: &[u8]) -> Result<Self> {
        let record: Self = parse_json(value)?;
        ensure!(record.id == id, "its id {:?} is not the {id:?} of its key", record.id);
        check_vni(record.vni)?;
        check_subnet(record.subnet)?;
        Ok(record)
    }
}

impl EndpointRecord {
    /// Reads the value of `endpoints/<network id>/<address>`. The error says what is wrong with
    /// it, in one line. Whether the address lies in the network's subnet is for the reader that
    /// has the network.
    pub fn parse(address: &str, value: &[u8]) -> Result<Self> {
        let record: Self = parse_json(value)?;
        ensure!(
            address.parse() == Ok(record.address),
            "its address {} is not the {address:?} of its key",
            record.address
        );
        ensure!(!record.id.is_empty(), "its id is empty");
        check_name("host name", &record.host)?;
        parse_mac(&record.mac)?;
        Ok(record)
    }
}

fn check_vni(vni: u32) -> Result<()> {
    ensure!((1..=LAST_VNI).contains(&vni), "its vni {vni} is not of 24 bits");
    ensure!(vni != PROBE_VNI, "its vni {vni} is that of the hosts' probes");
    Ok(())
}

/// Checks the parts of a network against each other: what a record by hand, and what a user
/// asking for a network, can get wrong.
pub fn check_network(network: &NetworkRecord) -> Result<()> {
    let subnet = network.subnet;
    check_subnet(subnet)?;
    ensure!(
        is_host_of(subnet, network.gateway),
        "gateway {} is not a host address of subnet {subnet}",
        network.gateway
    );
    if let Some(range) = network.ip_range {
        ensure!(subnet.contains(&range), "ip range {range} is not inside subnet {subnet}");
    }
    for (name, address) in &network.aux {
        ensure!(
            is_host_of(subnet, *address),
            "aux address {name}={address} is not a host address of subnet {subnet}"
        );
        ensure!(
            *address != network.gateway,
            "aux address {name}={address} is the network's gateway"
        );
    }
    if let Some(mtu) = network.mtu {
        ensure!(MTUS.contains(&mtu), "mtu {mtu} is not between 576 and 65535");
    }
    Ok(())
}

/// Checks a subnet by itself: no host bits, and a size that a network can have.
pub fn check_subnet(subnet: Ipv4Net) -> Result<()> {
    ensure!(
        subnet == subnet.trunc(),
        "subnet {subnet} has host bits set: did you mean {}?",
        subnet.trunc()
    );
    ensure!(
        (8..=30).contains(&subnet.prefix_len()),
        "subnet {subnet} is not between /8 and /30 in size"
    );
    Ok(())
}

/// Whether an address lies in a subnet and is neither its first (the network's) nor its last (the
/// broadcast address).
pub fn is_host_of(subnet: Ipv4Net, address: Ipv4Addr) -> bool {
    subnet.contains(&address) && address != subnet.network() && address != subnet.broadcast()
}

/// Checks a name that becomes part of a key: Docker's rule, letters, digits, `_`, `.` and `-`,
/// the first one a letter or digit. So no name is a sentinel's, holds a slash or needs escaping.
pub fn check_name(what: &str, name: &str) -> Result<()> {
    let good = name.len() <= 128
        && name.starts_with(|c: char| c.is_ascii_alphanumeric())
        && name.chars().all(|c| c.is_ascii_alphanumeric() || "_.-".contains(c));
    ensure!(
        good,
        "{what} {name:?} is not 1 to 128 letters, digits, '_', '.' and '-', \
         beginning with a letter or digit"
    );
    Ok(())
}

/// A MAC address from its text, `02:42:0a:00:00:02`; it must be one that a station can have.
pub fn parse_mac(text: &str) -> Result<[u8; 6]> {
    let mut mac = [0; 6];
    let mut parts = text.split(':');
    for byte in &mut mac {
        // from_str_radix() takes a sign, which is no part of an address.
        let part = parts
            .next()
            .filter(|part| part.len() == 2 && part.bytes().all(|byte| byte.is_ascii_hexdigit()));
        let part = part.and_then(|part| u8::from_str_radix(part, 16).ok());
        *byte = part.with_context(|| format!("mac {text:?} is not six bytes as 02:42:…"))?;
    }
    ensure!(parts.next().is_none(), "mac {text:?} is longer than six bytes");
    ensure!(mac[0] & 1 == 0 && mac != [0; 6], "mac {text} is not the address of one station");
    Ok(mac)
}

/// The MTUs a record may hold: below 576 no IPv4 host must accept a datagram whole (RFC 791).
const MTUS: std::ops::RangeInclusive<u32> = 576..=65535;

/// The version first, alone, so that a newer record is called newer whatever else it holds.
fn parse_json<'a, T: Deserialize<'a>>(value: &'a [u8]) -> Result<T> {
    #[derive(Deserialize)]
    struct Version {
        v: u32,
    }
    let Version { v } = serde_json::from_slice(value).context("it is no JSON record with a v")?;
    match v {
        VERSION => serde_json::from_slice(value).context("it is incomplete or malformed"),
        newer if newer > VERSION => {
            bail!("it is of version {newer}, this agent reads {VERSION}: update the agent")
        }
        other => bail!("its version is {other}, the first there is is {VERSION}"),
    }
}

/// The MAC of an address: `02:42` and the four bytes of it, as libnetwork makes them.
pub fn mac_of(address: Ipv4Addr) -> [u8; 6] {
    let [a, b, c, d] = address.octets();
    [0x02, 0x42, a, b, c, d]
}

/// A MAC as text.
pub fn format_mac(mac: [u8; 6]) -> String {
    let [a, b, c, d, e, f] = mac;
    format!("{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{f:02x}")
}

fn default_port() -> u16 {
    ovnet_common::headers::vxlan::PORT
}

fn default_mtu() -> u32 {
    1500
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOST: &str =
        r#"{"v":1,"node":"docker01","vtep":"192.168.1.11","port":4789,"mtu":1500,"agent":"0.1.0"}"#;
    const NETWORK: &str = r#"{"v":1,"id":"4d0b","name":"ov_net1","vni":4096,
        "subnet":"10.0.0.0/24","gateway":"10.0.0.1","ip_range":null,"aux":{},"mtu":null,
        "internal":false,"options":{},"labels":{},"created_by":"docker02"}"#;
    const ENDPOINT: &str = r#"{"v":1,"id":"9f","address":"10.0.0.2","mac":"02:42:0a:00:00:02",
        "host":"docker01","names":["t1"],"state":"up"}"#;

    fn why<T: std::fmt::Debug>(parsed: Result<T>) -> String {
        format!("{:#}", parsed.unwrap_err())
    }

    #[test]
    fn the_records_of_the_design_are_read() {
        assert_eq!(HostRecord::parse("docker01", HOST.as_bytes()).unwrap().port, 4789);
        assert_eq!(NetworkRecord::parse("ov_net1", NETWORK.as_bytes()).unwrap().vni, 4096);
        let endpoint = EndpointRecord::parse("10.0.0.2", ENDPOINT.as_bytes()).unwrap();
        assert_eq!(endpoint.state, EndpointState::Up);
        assert_eq!(parse_mac(&endpoint.mac).unwrap(), mac_of(endpoint.address));
        for bad in ["02:42:0a:00:00:+2", "02:42:0a:00:00", "02:42:0a:00:00:02:03", "03:0:0:0:0:1"] {
            assert!(parse_mac(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_record_by_hand_needs_only_what_matters_and_unknown_fields_are_ignored() {
        let host = br#"{"v":1,"node":"plain","vtep":"192.168.1.50","rack":[1,{"x":2}]}"#;
        let host = HostRecord::parse("plain", host).unwrap();
        assert_eq!((host.port, host.mtu, host.agent.as_str()), (4789, 1500, ""));
        let endpoint = br#"{"v":1,"id":"h","address":"10.0.0.9","mac":"02:42:0A:00:00:09",
            "host":"plain"}"#;
        assert_eq!(EndpointRecord::parse("10.0.0.9", endpoint).unwrap().state, EndpointState::Up);
    }

    #[test]
    fn half_written_records_are_refused_at_every_length() {
        for cut in 0..HOST.len() {
            HostRecord::parse("docker01", &HOST.as_bytes()[..cut]).unwrap_err();
        }
        for cut in 0..ENDPOINT.len() {
            EndpointRecord::parse("10.0.0.2", &ENDPOINT.as_bytes()[..cut]).unwrap_err();
        }
    }

    #[test]
    fn a_newer_version_is_called_so_whatever_its_fields() {
        let newer = br#"{"v":2,"node":{"name":"docker01"}}"#;
        assert!(why(HostRecord::parse("docker01", newer)).contains("of version 2"));
        let same_fields = HOST.replace("\"v\":1", "\"v\":7");
        assert!(
            why(HostRecord::parse("docker01", same_fields.as_bytes())).contains("of version 7")
        );
        let zero = HOST.replace("\"v\":1", "\"v\":0");
        HostRecord::parse("docker01", zero.as_bytes()).unwrap_err();
    }

    #[test]
    fn what_contradicts_its_key_or_itself_is_refused() {
        assert!(why(HostRecord::parse("docker02", HOST.as_bytes())).contains("of its key"));
        for (good, bad) in [
            ("192.168.1.11", "0.0.0.0"),
            ("192.168.1.11", "239.0.0.1"),
            ("192.168.1.11", "fe80::1"),
            ("4789", "0"),
            ("1500", "20"),
        ] {
            let record = HOST.replace(good, bad);
            HostRecord::parse("docker01", record.as_bytes()).unwrap_err();
        }
        for (good, bad) in [
            ("\"10.0.0.1\"", "\"10.0.1.1\""),
            ("\"10.0.0.1\"", "\"10.0.0.255\""),
            ("10.0.0.0/24", "10.0.0.4/24"),
            ("10.0.0.0/24", "10.0.0.0/31"),
            ("4096", "16777216"),
            ("4096", "0"),
            ("\"ip_range\":null", "\"ip_range\":\"10.0.0.0/23\""),
            ("\"aux\":{}", "\"aux\":{\"router\":\"10.0.0.1\"}"),
            ("\"4d0b\"", "\"../4d0b\""),
        ] {
            assert!(NETWORK.contains(good), "{good}");
            let record = NETWORK.replace(good, bad);
            NetworkRecord::parse("ov_net1", record.as_bytes()).unwrap_err();
        }
        EndpointRecord::parse("10.0.0.3", ENDPOINT.as_bytes()).unwrap_err();
        for bad in ["", "02:42", "03:42:0a:00:00:02", "02:42:0a:00:00:02:00", "+2:42:0a:00:00:0"] {
            let record = ENDPOINT.replace("02:42:0a:00:00:02", bad);
            EndpointRecord::parse("10.0.0.2", record.as_bytes()).unwrap_err();
        }
    }

    #[test]
    fn names_that_could_be_another_key_are_refused() {
        for bad in ["", ".keep", "a/b", "..", "a b", "ü", "-x", &"x".repeat(129)] {
            check_name("name", bad).unwrap_err();
        }
        for good in ["ov_net1", "docker-01.example.org", "0"] {
            check_name("name", good).unwrap();
        }
    }
}
