//! Attaches, right, wrong and cut short at every step.

use std::collections::BTreeSet;

use super::*;
use crate::service::{
    fake::{self, attach},
    kind_of,
};

#[tokio::test]
async fn an_attach_leaves_an_announced_wired_endpoint() {
    let (service, fake) = fake::service(&["ov_net1"]);
    let mut wanted = attach("ov_net1", "t1");
    wanted.aliases = vec!["web".into(), "t1".into()];
    let view = service.attach(wanted).await.unwrap();
    assert_eq!(view.record.id.len(), 64);
    assert_eq!(view.record.names, ["t1", "web"]);
    assert_eq!(view.record.state, EndpointState::Up);
    let local = view.local.unwrap();
    assert_eq!(local.host_ifname, format!("ovnet{}", &view.record.id[..8]));
    assert_eq!((local.ifname.as_str(), local.mtu), ("eth0", 1450));
    assert_eq!(fake.records(), [view.record]);
    assert_eq!(fake.links(), [local.host_ifname]);
    assert_eq!(
        fake.calls(),
        [
            "network",
            "has_default_route",
            "claim_address",
            "create_veth",
            "create_gateway",
            "add_local",
            "publish_endpoint"
        ]
    );
}

#[tokio::test]
async fn a_failure_of_any_step_leaves_nothing() {
    for step in [
        "network",
        "has_default_route",
        "local_addresses",
        "reserve_ports",
        "claim_address",
        "create_veth",
        "create_gateway",
        "add_local",
        "publish_endpoint",
    ] {
        let (service, fake) = fake::service(&["ov_net1"]);
        fake.fail(step);
        let wanted = Attach { publish: vec!["90:80".into()], ..attach("ov_net1", "t1") };
        let error = service.attach(wanted.clone()).await.unwrap_err();
        assert_eq!(one_line(&error), format!("{step} was told to fail"));
        assert_eq!(fake.records(), [], "{step}");
        assert!(fake.links().is_empty(), "{step}");
        assert!(fake.gateways().is_empty(), "{step}");
        assert!(fake.reserved().is_empty(), "{step}");
        assert!(fake.local().is_empty(), "{step}");
        assert!(service.attaching().is_empty(), "{step}");
        // And it is as if nothing had been tried.
        fake.fail("");
        service.attach(wanted).await.unwrap();
    }
}

#[tokio::test]
async fn what_cannot_be_undone_is_told_after_the_cause() {
    let (service, fake) = fake::service(&["ov_net1"]);
    fake.fail("add_local");
    fake.fail("remove_local");
    let error = service.attach(attach("ov_net1", "t1")).await.unwrap_err();
    assert_eq!(
        one_line(&error),
        "add_local was told to fail; and undoing it failed: remove_local was told to fail"
    );
    // The failed step does not keep the others from being undone.
    assert_eq!(fake.records(), []);
    assert!(fake.links().is_empty());
}

#[tokio::test]
async fn a_claim_whose_answer_was_lost_is_released() {
    let (service, fake) = fake::service(&["ov_net1"]);
    fake.fail("claim_address after");
    service.attach(attach("ov_net1", "t1")).await.unwrap_err();
    assert_eq!(fake.records().len(), 1);
    fake.fail("");
    fake::eventually(|| fake.records().is_empty()).await;
}

#[tokio::test]
async fn an_address_that_could_not_be_released_is_released_later() {
    let (service, fake) = fake::service(&["ov_net1"]);
    fake.fail("publish_endpoint");
    fake.fail("release_endpoint");
    service.attach(attach("ov_net1", "t1")).await.unwrap_err();
    assert_eq!(fake.records().len(), 1);
    fake.fail("");
    fake::eventually(|| fake.records().is_empty()).await;
}

#[tokio::test]
async fn a_sandbox_may_be_in_two_networks_but_not_twice_in_one() {
    let (service, fake) = fake::service(&["ov_net1", "ov_net2"]);
    service.attach(attach("ov_net1", "t1")).await.unwrap();
    service.attach(attach("ov_net2", "t1")).await.unwrap();
    let error = service.attach(attach("ov_net1", "t1")).await.unwrap_err();
    assert_eq!(kind_of(&error), Some(crate::service::Kind::Conflict));
    assert_eq!(
        one_line(&error),
        "sandbox /run/netns/t1 is in network ov_net1 already, as t1 with address 10.0.0.2: \
         detach it first"
    );
    assert_eq!(fake.records().len(), 2);
}

