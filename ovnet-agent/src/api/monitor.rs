//! `GET /v1/monitor`: sampled drops as they happen, one JSON object per line.

use std::convert::Infallible;

use anyhow::Result;
use axum::{
    body::{Body, Bytes},
    extract::State,
    http::{StatusCode, header},
    response::{IntoResponse as _, Response},
};
use futures::StreamExt as _;
use ovnet_common::{
    abi::{DropEvent, Program},
    verdict,
};
use tokio_stream::wrappers::{BroadcastStream, errors::BroadcastStreamRecvError};

use super::{
    server::{Api, Error},
    summary::summarize,
    types::{MonitorLine, MonitorView},
};
use crate::service::{Records, Wiring};

pub(super) async fn monitor<R: Records, W: Wiring>(
    State(api): State<Api<R, W>>,
) -> Result<Response, Error> {
    let permit = api.monitors.try_acquire_owned().map_err(|_| {
        Error::new(StatusCode::SERVICE_UNAVAILABLE, "too many monitors: end one of them first")
    })?;
    let port = api.service.vxlan_port();
    let mut ending = api.ending;
    let ended = async move {
        // An error means the server is gone, which is an end too.
        drop(ending.wait_for(|ending| *ending).await);
    };
    let lines = BroadcastStream::new(api.service.wiring().events())
        .map(move |received| {
            // The permit lives as long as the stream does.
            let _held = &permit;
            match received {
                Ok(event) => MonitorLine::Drop(view(&event, port)),
                Err(BroadcastStreamRecvError::Lagged(missed)) => MonitorLine::Missed { missed },
            }
        })
        .filter_map(|line| async move {
            let mut bytes = serde_json::to_vec(&line).ok()?;
            bytes.push(b'\n');
            Some(Ok::<_, Infallible>(Bytes::from(bytes)))
        })
        .take_until(ended);
    Ok(([(header::CONTENT_TYPE, "application/x-ndjson")], Body::from_stream(lines)).into_response())
}

/// A drop event for people. `vxlan_port` is in host byte order.
fn view(event: &DropEvent, vxlan_port: u16) -> MonitorView {
    let DropEvent { timestamp_ns, ifindex, length, program, reason, captured, reserved: _, data } =
        event;
    let captured = data.get(..usize::from(*captured)).unwrap_or(data);
    MonitorView {
        timestamp_ns: *timestamp_ns,
        program: Program::from_number(*program)
            .map_or_else(|| format!("program-{program}"), |program| program.name().to_owned()),
        reason: verdict::label(*reason)
            .map_or_else(|| format!("reason-{reason}"), ToOwned::to_owned),
        ifindex: *ifindex,
        interface: nix::net::if_::if_indextoname(*ifindex)
            .ok()
            .and_then(|name| name.into_string().ok())
            .unwrap_or_default(),
        length: *length,
        summary: summarize(captured, vxlan_port),
        data: captured.iter().map(|byte| format!("{byte:02x}")).collect(),
    }
}

#[cfg(test)]
mod tests {
    use ovnet_common::{abi::EVENT_DATA, verdict::DropReason};

    use super::*;

    #[test]
    fn an_event_is_shown_by_its_names() {
        let event = DropEvent {
            timestamp_ns: 7,
            ifindex: 1,
            length: 14,
            program: Program::FromUplink as u8,
            reason: DropReason::UnknownVtep as u8,
            captured: 2,
            reserved: 0,
            data: [0xab; EVENT_DATA],
        };
        let shown = view(&event, 4789);
        assert_eq!(
            (shown.program.as_str(), shown.reason.as_str(), shown.interface.as_str()),
            ("from_uplink", "unknown-vtep", "lo")
        );
        assert_eq!((shown.data.as_str(), shown.summary.as_str()), ("abab", "truncated ethernet"));
    }

    #[test]
    fn numbers_nothing_uses_are_shown_as_numbers() {
        let event = DropEvent {
            timestamp_ns: 0,
            ifindex: 0,
            length: 0,
            program: 99,
            reason: 127,
            captured: u16::MAX,
            reserved: 0,
            data: [0; EVENT_DATA],
        };
        let shown = view(&event, 4789);
        assert_eq!((shown.program.as_str(), shown.reason.as_str()), ("program-99", "reason-127"));
        assert_eq!(shown.data.len(), 2 * EVENT_DATA);
    }
}
