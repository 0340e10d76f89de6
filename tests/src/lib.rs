//! What the tests share.

pub mod consul;
pub mod lab;
