//! The HTTP API on the agent's unix socket.

pub mod types;
