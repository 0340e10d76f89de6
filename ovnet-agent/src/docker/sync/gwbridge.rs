//! Docker's bridge, `docker_gwbridge`, over which containers reach the agent's DNS server.

use std::{net::Ipv4Addr, time::Duration};

use tokio::sync::{Notify, watch};

use super::{
    api::Api,
    notes::{Notes, Part},
    over::Over,
    side::Side,
};

/// So many looks in a row must miss a bridge that was there before it is made again: who removes it
/// may do so to make it with another subnet.
const MISSED: u32 = 2;

/// Keeps the gateway address of Docker's bridge known, and makes the bridge where there is none.
/// Wakes `gone` where there is no Docker any more.
pub(super) async fn watch<A: Api, S: Side>(
    api: &A,
    gwbridge: &watch::Sender<Option<Ipv4Addr>>,
    notes: &Notes<S>,
    every: Duration,
    gone: &Notify,
    mut over: Over,
) {
    let mut missed = 0;
    while !over.now() {
        if !api.is_there() {
            gone.notify_one();
            return;
        }
        let Some(mut address) = over.or(api.gwbridge()).await else { return };
        if matches!(address, Ok(None)) {
            missed += 1;
            let was_there = gwbridge.borrow().is_some();
            if (!was_there || missed >= MISSED) && !over.now() {
                address = api.make_gwbridge().await.map(Some);
            }
        }
        notes.set_result(Part::Gwbridge, &address);
        if let Ok(Some(address)) = address {
            missed = 0;
            gwbridge.send_if_modified(|known| known.replace(address) != Some(address));
        }
        if over.or(tokio::time::sleep(every)).await.is_none() {
            return;
        }
    }
}
