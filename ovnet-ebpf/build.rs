//! Passes bpf-linker the option cargo has no field for.

fn main() {
    // Packet headers lie at odd addresses. Rust reads them with alignment 1, which without this
    // feature becomes one load per byte; the JITs of every architecture we run on take unaligned
    // loads from packet memory, and the verifier checks what it must have aligned (the stack).
    println!("cargo:rustc-link-arg-bins=--cpu-features=+allows-misaligned-mem-access");
}
