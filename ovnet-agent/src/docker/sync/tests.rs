//! The task as a whole, on the fakes.

use super::{
    fake::{Fake, docker_network, networks},
    *,
};
use crate::{
    consul::schema::NetworkRecord,
    docker::daemon::DockerNetwork,
    publish::{Protocol, PublishedPort},
    service::fake::{eventually, network},
};

/// The task, which ends when this is dropped.
struct Running {
    ending: watch::Sender<bool>,
    task: tokio::task::JoinHandle<()>,
    gwbridge: watch::Receiver<Option<Ipv4Addr>>,
}

fn start(fake: &Fake, every: Duration) -> Running {
    let (ending, ended) = watch::channel(false);
    let (sender, gwbridge) = watch::channel(None);
    let task = tokio::spawn(Task::new(fake.clone(), sender, every).run(fake.clone(), ended));
    Running { ending, task, gwbridge }
}

impl Running {
    async fn ended(self) {
        tokio::time::timeout(Duration::from_secs(60), self.task).await.unwrap().unwrap();
    }
}

fn changed(container: &str) -> Event {
    Event::ContainerChanged { id: container.into() }
}

/// So long that only events can be the reason for anything.
const NEVER: Duration = Duration::from_secs(3600);
/// So short that it does not matter when it is.
const OFTEN: Duration = Duration::from_millis(5);

fn net1() -> NetworkRecord {
    network("ov_net1", 4096)
}

fn net2() -> NetworkRecord {
    network("ov_net2", 4097)
}

#[tokio::test]
async fn docker_gets_what_consul_has_and_loses_what_was_deleted() {
    let fake = Fake::new(&[&net1()]);
    let running = start(&fake, NEVER);
    eventually(|| fake.docker_names() == ["ov_net1"]).await;
    fake.change(|consul| *consul = networks(&[&net1(), &net2()]));
    eventually(|| fake.docker_names() == ["ov_net1", "ov_net2"]).await;
    fake.change(|consul| *consul = networks(&[&net2()]));
    eventually(|| fake.docker_names() == ["ov_net2"]).await;
    eventually(|| fake.state().bound.len() == 1).await;
    assert!(fake.state().removing.is_empty() && fake.state().creating.is_empty());
    assert_eq!(*running.gwbridge.borrow(), Some([172, 18, 0, 1].into()));
    assert!(fake.state().notes.is_empty());
}

#[tokio::test]
async fn one_name_with_another_network_behind_it_is_replaced() {
    let fake = Fake::new(&[&net1()]);
    let _running = start(&fake, NEVER);
    eventually(|| fake.docker_names() == ["ov_net1"]).await;
    let other = network("ov_net1", 4098);
    fake.change(|consul| *consul = networks(&[&other]));
    let bound = |fake: &Fake| fake.state().bound.values().cloned().collect::<Vec<_>>();
    eventually(|| bound(&fake) == [other.clone()]).await;
    assert_eq!(fake.docker_names(), ["ov_net1"]);
}

#[tokio::test]
async fn a_network_made_here_is_published_as_soon_as_docker_is_done() {
    let fake = Fake::new(&[]);
    let _running = start(&fake, NEVER);
    let id = fake.user_creates("ov_net1", &net1());
    // Docker is asked in vain for a while.
    tokio::task::yield_now().await;
    assert!(fake.state().consul.by_name("ov_net1").is_none());
    fake.user_created(&id);
    eventually(|| fake.state().consul.by_name("ov_net1").is_some()).await;
    assert_eq!(fake.state().bound[&id].name, "ov_net1");
    assert_eq!(fake.docker_names(), ["ov_net1"]);
}

