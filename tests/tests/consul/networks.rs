//! Networks: names, VNIs and subnets that hosts compete for, and removing them.

use std::collections::BTreeSet;

use ovnet_agent::ipam;

use crate::{Server, claim, contract, line, pool, wanted, wanted_subnet};

contract!(
    a_network_is_created_listed_found_and_removed,
    two_creators_of_one_name_make_one_network,
    networks_made_at_once_share_neither_vni_nor_subnet,
    overlapping_subnets_of_different_size_made_at_once_are_refused,
    what_cannot_be_had_is_refused_in_one_line,
    a_record_by_hand_takes_its_vni_and_subnet,
    a_network_in_use_is_not_removed,
    removing_and_claiming_at_once_has_one_winner,
    a_lost_network_is_restored,
);

async fn a_network_is_created_listed_found_and_removed(server: Server) {
    let (one, two) = (server.client("docker01"), server.client("docker02"));
    one.ping().await.unwrap();
    assert!(one.networks().await.unwrap().is_empty());
    let network = one.create_network(&wanted("ov_net1"), &pool(), &[]).await.unwrap();
    assert_eq!(network.subnet.to_string(), "10.0.0.0/24");
    assert_eq!((network.gateway.octets(), network.vni), ([10, 0, 0, 1], 4096));
    assert_eq!(network.created_by, "docker01");
    assert_eq!(two.networks().await.unwrap(), std::slice::from_ref(&network));
    assert_eq!(two.network("ov_net1").await.unwrap(), network);
    assert_eq!(two.network(&network.id).await.unwrap(), network);

    let mut keys = server.keys().await;
    keys.sort();
    let mut expected = vec![
        format!("endpoints/{}/.keep", network.id),
        "networks/ov_net1".into(),
        "subnets/.keep".into(),
        "subnets/10.0.0.0-24".into(),
        "vnis/4096".into(),
    ];
    expected.sort();
    assert_eq!(keys, expected);

    assert_eq!(two.remove_network("ov_net1").await.unwrap(), network);
    assert_eq!(server.keys().await, ["subnets/.keep"]);
    assert!(line(two.remove_network("ov_net1").await).contains("no network ov_net1"));
}

async fn two_creators_of_one_name_make_one_network(server: Server) {
    let (one, two) = (server.client("docker01"), server.client("docker02"));
    for round in 0..10 {
        let wanted = wanted(&format!("net{round}"));
        let pool = pool();
        let (a, b) = tokio::join!(
            one.create_network(&wanted, &pool, &[]),
            two.create_network(&wanted, &pool, &[])
        );
        let (made, refused) = match (a, b) {
            (Ok(made), Err(refused)) | (Err(refused), Ok(made)) => (made, refused),
            other => panic!("not one network: {other:?}"),
        };
        let refused = format!("{refused:#}");
        assert!(
            refused.contains("exists already") && refused.contains(&made.created_by),
            "{refused}"
        );
        assert_eq!(one.network(&wanted.name).await.unwrap(), made);
    }
}

async fn networks_made_at_once_share_neither_vni_nor_subnet(server: Server) {
    let tasks: Vec<_> = (0..24)
        .map(|n| {
            let consul = server.client(&format!("docker0{}", n % 3 + 1));
            tokio::spawn(async move {
                consul.create_network(&wanted(&format!("net{n}")), &pool(), &[]).await.unwrap()
            })
        })
        .collect();
    let (mut vnis, mut subnets) = (BTreeSet::new(), BTreeSet::new());
    for task in tasks {
        let network = task.await.unwrap();
        assert!(vnis.insert(network.vni) && subnets.insert(network.subnet), "{network:?}");
    }
}

async fn overlapping_subnets_of_different_size_made_at_once_are_refused(server: Server) {
    let (one, two) = (server.client("docker01"), server.client("docker02"));
    for round in 1..=10 {
        let (large, small) = (format!("10.{round}.0.0/16"), format!("10.{round}.7.0/24"));
        let large = wanted_subnet(&format!("large{round}"), &large);
        let small = wanted_subnet(&format!("small{round}"), &small);
        let pool = pool();
        let (a, b) = tokio::join!(
            one.create_network(&large, &pool, &[]),
            two.create_network(&small, &pool, &[])
        );
        assert!(a.is_ok() != b.is_ok(), "{a:?} {b:?}");
        let (made, refused) =
            if let Ok(made) = a { (made, line(b)) } else { (b.unwrap(), line(a)) };
        assert!(refused.contains("overlaps") && refused.contains(&made.name), "{refused}");
    }
    let networks = one.networks().await.unwrap();
    for (i, a) in networks.iter().enumerate() {
        assert!(!networks[i + 1..].iter().any(|b| ipam::overlap(a.subnet, b.subnet)));
    }
}

