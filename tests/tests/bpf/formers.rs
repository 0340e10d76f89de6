//! What a start finds in the folders of other versions: maps that are alike are shared, links are
//! taken over, and there is one program on a hook throughout.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
};

use aya::{
    maps::MapInfo,
    programs::{SchedClassifier, TcAttachType},
};
use ovnet_agent::datapath::{Abi, Attachment, Datapath, XdpMode};
use ovnet_common::abi::{ABI_VERSION, HostValue, Program, map, mapped};
use ovnet_tests::{
    bpf::{CONNTRACK_MAX, PORT_A1, UPLINK, build_links, load, load_as, with_bpffs},
    cluster::until,
};

const OLD: u32 = ABI_VERSION;
const NEW: u32 = ABI_VERSION + 1;

fn later(folder: &Path, changed: &[&str]) -> Datapath {
    load_as(folder, Some(CONNTRACK_MAX), Abi::pretend(NEW, changed))
}

fn pins(folder: &Path, version: u32) -> PathBuf {
    folder.join(format!("ovnet/v{version}"))
}

fn id(folder: &Path, version: u32, name: &str) -> u32 {
    MapInfo::from_pin(pins(folder, version).join("maps").join(name)).unwrap().id()
}

fn links(folder: &Path, version: u32) -> Vec<String> {
    let entries = fs::read_dir(pins(folder, version).join("links")).into_iter().flatten();
    let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    names.collect::<BTreeSet<_>>().into_iter().collect()
}

fn on(program: Program, ifindex: u32, interface: &str, xdp: Option<XdpMode>) -> Attachment {
    Attachment { program, ifindex, interface: interface.into(), xdp }
}

/// The uplink's program, a container's, and the uplink's at XDP.
fn attachments() -> [Attachment; 3] {
    [
        on(Program::FromUplink, UPLINK, "ens33", None),
        on(Program::FromContainer, PORT_A1, "a1", None),
        on(Program::UplinkXdp, UPLINK, "ens33", Some(XdpMode::Generic)),
    ]
}

/// The programs at TCX ingress of an interface, by id.
fn programs(interface: &str) -> Vec<u32> {
    let (_, programs) = SchedClassifier::query_tcx(interface, TcAttachType::Ingress).unwrap();
    programs.iter().map(|program| program.id()).collect()
}

fn own(datapath: &mut Datapath, program: Program) -> u32 {
    datapath.ebpf().program(program.name()).unwrap().info().unwrap().id()
}

#[test]
fn maps_that_are_alike_are_shared_and_the_others_made_anew_up_and_down() {
    let name = "maps_that_are_alike_are_shared_and_the_others_made_anew_up_and_down";
    with_bpffs(name, |folder| {
        let changed = [map::HOSTS, map::COUNTERS];
        let host = mapped([192, 168, 1, 12]);
        let mut old = load(folder);
        old.maps().set_host(host, HostValue::default()).unwrap();
        old.maps().set_network(4096, Default::default()).unwrap();
        drop(old);
        let mut new = later(folder, &changed);
        for name in map::ALL {
            let shared = id(folder, OLD, name) == id(folder, NEW, name);
            assert_eq!(shared, !changed.contains(&name), "{name}");
        }
        assert!(new.maps().read().unwrap().hosts.is_empty());
        assert_eq!(new.maps().read().unwrap().networks.len(), 1);
        // What either writes the other reads.
        new.maps().set_network(4097, Default::default()).unwrap();
        new.maps().set_host(host, HostValue::default()).unwrap();
        let ids = map::ALL.map(|name| id(folder, NEW, name));
        drop(new);
        let mut old = load(folder);
        assert_eq!(old.maps().read().unwrap().networks.len(), 2);
        drop(old);
        // A build without any change takes over what it finds, and a restart all that is its own.
        fs::remove_dir_all(pins(folder, OLD)).unwrap();
        let new = later(folder, &changed);
        assert_eq!(map::ALL.map(|name| id(folder, NEW, name)), ids);
        drop(new);
        let mut old = load(folder);
        for name in map::ALL {
            let shared = id(folder, OLD, name) == id(folder, NEW, name);
            assert_eq!(shared, !changed.contains(&name), "{name} on the way back");
        }
        assert_eq!(old.remove_formers().unwrap(), [NEW]);
        assert!(!pins(folder, NEW).exists());
        assert_eq!(old.maps().read().unwrap().networks.len(), 2, "ours keep what they share");
    });
}

