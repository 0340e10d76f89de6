//! What a start finds under its folder: maps of this build are taken over with their content,
//! anything else is made again.

use std::{os::fd::AsFd as _, path::Path};

use aya::maps::MapInfo;
use ovnet_agent::datapath::versioned;
use ovnet_common::abi::{HostValue, MAX_HOSTS, map};
use ovnet_tests::{
    bpf::{bench, load, with_bpffs},
    fixture::world,
    syscall,
};

fn pin(folder: &Path, name: &str) -> std::path::PathBuf {
    versioned(&folder.join("ovnet")).join("maps").join(name)
}

#[test]
fn a_second_load_takes_the_maps_over_with_their_content() {
    with_bpffs("a_second_load_takes_the_maps_over_with_their_content", |folder| {
        let ids = || map::ALL.map(|name| MapInfo::from_pin(pin(folder, name)).unwrap().id());
        let mut first = load(folder);
        let (before, tables) = (ids(), world());
        let maps = first.maps();
        maps.set_config(tables.config).unwrap();
        for (key, value) in &tables.hosts {
            maps.set_host(*key, *value).unwrap();
        }
        for (key, value) in &tables.networks {
            maps.set_network(*key, *value).unwrap();
        }
        for (key, value) in &tables.endpoints {
            maps.set_endpoint(*key, *value).unwrap();
        }
        for (key, value) in &tables.ports {
            maps.set_port(*key, *value).unwrap();
        }
        drop(first);
        let mut second = load(folder);
        assert_eq!(ids(), before);
        assert_eq!(second.maps().read().unwrap(), tables);
        // What is there already can be said again, and what is gone removed again.
        let (host, value) = tables.hosts.iter().next().unwrap();
        second.maps().set_host(*host, *value).unwrap();
        second.maps().remove_host(host).unwrap();
        second.maps().remove_host(host).unwrap();
        second.maps().remove_network(0).unwrap();
        second.maps().remove_port(0).unwrap();
        let key = ovnet_common::abi::EndpointKey::default();
        second.maps().remove_endpoint(&key).unwrap();
        assert_eq!(second.maps().read().unwrap().hosts.len(), tables.hosts.len() - 1);
    });
}

#[test]
fn counters_outlive_a_restart() {
    bench("counters_outlive_a_restart", |bench| {
        let mut sent = super::from_container::fixtures();
        sent.truncate(1);
        sent[0].check(bench);
        let before = bench.counters();
        assert!(!before.verdicts.is_empty());
        bench.reload();
        assert_eq!(bench.counters(), before);
        sent[0].check(bench);
    });
}

#[test]
fn a_pinned_map_of_another_shape_is_made_again() {
    const HASH: u32 = 1;
    const ARRAY: u32 = 2;
    let value = u32::try_from(size_of::<HostValue>()).unwrap();
    let shapes = [
        ("type", ARRAY, 4, value, MAX_HOSTS),
        ("key", HASH, 8, value, MAX_HOSTS),
        ("value", HASH, 16, value + 4, MAX_HOSTS),
        ("capacity", HASH, 16, value, 4),
    ];
    with_bpffs("a_pinned_map_of_another_shape_is_made_again", |bpffs| {
        for (what, kind, key, value, entries) in shapes {
            let folder = &bpffs.join(what);
            drop(load(folder));
            let path = pin(folder, map::HOSTS);
            let others = |name: &&str| *name != map::HOSTS;
            let ids = || -> Vec<u32> {
                let names = map::ALL.iter().copied().filter(others);
                names.map(|name| MapInfo::from_pin(pin(folder, name)).unwrap().id()).collect()
            };
            let before = ids();
            std::fs::remove_file(&path).unwrap();
            let wrong = syscall::create_map(kind, key, value, entries).unwrap();
            syscall::pin(wrong.as_fd(), &path).unwrap();
            let wrong = MapInfo::from_pin(&path).unwrap().id();
            let mut datapath = load(folder);
            let found = MapInfo::from_pin(&path).unwrap();
            assert_ne!(found.id(), wrong, "{what}");
            let shape = (found.key_size(), found.value_size(), found.max_entries());
            assert_eq!(
                shape,
                (16, u32::try_from(size_of::<HostValue>()).unwrap(), MAX_HOSTS),
                "{what}"
            );
            for (key, value) in &world().hosts {
                datapath.maps().set_host(*key, *value).unwrap();
            }
            assert_eq!(datapath.maps().read().unwrap().hosts, world().hosts, "{what}");
            assert_eq!(ids(), before, "{what}: the other maps stay");
        }
    });
}

#[test]
fn a_folder_that_is_on_no_bpffs_is_refused_in_one_line() {
    with_bpffs("a_folder_that_is_on_no_bpffs_is_refused_in_one_line", |_| {
        let folder = tempfile::tempdir().unwrap();
        let options = ovnet_agent::datapath::LoadOptions {
            bpffs: folder.path().join("ovnet"),
            log: ovnet_agent::datapath::DatapathLog::Off,
            force_clsact: false,
            generic_xdp: false,
            conntrack_max: None,
            abi: ovnet_agent::datapath::Abi::default(),
        };
        let error = ovnet_agent::datapath::Datapath::load(&options).unwrap_err();
        let line = format!("{error:#}");
        assert!(line.contains("is not on a bpffs") && line.contains("mount"), "{line}");
        assert_eq!(line.lines().count(), 1, "{line}");
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0, "nothing was made");
    });
}
