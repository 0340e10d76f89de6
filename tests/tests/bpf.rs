//! The programs, one packet at a time, by BPF_PROG_TEST_RUN.
//!
//! `cargo xtask test bpf` runs this layer; without root every test prints SKIP and passes.

mod bpf {
    mod from_container;
}