#[test]
fn one_program_is_on_each_hook_while_another_version_takes_over() {
    with_bpffs("one_program_is_on_each_hook_while_another_version_takes_over", |folder| {
        build_links();
        let mut old = load(folder);
        for attachment in &attachments() {
            assert!(!old.is_behind(attachment), "nobody is there");
            old.attach(attachment).unwrap();
        }
        let names = links(folder, OLD);
        let theirs = own(&mut old, Program::FromUplink);
        assert_eq!(programs("ens33"), [theirs]);
        drop(old);

        let mut new = later(folder, &[map::PUBLISHED]);
        for (done, attachment) in attachments().iter().enumerate() {
            assert!(!new.is_behind(attachment), "hosts and endpoints are shared");
            assert_eq!((links(folder, OLD).len(), links(folder, NEW).len()), (3 - done, done));
            new.attach(attachment).unwrap();
        }
        assert_eq!((links(folder, OLD), links(folder, NEW)), (Vec::new(), names.clone()));
        let ours = [Program::FromUplink, Program::FromContainer].map(|it| own(&mut new, it));
        assert_eq!(programs("ens33"), [ours[0]]);
        assert_eq!(programs("a1"), [ours[1]]);
        assert_ne!(ours[0], theirs);
        assert_eq!(new.attached(), BTreeSet::from(attachments()));
        assert_eq!(new.remove_formers().unwrap(), [OLD]);
        assert_eq!(new.attached(), BTreeSet::from(attachments()), "they hold by themselves");
        assert!(new.remove_formers().unwrap().is_empty(), "and nothing else is left");
        drop(new);

        // Killed before the last two moved, and never started again: back to the version before.
        let mut old = load(folder);
        old.attach(&attachments()[0]).unwrap();
        drop(old);
        let mut old = load(folder);
        for attachment in &attachments() {
            old.attach(attachment).unwrap();
        }
        assert_eq!((links(folder, OLD), links(folder, NEW)), (names, Vec::new()));
        assert_eq!(programs("ens33"), [own(&mut old, Program::FromUplink)]);
    });
}

#[test]
fn a_program_waits_where_the_one_it_replaces_knows_other_hosts() {
    with_bpffs("a_program_waits_where_the_one_it_replaces_knows_other_hosts", |folder| {
        build_links();
        let [uplink, _, xdp] = attachments();
        let free = on(Program::FromContainer, PORT_A1 + 1, "a2", None);
        let gateway = on(Program::FromGwbridge, PORT_A1, "a1", None);
        let mut old = load(folder);
        old.attach(&uplink).unwrap();
        old.attach(&xdp).unwrap();
        old.attach(&gateway).unwrap();
        drop(old);
        for changed in [map::HOSTS, map::ENDPOINTS] {
            let new = later(folder, &[changed]);
            assert!(new.is_behind(&uplink) && new.is_behind(&xdp), "{changed}");
            assert!(!new.is_behind(&free), "where nobody is");
            assert!(new.is_behind(&gateway), "one that asks for no host changes with the rest");
            drop(new);
            // And as long as it takes: that start attached nothing.
            let new = later(folder, &[changed]);
            assert!(new.is_behind(&uplink), "{changed}, the second time");
            drop(new);
            fs::remove_dir_all(pins(folder, NEW)).unwrap();
        }
        assert!(!later(folder, &[map::PORTS, map::CONFIG]).is_behind(&uplink));
        fs::remove_dir_all(pins(folder, NEW)).unwrap();
        // A pin that somebody removed: our own programs know more than the map made in its place.
        fs::remove_file(pins(folder, OLD).join("maps").join(map::ENDPOINTS)).unwrap();
        let old = load(folder);
        assert!(old.is_behind(&uplink) && !old.is_behind(&free));
    });
}

#[test]
fn programs_on_hooks_of_no_use_go_with_their_folder() {
    with_bpffs("programs_on_hooks_of_no_use_go_with_their_folder", |folder| {
        build_links();
        let [uplink, container, xdp] = attachments();
        let mut old = load(folder);
        for attachment in [&uplink, &container, &xdp] {
            old.attach(attachment).unwrap();
        }
        drop(old);
        // Two programs on one hook, as an agent that knew nothing of others left them.
        let mut beside = later(folder, &[]);
        fs::rename(pins(folder, OLD), folder.join("ovnet/hidden")).unwrap();
        beside.attach(&uplink).unwrap();
        drop(beside);
        fs::rename(folder.join("ovnet/hidden"), pins(folder, OLD)).unwrap();
        let mut new = later(folder, &[]);
        new.attach(&on(Program::UplinkXdp, UPLINK, "ens33", Some(XdpMode::Generic))).unwrap();
        new.attach(&uplink).unwrap();
        // The kernel releases a link a moment after its last pin is gone.
        let ours = vec![own(&mut new, Program::FromUplink)];
        until("the other to go", || (programs("ens33") == ours).then_some(()));
        assert_eq!(programs("a1").len(), 1, "until the end");
        new.remove_formers().unwrap();
        until("the useless one to go", || programs("a1").is_empty().then_some(()));
        assert_eq!(links(folder, NEW).len(), 2);
        // Other modes of XDP exclude each other across versions, too.
        drop(new);
        let mut old = load(folder);
        let native = on(Program::UplinkXdp, UPLINK, "ens33", Some(XdpMode::Native));
        old.attach(&native).unwrap();
        assert_eq!(links(folder, OLD), ["uplink_xdp-100-native"]);
        assert_eq!(links(folder, NEW), ["from_uplink-100"]);
    });
}

#[test]
fn maps_of_a_start_that_attached_nothing_are_nobodys() {
    with_bpffs("maps_of_a_start_that_attached_nothing_are_nobodys", |folder| {
        build_links();
        let mut old = load(folder);
        old.attach(&attachments()[0]).unwrap();
        drop(later(folder, &[]));
        // The old one gets a map of its own again, and in force is what is in that.
        fs::remove_file(pins(folder, OLD).join("maps").join(map::NETWORKS)).unwrap();
        drop(old);
        let mut old = load(folder);
        old.attach(&attachments()[0]).unwrap();
        old.maps().set_network(4096, Default::default()).unwrap();
        drop(old);
        let mut new = later(folder, &[]);
        assert_eq!(new.maps().read().unwrap().networks.len(), 1);
        assert_eq!(id(folder, NEW, map::NETWORKS), id(folder, OLD, map::NETWORKS));
    });
}
