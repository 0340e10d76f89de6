//! Which addresses are inside a sandbox: what the DNS server tells askers apart by.

use std::{net::Ipv4Addr, path::Path};

use super::{HOST_END, host::Sandbox, on_a_host, spec};

#[test]
fn the_addresses_inside_a_sandbox_are_listed() {
    on_a_host("the_addresses_inside_a_sandbox_are_listed", async |net| {
        let sandbox = Sandbox::new();
        assert!(net.addresses_in(sandbox.path()).await.unwrap().is_empty());
        net.create_veth(&spec(&sandbox)).await.unwrap();
        let overlay = Ipv4Addr::new(10, 0, 0, 2);
        assert_eq!(net.addresses_in(sandbox.path()).await.unwrap(), [overlay], "without loopback");

        // As docker_gwbridge's, which appears a moment later and is not ours.
        sandbox.ip("link add eth1 type bridge");
        sandbox.ip("address add 172.18.0.5/16 dev eth1");
        let mut inside = net.addresses_in(sandbox.path()).await.unwrap();
        inside.sort();
        assert_eq!(inside, [overlay, Ipv4Addr::new(172, 18, 0, 5)]);
        assert!(net.link(HOST_END).await.unwrap().is_some(), "the host's own is untouched");

        let error = net.addresses_in(Path::new("/run/netns/ovnet-none")).await.unwrap_err();
        assert!(format!("{error:#}").contains("/run/netns/ovnet-none"));
    });
}