#[tokio::test]
async fn of_two_attaches_of_one_sandbox_at_once_one_is_refused() {
    let (service, fake) = fake::service(&["ov_net1"]);
    let (a, b) = tokio::join!(
        service.attach(attach("ov_net1", "t1")),
        service.attach(attach("ov_net1", "t1"))
    );
    assert!(a.is_ok() != b.is_ok());
    assert_eq!(fake.records().len(), 1);
}

#[tokio::test]
async fn two_hundred_at_once_get_two_hundred_addresses() {
    let (service, fake) = fake::service(&["ov_net1"]);
    let attaches = (0..200).map(|n| {
        let service = service.clone();
        tokio::spawn(async move { service.attach(attach("ov_net1", &format!("t{n}"))).await })
    });
    let mut addresses = BTreeSet::new();
    for attached in futures::future::join_all(attaches).await {
        addresses.insert(attached.unwrap().unwrap().record.address);
    }
    assert_eq!(addresses.len(), 200);
    assert_eq!(fake.local().len(), 200);
}

#[tokio::test]
async fn an_attach_goes_on_when_its_client_is_gone() {
    let (service, fake) = fake::service(&["ov_net1"]);
    let gate = fake.hold("create_veth");
    let asked = tokio::spawn({
        let service = service.clone();
        async move { service.attach(attach("ov_net1", "t1")).await }
    });
    fake::eventually(|| fake.calls().contains(&"create_veth")).await;
    asked.abort();
    drop(gate);
    fake::eventually(|| fake.records().iter().any(|it| it.state == EndpointState::Up)).await;
    assert_eq!(fake.local().len(), 1);
}

#[tokio::test]
async fn another_sandbox_does_not_wait() {
    let (service, fake) = fake::service(&["ov_net1"]);
    let gate = fake.hold("create_veth");
    let slow = tokio::spawn({
        let service = service.clone();
        async move { service.attach(attach("ov_net1", "t1")).await }
    });
    fake::eventually(|| fake.calls().contains(&"create_veth")).await;
    fake.let_others_pass();
    service.attach(attach("ov_net1", "t2")).await.unwrap();
    drop(gate);
    slow.await.unwrap().unwrap();
}

#[tokio::test]
async fn wrong_requests_change_nothing() {
    let (service, fake) = fake::service(&["ov_net1"]);
    service
        .attach(Attach { ip: Some([10, 0, 0, 7].into()), ..attach("ov_net1", "t1") })
        .await
        .unwrap();
    let before = (fake.records(), fake.links());
    let t2 = attach("ov_net1", "t2");
    let tries = [
        (Attach { network: "none".into(), ..t2.clone() }, "there is no network none"),
        (attach("ov_net1", "missing"), "there is no network namespace missing"),
        (Attach { ip: Some([10, 9, 0, 2].into()), ..t2.clone() }, "is not inside subnet"),
        (Attach { ip: Some([10, 0, 0, 1].into()), ..t2.clone() }, "is taken: it is the"),
        (Attach { ip: Some([10, 0, 0, 7].into()), ..t2.clone() }, "is taken"),
        (Attach { name: Some("a b".into()), ..t2.clone() }, "endpoint name"),
        (Attach { ifname: Some("a/b".into()), ..t2.clone() }, "interface name"),
    ];
    for (wanted, part) in tries {
        let error = service.attach(wanted).await.unwrap_err();
        assert!(error.to_string().contains(part), "{error}");
    }
    assert_eq!((fake.records(), fake.links()), before);
}

#[tokio::test]
async fn a_network_is_found_by_the_start_of_its_id() {
    let (service, _) = fake::service(&["ov_net1"]);
    let id = fake::network("ov_net1", 4096).id;
    service.attach(attach(&id[..6], "t1")).await.unwrap();
    service.attach(attach(&id, "t2")).await.unwrap();
    assert!(service.attach(attach(&id[..3], "t3")).await.is_err());
}
