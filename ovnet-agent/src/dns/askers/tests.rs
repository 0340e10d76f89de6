use std::{
    collections::BTreeMap,
    sync::atomic::{AtomicUsize, Ordering},
};

use super::*;
use crate::consul::schema::VERSION;

/// Sandboxes by path: identity and addresses; endpoints: id, network, path.
#[derive(Default)]
struct Fake {
    inner: Mutex<Inner>,
    looks: AtomicUsize,
}

#[derive(Default)]
struct Inner {
    sandboxes: BTreeMap<String, (u64, Vec<Ipv4Addr>)>,
    endpoints: BTreeMap<String, (String, String)>,
}

impl Fake {
    fn sandbox(&self, path: &str, identity: u64, addresses: &[[u8; 4]]) {
        let addresses = addresses.iter().map(|it| Ipv4Addr::from(*it)).collect();
        self.inner.lock().unwrap().sandboxes.insert(path.into(), (identity, addresses));
    }

    fn endpoint(&self, id: &str, network: &str, path: &str) {
        let endpoint = (network.into(), path.into());
        self.inner.lock().unwrap().endpoints.insert(id.into(), endpoint);
    }

    fn remove(&self, id: &str) {
        self.inner.lock().unwrap().endpoints.remove(id);
    }

    fn looks(&self) -> usize {
        self.looks.load(Ordering::SeqCst)
    }
}

impl Places for &'static Fake {
    fn endpoints(&self) -> Vec<String> {
        self.inner.lock().unwrap().endpoints.keys().cloned().collect()
    }

    fn sandboxes(&self) -> Vec<Sandbox> {
        let inner = self.inner.lock().unwrap();
        let endpoints = inner.endpoints.iter();
        let sandbox = |(id, (network, path)): (&String, &(String, String))| Sandbox {
            endpoint: id.clone(),
            network: network_called(network),
            netns: path.into(),
        };
        endpoints.map(sandbox).collect()
    }

    fn identity(&self, netns: &Path) -> Option<(u64, u64)> {
        let inner = self.inner.lock().unwrap();
        inner.sandboxes.get(netns.to_str().unwrap()).map(|(identity, _)| (4, *identity))
    }

    async fn addresses(&self, netns: &Path) -> Result<Vec<Ipv4Addr>> {
        self.looks.fetch_add(1, Ordering::SeqCst);
        tokio::task::yield_now().await;
        let inner = self.inner.lock().unwrap();
        let sandbox = inner.sandboxes.get(netns.to_str().unwrap());
        sandbox.map(|it| it.1.clone()).ok_or_else(|| anyhow::anyhow!("it is gone"))
    }
}

fn network_called(name: &str) -> NetworkRecord {
    NetworkRecord {
        v: VERSION,
        id: name.into(),
        name: name.into(),
        vni: 4096,
        subnet: "10.0.0.0/24".parse().unwrap(),
        gateway: [10, 0, 0, 1].into(),
        ip_range: None,
        aux: Default::default(),
        mtu: None,
        internal: false,
        options: Default::default(),
        labels: Default::default(),
        created_by: String::new(),
    }
}

fn askers() -> (&'static Fake, Askers<&'static Fake>) {
    let fake: &'static Fake = Box::leak(Box::default());
    (fake, Askers::new(fake))
}

fn names(networks: &Networks) -> Vec<&str> {
    networks.iter().map(|it| it.name.as_str()).collect()
}

const OVERLAY: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 2);
const BRIDGE: Ipv4Addr = Ipv4Addr::new(172, 18, 0, 5);

#[tokio::test]
async fn every_address_of_a_sandbox_tells_all_its_networks() {
    let (fake, askers) = askers();
    fake.sandbox("a", 1, &[OVERLAY.octets(), [10, 0, 1, 2], BRIDGE.octets()]);
    fake.sandbox("same-as-a", 1, &[]);
    fake.sandbox("b", 2, &[[10, 0, 0, 3]]);
    fake.endpoint("e1", "ov_net1", "a");
    fake.endpoint("e2", "ov_net2", "same-as-a");
    fake.endpoint("e3", "ov_net3", "b");
    for address in [OVERLAY, BRIDGE, [10, 0, 1, 2].into()] {
        assert_eq!(names(&askers.find(address).await), ["ov_net1", "ov_net2"], "{address}");
    }
    assert_eq!(names(&askers.find([10, 0, 0, 3].into()).await), ["ov_net3"]);
    assert_eq!(fake.looks(), 2, "one look into each was enough");
    assert_eq!(names(&askers.known(BRIDGE).unwrap()), ["ov_net1", "ov_net2"]);
}

