//! Medians, and what samples lie between.

use crate::lab::measure::median;

/// A median, and between what the samples lie.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Spread {
    /// The middle one, or the mean of the middle two.
    pub(crate) median: f64,
    /// The lowest of all.
    pub(crate) lowest: f64,
    /// The highest of all.
    pub(crate) highest: f64,
}

impl Spread {
    /// Of these samples; all zero where there are none.
    pub(crate) fn of(samples: &[f64]) -> Self {
        let (Some(lowest), Some(highest)) =
            (samples.iter().copied().reduce(f64::min), samples.iter().copied().reduce(f64::max))
        else {
            return Self::default();
        };
        Self { median: median(samples.iter().copied()), lowest, highest }
    }

    /// Whether some value lies between both one's extremes and the other's.
    pub(crate) fn overlaps(&self, other: &Self) -> bool {
        self.lowest <= other.highest && other.lowest <= self.highest
    }
}

/// One by another, round by round: what they have in common then, drops out. Rounds in which the
/// other did nothing have no ratio.
pub(crate) fn ratios(ours: &[f64], theirs: &[f64]) -> Vec<f64> {
    let pairs = ours.iter().zip(theirs).filter(|(_, theirs)| theirs.abs() > f64::EPSILON);
    pairs.map(|(ours, theirs)| ours / theirs).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ratios_are_those_of_each_round() {
        // The second round was slow for both, in the last one nothing was lost by the other.
        let found = ratios(&[20.0, 2.0, 30.0, 1.0], &[10.0, 1.0, 10.0, 0.0]);
        let spread = Spread::of(&found);
        assert_eq!(spread, Spread { median: 2.0, lowest: 2.0, highest: 3.0 });
        assert_eq!(Spread::of(&[]), Spread::default());
    }

    #[test]
    fn spreads_overlap_where_they_touch() {
        let of = |lowest, highest| Spread { median: lowest, lowest, highest };
        assert!(of(1.0, 2.0).overlaps(&of(2.0, 3.0)));
        assert!(of(1.0, 9.0).overlaps(&of(2.0, 3.0)));
        assert!(!of(1.0, 2.0).overlaps(&of(2.1, 3.0)));
        assert!(!of(2.1, 3.0).overlaps(&of(1.0, 2.0)));
    }
}
