use std::collections::btree_map::Entry;

use proptest::prelude::*;

use super::*;
use crate::{
    docker::{
        daemon::ID_OPTION,
        sync::fake::{docker_network, networks},
    },
    service::fake::network,
};

fn net1() -> NetworkRecord {
    network("ov_net1", 4096)
}

fn bound(pairs: &[(&str, &NetworkRecord)]) -> BTreeMap<String, NetworkRecord> {
    pairs.iter().map(|(id, record)| ((*id).to_owned(), (*record).clone())).collect()
}

/// `ov_net1` in Consul and in Docker, as d1.
fn same() -> View {
    View {
        consul: networks(&[&net1()]),
        bound: bound(&[("d1", &net1())]),
        docker: vec![docker_network("d1", &net1())],
        settled: BTreeSet::from([net1().id]),
        ..View::default()
    }
}

fn actions(view: &View) -> Vec<Action> {
    let (actions, notes) = plan(view);
    assert_eq!(notes, BTreeSet::new());
    actions
}

#[test]
fn nothing_is_to_be_done_where_both_are_the_same() {
    assert_eq!(actions(&same()), []);
}

#[test]
fn a_network_of_another_host_is_made_here() {
    let view = View { bound: BTreeMap::new(), docker: vec![], ..same() };
    assert_eq!(actions(&view), [Action::Create { network: net1() }]);
    let mut away = view;
    away.consul.connected = false;
    assert_eq!(actions(&away), []);
}

#[test]
fn a_name_that_another_drivers_network_has_is_noted() {
    let bridge = DockerNetwork { driver: "bridge".into(), ..docker_network("d9", &net1()) };
    let (actions, notes) = plan(&View { bound: BTreeMap::new(), docker: vec![bridge], ..same() });
    assert_eq!(actions, []);
    let note = notes.first().unwrap();
    assert!(note.contains("ov_net1") && note.contains("driver bridge"), "{note}");
}

#[test]
fn a_network_made_here_is_published_once_consul_answers() {
    let nameless = NetworkRecord { name: String::new(), ..net1() };
    let mut view = View { bound: bound(&[("d1", &nameless)]), ..same() };
    view.consul = networks(&[]);
    assert_eq!(actions(&view), [Action::Publish { network: docker_network("d1", &net1()) }]);
    // Another host has the name: the one here makes room, there is nothing to be made yet.
    view.consul = networks(&[&network("ov_net1", 4097)]);
    assert_eq!(actions(&view), [Action::Publish { network: docker_network("d1", &net1()) }]);
    view.consul.connected = false;
    let (actions, notes) = plan(&view);
    assert_eq!((actions.len(), notes.len()), (0, 1));
}

#[test]
fn a_network_published_this_moment_is_not_made_again() {
    let nameless = NetworkRecord { name: String::new(), ..net1() };
    let view = View {
        bound: bound(&[("d1", &nameless)]),
        docker: vec![],
        fresh: BTreeSet::from(["d1".into()]),
        ..same()
    };
    assert_eq!(actions(&view), []);
}

#[test]
fn a_docker_network_nobody_remembers_is_found_by_its_option_or_by_name_and_subnet() {
    let mut view = View { bound: BTreeMap::new(), ..same() };
    let bind = [Action::Bind { docker_id: "d1".into(), network: net1() }];
    assert_eq!(actions(&view), bind);
    view.docker[0].options.clear();
    assert_eq!(actions(&view), bind);
    view.docker[0].subnet = Some("10.9.0.0/24".parse().unwrap());
    assert_eq!(actions(&view), []);
    view.strays.insert("d1".into());
    let (actions, notes) = plan(&view);
    assert_eq!(actions, []);
    assert!(notes.first().unwrap().contains("docker network rm ov_net1"), "{notes:?}");
}

#[test]
fn one_that_was_made_for_another_network_of_that_name_is_not_taken_for_this_one() {
    let mut view = View { bound: BTreeMap::new(), ..same() };
    view.docker[0].options.insert(ID_OPTION.into(), "another".into());
    assert_eq!(actions(&view), []);
}

