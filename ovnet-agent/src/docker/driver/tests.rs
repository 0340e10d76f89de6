//! The driver's calls in the orders Docker makes them, on Consul and a host in memory.

use std::{collections::BTreeMap, net::Ipv4Addr};

use serde_json::{Value, json};

use super::*;
use crate::{
    consul::{Publish, schema::EndpointState},
    docker::{
        book::Bound,
        plugin::types::{CreateNetwork, Join, PoolAddress, RequestPool},
    },
    service::{
        fake::{self, Fake},
        one_line,
    },
};

struct Host {
    driver: Driver<Fake, Fake>,
    fake: Fake,
    folder: tempfile::TempDir,
}

fn host(networks: &[&str]) -> Host {
    let folder = tempfile::tempdir().unwrap();
    let (service, fake) = fake::service(networks);
    let driver = Driver::new(service, Book::open(folder.path()).unwrap());
    Host { driver, fake, folder }
}

fn read<T: serde::de::DeserializeOwned>(value: Value) -> T {
    serde_json::from_value(value).unwrap()
}

/// Docker's ids are 64 hexadecimal digits.
fn id(number: u32) -> String {
    format!("{number:08x}").repeat(8)
}

impl Host {
    /// What follows `docker network create`, up to the name.
    async fn create(&self, docker: &str, pool: Value) -> Result<()> {
        let wanted: RequestPool = read(pool);
        let options = wanted.options.clone();
        let pool = self.driver.request_pool(wanted).await?;
        let gateway = json!({"PoolID": pool.id, "Options": {"RequestAddressType": "com.docker.network.gateway"}});
        let gateway = self.driver.request_address(read(gateway)).await?.address;
        let generic = json!({"com.docker.network.generic": options});
        let data =
            json!([{"AddressSpace": "ovnet-local", "Pool": pool.subnet, "Gateway": gateway}]);
        let wanted = json!({"NetworkID": docker, "Options": generic, "IPv4Data": data});
        self.driver.create_network(read(wanted)).await
    }

    async fn publish(&self, docker: &str, name: &str) -> Publish {
        self.driver.publish(docker, name, BTreeMap::new()).await.unwrap()
    }

    async fn address(&self, pool: &str, address: &str) -> Result<String> {
        let wanted: PoolAddress =
            read(json!({"PoolID": pool, "Address": address, "Options": null}));
        Ok(self.driver.request_address(wanted).await?.address)
    }

    /// What `docker run` does once it has an address.
    async fn endpoint(
        &self,
        docker: &str,
        endpoint: &str,
        address: &str,
    ) -> Result<Option<String>> {
        let interface = json!({"Address": address, "AddressIPv6": "", "MacAddress": ""});
        let wanted = json!({"NetworkID": docker, "EndpointID": endpoint, "Interface": interface});
        self.driver.create_endpoint(read(wanted)).await
    }

    async fn join(&self, docker: &str, endpoint: &str) -> Result<String> {
        let wanted: Join = read(json!({
            "NetworkID": docker, "EndpointID": endpoint, "SandboxKey": "/var/run/docker/netns/0f8d",
        }));
        Ok(self.driver.join(wanted).await?.interface_name.src_name)
    }

    async fn run(&self, pool: &str, docker: &str, endpoint: &str) -> String {
        let address = self.address(pool, "").await.unwrap();
        self.endpoint(docker, endpoint, &address).await.unwrap();
        self.join(docker, endpoint).await.unwrap();
        address
    }

    async fn release(&self, pool: &str, address: &str) {
        let wanted = json!({"PoolID": pool, "Address": address.split('/').next()});
        self.driver.release_address(&read(wanted)).await;
    }

    /// The record of an address that was claimed.
    async fn run_record(&self, pool: &str) -> crate::consul::schema::EndpointRecord {
        self.address(pool, "").await.unwrap();
        self.fake.records().remove(0)
    }

    fn pool(&self, docker: &str) -> String {
        self.driver.book().bound(docker).unwrap().network.id
    }

