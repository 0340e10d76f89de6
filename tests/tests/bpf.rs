//! The programs, one packet at a time, by BPF_PROG_TEST_RUN.
//!
//! `cargo xtask test bpf` runs this layer; without root every test prints SKIP and passes.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "tests panic with context where an error has no stack trace"
)]

mod bpf {
    mod coverage;
    mod encapsulate;
    mod events;
    mod formers;
    mod from_container;
    mod from_overlay;
    mod full;
    mod pins;
    mod probe;
    mod published;
    mod published_edges;
    mod published_rest;
    mod random;
    mod receive;
    mod round_trip;
}