#[test]
fn a_deleted_network_is_removed() {
    let view = View { consul: networks(&[]), ..same() };
    let remove =
        Action::Remove { docker_id: "d1".into(), name: "ov_net1".into(), why: Removal::Deleted };
    assert_eq!(actions(&view), std::slice::from_ref(&remove));
    // Where another one has its name, that one is made when there is room.
    let view = View { consul: networks(&[&network("ov_net1", 4097)]), ..same() };
    assert_eq!(actions(&view), [remove]);
}

#[test]
fn absence_is_not_an_order() {
    let unsettled = View { consul: networks(&[]), settled: BTreeSet::new(), ..same() };
    assert_eq!(actions(&unsettled), []);
    let mut unread = same();
    unread.consul.read = None;
    assert_eq!(actions(&unread), []);
    let mut away = View { consul: networks(&[]), ..same() };
    away.consul.connected = false;
    assert_eq!(actions(&away), []);
    let mut lost = View { consul: networks(&[]), ..same() };
    lost.consul.lost.insert("ov_net1".into());
    assert_eq!(actions(&lost), [Action::Restore { network: net1() }]);
}

#[test]
fn a_network_whose_record_cannot_be_read_stays_and_that_is_noted() {
    let mut view = View { consul: networks(&[]), ..same() };
    view.consul.unreadable.insert("ov_net1".into());
    let noted = |view: &View| {
        let (actions, notes) = plan(view);
        assert_eq!(actions, []);
        assert_eq!(notes.len(), 1);
        assert!(notes.first().unwrap().contains("ov_net1 stays"), "{notes:?}");
    };
    noted(&view);
    // Not put back either, where Consul was wiped and somebody wrote this since.
    view.consul.lost.insert("ov_net1".into());
    noted(&view);
    // Nobody remembers the Docker network.
    view.bound.clear();
    view.strays.insert("d1".into());
    noted(&view);
}

#[test]
fn a_docker_network_that_is_gone_is_forgotten() {
    let mut view = View { docker: vec![], ..same() };
    let unbind = [Action::Unbind { docker_id: "d1".into(), network: net1() }];
    assert_eq!(actions(&view), unbind);
    view.bound.clear();
    view.resting.insert(net1().id);
    assert_eq!(actions(&view), []);
}

#[test]
fn the_older_of_two_docker_networks_stays() {
    let mut view = same();
    view.docker.push(docker_network("d2", &net1()));
    view.bound.insert("d2".into(), net1());
    view.docker[0].created = "2026-11-23T08:00:00.51Z".into();
    view.docker[1].created = "2026-11-23T08:00:00.5Z".into();
    let remove =
        Action::Remove { docker_id: "d1".into(), name: "ov_net1".into(), why: Removal::Duplicate };
    assert_eq!(actions(&view), [remove]);
}

/// What the steps do, where none fails.
fn take(view: &mut View, actions: Vec<Action>) {
    for action in actions {
        match action {
            Action::Unbind { docker_id, .. } => {
                view.bound.remove(&docker_id);
            }
            Action::Restore { network } => {
                view.consul.lost.remove(&network.name);
                let read = view.consul.read.get_or_insert_default();
                read.insert(network.name.clone(), network);
            }
            Action::Bind { docker_id, network } => {
                view.bound.insert(docker_id, network);
            }
            Action::Remove { docker_id, .. } => {
                view.docker.retain(|network| network.id != docker_id);
                view.bound.remove(&docker_id);
            }
            Action::Publish { network } => {
                let read = view.consul.read.get_or_insert_default();
                if let Entry::Vacant(free) = read.entry(network.name.clone()) {
                    let record = view.bound.get_mut(&network.id).unwrap();
                    record.name = network.name;
                    free.insert(record.clone());
                } else {
                    view.docker.retain(|other| other.id != network.id);
                    view.bound.remove(&network.id);
                }
            }
            Action::Create { network } => {
                assert!(!view.docker.iter().any(|other| other.name == network.name));
                let id = format!("new-{}", network.id);
                view.docker.push(docker_network(&id, &network));
                view.bound.insert(id, network);
            }
        }
    }
}

