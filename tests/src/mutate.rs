//! Packets changed as somebody hostile changes them: in places that mean something, to values that
//! mean something there or elsewhere.

use crate::{packet::*, random::Random, storm::NEIGHBOUR};

/// Values that mean something somewhere in a packet.
pub fn words() -> Vec<Vec<u8>> {
    let parties = [
        HOST_A,
        HOST_B,
        HOST_C,
        HOST_E,
        INTRUDER,
        GATEWAY,
        CONTAINER_A1,
        CONTAINER_A2,
        CONTAINER_A4,
        CONTAINER_B1,
        CONTAINER_B4,
        CONTAINER_C1,
        CONTAINER_E1,
        NOBODY,
        SANDBOX,
        NEIGHBOUR,
        GWBRIDGE,
        CLIENT,
    ];
    let mut words: Vec<Vec<u8>> = Vec::new();
    for party in parties {
        words.push(party.address.to_vec());
        words.push(party.mac.to_vec());
    }
    for vni in [VNI_BLUE, VNI_RED, 0] {
        words.push(vni.to_be_bytes()[1..].to_vec());
    }
    words.extend([[127, 0, 0, 1], [224, 0, 0, 1], [0; 4], [255; 4]].map(|it| it.to_vec()));
    for number in
        [0u16, 1, 2, 0x0800, 0x0806, 0x86dd, 0x8100, 0x88a8, 0x2000, 0x4000, 0xffff, VXLAN_PORT, 90]
    {
        words.push(number.to_be_bytes().to_vec());
    }
    for byte in [0, 1, 6, 8, 17, 0x40, 0x44, 0x45, 0x46, 0x4f, 0x65, 0x80, 0xe0, 0xff] {
        words.push(vec![byte]);
    }
    words
}

/// Offsets at which a header field starts, with and without the outer headers.
const FIELDS: [usize; 27] = [
    0, 6, 12, 14, 15, 16, 18, 20, 22, 23, 24, 26, 28, 30, 32, 34, 36, 38, 40, 42, 46, 50, 56, 62,
    64, 76, 80,
];

/// Changes a packet: bits, bytes, fields, its end, its headers.
pub fn mutate(random: &mut Random, packet: &mut Vec<u8>, words: &[Vec<u8>]) {
    for _ in 0..=random.below(3) {
        let length = packet.len();
        match random.below(12) {
            0 => packet[random.below(length)] ^= 1 << random.below(8),
            1 => packet[random.below(length)] = random.byte(),
            2 => packet.truncate(14 + random.below(length - 13)),
            3 => {
                let more = random.below(100);
                packet.extend((0..more).map(|_| random.byte()));
            }
            // A header twice, or another packet's end.
            4 => {
                let from = random.below(length.min(100));
                let piece = packet[from..length.min(from + 1 + random.below(60))].to_vec();
                let at = random.below(length.min(100));
                packet.splice(at..at, piece);
                packet.truncate(1600);
            }
            // Sender and receiver change places.
            5 => {
                for (left, right, size) in [(0, 6, 6), (26, 30, 4), (34, 36, 2)] {
                    if right + size <= length {
                        for at in 0..size {
                            packet.swap(left + at, right + at);
                        }
                    }
                }
            }
            // From somewhere else inside it.
            6 => {
                let size = random.pick(&[1, 2, 4, 6]);
                let (from, at) = (random.pick(&FIELDS), random.pick(&FIELDS));
                if from.max(at) + size <= length {
                    packet.copy_within(from..from + size, at);
                }
            }
            _ => {
                let (word, at) = (&words[random.below(words.len())], random.pick(&FIELDS));
                if at + word.len() <= length {
                    packet[at..at + word.len()].copy_from_slice(word);
                }
            }
        }
    }
    // Most of the rules are behind the checksum.
    if !random.one_in(4) {
        for at in [14, 64] {
            let header = packet.get(at).map(|byte| usize::from(byte & 15) * 4);
            if header.is_some_and(|it| it >= 20 && at + it <= packet.len()) {
                fix_ipv4_checksum(packet, at);
            }
        }
    }
}
