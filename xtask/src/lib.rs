//! What others link: the lab and the demo, for tests and benchmarks, and the development stand-in
//! for Consul.

pub mod demo;
pub mod lab;
pub mod stand_in;
