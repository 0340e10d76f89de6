//! Reads the sampled drops, and the programs' own log where it is on.

use aya::maps::{MapData, RingBuf};
use aya_log::EbpfLogger;
use ovnet_common::abi::DropEvent;
use tokio::{
    io::{Interest, unix::AsyncFd},
    sync::broadcast,
};

use super::Datapath;

/// Spawns the task that hands drop events to `sender`, and the one that prints the log. Both end
/// with the runtime.
pub fn spawn_reader(datapath: &mut Datapath, sender: broadcast::Sender<DropEvent>) {
    if let Some(events) = datapath.maps.take_events() {
        tokio::spawn(async move {
            if let Err(error) = read_events(events, sender).await {
                tracing::warn!(%error, "drop events are not read any more");
            }
        });
    }
    match EbpfLogger::init_with_logger(&mut datapath.ebpf, TracingLog) {
        Ok(logger) => {
            tokio::spawn(async move {
                if let Err(error) = read_log(logger).await {
                    tracing::warn!(%error, "the programs' log is not read any more");
                }
            });
        }
        Err(error) => tracing::debug!(%error, "the programs have no log"),
    }
}

async fn read_events(
    events: RingBuf<MapData>,
    sender: broadcast::Sender<DropEvent>,
) -> std::io::Result<()> {
    // SAFETY: the ring buffer owns its descriptor for as long as it lives, inside the AsyncFd.
    let mut events = unsafe { AsyncFd::register_with_interest(events, Interest::READABLE) }?;
    loop {
        let mut guard = events.readable_mut().await?;
        while let Some(item) = guard.get_inner_mut().next() {
            if item.len() < size_of::<DropEvent>() {
                continue;
            }
            // SAFETY: the item is long enough, DropEvent is Pod, and the read needs no alignment.
            let event = unsafe { item.as_ptr().cast::<DropEvent>().read_unaligned() };
            // Nobody listening is the usual case.
            let _ = sender.send(event);
        }
        guard.clear_ready();
    }
}

async fn read_log(logger: EbpfLogger<TracingLog>) -> std::io::Result<()> {
    // SAFETY: the ring buffer owns its descriptor for as long as it lives, inside the AsyncFd.
    let mut logger = unsafe { AsyncFd::register_with_interest(logger, Interest::READABLE) }?;
    loop {
        let mut guard = logger.readable_mut().await?;
        guard.get_inner_mut().flush();
        guard.clear_ready();
    }
}

/// aya-log speaks the `log` crate; the agent speaks `tracing`.
struct TracingLog;

impl log::Log for TracingLog {
    fn enabled(&self, _: &log::Metadata<'_>) -> bool {
        true
    }

    fn log(&self, record: &log::Record<'_>) {
        tracing::info!(target: "datapath", "{}", record.args());
    }

    fn flush(&self) {}
}
