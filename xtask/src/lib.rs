//! The part of xtask that others link: the development stand-in for Consul.

pub mod stand_in;
