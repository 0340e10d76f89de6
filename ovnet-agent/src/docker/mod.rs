//! Docker: networks of this host's Docker that stand for networks of ovnet, and their containers.
//!
//! [`plugin`] is the HTTP of Docker's plugin protocol, [`driver`] is what its calls do, [`book`] is
//! what this host remembers of Docker's networks. Everything the agent asks Docker for goes the
//! other way, through Docker's API, and never from within a call of the plugin: Docker may be
//! waiting for that very call.

pub mod book;
pub mod driver;
pub mod plugin;