#[tokio::test]
async fn who_loses_the_race_for_a_name_gets_the_winners_network() {
    let winner = network("ov_net1", 4098);
    let fake = Fake::new(&[]);
    let _running = start(&fake, NEVER);
    let id = fake.user_creates("ov_net1", &net1());
    fake.change(|consul| *consul = networks(&[&winner]));
    fake.user_created(&id);
    let bound = |fake: &Fake| fake.state().bound.values().cloned().collect::<Vec<_>>();
    eventually(|| bound(&fake) == [winner.clone()]).await;
    assert!(!fake.state().docker.contains_key(&id));
    assert!(fake.state().removing.is_empty());
}

#[tokio::test]
async fn who_loses_it_with_containers_already_there_is_told() {
    let winner = network("ov_net1", 4098);
    let fake = Fake::new(&[&winner]);
    let id = fake.user_creates("ov_net1", &net1());
    fake.start_container(&id, "c1", &[]);
    fake.user_created(&id);
    let _running = start(&fake, OFTEN);
    let said = |fake: &Fake| fake.state().notes.iter().any(|note| note.contains("docker02"));
    eventually(|| said(&fake)).await;
    assert!(fake.state().docker.contains_key(&id));
    // The container ends, and the note with it.
    fake.state().listed.clear();
    eventually(|| fake.state().notes.is_empty()).await;
    assert!(!fake.state().docker.contains_key(&id));
}

#[tokio::test]
async fn what_cannot_be_published_now_is_published_later() {
    let fake = Fake::new(&[]);
    fake.state().unpublishable.insert("ov_net1".into());
    let _running = start(&fake, OFTEN);
    let id = fake.user_creates("ov_net1", &net1());
    fake.user_created(&id);
    eventually(|| !fake.state().notes.is_empty()).await;
    fake.state().unpublishable.clear();
    eventually(|| fake.state().consul.by_name("ov_net1").is_some()).await;
    eventually(|| fake.state().notes.is_empty()).await;
}

#[tokio::test]
async fn a_network_that_docker_lost_is_made_again() {
    let fake = Fake::new(&[&net1()]);
    let _running = start(&fake, OFTEN);
    eventually(|| fake.docker_names() == ["ov_net1"]).await;
    let id = fake.state().bound.keys().next().unwrap().clone();
    fake.state().docker.clear();
    fake.happens(Event::NetworkDestroyed { id: id.clone() });
    eventually(|| !fake.state().bound.contains_key(&id)).await;
    eventually(|| fake.docker_names() == ["ov_net1"]).await;
}

#[tokio::test]
async fn a_docker_that_comes_back_gets_everything() {
    let fake = Fake::new(&[]);
    let _running = start(&fake, NEVER);
    fake.set_down(true);
    eventually(|| fake.state().notes.iter().any(|note| note.contains("down"))).await;
    fake.change(|consul| *consul = networks(&[&net1(), &net2()]));
    fake.set_down(false);
    eventually(|| fake.docker_names() == ["ov_net1", "ov_net2"]).await;
    eventually(|| fake.state().notes.is_empty()).await;
}

#[tokio::test]
async fn nothing_goes_while_consul_is_away_or_has_lost_its_data() {
    let fake = Fake::new(&[&net1()]);
    let _running = start(&fake, OFTEN);
    eventually(|| fake.docker_names() == ["ov_net1"]).await;
    fake.change(|consul| *consul = Networks { connected: false, ..networks(&[]) });
    let bridge = DockerNetwork { driver: "bridge".into(), ..docker_network("b", &net2()) };
    fake.state().docker.insert("b".into(), bridge);
    // A note about the bridge shows that a pass has seen the rest as well.
    let lost = Networks { lost: ["ov_net1".to_owned()].into(), ..networks(&[&net2()]) };
    fake.change(|consul| *consul = lost);
    eventually(|| fake.state().notes.iter().any(|note| note.contains("driver bridge"))).await;
    assert_eq!(fake.docker_names(), ["ov_net1", "ov_net2"]);
    eventually(|| fake.state().consul.by_name("ov_net1") == Some(&net1())).await;
}