    /// The agent as it is after a restart: with its folder, and nothing in memory.
    fn restarted(&self) -> Driver<Fake, Fake> {
        let book = Book::open(self.folder.path()).unwrap();
        Driver::new(Service::new(self.fake.clone(), self.fake.clone(), fake::NODE, 4789), book)
    }
}

#[tokio::test]
async fn a_network_and_a_container_come_and_go() {
    let host = host(&[]);
    let (network, endpoint) = (id(1), id(0xa));
    host.create(&network, json!({"Pool": "172.19.0.0/24"})).await.unwrap();
    assert_eq!(host.fake.pending_claims(), 1);
    let Publish::Done(record) = host.publish(&network, "ov_net1").await else { panic!() };
    assert_eq!(
        (record.name.as_str(), record.subnet.to_string()),
        ("ov_net1", "172.19.0.0/24".into())
    );
    assert_eq!(host.fake.pending_claims(), 0);

    let address = host.run(&record.id, &network, &endpoint).await;
    assert_eq!(address, "172.19.0.2/24");
    let local = host.fake.local();
    assert_eq!(
        (local[0].record.id.as_str(), local[0].record.state),
        (endpoint.as_str(), EndpointState::Up)
    );
    assert_eq!(local[0].record.mac, "02:42:ac:13:00:02");
    assert_eq!(host.fake.records(), [local[0].record.clone()]);
    assert_eq!(host.fake.links(), ["ovnet0000000a"]);
    // Docker repeats a call whose connection broke.
    assert_eq!(host.join(&network, &endpoint).await.unwrap(), "ovnetp0000000a");

    let refused = host.driver.delete_network(&network).await.unwrap_err();
    assert!(one_line(&refused).contains("on host docker01"), "{refused}");

    host.driver.delete_endpoint(&endpoint).await.unwrap();
    assert!(host.fake.local().is_empty() && host.fake.links().is_empty());
    host.release(&record.id, &address).await;
    assert!(host.fake.records().is_empty());
    host.driver.delete_network(&network).await.unwrap();
    host.driver.delete_network(&network).await.unwrap();
    assert!(host.driver.book().all().is_empty());
    host.driver.records().network("ov_net1").await.unwrap_err();
}

#[tokio::test]
async fn another_ipam_driver_is_refused_with_the_command_that_works() {
    let host = host(&[]);
    let data = json!([{"AddressSpace": "LocalDefault", "Pool": "172.20.0.0/16"}]);
    let wanted: CreateNetwork = read(json!({"NetworkID": id(1), "Options": {}, "IPv4Data": data}));
    let refused = one_line(&host.driver.create_network(wanted).await.unwrap_err());
    assert!(refused.contains("docker network create -d ovnet --ipam-driver ovnet"), "{refused}");
    let refused = host.driver.request_pool(read(json!({"V6": true}))).await.unwrap_err();
    assert!(one_line(&refused).contains("IPv4 only"));
}

#[tokio::test]
async fn a_replica_is_the_network_it_names_and_its_addresses_are_shared() {
    let host = host(&["ov_net1"]);
    let record = host.driver.records().network("ov_net1").await.unwrap();
    let options = json!({"Pool": "10.0.0.0/24", "Options": {"ovnet.id": record.id}});
    host.create(&id(1), options).await.unwrap();
    assert_eq!(host.driver.book().bound(&id(1)).unwrap().network, record);
    assert_eq!(host.fake.pending_claims(), 0);
    // The gateway is every host's to ask for and nobody's to give back or to have.
    assert_eq!(host.address(&record.id, "10.0.0.1").await.unwrap(), "10.0.0.1/24");
    host.release(&record.id, "10.0.0.1").await;
    let refused = host.endpoint(&id(1), &id(0xa), "10.0.0.1/24").await.unwrap_err();
    assert!(one_line(&refused).contains("it is the gateway"), "{refused}");
    // What the agent removes here stays elsewhere.
    host.driver.book().pages().removing.insert(id(1));
    host.driver.delete_network(&id(1)).await.unwrap();
    host.driver.records().network("ov_net1").await.unwrap();
    // So does what Docker gave up making for the agent.
    host.driver.book().pages().creating.insert(record.id.clone());
    host.driver.book().bind(Bound { docker: id(2), network: record, consul: None }).unwrap();
    host.driver.delete_network(&id(2)).await.unwrap();
    host.driver.records().network("ov_net1").await.unwrap();
    assert_eq!(host.driver.book().all().len(), 0);
}