#[tokio::test]
async fn an_interface_that_appears_later_is_found() {
    let (fake, askers) = askers();
    fake.sandbox("a", 1, &[OVERLAY.octets()]);
    fake.endpoint("e1", "ov_net1", "a");
    assert_eq!(names(&askers.find(OVERLAY).await), ["ov_net1"]);
    fake.sandbox("a", 1, &[OVERLAY.octets(), BRIDGE.octets()]);
    assert!(askers.known(BRIDGE).is_none());
    assert_eq!(names(&askers.find(BRIDGE).await), ["ov_net1"]);
}

#[tokio::test]
async fn an_address_that_moved_to_another_container_moves_here_too() {
    let (fake, askers) = askers();
    fake.sandbox("a", 1, &[BRIDGE.octets()]);
    fake.endpoint("e1", "ov_net1", "a");
    assert_eq!(names(&askers.find(BRIDGE).await), ["ov_net1"]);
    // Even where the kernel gives the next namespace the number of the last.
    fake.remove("e1");
    fake.sandbox("a", 9, &[]);
    fake.sandbox("b", 1, &[BRIDGE.octets()]);
    fake.endpoint("e2", "ov_net2", "b");
    assert!(askers.known(BRIDGE).is_none(), "its endpoint is gone");
    assert_eq!(names(&askers.find(BRIDGE).await), ["ov_net2"]);
}

#[tokio::test]
async fn a_network_that_is_connected_or_disconnected_counts_at_once() {
    let (fake, askers) = askers();
    fake.sandbox("a", 1, &[BRIDGE.octets()]);
    fake.endpoint("e1", "ov_net1", "a");
    askers.find(BRIDGE).await;
    fake.endpoint("e2", "ov_net2", "a");
    assert_eq!(names(&askers.known(BRIDGE).unwrap()), ["ov_net1", "ov_net2"]);
    fake.remove("e2");
    assert_eq!(names(&askers.known(BRIDGE).unwrap()), ["ov_net1"]);
    fake.remove("e1");
    assert!(askers.known(BRIDGE).is_none());
    assert!(askers.find(BRIDGE).await.is_empty());
}

#[tokio::test]
async fn what_is_remembered_is_looked_at_again() {
    let (fake, askers) = askers();
    fake.sandbox("a", 1, &[BRIDGE.octets()]);
    fake.endpoint("e1", "ov_net1", "a");
    askers.find(BRIDGE).await;
    {
        // Instead of waiting.
        let mut memory = askers.memory();
        memory.found.values_mut().for_each(|it| it.1 = Instant::now().checked_sub(FRESH).unwrap());
    }
    assert!(askers.known(BRIDGE).is_none());
    assert_eq!(names(&askers.find(BRIDGE).await), ["ov_net1"]);
    assert_eq!(fake.looks(), 2);
    fake.sandbox("a", 1, &[]);
    askers.memory().found.clear();
    assert!(askers.find(BRIDGE).await.is_empty());
}

#[tokio::test]
async fn strangers_cost_a_few_scans_a_second_and_do_not_delay_others_much() {
    let (fake, askers) = askers();
    fake.sandbox("a", 1, &[OVERLAY.octets()]);
    fake.endpoint("e1", "ov_net1", "a");
    let began = Instant::now();
    let strangers = (0..200u8).map(|last| askers.find([192, 168, 7, last].into()));
    let strangers = futures::future::join_all(strangers);
    let (found, mine) = tokio::join!(strangers, askers.find(OVERLAY));
    assert!(found.iter().all(|it| it.is_empty()));
    assert_eq!(names(&mine), ["ov_net1"]);
    let scans = fake.looks();
    let most = 2 + began.elapsed().as_millis() / SCANS.as_millis();
    assert!(scans as u128 <= most, "{scans} scans, {most} at most");
    assert!(askers.known([192, 168, 7, 0].into()).is_some_and(|it| it.is_empty()));
}

#[tokio::test]
async fn many_new_containers_are_found_in_one_scan() {
    let (fake, askers) = askers();
    assert!(askers.find(BRIDGE).await.is_empty());
    let address = |last: u8| Ipv4Addr::new(172, 18, 0, last);
    for last in 1..=60 {
        fake.sandbox(&format!("s{last}"), last.into(), &[address(last).octets()]);
        fake.endpoint(&format!("e{last}"), &format!("net{last}"), &format!("s{last}"));
    }
    let began = Instant::now();
    for last in 1..=60 {
        assert_eq!(names(&askers.find(address(last)).await), [format!("net{last}")]);
    }
    assert_eq!(fake.looks(), 60);
    assert!(began.elapsed() < SCANS, "new ones do not wait");
}

#[tokio::test]
async fn a_sandbox_that_is_gone_is_passed_over() {
    let (fake, askers) = askers();
    fake.endpoint("e1", "ov_net1", "gone");
    fake.sandbox("a", 1, &[OVERLAY.octets()]);
    fake.endpoint("e2", "ov_net2", "a");
    assert_eq!(names(&askers.find(OVERLAY).await), ["ov_net2"]);
}
