//! The only module that talks to Consul.

pub mod schema;