#[tokio::test]
async fn a_subnet_of_this_host_is_not_given_to_a_second_network() {
    let host = host(&[]);
    host.create(&id(1), json!({"Pool": "172.19.0.0/24"})).await.unwrap();
    host.publish(&id(1), "ov_net1").await;
    let refused = host.create(&id(2), json!({"Pool": "172.19.0.0/24"})).await.unwrap_err();
    assert!(one_line(&refused).contains("is that of network ov_net1"), "{refused}");
    host.driver.release_pool(&host.pool(&id(1))).await;
    assert_eq!(host.driver.book().all().len(), 1);
}

#[tokio::test]
async fn an_endpoint_waits_for_its_networks_name() {
    let host = host(&[]);
    host.create(&id(1), json!({})).await.unwrap();
    let pool = host.pool(&id(1));
    let (address, _) = tokio::join!(host.address(&pool, ""), async {
        tokio::task::yield_now().await;
        host.publish(&id(1), "ov_net1").await
    });
    assert_eq!(address.unwrap(), "10.0.0.2/24");
}

#[tokio::test]
async fn a_name_that_is_taken_leaves_the_network_to_be_replaced() {
    let host = host(&["ov_net1"]);
    host.create(&id(1), json!({})).await.unwrap();
    assert!(matches!(host.publish(&id(1), "ov_net1").await, Publish::Taken(_)));
    host.driver.delete_network(&id(1)).await.unwrap();
    fake::eventually(|| host.fake.pending_claims() == 0).await;
    host.driver.records().network("ov_net1").await.unwrap();
}

#[tokio::test]
async fn an_address_given_back_late_is_not_taken_from_its_next_owner() {
    let host = host(&[]);
    host.create(&id(1), json!({})).await.unwrap();
    host.publish(&id(1), "ov_net1").await;
    let pool = host.pool(&id(1));
    let address = host.run(&pool, &id(1), &id(0xa)).await;
    // As long as Docker has not given it back it is nobody else's.
    host.driver.delete_endpoint(&id(0xa)).await.unwrap();
    assert_ne!(host.address(&pool, "").await.unwrap(), address);
    host.release(&pool, &address).await;
    assert_eq!(host.run(&pool, &id(1), &id(0xb)).await, address);
    host.release(&pool, &address).await;
    assert_eq!(host.fake.local().len(), 1);
    assert!(host.fake.records().iter().any(|record| record.id == id(0xb)));
}

#[tokio::test]
async fn a_docker_that_starts_again_gets_what_it_had_even_without_consul() {
    let host = host(&[]);
    host.create(&id(1), json!({"Pool": "172.19.0.0/24"})).await.unwrap();
    host.publish(&id(1), "ov_net1").await;
    let pool = host.pool(&id(1));
    host.run(&pool, &id(1), &id(0xa)).await;
    let host = Host { driver: host.restarted(), ..host };
    for call in ["claim_pending", "pending", "network", "networks", "endpoints", "claim_address"] {
        host.fake.fail(call);
    }
    let wanted: RequestPool = read(json!({"Pool": "172.19.0.0/24"}));
    assert_eq!(host.driver.request_pool(wanted).await.unwrap().id, pool);
    assert_eq!(host.address(&pool, "172.19.0.1").await.unwrap(), "172.19.0.1/24");
    assert_eq!(host.address(&pool, "172.19.0.2").await.unwrap(), "172.19.0.2/24");
    // Somebody else who asks for it is told no with the endpoint.
    let refused = host.endpoint(&id(1), &id(0xb), "172.19.0.2/24").await.unwrap_err();
    assert!(one_line(&refused).contains("is that of"), "{refused}");
    host.driver.delete_endpoint(&id(0xa)).await.unwrap();
    host.release(&pool, "172.19.0.2").await;
    assert!(host.fake.records().is_empty());
}

