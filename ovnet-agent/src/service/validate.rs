//! Checks of what people type that need nothing but the request itself. Pure.

use std::net::Ipv4Addr;

use anyhow::Result;

use super::{Refusal, one_line};
use crate::{
    api::types::{Attach, CreateNetwork},
    consul::schema::{self, NetworkRecord},
    ipam,
};

/// IFNAMSIZ without its terminating zero.
const MAX_IFNAME: usize = 15;

/// What can be told of a network before Consul is asked. The rest of it is checked by whoever claims
/// it, against what is taken.
pub(super) fn network(wanted: &CreateNetwork) -> Result<()> {
    name("network name", &wanted.name)
}

/// The names, the interface and everything else of an attach but its address.
pub(super) fn attach(wanted: &Attach) -> Result<()> {
    if wanted.network.is_empty() {
        return Err(Refusal::invalid("no network is named: say which one with --network"));
    }
    if wanted.netns.is_empty() {
        return Err(Refusal::invalid("no sandbox is named: say which one with --netns"));
    }
    for given in wanted.name.iter().chain(&wanted.aliases) {
        name("endpoint name", given)?;
    }
    if let Some(ifname) = &wanted.ifname {
        // What the kernel's dev_valid_name() refuses, told before anything is made.
        let bad = ifname.is_empty()
            || ifname.len() > MAX_IFNAME
            || ifname == "."
            || ifname == ".."
            || !ifname.chars().all(|c| c.is_ascii_graphic() && c != '/' && c != ':')
            || ifname == "lo";
        if bad {
            return Err(Refusal::invalid(format!(
                "interface name {ifname:?} is not possible: 1 to {MAX_IFNAME} characters, no \
                 spaces, slashes or colons, and not lo"
            )));
        }
    }
    Ok(())
}

/// Whether an endpoint of `network` may have `address` at all; whether it is free is Consul's to
/// say.
pub(super) fn address(network: &NetworkRecord, address: Ipv4Addr) -> Result<()> {
    ipam::check_address(network, address).map_err(invalid)
}

fn name(what: &str, name: &str) -> Result<()> {
    schema::check_name(what, name).map_err(invalid)
}

fn invalid(error: anyhow::Error) -> anyhow::Error {
    Refusal::invalid(one_line(&error))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::service::{Kind, fake::network as record, kind_of};

    #[test]
    fn interface_names_are_the_kernels() {
        for bad in ["", "a/b", "a b", "sixteen_letters_", "..", "lo", "a:1"] {
            let wanted = Attach {
                network: "n".into(),
                netns: "t1".into(),
                ifname: Some(bad.into()),
                ..Default::default()
            };
            assert!(attach(&wanted).is_err(), "{bad}");
        }
    }

    #[test]
    fn wrong_names_and_addresses_are_the_askers_to_mend() {
        let network = record("ov_net1", 4096);
        address(&network, [10, 0, 0, 2].into()).unwrap();
        for error in [
            name("network name", "a/b").unwrap_err(),
            address(&network, [10, 0, 1, 2].into()).unwrap_err(),
            address(&network, [10, 0, 0, 1].into()).unwrap_err(),
        ] {
            assert_eq!(kind_of(&error), Some(Kind::Invalid), "{error}");
        }
    }
}
