//! Addresses: creating the endpoint's record is the allocation.

use std::collections::BTreeSet;

use ovnet_agent::consul::schema::EndpointState;

use crate::{Server, claim, contract, line, pool, wanted, wanted_subnet};

contract!(
    two_hundred_claims_at_once_get_two_hundred_addresses,
    a_full_subnet_says_so,
    an_address_asked_for_is_had_or_refused_with_its_holder,
    an_endpoint_is_reserved_published_put_back_and_released,
    a_key_that_cannot_be_read_is_taken_all_the_same,
);

async fn two_hundred_claims_at_once_get_two_hundred_addresses(server: Server) {
    let consul = server.client("docker01");
    let network = consul.create_network(&wanted("ov_net1"), &pool(), &[]).await.unwrap();
    let clients: Vec<_> = (1..=3).map(|n| server.client(&format!("docker0{n}"))).collect();
    let tasks: Vec<_> = (0..200)
        .map(|n| {
            let (consul, network) = (clients[n % 3].clone(), network.clone());
            tokio::spawn(async move {
                consul.claim_address(&network, &claim(&format!("e{n}"))).await.unwrap()
            })
        })
        .collect();
    let mut addresses = BTreeSet::new();
    for task in tasks {
        let record = task.await.unwrap();
        assert!(addresses.insert(record.address), "{} twice", record.address);
        assert!(network.subnet.contains(&record.address) && record.address != network.gateway);
    }
    let listed = consul.endpoints(&network.id).await.unwrap();
    assert_eq!(listed.len(), 200);
    assert_eq!(listed.iter().map(|record| record.address).collect::<BTreeSet<_>>(), addresses);
}

async fn a_full_subnet_says_so(server: Server) {
    let consul = server.client("docker01");
    let wanted = wanted_subnet("small", "10.0.0.0/29");
    let network = consul.create_network(&wanted, &pool(), &[]).await.unwrap();
    let mut records = Vec::new();
    for n in 0..5 {
        records.push(consul.claim_address(&network, &claim(&format!("e{n}"))).await.unwrap());
    }
    let full = line(consul.claim_address(&network, &claim("e5")).await);
    assert!(full.contains("network small is full"), "{full}");
    consul.release_endpoint(&network.id, &records[2]).await.unwrap();
    let again = consul.claim_address(&network, &claim("e5")).await.unwrap();
    assert_eq!(again.address, records[2].address);
}

async fn an_address_asked_for_is_had_or_refused_with_its_holder(server: Server) {
    let (one, two) = (server.client("docker01"), server.client("docker02"));
    let network = one.create_network(&wanted("ov_net1"), &pool(), &[]).await.unwrap();
    let mut chosen = claim("e1");
    chosen.address = Some([10, 0, 0, 77].into());
    chosen.mac = Some([2, 0, 0, 0, 0, 9]);
    let record = one.claim_address(&network, &chosen).await.unwrap();
    assert_eq!((record.address.octets()[3], record.mac.as_str()), (77, "02:00:00:00:00:09"));
    // The same claim again is the same address: its answer may have been lost.
    assert_eq!(one.claim_address(&network, &chosen).await.unwrap(), record);
    chosen.id = "e2".into();
    let taken = line(two.claim_address(&network, &chosen).await);
    assert!(taken.contains("10.0.0.77") && taken.contains("docker01"), "{taken}");
    for (address, why) in [([10, 0, 0, 1], "gateway"), ([10, 0, 9, 9], "not inside")] {
        chosen.address = Some(address.into());
        let refused = line(two.claim_address(&network, &chosen).await);
        assert!(refused.contains(why), "{refused}");
    }
}

async fn an_endpoint_is_reserved_published_put_back_and_released(server: Server) {
    let (one, two) = (server.client("docker01"), server.client("docker02"));
    let network = one.create_network(&wanted("ov_net1"), &pool(), &[]).await.unwrap();
    let reserved = one.claim_address(&network, &claim("e1")).await.unwrap();
    assert_eq!((reserved.state, reserved.host.as_str()), (EndpointState::Reserved, "docker01"));
    assert_eq!(reserved.mac, "02:42:0a:00:00:02");
    one.publish_endpoint(&network, &reserved).await.unwrap();
    one.publish_endpoint(&network, &reserved).await.unwrap();
    let up = two.endpoints(&network.id).await.unwrap().remove(0);
    assert_eq!(up.state, EndpointState::Up);

    // Lost, it is put back; another's at the same address is neither overwritten nor deleted.
    server.delete(&format!("endpoints/{}/10.0.0.2", network.id)).await;
    one.publish_endpoint(&network, &up).await.unwrap();
    assert_eq!(two.endpoints(&network.id).await.unwrap(), std::slice::from_ref(&up));
    one.release_endpoint(&network.id, &up).await.unwrap();
    one.release_endpoint(&network.id, &up).await.unwrap();
    let other = two.claim_address(&network, &claim("e2")).await.unwrap();
    assert_eq!(other.address, up.address);
    let refused = line(one.publish_endpoint(&network, &up).await);
    assert!(refused.contains("docker02"), "{refused}");
    one.release_endpoint(&network.id, &up).await.unwrap();
    assert_eq!(two.endpoints(&network.id).await.unwrap(), [other]);
}

async fn a_key_that_cannot_be_read_is_taken_all_the_same(server: Server) {
    let consul = server.client("docker01");
    let network = consul.create_network(&wanted("ov_net1"), &pool(), &[]).await.unwrap();
    server.put(&format!("endpoints/{}/10.0.0.2", network.id), "{").await;
    let record = consul.claim_address(&network, &claim("e1")).await.unwrap();
    assert_eq!(record.address.octets(), [10, 0, 0, 3]);
    let mut chosen = claim("e2");
    chosen.address = Some([10, 0, 0, 2].into());
    let refused = line(consul.claim_address(&network, &chosen).await);
    assert!(refused.contains("cannot be read"), "{refused}");
}
