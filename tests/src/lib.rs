//! What the tests share.

pub mod consul;
