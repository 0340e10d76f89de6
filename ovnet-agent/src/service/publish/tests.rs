//! Published ports and ways out, from attach to detach.

use super::*;
use crate::{
    api::types::{Detach, EndpointView},
    service::{
        Kind,
        fake::{self, Fake, FakeService, attach},
        kind_of, one_line,
    },
    state::DockerEndpoint,
};

fn publishing(network: &str, netns: &str, specs: &[&str]) -> Attach {
    let publish = specs.iter().map(ToString::to_string).collect();
    Attach { publish, ..attach(network, netns) }
}

fn shown(ports: &[PublishedPort]) -> Vec<String> {
    ports
        .iter()
        .map(|it| {
            format!("{}:{}:{}/{}", it.host_address, it.host_port, it.container_port, it.protocol)
        })
        .collect()
}

fn ports_of(view: &EndpointView) -> Vec<String> {
    shown(&view.local.as_ref().unwrap().ports)
}

async fn detach(service: &FakeService, netns: &str, network: Option<&str>) -> Vec<String> {
    let wanted = Detach {
        netns: Some(netns.into()),
        network: network.map(ToOwned::to_owned),
        ..Default::default()
    };
    service.detach(wanted).await.unwrap().warnings
}

/// Nothing of what an attach makes is there.
fn assert_nothing(fake: &Fake) {
    assert_eq!(fake.records(), []);
    assert_eq!((fake.links().len(), fake.gateways().len(), fake.reserved().len()), (0, 0, 0));
}

#[tokio::test]
async fn ports_and_the_way_out_come_and_go_with_the_endpoint() {
    let (service, fake) = fake::service(&["ov_net1"]);
    let wanted = Attach {
        publish_all: true,
        expose: vec!["53/udp".into(), "80".into()],
        ..publishing("ov_net1", "t1", &["90:80", "127.0.0.1:91-95:81"])
    };
    let view = service.attach(wanted).await.unwrap();
    assert_eq!(
        ports_of(&view),
        ["0.0.0.0:32768:53/udp", "0.0.0.0:90:80/tcp", "127.0.0.1:91:81/tcp"]
    );
    let local = view.local.clone().unwrap();
    assert_eq!(local.gateway.unwrap().address.to_string(), "172.18.0.2");
    assert_eq!(fake.gateways(), [format!("ovnetg{}", &view.record.id[..8])]);
    assert_eq!(fake.local()[0].ports.len(), 3);
    assert_eq!(shown(&service.ports("t1").unwrap()), ports_of(&view));
    assert_eq!(service.local_endpoints(None), [view]);
    assert!(detach(&service, "t1", None).await.is_empty());
    assert_nothing(&fake);
    // Nothing is sent to it any more when its way out goes.
    assert!(fake.calls().ends_with(&["remove_local", "delete_gateway", "release_endpoint"]));
}

#[tokio::test]
async fn a_sandbox_has_one_way_out_until_its_last_endpoint_goes() {
    for first in ["ov_net1", "ov_net2"] {
        let (service, fake) = fake::service(&["ov_net1", "ov_net2", "ov_net3"]);
        fake.make_internal("ov_net3");
        for network in ["ov_net1", "ov_net2", "ov_net3"] {
            service.attach(attach(network, "t1")).await.unwrap();
        }
        service.attach(attach("ov_net1", "t2")).await.unwrap();
        assert_eq!(fake.gateways().len(), 2);
        let of_t1: Vec<_> =
            fake.local().into_iter().filter(|it| it.netns.ends_with("t1")).collect();
        let internal = of_t1.iter().find(|it| it.network.internal).unwrap();
        assert_eq!(internal.gateway, None);
        assert_eq!(of_t1.iter().filter(|it| it.gateway.is_some()).count(), 2);
        detach(&service, "t1", Some(first)).await;
        assert_eq!(fake.gateways().len(), 2);
        // The internal one, which is left, does not keep it.
        let second = if first == "ov_net1" { "ov_net2" } else { "ov_net1" };
        detach(&service, "t1", Some(second)).await;
        assert_eq!(fake.gateways().len(), 1);
        detach(&service, "t2", None).await;
        assert!(fake.gateways().is_empty());
    }
}

#[tokio::test]
async fn a_failure_leaves_the_way_out_that_others_share() {
    for step in ["add_local", "publish_endpoint", "create_veth"] {
        let (service, fake) = fake::service(&["ov_net1", "ov_net2"]);
        service.attach(publishing("ov_net1", "t1", &["90:80"])).await.unwrap();
        fake.fail(step);
        service.attach(publishing("ov_net2", "t1", &["91:80"])).await.unwrap_err();
        assert_eq!(fake.gateways().len(), 1, "{step}");
        assert_eq!(fake.reserved(), [90], "{step}");
    }
}

#[tokio::test]
async fn a_port_is_published_once_even_by_one_sandbox() {
    let (service, fake) = fake::service(&["ov_net1", "ov_net2"]);
    service.attach(publishing("ov_net1", "t1", &["90:80"])).await.unwrap();
    let before = (fake.records(), fake.links(), fake.gateways());
    for (network, netns) in [("ov_net2", "t1"), ("ov_net2", "t2")] {
        let error = service.attach(publishing(network, netns, &["89:79", "90:80"])).await;
        assert_eq!(kind_of(&error.unwrap_err()), Some(Kind::Conflict));
    }
    assert_eq!((fake.records(), fake.links(), fake.gateways()), before);
    assert_eq!(fake.reserved(), [90]);
}

