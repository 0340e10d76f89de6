//! The HTTP API on the agent's unix socket: JSON bodies of [`types`], errors as
//! [`types::ErrorBody`].
//!
//! | request | answer |
//! |---|---|
//! | `GET /v1/networks` | all networks |
//! | `POST /v1/networks` | creates one: [`types::CreateNetwork`] → its record |
//! | `GET /v1/networks/{name or id}` | [`types::NetworkView`] |
//! | `DELETE /v1/networks/{name or id}` | removes it, answers with its record |
//! | `GET /v1/endpoints[?network=…][&local=true]` | [`types::EndpointView`]s, of all hosts or only this one |
//! | `POST /v1/endpoints` | [`types::Attach`] → [`types::EndpointView`] |
//! | `POST /v1/endpoints/detach` | [`types::Detach`] → [`types::Detached`] |
//! | `GET /v1/hosts` | [`types::HostView`]s |
//! | `GET /v1/status` | [`types::Status`] |
//! | `GET /v1/counters` | [`types::CounterView`]s, zeroes included |
//! | `GET /v1/monitor` | [`types::MonitorLine`]s, one per line, until either side ends it |

pub mod client;
pub(crate) mod http;
mod monitor;
pub mod server;
pub mod socket;
pub mod summary;
pub mod types;
