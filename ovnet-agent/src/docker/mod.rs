//! Docker: what the agent asks of its API.

pub mod daemon;
pub mod sync;
