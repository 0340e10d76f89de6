//! Maps and links edited by hand, by their pins.

use std::{
    collections::BTreeMap,
    ffi::CString,
    io,
    os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd},
    path::PathBuf,
    thread,
};

use aya::maps::{Array, HashMap, Map, MapData};
use nix::sched::{CloneFlags, setns};
use ovnet_agent::datapath::{Abi, Attachment, Datapath, DatapathLog, LoadOptions, versioned};
use ovnet_common::{
    abi::{
        Address, EndpointKey, EndpointValue, HostConfig, HostValue, NetworkValue, PortValue,
        Program,
    },
    published::{PublishedKey, PublishedValue},
};
use ovnet_tests::cluster::Cluster;

use super::host::{HOST, ifindex};

/// Entries of every table by its name, as bytes.
pub(crate) type Tables = BTreeMap<&'static str, BTreeMap<Vec<u8>, Vec<u8>>>;

/// What is done to every table.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Edit {
    /// Each entry is removed, or all zeroes where it cannot be.
    Remove,
    /// The last byte of each value is another one.
    Change,
    /// For each entry there is another one beside it, whose key differs in its last byte.
    Add,
}

/// The host's tables.
pub(crate) fn tables(cluster: &Cluster) -> Tables {
    let mut tables = Tables::new();
    edit(cluster, None, &mut tables);
    tables
}

/// Edits every table; how many entries.
pub(crate) fn edit_tables(cluster: &Cluster, how: Edit) -> u64 {
    edit(cluster, Some(how), &mut Tables::new())
}

fn edit(cluster: &Cluster, how: Option<Edit>, tables: &mut Tables) -> u64 {
    const CONFIG: usize = size_of::<HostConfig>();
    let mut count = 0;
    let config = open(cluster, "CONFIG");
    let mut config: Array<MapData, [u8; CONFIG]> = Map::Array(config).try_into().unwrap();
    let mut value = config.get(&0, 0).unwrap();
    tables.insert("CONFIG", BTreeMap::from([(Vec::new(), value.to_vec())]));
    match how {
        Some(Edit::Remove) => value = [0; CONFIG],
        Some(Edit::Change) => value[CONFIG - 1] ^= 1,
        Some(Edit::Add) | None => {}
    }
    if matches!(how, Some(Edit::Remove | Edit::Change)) {
        config.set(0, value, 0).unwrap();
        count += 1;
    }
    const ADDRESS: usize = size_of::<Address>();
    const ENDPOINT: usize = size_of::<EndpointKey>();
    const PUBLISHED: usize = size_of::<PublishedKey>();
    count += table::<ADDRESS, { size_of::<HostValue>() }>(cluster, "HOSTS", how, tables);
    count += table::<4, { size_of::<NetworkValue>() }>(cluster, "NETWORKS", how, tables);
    count += table::<ENDPOINT, { size_of::<EndpointValue>() }>(cluster, "ENDPOINTS", how, tables);
    count += table::<4, { size_of::<PortValue>() }>(cluster, "PORTS", how, tables);
    count += table::<PUBLISHED, { size_of::<PublishedValue>() }>(cluster, "PUBLISHED", how, tables);
    count
}

fn table<const K: usize, const V: usize>(
    cluster: &Cluster,
    name: &'static str,
    how: Option<Edit>,
    tables: &mut Tables,
) -> u64 {
    let map = Map::HashMap(open(cluster, name));
    let mut map: HashMap<MapData, [u8; K], [u8; V]> = map.try_into().unwrap();
    let entries: Vec<([u8; K], [u8; V])> = map.iter().map(Result::unwrap).collect();
    let as_bytes = entries.iter().map(|(key, value)| (key.to_vec(), value.to_vec()));
    tables.insert(name, as_bytes.collect());
    let Some(how) = how else { return 0 };
    assert!(!entries.is_empty(), "{name} has nothing to edit");
    for (mut key, mut value) in entries.iter().copied() {
        match how {
            Edit::Remove => {
                map.remove(&key).unwrap();
                continue;
            }
            Edit::Change => value[V - 1] ^= 1,
            Edit::Add => key[K - 1] ^= 0x40,
        }
        map.insert(key, value, 0).unwrap();
    }
    entries.len() as u64
}

fn open(cluster: &Cluster, name: &str) -> MapData {
    MapData::from_pin(pins(cluster).join("maps").join(name)).unwrap()
}

/// The folder of the host's pins.
pub(crate) fn pins(cluster: &Cluster) -> PathBuf {
    versioned(&cluster.lab.host(HOST).unwrap().root().join("sys/fs/bpf/ovnet"))
}

/// Detaches a program's link by force, as `bpftool link detach` does: its pin stays.
pub(crate) fn detach(cluster: &Cluster, program: Program, interface: &str) {
    let index = ifindex(cluster, interface).unwrap();
    let mode = if program == Program::UplinkXdp { "-native" } else { "" };
    let pin = pins(cluster).join(format!("links/{}-{index}{mode}", program.name()));
    let link = object(&pin).unwrap_or_else(|error| panic!("{}: {error}", pin.display()));
    bpf(BPF_LINK_DETACH, &[u64::try_from(link.as_raw_fd()).unwrap()]).unwrap();
}

/// Leaves a clsact filter on the uplink, as an agent without TCX does that was killed.
pub(crate) fn leave_filter(cluster: &Cluster) {
    let host = cluster.lab.host(HOST).unwrap();
    let namespace = std::fs::File::open(host.netns()).unwrap();
    let bpffs = host.root().join("sys/fs/bpf/of-another");
    let interface = "ens33".to_owned();
    let ifindex = ifindex(cluster, &interface).unwrap();
    let folder = bpffs.clone();
    thread::spawn(move || {
        setns(namespace, CloneFlags::CLONE_NEWNET).unwrap();
        let log = DatapathLog::Off;
        let conntrack_max = Some(16_384);
        let options = LoadOptions {
            bpffs,
            log,
            force_clsact: true,
            generic_xdp: false,
            conntrack_max,
            abi: Abi::default(),
        };
        let mut datapath = Datapath::load(&options).unwrap();
        let program = Program::FromUplink;
        datapath.attach(&Attachment { program, ifindex, interface, xdp: None }).unwrap();
    })
    .join()
    .unwrap();
    std::fs::remove_dir_all(folder).unwrap();
}

const BPF_OBJ_GET: libc::c_long = 7;
const BPF_LINK_DETACH: libc::c_long = 34;

/// A pinned object.
fn object(pin: &std::path::Path) -> io::Result<OwnedFd> {
    let path = CString::new(pin.to_string_lossy().as_bytes()).unwrap();
    let raw = bpf(BPF_OBJ_GET, &[path.as_ptr() as u64, 0])?;
    // SAFETY: the kernel made the descriptor just now, and nobody else has it.
    Ok(unsafe { OwnedFd::from_raw_fd(i32::try_from(raw).unwrap()) })
}

/// One `bpf(2)`, the attribute given as words of which every one begins a field.
fn bpf(command: libc::c_long, attribute: &[u64]) -> io::Result<libc::c_long> {
    let mut words = [0_u64; 8];
    words[..attribute.len()].copy_from_slice(attribute);
    // SAFETY: the attribute is as long as said, and what it points to lives until after the call.
    let result =
        unsafe { libc::syscall(libc::SYS_bpf, command, words.as_ptr(), size_of_val(&words)) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}
