//! What the tests share.

pub mod bpf;
pub mod cluster;
pub mod compare;
pub mod consul;
pub mod fault_proxy;
pub mod fixture;
pub mod lab;
pub mod model;
pub mod mutate;
pub mod oracle;
pub mod packet;
pub mod ports;
pub mod privilege;
pub mod random;
pub mod replay;
pub mod storm;
pub mod syscall;