async fn what_cannot_be_had_is_refused_in_one_line(server: Server) {
    let consul = server.client("docker01");
    let pool = pool();
    consul.create_network(&wanted_subnet("first", "10.9.0.0/24"), &pool, &[]).await.unwrap();
    let before = server.keys().await;
    let mut outside = wanted_subnet("x", "10.1.0.0/24");
    outside.gateway = Some([10, 1, 1, 1].into());
    let mut gateway_only = wanted("x");
    gateway_only.gateway = Some([10, 1, 1, 1].into());
    let routes = ["192.168.1.0/24".parse().unwrap()];
    for (wanted, why) in [
        (wanted("first"), "created by docker01"),
        (wanted_subnet("x", "10.9.0.0/25"), "overlaps 10.9.0.0/24 of network first"),
        (wanted_subnet("x", "192.168.0.0/16"), "overlaps the route to 192.168.1.0/24"),
        (wanted_subnet("x", "10.1.0.0/31"), "/30"),
        (wanted_subnet("x", "10.1.0.9/24"), "did you mean 10.1.0.0/24"),
        (outside, "gateway 10.1.1.1 is not"),
        (gateway_only, "needs a --subnet"),
        (wanted("a/b"), "network name"),
        (wanted(".keep"), "network name"),
    ] {
        let line = line(consul.create_network(&wanted, &pool, &routes).await);
        assert!(line.contains(why), "{why:?} is not in {line:?}");
    }
    assert_eq!(server.keys().await, before, "a refusal changes nothing");

    let mut full = pool;
    full.subnet = "10.9.0.0/24".parse().unwrap();
    let line = line(consul.create_network(&wanted("x"), &full, &[]).await);
    assert!(line.contains("exhausted"), "{line}");
}

async fn a_record_by_hand_takes_its_vni_and_subnet(server: Server) {
    let record = r#"{"v":1,"id":"by-hand","name":"hand","vni":4096,"subnet":"10.0.0.0/24",
        "gateway":"10.0.0.1"}"#;
    server.put("networks/hand", record).await;
    let consul = server.client("docker01");
    let network = consul.create_network(&wanted("other"), &pool(), &[]).await.unwrap();
    assert_eq!((network.vni, network.subnet.to_string().as_str()), (4097, "10.0.1.0/24"));
    // It can be used and removed like any other.
    let hand = consul.network("hand").await.unwrap();
    let endpoint = consul.claim_address(&hand, &claim("e1")).await.unwrap();
    consul.release_endpoint("by-hand", &endpoint).await.unwrap();
    consul.remove_network("by-hand").await.unwrap();
    server.put("networks/hand", record).await;
    consul.remove_network("hand").await.unwrap();
    assert!(!server.keys().await.iter().any(|key| key.contains("hand")));
}

async fn a_network_in_use_is_not_removed(server: Server) {
    let (one, two) = (server.client("docker01"), server.client("docker02"));
    let network = one.create_network(&wanted("ov_net1"), &pool(), &[]).await.unwrap();
    let reserved = two.claim_address(&network, &claim("e1")).await.unwrap();
    let refused = line(one.remove_network("ov_net1").await);
    for part in ["host docker02", "name-e1", "10.0.0.2", "being attached"] {
        assert!(refused.contains(part), "{part} is not in {refused}");
    }
    two.publish_endpoint(&network, &reserved).await.unwrap();
    assert!(!line(one.remove_network("ov_net1").await).contains("being attached"));
    two.release_endpoint(&network.id, &reserved).await.unwrap();
    // What cannot be read may be an endpoint of a newer agent.
    let key = format!("endpoints/{}/10.0.0.7", network.id);
    server.put(&key, r#"{"v":2}"#).await;
    assert!(line(one.remove_network("ov_net1").await).contains(&key));
    server.delete(&key).await;
    one.remove_network("ov_net1").await.unwrap();
    assert_eq!(server.keys().await, ["subnets/.keep"]);
    let gone = line(two.claim_address(&network, &claim("e2")).await);
    assert!(gone.contains("does not exist any more"), "{gone}");
}

async fn removing_and_claiming_at_once_has_one_winner(server: Server) {
    let (one, two) = (server.client("docker01"), server.client("docker02"));
    let pool = pool();
    for round in 0..30 {
        let network =
            one.create_network(&wanted(&format!("net{round}")), &pool, &[]).await.unwrap();
        let claim = claim("e1");
        let (removed, claimed) =
            tokio::join!(one.remove_network(&network.name), two.claim_address(&network, &claim));
        match (removed, claimed) {
            (Ok(_), Err(_)) => {
                assert!(!server.keys().await.iter().any(|key| key.contains(&network.id)));
            }
            (Err(refused), Ok(endpoint)) => {
                assert!(format!("{refused:#}").contains("in use"), "{refused:#}");
                assert_eq!(two.endpoints(&network.id).await.unwrap(), [endpoint]);
            }
            other => panic!("round {round}: {other:?}"),
        }
    }
}

async fn a_lost_network_is_restored(server: Server) {
    let consul = server.client("docker01");
    let network = consul.create_network(&wanted("ov_net1"), &pool(), &[]).await.unwrap();
    consul.restore_network(&network).await.unwrap();
    server.request("DELETE", "kv/ovnet/v1/?recurse", "").await;
    consul.restore_network(&network).await.unwrap();
    assert_eq!(consul.network("ov_net1").await.unwrap(), network);
    let other = consul.create_network(&wanted("other"), &pool(), &[]).await.unwrap();
    assert_ne!((other.vni, other.subnet), (network.vni, network.subnet));
    consul.remove_network("ov_net1").await.unwrap();
    consul.create_network(&wanted("thief"), &pool(), &[]).await.unwrap();
    assert!(line(consul.restore_network(&network).await).contains("another network"));
}