#[tokio::test]
async fn names_are_learned_although_another_container_is_starting() {
    let fake = Fake::new(&[&net1()]);
    let _running = start(&fake, NEVER);
    eventually(|| fake.docker_names() == ["ov_net1"]).await;
    let network = fake.state().bound.keys().next().unwrap().clone();
    let names = |container: &str| {
        fake.state().endpoints[&format!("endpoint-{container}")].record.names.clone()
    };
    fake.start_container(&network, "0123456789abcdef", &["web"]);
    fake.start_container(&network, "slow", &["db"]);
    fake.state().starting.insert("slow".into());
    fake.happens(changed("slow"));
    fake.happens(changed("0123456789abcdef"));
    let learned = ["name-0123456789abcdef", "web", "0123456789ab"];
    eventually(|| names("0123456789abcdef") == learned).await;
    assert!(names("slow").is_empty());

    let renamed = "0123456789abcdef".to_owned();
    fake.state().containers.get_mut(&renamed).unwrap().name = "t1".into();
    fake.happens(changed(&renamed));
    eventually(|| names("0123456789abcdef") == ["t1", "web", "0123456789ab"]).await;
}

#[tokio::test]
async fn ports_are_learned_and_those_that_moved_learned_anew() {
    let fake = Fake::new(&[&net1()]);
    let _running = start(&fake, NEVER);
    eventually(|| fake.docker_names() == ["ov_net1"]).await;
    let network = fake.state().bound.keys().next().unwrap().clone();
    let port = |host_port| PublishedPort {
        protocol: Protocol::Tcp,
        host_address: Ipv4Addr::UNSPECIFIED,
        host_port,
        container_port: 80,
    };
    let ports = || fake.state().endpoints["endpoint-c1"].ports.clone();
    let docker_has = |ports: &[PublishedPort]| {
        fake.state().containers.get_mut("c1").unwrap().ports = ports.to_vec();
    };
    fake.start_container(&network, "c1", &[]);
    docker_has(&[port(90), port(32768)]);
    fake.happens(changed("c1"));
    eventually(|| ports() == [port(90), port(32768)]).await;
    // Nothing but the ports is news.
    docker_has(&[port(90), port(32769)]);
    fake.happens(changed("c1"));
    eventually(|| ports() == [port(90), port(32769)]).await;
    docker_has(&[]);
    fake.happens(changed("c1"));
    eventually(|| ports().is_empty()).await;
    assert_eq!(fake.state().endpoints["endpoint-c1"].record.names, ["name-c1"]);
}

#[tokio::test]
async fn a_container_whose_events_were_missed_is_found() {
    let fake = Fake::new(&[&net1()]);
    let _running = start(&fake, OFTEN);
    eventually(|| fake.docker_names() == ["ov_net1"]).await;
    let network = fake.state().bound.keys().next().unwrap().clone();
    fake.start_container(&network, "c1", &["web"]);
    eventually(|| fake.state().endpoints["endpoint-c1"].record.names == ["name-c1", "web"]).await;
    let docker = fake.state().endpoints["endpoint-c1"].docker.clone().unwrap();
    assert_eq!(docker.container.as_deref(), Some("c1"));
}

#[tokio::test]
async fn names_are_learned_although_a_network_is_not_described() {
    let fake = Fake::new(&[&net1(), &net2()]);
    let _running = start(&fake, OFTEN);
    eventually(|| fake.docker_names() == ["ov_net1", "ov_net2"]).await;
    let networks: Vec<_> = fake.state().bound.keys().cloned().collect();
    fake.state().stuck.insert(networks[0].clone());
    fake.start_container(&networks[0], "c1", &[]);
    fake.start_container(&networks[1], "c2", &[]);
    fake.happens(changed("c2"));
    eventually(|| fake.state().endpoints["endpoint-c2"].record.names == ["name-c2"]).await;
}

