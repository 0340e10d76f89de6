//! The outer UDP source port: entropy for RSS and ECMP, by the kernel's own formula.

/// The source port, host byte order, for a flow hash: `udp_flow_src_port()` of
/// `include/net/udp.h`, bit for bit. `min` is the first port, `max` one past the last as the kernel
/// uses it: the result is always under `max` when `min < max`.
#[inline(always)]
pub const fn source_port(hash: u32, min: u16, max: u16) -> u16 {
    // The kernel moves the upper bits down because the lower half of the hash alone selects the
    // receive queue on many devices.
    let hash = (hash ^ (hash << 16)) as u64;
    let range = max.saturating_sub(min) as u64;
    // The product's upper half is under `range`, so its low 16 bits are all of it.
    let [low, high, ..] = ((hash * range) >> 32).to_le_bytes();
    min.wrapping_add(u16::from_le_bytes([low, high]))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// `udp_flow_src_port()` transcribed with C's types, to compare against.
    fn kernel(hash: u32, min: i32, max: i32) -> u16 {
        let mut hash = hash;
        hash ^= hash << 16;
        let product = (hash as u64).wrapping_mul((max - min) as u64);
        u16::try_from((product >> 32) as i32 + min).unwrap()
    }

    #[test]
    fn known_values() {
        assert_eq!(source_port(0, 32768, 60999), 32768);
        assert_eq!(source_port(0x0000_ffff, 32768, 60999), 60998);
        assert_eq!(source_port(0x8000_0000, 32768, 60999), 32768 + 14115);
    }

    proptest! {
        #[test]
        fn equals_the_kernel_and_stays_in_range(hash: u32, min in 1u16..60000, span in 1u16..5000) {
            let port = source_port(hash, min, min + span);
            prop_assert_eq!(port, kernel(hash, min as i32, (min + span) as i32));
            prop_assert!((min..min + span).contains(&port));
        }
    }
}
