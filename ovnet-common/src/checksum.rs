//! The Internet checksum (RFC 1071) of an IPv4 header, full and incremental (RFC 1624).
//!
//! Words are taken in host byte order from memory, as the kernel's `ip_fast_csum()` does: the one's
//! complement sum is the same in either byte order, so the result is stored as it is.

use crate::headers::ipv4;

/// Folds a sum of 16-bit words to 16 bits, with the carries added back.
#[inline(always)]
pub const fn fold(mut sum: u32) -> u16 {
    sum = (sum & 0xffff) + (sum >> 16);
    sum = (sum & 0xffff) + (sum >> 16);
    (sum & 0xffff) as u16
}

/// The one's complement sum of a 20-byte header, checksum field included. 0xffff for a header
/// whose checksum is right.
#[inline(always)]
pub fn ipv4_sum(header: &[u8; ipv4::LEN]) -> u16 {
    let mut sum = 0u32;
    let mut at = 0;
    while at < ipv4::LEN {
        sum += u16::from_ne_bytes([header[at], header[at + 1]]) as u32;
        at += 2;
    }
    fold(sum)
}

/// The checksum to store, as it lies in memory, for a 20-byte header whose field is zero.
#[inline(always)]
pub fn ipv4_checksum(header: &[u8; ipv4::LEN]) -> [u8; 2] {
    (!ipv4_sum(header)).to_ne_bytes()
}

/// Whether the checksum of a 20-byte header is right.
#[inline(always)]
pub fn ipv4_valid(header: &[u8; ipv4::LEN]) -> bool {
    ipv4_sum(header) == 0xffff
}

/// The checksum, as it lies in memory, after the 16-bit word `old` of the data became `new`
/// (RFC 1624 equation 3: `HC' = ~(~HC + ~m + m')`). All three are bytes as they lie in memory.
#[inline(always)]
pub const fn update(checksum: [u8; 2], old: [u8; 2], new: [u8; 2]) -> [u8; 2] {
    let sum = !u16::from_ne_bytes(checksum) as u32
        + !u16::from_ne_bytes(old) as u32
        + u16::from_ne_bytes(new) as u32;
    (!fold(sum)).to_ne_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// The example header of RFC 1071's usual walk-through.
    const KNOWN: [u8; 20] = [
        0x45, 0, 0, 0x73, 0, 0, 0x40, 0, 0x40, 0x11, 0xb8, 0x61, 0xc0, 0xa8, 0, 1, 0xc0, 0xa8, 0,
        0xc7,
    ];

    #[test]
    fn a_known_header_has_its_known_checksum() {
        let mut header = KNOWN;
        assert!(ipv4_valid(&header));
        header[10..12].fill(0);
        assert_eq!(ipv4_checksum(&header), [0xb8, 0x61]);
        assert!(!ipv4_valid(&header));
    }

    proptest! {
        #[test]
        fn an_incremental_update_equals_a_full_sum(
            mut header: [u8; 20], word in (0usize..10).prop_filter("not the checksum", |w| *w != 5), new: [u8; 2]
        ) {
            // An all-zero header has two representations of zero and does not occur.
            header[0] = 0x45;
            prop_assume!(word != 0 || new != [0, 0]);
            header[10..12].fill(0);
            let checksum = ipv4_checksum(&header);
            let old = [header[word * 2], header[word * 2 + 1]];
            header[word * 2..word * 2 + 2].copy_from_slice(&new);
            header[10..12].copy_from_slice(&update(checksum, old, new));
            prop_assert!(ipv4_valid(&header));
        }
    }
}
