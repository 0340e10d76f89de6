//! What a test needs of the machine, and what happens where that is missing.

/// Whether this test can run. Without root it prints `SKIP name: why` and the caller returns;
/// with `OVNET_REQUIRE_ALL=1`, as in CI, it panics instead, so that no layer is skipped unseen.
pub fn is_root(name: &str) -> bool {
    nix::unistd::geteuid().is_root() || skip(name, "needs root")
}

/// Prints why a test cannot run, and is false; panics where nothing may be skipped.
#[allow(
    clippy::panic,
    reason = "only tests call this, and a skip that is not allowed is a failure"
)]
pub fn skip(name: &str, why: &str) -> bool {
    if std::env::var_os("OVNET_REQUIRE_ALL").is_some_and(|value| value == "1") {
        panic!("{name}: {why}, and OVNET_REQUIRE_ALL=1 allows no skip");
    }
    println!("SKIP {name}: {why}");
    false
}