#[tokio::test]
async fn names_that_cannot_be_learned_are_noted() {
    let fake = Fake::new(&[&net1()]);
    let _running = start(&fake, OFTEN);
    eventually(|| fake.docker_names() == ["ov_net1"]).await;
    let network = fake.state().bound.keys().next().unwrap().clone();
    fake.state().nameless.insert("c1".into());
    fake.start_container(&network, "c1", &[]);
    let said = |fake: &Fake| fake.state().notes.iter().any(|note| note.contains("container c1"));
    eventually(|| said(&fake)).await;
    fake.state().nameless.clear();
    eventually(|| fake.state().notes.is_empty()).await;
    assert_eq!(fake.state().endpoints["endpoint-c1"].record.names, ["name-c1"]);
}

#[tokio::test]
async fn a_bridge_that_was_removed_is_made_again_after_two_looks() {
    let fake = Fake::new(&[]);
    let running = start(&fake, OFTEN);
    eventually(|| running.gwbridge.borrow().is_some()).await;
    // Somebody makes it with another subnet.
    let theirs = Ipv4Addr::new(172, 30, 0, 1);
    fake.state().gwbridge = Some(theirs);
    eventually(|| *running.gwbridge.borrow() == Some(theirs)).await;
    // Nobody makes it.
    fake.state().gwbridge = None;
    eventually(|| *running.gwbridge.borrow() == Some([172, 18, 0, 1].into())).await;
    assert_eq!(fake.state().bridge_made, [1, 2]);
}

#[tokio::test]
async fn a_docker_that_stops_is_left_alone_although_its_events_go_on() {
    let fake = Fake::new(&[]);
    let running = start(&fake, OFTEN);
    eventually(|| running.gwbridge.borrow().is_some()).await;
    fake.state().stopping = true;
    // The receivers of a session's events go with it.
    eventually(|| {
        fake.happens(Event::NetworkCreated);
        fake.state().events.is_empty()
    })
    .await;
    fake.change(|consul| *consul = networks(&[&net1()]));
    fake.state().stopping = false;
    eventually(|| fake.docker_names() == ["ov_net1"]).await;
}

#[tokio::test]
async fn the_task_ends_when_it_is_told() {
    let fake = Fake::new(&[]);
    let running = start(&fake, NEVER);
    fake.happens(Event::NetworkCreated);
    running.ending.send_replace(true);
    running.ended().await;
}

#[tokio::test]
async fn what_was_begun_is_finished_and_nothing_else_is_begun_at_the_end() {
    let fake = Fake::new(&[&net1(), &net2()]);
    let (open, gate) = watch::channel(false);
    fake.state().gate = Some(gate);
    let running = start(&fake, NEVER);
    eventually(|| fake.state().begun == ["ov_net1"]).await;
    running.ending.send_replace(true);
    open.send_replace(true);
    running.ended().await;
    assert_eq!(fake.docker_names(), ["ov_net1"]);
    assert_eq!(fake.state().bound.len(), 1);
    assert_eq!(fake.state().begun, ["ov_net1"]);
}

#[tokio::test]
async fn names_that_are_being_announced_are_announced_at_the_end() {
    let fake = Fake::new(&[&net1()]);
    let running = start(&fake, NEVER);
    eventually(|| fake.docker_names() == ["ov_net1"]).await;
    let network = fake.state().bound.keys().next().unwrap().clone();
    let (open, gate) = watch::channel(false);
    fake.start_container(&network, "c1", &[]);
    fake.start_container(&network, "slow", &[]);
    fake.state().starting.insert("slow".into());
    fake.state().gate = Some(gate);
    fake.happens(changed("slow"));
    fake.happens(changed("c1"));
    eventually(|| fake.state().begun.contains(&"endpoint-c1".to_owned())).await;
    running.ending.send_replace(true);
    open.send_replace(true);
    running.ended().await;
    assert_eq!(fake.state().endpoints["endpoint-c1"].record.names, ["name-c1"]);
    assert!(fake.state().endpoints["endpoint-slow"].record.names.is_empty());
}
