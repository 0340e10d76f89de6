//! `--metrics`: what there is to count, for Prometheus.
//!
//! Nothing is counted here: everything is counted where it happens, read when it is asked for
//! (`Numbers::read`), written down by `text`, and served by [`server`], which bounds what a client
//! can cost.

mod process;
pub mod server;
mod text;

use std::{collections::BTreeMap, sync::Arc};

use anyhow::Result;
use tokio::{sync::watch, task::JoinHandle};

use self::process::Process;
use crate::{
    api::types::{CounterView, Status},
    config::Metrics,
    consul::Health,
    peers::{Counts, Known},
    reconcile::{Activity, Reconciler},
};

/// Serves the metrics until the agent ends. Nothing here is fatal to the agent: what goes wrong is
/// logged and tried again.
pub fn spawn(
    choice: Metrics,
    reconciler: Reconciler,
    mut ending: watch::Receiver<bool>,
) -> JoinHandle<()> {
    tokio::spawn(async move {
        let Metrics::At(address) = choice else { return };
        let page = Arc::new(move || Numbers::read(&reconciler)?.text());
        tokio::select! {
            () = server::serve(address, page) => {}
            // An error means that the sender is gone, which is a stop too.
            _ = ending.wait_for(|stop| *stop) => {}
        }
    })
}

/// Everything at one moment.
#[derive(Clone, Debug)]
struct Numbers {
    status: Status,
    counters: Vec<CounterView>,
    peers: BTreeMap<String, Known>,
    probes: Counts,
    activity: Activity,
    consul: Health,
    process: Process,
}

impl Numbers {
    fn read(reconciler: &Reconciler) -> Result<Self> {
        let peers = reconciler.peers();
        Ok(Self {
            status: reconciler.status(),
            counters: reconciler.counters()?,
            peers: peers.known(),
            probes: peers.counts(),
            activity: reconciler.activity(),
            consul: reconciler.consul_health(),
            process: Process::read()?,
        })
    }
}
