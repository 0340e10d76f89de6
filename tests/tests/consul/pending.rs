//! Networks whose name follows: claimed, published, given up.

use ovnet_agent::consul::{
    Publish,
    schema::{NetworkRecord, PendingRecord},
};

use crate::{Server, contract, line, pool, wanted};

contract!(
    a_claim_becomes_a_network_under_its_name,
    a_claim_given_up_leaves_nothing,
    claims_made_at_once_share_neither_vni_nor_subnet,
    of_two_claims_for_one_name_one_is_published,
    what_is_claimed_is_nobody_elses,
    an_endpoint_takes_over_what_was_claimed_for_it,
);

async fn a_claim_becomes_a_network_under_its_name(server: Server) {
    let (one, two) = (server.client("docker01"), server.client("docker02"));
    let claim = one.claim_pending(None, None, &pool(), &[]).await.unwrap();
    assert_eq!((claim.subnet.to_string().as_str(), claim.vni), ("10.0.0.0/24", 4096));
    assert_eq!(one.pending().await.unwrap(), std::slice::from_ref(&claim));
    assert!(two.pending().await.unwrap().is_empty());
    assert!(two.networks().await.unwrap().is_empty());

    let network = named(&claim, "ov_net1");
    assert_eq!(one.publish_network(&network).await.unwrap(), Publish::Done(network.clone()));
    assert_eq!(one.publish_network(&network).await.unwrap(), Publish::Done(network.clone()));
    assert!(one.pending().await.unwrap().is_empty());
    assert_eq!(two.network("ov_net1").await.unwrap(), network);
    // From here on it is a network as any other.
    two.remove_network("ov_net1").await.unwrap();
    assert_eq!(server.keys().await, ["subnets/.keep"]);
}

async fn a_claim_given_up_leaves_nothing(server: Server) {
    let one = server.client("docker01");
    let claim = one.claim_pending(None, None, &pool(), &[]).await.unwrap();
    one.release_pending(&claim.id).await.unwrap();
    one.release_pending(&claim.id).await.unwrap();
    assert_eq!(server.keys().await, ["subnets/.keep"]);
}

async fn claims_made_at_once_share_neither_vni_nor_subnet(server: Server) {
    let mut claiming = tokio::task::JoinSet::new();
    for number in 1..=6 {
        let client = server.client(&format!("docker{number:02}"));
        claiming
            .spawn(async move { client.claim_pending(None, None, &pool(), &[]).await.unwrap() });
    }
    let claims = claiming.join_all().await;
    for (index, one) in claims.iter().enumerate() {
        for other in &claims[index + 1..] {
            assert!(one.vni != other.vni && one.subnet != other.subnet, "{one:?} {other:?}");
        }
    }
}

async fn of_two_claims_for_one_name_one_is_published(server: Server) {
    let (one, two) = (server.client("docker01"), server.client("docker02"));
    for round in 0..10 {
        let name = format!("net{round}");
        let a = named(&one.claim_pending(None, None, &pool(), &[]).await.unwrap(), &name);
        let b = named(&two.claim_pending(None, None, &pool(), &[]).await.unwrap(), &name);
        let (of_a, of_b) = tokio::join!(one.publish_network(&a), two.publish_network(&b));
        let (of_a, of_b) = (of_a.unwrap(), of_b.unwrap());
        let winner = one.network(&name).await.unwrap();
        let expected = |own: &_| {
            if *own == winner {
                Publish::Done(winner.clone())
            } else {
                Publish::Taken(winner.clone())
            }
        };
        assert_eq!((&of_a, &of_b), (&expected(&a), &expected(&b)));
        assert!(a == winner || b == winner);
    }
}

async fn what_is_claimed_is_nobody_elses(server: Server) {
    let (one, two) = (server.client("docker01"), server.client("docker02"));
    let subnet = "10.7.0.0/24".parse().unwrap();
    one.claim_pending(Some(subnet), None, &pool(), &[]).await.unwrap();
    let again = two.claim_pending(Some(subnet), None, &pool(), &[]).await;
    assert!(line(again).contains("overlaps"));
    let wider = crate::wanted_subnet("ov_net1", "10.7.0.0/16");
    assert!(line(two.create_network(&wider, &pool(), &[]).await).contains("overlaps"));
    let free = two.create_network(&wanted("ov_net1"), &pool(), &[]).await.unwrap();
    assert_ne!(free.vni, 4096);
    let bad = two.claim_pending("10.9.0.1/24".parse().ok(), None, &pool(), &[]).await;
    assert!(line(bad).contains("host bits"));
}

async fn an_endpoint_takes_over_what_was_claimed_for_it(server: Server) {
    let one = server.client("docker01");
    let network = one.create_network(&wanted("ov_net1"), &pool(), &[]).await.unwrap();
    let claimed = one.claim_address(&network, &crate::claim("reservation")).await.unwrap();
    let mut endpoint = claimed.clone();
    endpoint.id = "endpoint".into();
    one.publish_claimed(&network, &endpoint, Some("another")).await.unwrap_err();
    one.publish_claimed(&network, &endpoint, Some("reservation")).await.unwrap();
    let there = one.endpoints(&network.id).await.unwrap();
    assert_eq!((there.len(), there[0].id.as_str()), (1, "endpoint"));
    // The reservation is none any more.
    one.release_endpoint(&network.id, &claimed).await.unwrap();
    assert_eq!(one.endpoints(&network.id).await.unwrap().len(), 1);
}

fn named(claim: &PendingRecord, name: &str) -> NetworkRecord {
    NetworkRecord {
        v: claim.v,
        id: claim.id.clone(),
        name: name.into(),
        vni: claim.vni,
        subnet: claim.subnet,
        gateway: claim.subnet.hosts().next().unwrap(),
        ip_range: None,
        aux: Default::default(),
        mtu: None,
        internal: false,
        options: Default::default(),
        labels: Default::default(),
        created_by: claim.host.clone(),
    }
}
