//! The baseline.
