//! The ovnet agent as a library, in the order an event takes through it.
//!
//! Consul or kernel event → [`consul`] → [`desired`] → [`diff`] → [`apply`] → [`datapath`] and
//! [`net`], driven by [`reconcile`]. Requests come in by [`api`] and are carried out by
//! [`service`]. ARCHITECTURE.md walks through it file by file.

pub mod activation;
pub mod agent;
pub mod api;
pub mod apply;
pub mod check;
pub mod cleanup;
pub mod cli;
pub mod config;
pub mod consul;
pub mod datapath;
pub mod desired;
pub mod diff;
pub mod dns;
pub mod docker;
pub mod durable;
pub mod firewall;
pub mod hosts;
pub mod ipam;
pub mod metrics;
pub mod net;
pub mod peers;
pub mod publish;
pub mod reconcile;
pub mod repairs;
pub mod service;
pub mod state;
