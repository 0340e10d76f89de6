//! Explicit Congestion Notification across the tunnel, RFC 6040.
//!
//! The kernel's vxlan device sets the outer field by the older RFC 3168 (CE becomes ECT(0)); both
//! forms decapsulate to the same inner field, so hosts of either kind mix.

/// The two ECN bits of the IPv4 TOS byte.
pub const MASK: u8 = 0b11;
/// Not ECN-capable.
pub const NOT_ECT: u8 = 0b00;
/// ECN-capable, ECT(1).
pub const ECT_1: u8 = 0b01;
/// ECN-capable, ECT(0).
pub const ECT_0: u8 = 0b10;
/// Congestion experienced.
pub const CE: u8 = 0b11;

/// The outer TOS byte for an inner one: the ECN field copied (RFC 6040 §4.1, normal mode), DSCP 0.
#[inline(always)]
pub const fn encapsulate(inner_tos: u8) -> u8 {
    inner_tos & MASK
}

/// The inner TOS byte after decapsulation (RFC 6040 §4.2, figure 4); `None` where it says to drop:
/// CE around a Not-ECT packet, whose sender would never hear of the congestion.
#[inline(always)]
pub const fn decapsulate(inner_tos: u8, outer_tos: u8) -> Option<u8> {
    let inner = inner_tos & MASK;
    let outer = outer_tos & MASK;
    if outer == CE {
        return if inner == NOT_ECT { None } else { Some(inner_tos | CE) };
    }
    if inner == ECT_0 && outer == ECT_1 {
        return Some((inner_tos & !MASK) | ECT_1);
    }
    Some(inner_tos)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn encapsulation_copies_ecn_and_hides_dscp() {
        for ecn in 0..4 {
            assert_eq!(encapsulate(0xb8 | ecn), ecn);
        }
    }

    /// RFC 6040 figure 4, row by row.
    #[test]
    fn decapsulation_follows_figure_4() {
        let columns = [NOT_ECT, ECT_0, ECT_1, CE];
        let table = [
            (NOT_ECT, [Some(NOT_ECT), Some(NOT_ECT), Some(NOT_ECT), None]),
            (ECT_0, [Some(ECT_0), Some(ECT_0), Some(ECT_1), Some(CE)]),
            (ECT_1, [Some(ECT_1), Some(ECT_1), Some(ECT_1), Some(CE)]),
            (CE, [Some(CE), Some(CE), Some(CE), Some(CE)]),
        ];
        for (inner, row) in table {
            for (outer, expected) in columns.into_iter().zip(row) {
                let expected = expected.map(|ecn| 0x28 | ecn);
                assert_eq!(decapsulate(0x28 | inner, outer), expected, "{inner:02b} {outer:02b}");
            }
        }
    }
}