#[tokio::test]
async fn an_agent_started_anew_in_the_middle_goes_on() {
    let host = host(&[]);
    let pool = host.driver.request_pool(read(json!({"Pool": "172.19.0.0/24"}))).await.unwrap();
    let host = Host { driver: host.restarted(), ..host };
    let data =
        json!([{"AddressSpace": "ovnet-local", "Pool": pool.subnet, "Gateway": "172.19.0.9/24"}]);
    let wanted = json!({"NetworkID": id(1), "Options": {}, "IPv4Data": data});
    host.driver.create_network(read(wanted)).await.unwrap();
    let host = Host { driver: host.restarted(), ..host };
    let Publish::Done(record) = host.publish(&id(1), "ov_net1").await else { panic!() };
    assert_eq!(
        (record.id.as_str(), record.gateway),
        (pool.id.as_str(), Ipv4Addr::new(172, 19, 0, 9))
    );
    let address = host.address(&pool.id, "").await.unwrap();
    let host = Host { driver: host.restarted(), ..host };
    host.endpoint(&id(1), &id(0xa), &address).await.unwrap();
    host.join(&id(1), &id(0xa)).await.unwrap();
    assert_eq!(host.fake.local().len(), 1);
    assert_eq!(host.fake.records()[0].id, id(0xa));
}

#[tokio::test]
async fn a_join_that_fails_leaves_nothing() {
    for step in ["create_loose_veth", "add_local", "publish_endpoint"] {
        let host = host(&[]);
        host.create(&id(1), json!({})).await.unwrap();
        host.publish(&id(1), "ov_net1").await;
        let pool = host.pool(&id(1));
        let address = host.address(&pool, "").await.unwrap();
        host.endpoint(&id(1), &id(0xa), &address).await.unwrap();
        host.fake.fail(step);
        host.join(&id(1), &id(0xa)).await.unwrap_err();
        host.fake.fail("");
        host.driver.delete_endpoint(&id(0xa)).await.unwrap();
        host.release(&pool, &address).await;
        assert!(host.fake.links().is_empty() && host.fake.local().is_empty(), "{step}");
        assert!(host.fake.records().is_empty(), "{step}");
    }
}

#[tokio::test]
async fn a_claim_whose_answer_was_lost_is_given_back() {
    let host = host(&[]);
    host.create(&id(1), json!({})).await.unwrap();
    host.publish(&id(1), "ov_net1").await;
    host.fake.fail("claim_address after");
    host.address(&host.pool(&id(1)), "").await.unwrap_err();
    host.fake.fail("");
    let mut found = Default::default();
    host.driver.shared.service.sweep(&mut found).await;
    assert_eq!(host.fake.records().len(), 1);
    host.driver.shared.service.sweep(&mut found).await;
    assert!(host.fake.records().is_empty());
}

#[tokio::test]
async fn the_guard_keeps_a_network_that_another_host_uses() {
    let host = host(&["ov_net1"]);
    let record = host.driver.records().network("ov_net1").await.unwrap();
    let replica = json!({"Pool": "10.0.0.0/24", "Options": {"ovnet.id": record.id}});
    host.create(&id(1), replica).await.unwrap();
    let ask = async |network: &str| {
        let uri = format!("/v1.41/networks/{network}");
        host.driver.objection(&read(json!({"RequestMethod": "DELETE", "RequestUri": uri}))).await
    };
    assert_eq!(ask("ov_net1").await, None);
    let mut theirs = host.run_record(&record.id).await;
    theirs.host = "docker02".into();
    theirs.names = vec!["t4".into()];
    host.fake.put("ov_net1", theirs);
    let line = "network ov_net1 is in use: host docker02 has t4 (10.0.0.2) in it";
    for name in ["ov_net1", &id(1), &id(1)[..12]] {
        assert_eq!(ask(name).await.as_deref(), Some(line), "{name}");
    }
    assert_eq!(ask("bridge").await, None);
    host.fake.fail("endpoints");
    assert!(ask("ov_net1").await.is_some());
    // What the agent itself removes was decided in Consul.
    host.driver.book().pages().removing.insert(id(1));
    assert_eq!(ask("ov_net1").await, None);
}
