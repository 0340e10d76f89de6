//! How often a time was taken: counts by ranges that are a 64th of the time wide, so that adding is quick,
//! takes no memory, and a percentile is right to 1.6 %.

use std::time::Duration;

/// Ranges between two powers of two, as a power of two.
const BITS: u32 = 6;
/// Up to 2^33 ns, which is longer than anybody waits for an answer.
const RANGES: usize = (33 - BITS as usize + 1) << BITS;

pub(super) struct Histogram {
    counts: Vec<u64>,
}

impl Histogram {
    pub(super) fn new() -> Self {
        Self { counts: vec![0; RANGES] }
    }

    pub(super) fn add(&mut self, time: Duration) {
        let range = range(u64::try_from(time.as_nanos()).unwrap_or(u64::MAX));
        if let Some(count) = self.counts.get_mut(range.min(RANGES - 1)) {
            *count += 1;
        }
    }

    pub(super) fn count(&self) -> u64 {
        self.counts.iter().sum()
    }

    /// The time that this share of all did not exceed; zero where there are none.
    pub(super) fn below(&self, share: f64) -> Duration {
        #[allow(clippy::cast_precision_loss, reason = "a count of seconds is exact in an f64")]
        let wanted = self.count() as f64 * share;
        let mut seen = 0.0;
        for (range, count) in self.counts.iter().enumerate() {
            #[allow(clippy::cast_precision_loss, reason = "as above")]
            let count = *count as f64;
            seen += count;
            if count > 0.0 && seen >= wanted {
                return Duration::from_nanos(highest(range));
            }
        }
        Duration::ZERO
    }
}

/// The range of a time: its power of two, and the bits that follow the first one.
fn range(nanoseconds: u64) -> usize {
    let shift = (u64::BITS - nanoseconds.leading_zeros()).saturating_sub(BITS + 1);
    let range = (u64::from(shift) << BITS) + (nanoseconds >> shift);
    usize::try_from(range).unwrap_or(usize::MAX)
}

/// The longest time of a range.
fn highest(range: usize) -> u64 {
    let first = 1_usize << BITS;
    // Short times are ranges of their own; after them, each power of two has as many ranges.
    let shift = (range >> BITS).saturating_sub(1);
    let bits = range - (shift << BITS);
    debug_assert!(bits < 2 * first, "a range of another power of two");
    let next = u64::try_from(bits + 1).unwrap_or(u64::MAX);
    (next << shift) - 1
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_time_is_in_its_range() {
        for time in (0..1000).chain([1023, 1024, 65_535, 123_456_789, 1 << 32]) {
            let range = range(time);
            assert!(range < RANGES, "{time}");
            assert!(highest(range) >= time, "{time}");
            assert!(range == 0 || highest(range - 1) < time, "{time}");
        }
    }

    #[test]
    fn percentiles_are_right_to_a_64th() {
        let mut histogram = Histogram::new();
        assert_eq!(histogram.below(0.5), Duration::ZERO);
        for microseconds in 1..=1000 {
            histogram.add(Duration::from_micros(microseconds));
        }
        for (share, exact) in [(0.5, 500e-6), (0.99, 990e-6), (1.0, 1000e-6)] {
            let found = histogram.below(share).as_secs_f64();
            assert!(found >= exact && found <= exact * (1.0 + 1.0 / 64.0), "{share}: {found}");
        }
        histogram.add(Duration::MAX);
        assert_eq!(histogram.count(), 1001);
    }
}
