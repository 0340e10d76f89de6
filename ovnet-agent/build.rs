//! temporary
fn main() {
    unsafe { std::env::set_var("RUSTC_BOOTSTRAP", "1") };
    unsafe { std::env::set_var("CARGO_TERM_QUIET", "true") };
    let tools = concat!(env!("CARGO_MANIFEST_DIR"), "/../target/tools/bin");
    let path = format!("{tools}:{}", std::env::var("PATH").unwrap());
    unsafe { std::env::set_var("PATH", path) };
    aya_build::build_ebpf(
        [aya_build::Package {
            name: "ovnet-ebpf",
            root_dir: concat!(env!("CARGO_MANIFEST_DIR"), "/../ovnet-ebpf"),
            ..Default::default()
        }],
        aya_build::Toolchain::Custom("1.95.0"),
    )
    .unwrap();
}