/// Any mixture of a few networks, of which two at a time have one name.
fn any_view() -> impl Strategy<Value = View> {
    let record = |n: u32| network(&format!("net{}", n / 2), 4096 + n);
    let subset = || prop::collection::btree_set(0..6u32, 0..6);
    let unreadable = prop::collection::btree_set(0..6u32, 0..2);
    let consul = (subset(), unreadable, prop::option::weighted(0.9, subset()), any::<bool>());
    let docker = prop::collection::btree_map(0..8usize, (0..6u32, 0..4u8), 0..6);
    let bound = prop::collection::btree_map(0..8usize, (0..6u32, any::<bool>()), 0..6);
    (consul, docker, bound, subset(), subset(), prop::collection::btree_set(0..8usize, 0..8))
        .prop_map(
            move |((lost, unreadable, read, connected), docker, bound, settled, resting, fresh)| {
                let by_name = |n: u32| (record(n).name, record(n));
                let names = |set: BTreeSet<u32>| set.into_iter().map(|n| record(n).name).collect();
                let consul = Networks {
                    read: read.map(|read| read.into_iter().map(by_name).collect()),
                    lost: names(lost),
                    unreadable: names(unreadable),
                    connected,
                };
                let docker: Vec<_> = docker
                    .into_iter()
                    .map(|(id, (n, kind))| {
                        let mut found = docker_network(&format!("d{id}"), &record(n));
                        match kind {
                            0 => found.driver = "bridge".into(),
                            1 => found.options.clear(),
                            _ => {}
                        }
                        found
                    })
                    .collect();
                // A network has one record, whoever has it; a pending one is bound once.
                let mut pending = BTreeSet::new();
                let mut known = BTreeMap::new();
                for (id, (n, named)) in bound {
                    let mut record = record(n);
                    if !named && pending.insert(n) {
                        record.name.clear();
                    }
                    known.insert(format!("d{id}"), record);
                }
                let ids = |set: BTreeSet<u32>| set.into_iter().map(|n| record(n).id).collect();
                View {
                    consul,
                    bound: known,
                    docker,
                    fresh: fresh.into_iter().map(|id| format!("d{id}")).collect(),
                    settled: ids(settled),
                    resting: ids(resting),
                    strays: BTreeSet::new(),
                }
            },
        )
}

proptest! {
    #[test]
    fn nothing_is_removed_unless_consul_answers_and_the_deletion_was_read(view in any_view()) {
        let answers = view.consul.connected && view.consul.read.is_some();
        for action in plan(&view).0 {
            let Action::Remove { docker_id, why: Removal::Deleted, .. } = action else { continue };
            let record = &view.bound[&docker_id];
            prop_assert!(answers);
            prop_assert!(view.settled.contains(&record.id));
            prop_assert!(view.consul.by_id(&record.id).is_none());
            prop_assert!(!view.consul.lost.contains(&record.name));
            prop_assert!(!view.consul.unreadable.contains(&record.name));
        }
    }

    #[test]
    fn no_other_drivers_network_is_touched(view in any_view()) {
        for action in plan(&view).0 {
            if let Action::Remove { docker_id: id, .. } | Action::Bind { docker_id: id, .. } = action {
                let found = view.docker.iter().find(|network| network.id == id);
                prop_assert!(found.is_some_and(DockerNetwork::is_ours));
            }
        }
    }

    #[test]
    fn a_few_rounds_leave_nothing_to_be_done(mut view in any_view()) {
        for _ in 0..3 {
            let (actions, _) = plan(&view);
            take(&mut view, actions);
        }
        prop_assert_eq!(plan(&view).0, []);
    }

    #[test]
    fn afterwards_each_network_of_consul_is_here_once_or_something_is_said(mut view in any_view()) {
        view.resting.clear();
        view.fresh.clear();
        view.consul.lost.clear();
        view.consul.connected = true;
        for _ in 0..3 {
            let (actions, _) = plan(&view);
            take(&mut view, actions);
        }
        // What nobody knows is only noted, after a while.
        view.strays = view
            .docker
            .iter()
            .filter(|network| !view.bound.contains_key(&network.id))
            .map(|network| network.id.clone())
            .collect();
        let notes = plan(&view).1.into_iter().collect::<Vec<_>>().join("\n");
        for network in view.consul.read.iter().flat_map(BTreeMap::values) {
            let here = view.bound.values().filter(|bound| bound.id == network.id).count();
            let said = notes.contains(&network.name);
            // A Docker network that stands for another one, whose deletion was not read, stays.
            let taken = view
                .docker
                .iter()
                .any(|found| found.name == network.name && view.bound.contains_key(&found.id));
            prop_assert!(here == 1 || said || taken, "{} is here {here} times", network.name);
        }
    }
}
