//! Packets in files: one that a program once got wrong is kept, and replayed by a normal test.
//!
//! A file is text: lines of `#` say what it is about, a line `tables NAME` what the programs meet, and
//! each other line is a packet, in the order they came:
//! `PROGRAM IFINDEX GSO-SIZE VLAN-TAG VNI/REMOTE/LOCAL-or-minus HEX`.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "only tests call this, and a panic has a stack trace where an error has none"
)]

use std::{fmt::Write as _, fs, net::Ipv4Addr, path::PathBuf};

use ovnet_common::abi::Program;

use crate::{
    bpf::{Input, TunnelKey},
    compare,
    storm::World,
};

/// A file of packets.
#[derive(Clone, Debug)]
pub struct Case {
    /// What it is about: the first line.
    pub title: String,
    /// What the programs meet.
    pub world: World,
    /// The packets, one after the other.
    pub inputs: Vec<Input>,
}

/// Every file of the folder that keeps them.
pub fn kept() -> Vec<(PathBuf, Case)> {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/regressions");
    let mut files: Vec<PathBuf> = fs::read_dir(folder)
        .unwrap_or_else(|error| panic!("{folder}: {error}"))
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some_and(|it| it == "hex"))
        .collect();
    files.sort();
    let read = |path: PathBuf| {
        let text = fs::read_to_string(&path).unwrap_or_else(|error| panic!("{path:?}: {error}"));
        let case = parse(&text).unwrap_or_else(|line| panic!("{path:?}: what is {line:?}?"));
        (path, case)
    };
    files.into_iter().map(read).collect()
}

/// Writes a case, and the last packet as a capture beside it; where to.
pub fn save(name: &str, case: &Case) -> PathBuf {
    let folder = compare::folder();
    let path = folder.join(format!("{name}.hex"));
    fs::write(&path, text(case)).unwrap_or_else(|error| panic!("{path:?}: {error}"));
    if let Some(last) = case.inputs.last() {
        let path = folder.join(format!("{name}.pcap"));
        let _ = fs::write(path, compare::pcap(&last.packet));
    }
    path
}

/// A case as its file has it.
pub fn text(case: &Case) -> String {
    let mut text = String::new();
    for line in case.title.lines() {
        let _ = writeln!(text, "# {line}");
    }
    let _ = writeln!(text, "tables {}", case.world.name());
    for input in &case.inputs {
        let Input { program, ifindex, gso_size, tunnel_key, vlan, packet, repeat: _ } = input;
        let key = tunnel_key.map_or("-".to_owned(), |TunnelKey { vni, remote, local }| {
            format!("{vni}/{}/{}", Ipv4Addr::from(remote), Ipv4Addr::from(local))
        });
        let _ = write!(text, "{} {ifindex} {gso_size} {vlan} {key} ", program.name());
        for byte in packet {
            let _ = write!(text, "{byte:02x}");
        }
        text.push('\n');
    }
    text
}

/// The case of a file, or the line that cannot be read.
pub fn parse(text: &str) -> Result<Case, String> {
    let mut case = Case { title: String::new(), world: World::Ordinary, inputs: Vec::new() };
    for line in text.lines().filter(|line| !line.trim().is_empty()) {
        if let Some(comment) = line.strip_prefix('#') {
            case.title = format!("{}\n{}", case.title, comment.trim()).trim_start().to_owned();
        } else if let Some(name) = line.strip_prefix("tables ") {
            case.world = World::by_name(name.trim()).ok_or(line)?;
        } else {
            case.inputs.push(packet(line).ok_or(line)?);
        }
    }
    Ok(case)
}

fn packet(line: &str) -> Option<Input> {
    let [program, ifindex, gso_size, vlan, key, hex] =
        line.split_whitespace().collect::<Vec<_>>().try_into().ok()?;
    let address = |text: &str| Some(text.parse::<Ipv4Addr>().ok()?.octets());
    let tunnel_key = match key.split('/').collect::<Vec<_>>()[..] {
        ["-"] => None,
        [vni, remote, local] => Some(TunnelKey {
            vni: vni.parse().ok()?,
            remote: address(remote)?,
            local: address(local)?,
        }),
        _ => return None,
    };
    let digits = hex.as_bytes().chunks(2);
    let byte = |pair: &[u8]| u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok();
    Some(Input {
        program: Program::ALL.into_iter().find(|it| it.name() == program)?,
        ifindex: ifindex.parse().ok()?,
        gso_size: gso_size.parse().ok()?,
        vlan: vlan.parse().ok()?,
        tunnel_key,
        packet: digits.map(byte).collect::<Option<_>>()?,
        repeat: 1,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_case_is_read_as_it_was_written() {
        let line = "from_overlay 105 0 5 4096/192.168.1.12/192.168.1.11 0102ff";
        let file =
            format!("# a title\n# and more\ntables no-vtep\n{line}\nuplink_xdp 1 0 0 - 00\n");
        let case = parse(&file).unwrap();
        assert_eq!((case.inputs.len(), case.title.as_str()), (2, "a title\nand more"));
        assert_eq!(text(&case), file);
        assert!(parse("from_nowhere 1 0 0 - 00").is_err());
        assert!(parse("uplink_xdp 1 0 0 - 0g").is_err());
    }
}