#[tokio::test]
async fn ports_that_cannot_be_are_refused_before_anything_is_done() {
    let specs = |specs: &[&str]| publishing("ov_net1", "t1", specs);
    let all = Attach { publish_all: true, ..attach("ov_net1", "t1") };
    let internal = "network ov_net1 is internal: nothing of it is published; attach without -p and \
                    -P, or to another network";
    let off = "no port can be published: the agent of this host runs with --egress off";
    let routed = "sandbox /run/netns/t1 has a default route of its own, so answers would not come \
                  back through ovnet: remove the route, or attach without -p and -P";
    type Prepare = fn(&Fake);
    let cases: [(Prepare, Attach, &str); 8] = [
        (|fake| fake.make_internal("ov_net1"), specs(&["90:80"]), internal),
        (|fake| fake.make_internal("ov_net1"), all.clone(), internal),
        (Fake::without_egress, specs(&["80"]), off),
        (Fake::without_egress, all.clone(), off),
        (|fake| fake.give_default_route("t1"), specs(&["80"]), routed),
        (|fake| fake.give_default_route("t1"), all, routed),
        (
            |_| {},
            specs(&["90:0"]),
            "published port \"90:0\": container port 0 is not possible: 1 is the lowest",
        ),
        (
            |_| {},
            Attach { expose: vec!["a".into()], ..attach("ov_net1", "t1") },
            "exposed port \"a\": container port \"a\" is not a number",
        ),
    ];
    for (prepare, wanted, line) in cases {
        let (service, fake) = fake::service(&["ov_net1"]);
        prepare(&fake);
        let error = service.attach(wanted).await.unwrap_err();
        assert_eq!(one_line(&error), line);
        assert!(kind_of(&error).is_some(), "{error}");
        assert!(fake.calls().iter().all(|it| ["network", "has_default_route"].contains(it)));
        assert_nothing(&fake);
    }
}

#[tokio::test]
async fn without_ports_there_is_no_way_out_where_there_must_be_none() {
    let prepare: [fn(&Fake); 3] = [
        |fake| fake.make_internal("ov_net1"),
        Fake::without_egress,
        |fake| fake.give_default_route("t1"),
    ];
    for prepare in prepare {
        let (service, fake) = fake::service(&["ov_net1"]);
        prepare(&fake);
        let expose = vec!["80/tcp".into()];
        let view = service.attach(Attach { expose, ..attach("ov_net1", "t1") }).await.unwrap();
        assert_eq!(view.local.unwrap().gateway, None);
        assert!(fake.gateways().is_empty() && fake.reserved().is_empty());
        detach(&service, "t1", None).await;
        assert!(!fake.calls().contains(&"delete_gateway"));
    }
}

#[tokio::test]
async fn what_is_dockers_is_not_shared() {
    let (service, fake) = fake::service(&["ov_net1", "ov_net2"]);
    service.attach(attach("ov_net1", "t1")).await.unwrap();
    let mut endpoint = fake.local().remove(0);
    endpoint.docker = Some(DockerEndpoint { network: "n".into(), container: None });
    Wiring::add_local(&fake, endpoint).await.unwrap();
    service.attach(attach("ov_net2", "t1")).await.unwrap();
    assert_eq!(fake.gateways().len(), 2);
}

#[tokio::test]
async fn a_way_out_that_stays_behind_is_a_warning() {
    let (service, fake) = fake::service(&["ov_net1"]);
    service.attach(publishing("ov_net1", "t1", &["90:80"])).await.unwrap();
    fake.fail("delete_gateway");
    let warnings = detach(&service, "t1", None).await;
    assert_eq!(warnings.len(), 1);
    assert!(
        warnings[0].ends_with("its way out is still there: delete_gateway was told to fail"),
        "{warnings:?}"
    );
    assert!(fake.records().is_empty() && fake.reserved().is_empty());
}

#[tokio::test]
async fn ports_are_asked_for_by_name_alias_or_id() {
    let (service, _) = fake::service(&["ov_net1", "ov_net2"]);
    let aliases = vec!["web".into()];
    let wanted = Attach { aliases, ..publishing("ov_net1", "t1", &["90:80"]) };
    let id = service.attach(wanted).await.unwrap().record.id;
    service.attach(publishing("ov_net2", "t1", &["91:79"])).await.unwrap();
    for name in ["web", &id, &id[..12]] {
        assert_eq!(shown(&service.ports(name).unwrap()), ["0.0.0.0:90:80/tcp"]);
    }
    assert_eq!(shown(&service.ports("t1").unwrap()), ["0.0.0.0:91:79/tcp", "0.0.0.0:90:80/tcp"]);
    let error = service.ports("t9").unwrap_err();
    assert_eq!(kind_of(&error), Some(Kind::NotFound));
    assert_eq!(
        one_line(&error),
        "no endpoint of this host has name or id t9: see `ovnet endpoint ls --local`"
    );
    let aliases = vec!["web".into()];
    service.attach(Attach { aliases, ..attach("ov_net1", "t2") }).await.unwrap();
    let error = service.ports("web").unwrap_err();
    assert_eq!(kind_of(&error), Some(Kind::Conflict));
    let line = one_line(&error);
    assert!(line.starts_with("2 endpoints have name or id web: t1 ("), "{line}");
    assert!(line.ends_with("; say which by id"), "{line}");
}
