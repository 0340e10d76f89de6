//! What a developer sees when two packets that should be equal are not.

use std::{fmt::Write as _, fs, path::PathBuf};

/// Describes how two packets differ: a hexdump of both with the lines that differ marked, and a
/// pair of .pcap files to open in Wireshark.
pub fn difference(name: &str, expected: &[u8], found: &[u8]) -> String {
    let mut text = format!("expected {} bytes, found {}\n", expected.len(), found.len());
    for line in 0..expected.len().max(found.len()).div_ceil(16) {
        let (left, right) = (row(expected, line), row(found, line));
        let mark = if left == right { ' ' } else { '!' };
        let _ = writeln!(text, "{mark} {:04x}  {}  | {}", line * 16, hex(left), hex(right));
    }
    for (side, packet) in [("expected", expected), ("found", found)] {
        let path = pcap_path(name, side);
        let _ = match fs::write(&path, pcap(packet)) {
            Ok(()) => writeln!(text, "{side}: {}", path.display()),
            Err(error) => writeln!(text, "{side}: {}: {error}", path.display()),
        };
    }
    text
}

fn row(packet: &[u8], line: usize) -> &[u8] {
    let start = (line * 16).min(packet.len());
    &packet[start..(start + 16).min(packet.len())]
}

fn hex(bytes: &[u8]) -> String {
    let text: Vec<String> = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    format!("{:<47}", text.join(" "))
}

fn pcap_path(name: &str, side: &str) -> PathBuf {
    let safe: String =
        name.chars().map(|c| if c.is_ascii_alphanumeric() { c } else { '-' }).collect();
    folder().join(format!("ovnet-{safe}-{side}.pcap"))
}

/// Where failing tests leave what they found.
pub fn folder() -> PathBuf {
    let folder = PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../target/tmp"));
    if folder.is_dir() { folder } else { std::env::temp_dir() }
}

/// A capture file of one Ethernet frame (<https://www.tcpdump.org/manpages/pcap-savefile.5.html>).
pub fn pcap(packet: &[u8]) -> Vec<u8> {
    const ETHERNET: u32 = 1;
    let length = u32::try_from(packet.len()).unwrap_or(u32::MAX);
    let mut file = Vec::new();
    for word in [0xa1b2_c3d4_u32, 0x0004_0002, 0, 0, 65_535, ETHERNET, 0, 0, length, length] {
        file.extend(word.to_le_bytes());
    }
    file.extend(packet);
    file
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_lines_that_differ_are_marked() {
        let (expected, mut found) = ([7; 40], [7; 40]);
        found[20] = 8;
        let text = difference("compare self test", &expected, &found);
        let marked: Vec<&str> = text.lines().filter(|line| line.starts_with('!')).collect();
        assert_eq!(marked.len(), 1, "{text}");
        assert!(marked[0].contains("0010"), "{text}");
        for side in ["expected", "found"] {
            let path = pcap_path("compare self test", side);
            assert_eq!(fs::metadata(&path).unwrap().len(), 24 + 16 + 40);
            fs::remove_file(path).unwrap();
        }
    }
}
