//! Which failures an attach has to tell.

use ovnet_common::abi::{PortValue, Program, mapped};

use super::*;
use crate::{datapath::Attachment, service::fake, state::GatewayPort};

#[test]
fn an_endpoint_whose_way_out_trusts_it_too_far_is_not_attached() {
    let endpoint = LocalEndpoint {
        gateway: Some(GatewayPort {
            bridge: "ovnet_gwbridge".into(),
            host_ifname: "ovnetg01234567".into(),
            ifname: "eth1".into(),
            address: [172, 18, 0, 3].into(),
            mac: "02:42:ac:12:00:03".into(),
        }),
        ..fake::local_endpoint()
    };
    let attach = |interface: &str| {
        let (program, interface) = (Program::FromGwbridge, interface.to_owned());
        Op::Attach(Attachment { program, ifindex: 9, interface, xdp: None })
    };
    let port = |last| {
        let address = mapped([172, 18, 0, last]);
        Op::SetPort(9, PortValue { vni: 0, address, ..PortValue::default() })
    };
    assert!(concerns(&attach("ovnetg01234567"), &endpoint));
    assert!(concerns(&port(3), &endpoint));
    assert!(!concerns(&attach("ovnetg76543210"), &endpoint), "another's");
    assert!(!concerns(&port(4), &endpoint), "another's");
}
