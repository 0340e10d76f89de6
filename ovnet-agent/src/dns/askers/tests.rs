use std::{
    collections::BTreeMap,
    sync::atomic::{AtomicBool, AtomicUsize, Ordering},
};

use super::{
    memory::{DOUBT, FRESH, STALE, UNKNOWN},
    *,
};
use crate::consul::schema::VERSION;

/// Sandboxes by path: identity and addresses; endpoints: id, network, path.
#[derive(Default)]
struct Fake {
    inner: Mutex<Inner>,
    looks: AtomicUsize,
    /// Whether no sandbox can be looked into.
    broken: AtomicBool,
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
        anyhow::ensure!(!self.broken.load(Ordering::SeqCst), "it cannot be entered");
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

fn known(asker: Asker) -> Option<Networks> {
    match asker {
        Asker::Known(networks) => Some(networks),
        Asker::Familiar | Asker::New => None,
    }
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
    assert_eq!(names(&known(askers.known(BRIDGE)).unwrap()), ["ov_net1", "ov_net2"]);
}

#[tokio::test]
async fn an_interface_that_appears_later_is_found() {
    let (fake, askers) = askers();
    fake.sandbox("a", 1, &[OVERLAY.octets()]);
    fake.endpoint("e1", "ov_net1", "a");
    assert_eq!(names(&askers.find(OVERLAY).await), ["ov_net1"]);
    fake.sandbox("a", 1, &[OVERLAY.octets(), BRIDGE.octets()]);
    assert!(known(askers.known(BRIDGE)).is_none());
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
    assert!(known(askers.known(BRIDGE)).is_none(), "its endpoint is gone");
    assert_eq!(names(&askers.find(BRIDGE).await), ["ov_net2"]);
}

#[tokio::test]
async fn a_network_that_is_connected_or_disconnected_counts_at_once() {
    let (fake, askers) = askers();
    fake.sandbox("a", 1, &[BRIDGE.octets()]);
    fake.endpoint("e1", "ov_net1", "a");
    askers.find(BRIDGE).await;
    fake.endpoint("e2", "ov_net2", "a");
    assert_eq!(names(&known(askers.known(BRIDGE)).unwrap()), ["ov_net1", "ov_net2"]);
    fake.remove("e2");
    assert_eq!(names(&known(askers.known(BRIDGE)).unwrap()), ["ov_net1"]);
    fake.remove("e1");
    assert!(known(askers.known(BRIDGE)).is_none());
    assert!(askers.find(BRIDGE).await.is_empty());
}

/// Waits until the task has nothing to do.
async fn idle(askers: &Askers<&'static Fake>) {
    let idle = async {
        while askers.0.memory().scanner.is_some() {
            tokio::task::yield_now().await;
        }
    };
    timeout(Duration::from_secs(10), idle).await.expect("it looks for ever");
}

#[tokio::test]
async fn what_is_remembered_counts_while_it_is_looked_at_again() {
    let (fake, askers) = askers();
    fake.sandbox("a", 1, &[BRIDGE.octets()]);
    fake.sandbox("b", 2, &[OVERLAY.octets()]);
    fake.endpoint("e1", "ov_net1", "a");
    fake.endpoint("e2", "ov_net2", "b");
    askers.find(BRIDGE).await;
    idle(&askers).await;
    let before = fake.looks();
    askers.0.memory().age(FRESH);
    for _ in 0..100 {
        assert_eq!(names(&known(askers.known(BRIDGE)).unwrap()), ["ov_net1"]);
    }
    idle(&askers).await;
    assert_eq!(fake.looks(), before + 1, "in its sandbox only, once");

    askers.0.memory().age(FRESH);
    fake.sandbox("a", 1, &[]);
    assert!(known(askers.known(BRIDGE)).is_some(), "nobody has looked yet");
    idle(&askers).await;
    assert_eq!(askers.known(BRIDGE), Asker::New);
}

#[tokio::test]
async fn what_was_found_long_ago_or_may_be_another_s_counts_only_after_a_look() {
    let (fake, askers) = askers();
    fake.sandbox("a", 1, &[BRIDGE.octets()]);
    fake.endpoint("e1", "ov_net1", "a");
    askers.find(BRIDGE).await;
    askers.0.memory().age(STALE);
    assert_eq!(askers.known(BRIDGE), Asker::Familiar);
    assert_eq!(names(&askers.find(BRIDGE).await), ["ov_net1"]);
    // One that has just come may have got the address.
    askers.0.memory().age(FRESH);
    fake.sandbox("a", 1, &[]);
    fake.sandbox("b", 2, &[BRIDGE.octets()]);
    fake.endpoint("e2", "ov_net2", "b");
    assert_eq!(askers.known(BRIDGE), Asker::Familiar);
    assert_eq!(names(&askers.find(BRIDGE).await), ["ov_net2"]);
}

#[tokio::test]
async fn a_sandbox_that_is_made_after_its_endpoint_is_found() {
    let (fake, askers) = askers();
    fake.sandbox("a", 1, &[OVERLAY.octets()]);
    fake.endpoint("e1", "ov_net1", "a");
    fake.endpoint("e2", "ov_net2", "b");
    // The round in which its namespace is not there yet.
    assert!(askers.find(BRIDGE).await.is_empty());
    assert_eq!(names(&askers.find(OVERLAY).await), ["ov_net1"]);
    fake.sandbox("b", 2, &[[10, 0, 0, 3], BRIDGE.octets()]);
    assert_eq!(names(&askers.find([10, 0, 0, 3].into()).await), ["ov_net2"]);
    assert_eq!(names(&known(askers.known(BRIDGE)).unwrap()), ["ov_net2"], "no stranger any more");
}

#[tokio::test]
async fn a_stranger_is_one_for_long_where_nothing_comes_or_goes() {
    let (fake, askers) = askers();
    let [stranger, other] = [[172, 17, 0, 2].into(), [172, 17, 0, 3].into()];
    fake.sandbox("a", 1, &[OVERLAY.octets()]);
    fake.endpoint("e1", "ov_net1", "a");
    // The endpoint has just come, and may get an address still.
    assert!(askers.find(stranger).await.is_empty());
    assert!(known(askers.known(stranger)).is_some_and(|it| it.is_empty()));
    askers.0.memory().age(DOUBT);
    assert_eq!(askers.known(stranger), Asker::New);

    askers.0.memory().age(UNKNOWN);
    idle(&askers).await;
    let before = fake.looks();
    let (a, b) = tokio::join!(askers.find(stranger), askers.find(other));
    assert!(a.is_empty() && b.is_empty());
    assert_eq!(fake.looks(), before + 1, "one round is for all who wait");
    askers.0.memory().age(UNKNOWN / 2);
    for address in [stranger, other] {
        assert!(known(askers.known(address)).is_some_and(|it| it.is_empty()), "{address}");
    }
    fake.sandbox("b", 2, &[stranger.octets()]);
    fake.endpoint("e2", "ov_net2", "b");
    assert_eq!(askers.known(stranger), Asker::New);
    assert_eq!(names(&askers.find(stranger).await), ["ov_net2"]);
}

#[tokio::test]
async fn a_sandbox_that_cannot_be_looked_into_leaves_a_doubt() {
    let (fake, askers) = askers();
    fake.sandbox("a", 1, &[OVERLAY.octets()]);
    fake.endpoint("e1", "ov_net1", "a");
    askers.find(OVERLAY).await;
    askers.0.memory().age(UNKNOWN);
    fake.broken.store(true, Ordering::SeqCst);
    assert!(askers.find(BRIDGE).await.is_empty());
    askers.0.memory().age(DOUBT);
    assert_eq!(askers.known(BRIDGE), Asker::New);
}

#[tokio::test]
async fn a_round_that_takes_longer_than_anybody_waits_is_still_of_use() {
    let (fake, askers) = askers();
    fake.sandbox("a", 1, &[OVERLAY.octets()]);
    fake.endpoint("e1", "ov_net1", "a");
    askers.find(OVERLAY).await;
    let mut given_up = Box::pin(askers.find(BRIDGE));
    assert!(futures::poll!(&mut given_up).is_pending());
    while askers.0.memory().everywhere.is_none() {
        tokio::task::yield_now().await;
    }
    drop(given_up);
    idle(&askers).await;
    assert!(known(askers.known(BRIDGE)).is_some_and(|it| it.is_empty()));
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
    assert!(known(askers.known([192, 168, 7, 0].into())).is_some_and(|it| it.is_empty()));
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
