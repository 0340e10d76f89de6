//! A soak: attach, detach, publish, networks that come and go, agents and Consul that are killed, at
//! random from a seed. Afterwards what was asked for, what the kernels hold and what Consul has agree
//! exactly, and nothing has grown.
//!
//! `cargo xtask soak` runs it for half an hour; among the other tests it is short. The plan of a seed
//! is always the same; what meets what within a round is up to the machine.

#![allow(
    clippy::panic,
    clippy::unwrap_used,
    reason = "a test panics with what it found; the lint knows #[test] functions, not helpers"
)]

mod agree;
mod flat;
mod plan;
mod world;

use std::{
    env, thread,
    time::{Duration, Instant},
};

use ovnet_tests::cluster::{Cluster, Ping, Steps};

use self::{
    flat::Flatness,
    plan::{HOSTS, Plan},
    world::World,
};

/// How long it goes on where `OVNET_SOAK_SECONDS` says nothing.
const SHORT: Duration = Duration::from_secs(45);
/// The seed where `OVNET_SOAK_SEED` says nothing.
const SEED: u64 = 1;
/// After so many rounds everything that comes and goes is taken down, and what is left is compared.
const ROUNDS_TO_A_DRAIN: usize = 4;

#[test]
fn after_a_soak_everything_agrees_and_nothing_has_grown() {
    let Some(cluster) = Cluster::up("soak", |options| {
        options.durable_consul = true;
        let arguments = ["--repair-interval", "1", "--host-grace", "60"];
        options.agent_args = arguments.map(str::to_owned).to_vec();
    }) else {
        return;
    };
    let seconds = number("OVNET_SOAK_SECONDS").map_or(SHORT, Duration::from_secs);
    let seed = number("OVNET_SOAK_SEED").unwrap_or(SEED);
    println!("seed {seed}, {} s", seconds.as_secs());
    let steps = Steps::default();
    let end = Instant::now() + seconds;

    cluster.sh("docker01", "ovnet network create anchors");
    let mut world = World::new("anchors");
    for host in HOSTS {
        let address = cluster.sandbox(host, "anchor", "--network anchors");
        world.anchor(host, "anchor", "anchors", address);
    }
    agree::wait(&cluster, &world);
    let mut flatness = Flatness::begin(&cluster);

    let mut plan = Plan::new(seed);
    let mut rounds = 0;
    while Instant::now() < end || rounds < 2 * ROUNDS_TO_A_DRAIN {
        let round = plan.round();
        rounds += 1;
        steps.begin(&format!("round {rounds}: {round}"));
        let ping = Ping::start(&cluster.lab, "docker01/anchor", world.address_of("docker02"));
        world.live_through(&cluster, &round);
        let settling = Instant::now();
        agree::wait(&cluster, &world);
        println!(
            "         {} endpoints in {} networks agree after {:.1} s",
            world.endpoints().count(),
            world.networks().count(),
            settling.elapsed().as_secs_f64()
        );
        ping.must_have_lost_none("through a round of the soak");
        if rounds % ROUNDS_TO_A_DRAIN == 0 {
            steps.begin("all that comes and goes is taken down");
            world.drain(&cluster);
            agree::wait(&cluster, &world);
            flatness.look(&cluster);
        }
    }
    steps.begin("the end");
    println!("{rounds} rounds, {}", world.tally());
    flatness.must_be_flat();
}

/// The number in an environment variable.
fn number(name: &str) -> Option<u64> {
    let text = env::var(name).ok()?;
    Some(text.parse().unwrap_or_else(|error| panic!("{name}={text}: {error}")))
}

/// Does something for each host at the same time.
fn on_each_host<R: Send>(work: impl Fn(usize) -> R + Sync) -> Vec<R> {
    let work = &work;
    thread::scope(|scope| {
        let threads: Vec<_> =
            (0..HOSTS.len()).map(|host| scope.spawn(move || work(host))).collect();
        threads.into_iter().map(|it| it.join().unwrap()).collect()
    })
}
