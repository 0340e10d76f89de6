//! Runs the programs by BPF_PROG_TEST_RUN: the real object over real maps, in a network namespace
//! with real routes and neighbours for `bpf_fib_lookup`.
//!
//! A [`Bench`] lives on a thread of its own with its own network and mount namespace. Both, with
//! the bpffs and everything pinned there, end with the thread, also when the test panics.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "only tests call this, and a panic has a stack trace where an error has none"
)]

use std::{
    collections::BTreeMap,
    fs,
    os::fd::AsFd as _,
    path::{Path, PathBuf},
    process::Command,
    thread,
};

use aya::programs::{SchedClassifier, Xdp};
use nix::{
    mount::{MsFlags, mount},
    sched::{CloneFlags, unshare},
};
use ovnet_agent::datapath::{Abi, Datapath, DatapathLog, LoadOptions, Tables, object_is_missing};
use ovnet_common::{
    abi::{CODES_PER_PROGRAM, Counter, PortCounters, Program},
    verdict::label,
};

use crate::{
    packet::{
        Address, CLIENT, GWBRIDGE, HOST_A, HOST_B, HOST_E, Party, ROUTED_MTU, ROUTER,
        SECOND_ADDRESS, UPLINK_MTU,
    },
    privilege,
    syscall::{self, Prelude},
};

/// ifindex of the uplink, with the MAC and address of [`HOST_A`].
pub const UPLINK: u32 = 100;
/// ifindex of the host-side veth of container A1.
pub const PORT_A1: u32 = 101;
/// Of container A2.
pub const PORT_A2: u32 = 102;
/// Of container A3; the kernel does not forward what comes in here.
pub const PORT_A3: u32 = 103;
/// Of container A4.
pub const PORT_A4: u32 = 104;
/// A veth without an endpoint.
pub const PORT_UNKNOWN: u32 = 105;
/// The gwbridge's port of [`crate::packet::SANDBOX`].
pub const GATEWAY_PORT: u32 = 106;
/// Another sandbox's.
pub const OTHER_GATEWAY_PORT: u32 = 107;
/// Entries of published ports' flows that fit.
pub const CONNTRACK_MAX: u32 = 65_536;
/// What the tables call the `external` device; redirecting there is not carried out in a test run.
pub const EXTERNAL: u32 = 110;

/// What a run starts from.
#[derive(Clone, Debug)]
pub struct Input {
    /// The program.
    pub program: Program,
    /// Interface the packet comes in by; XDP runs know only the loopback device.
    pub ifindex: u32,
    /// Bytes of payload per segment of a GSO packet, 0 for any other. A test run knows no GSO
    /// *type*, so the kernel refuses to resize such a packet.
    pub gso_size: u32,
    /// What the kernel's vxlan device found outside, for `from_overlay`.
    pub tunnel_key: Option<TunnelKey>,
    /// VLAN tag the kernel found on the packet, 0 where there was none.
    pub vlan: u16,
    /// The frame, at least 14 bytes.
    pub packet: Vec<u8>,
    /// How often the program runs, each time on what the time before left.
    pub repeat: u32,
}

/// Metadata of a packet that came out of a tunnel.
#[derive(Clone, Copy, Debug)]
pub struct TunnelKey {
    /// VNI.
    pub vni: u32,
    /// Outer source.
    pub remote: Address,
    /// Outer destination.
    pub local: Address,
}

/// Everything that counts, where it is not zero.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// By program and code.
    pub verdicts: BTreeMap<(Program, u8), Counter>,
    /// By host-side ifindex.
    pub ports: BTreeMap<u32, PortCounters>,
}

/// The loaded programs and what they run in.
pub struct Bench {
    /// The programs and maps.
    pub datapath: Datapath,
    tables: Tables,
    preludes: BTreeMap<Program, Prelude>,
    folder: PathBuf,
}

/// Runs a test over loaded programs, or skips it where the machine does not let us.
pub fn bench(name: &str, body: impl FnOnce(&mut Bench) + Send) {
    with_bpffs(name, |folder| {
        build_links();
        let datapath = load(folder);
        body(&mut Bench::new(datapath, folder));
    });
}

/// Runs a test in namespaces of its own, with the path of a bpffs, or skips it.
pub fn with_bpffs(name: &str, body: impl FnOnce(&Path) + Send) {
    if !privilege::is_root(name) {
        return;
    }
    if object_is_missing() {
        privilege::skip(name, "built without the programs (AYA_BUILD_SKIP)");
        return;
    }
    // Made and removed on this side, where the mount inside it is never seen.
    let folder = tempfile::tempdir().expect("make a temporary folder");
    let path = folder.path();
    let result = thread::scope(|scope| {
        let thread = scope.spawn(move || {
            unshare(CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWNET)
                .expect("make namespaces (CAP_SYS_ADMIN)");
            let private = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
            mount(None::<&str>, "/", None::<&str>, private, None::<&str>)
                .expect("keep mounts to ourselves");
            mount(Some("bpf"), path, Some("bpf"), MsFlags::empty(), None::<&str>)
                .expect("mount a bpffs");
            body(path);
        });
        thread.join()
    });
    if let Err(panic) = result {
        std::panic::resume_unwind(panic);
    }
}

/// Loads the programs over what is pinned under the folder.
pub fn load(folder: &Path) -> Datapath {
    load_with(folder, Some(CONNTRACK_MAX))
}

/// The same with a capacity of the flows' map.
pub fn load_with(folder: &Path, conntrack_max: Option<u32>) -> Datapath {
    load_as(folder, conntrack_max, Abi::default())
}

/// The same as an agent of another version of the maps.
pub fn load_as(folder: &Path, conntrack_max: Option<u32>, abi: Abi) -> Datapath {
    let bpffs = folder.join("ovnet");
    let log = DatapathLog::Off;
    let (force_clsact, generic_xdp) = (false, false);
    load_by(&LoadOptions { bpffs, log, force_clsact, generic_xdp, conntrack_max, abi })
}

fn load_by(options: &LoadOptions) -> Datapath {
    Datapath::load(options).unwrap_or_else(|error| panic!("load the programs: {error:#}"))
}

impl Bench {
    fn new(mut datapath: Datapath, folder: &Path) -> Self {
        let mut preludes = BTreeMap::new();
        for program in Program::ALL.into_iter().filter(|it| *it != Program::UplinkXdp) {
            let target = classifier(&mut datapath, program).fd().unwrap().as_fd();
            preludes.insert(program, Prelude::before(target).expect("load a prelude"));
        }
        let tables = datapath.maps().read().unwrap();
        Self { datapath, tables, preludes, folder: folder.to_owned() }
    }

    /// Loads everything again over the same pins, as a restarted agent does.
    pub fn reload(&mut self) {
        *self = Self::new(load(&self.folder), &self.folder.clone());
    }

    /// The same as an agent that is told `--xdp generic`.
    pub fn reload_for_generic_xdp(&mut self) {
        let datapath = load_by(&LoadOptions {
            bpffs: self.folder.join("ovnet"),
            log: DatapathLog::Off,
            force_clsact: false,
            generic_xdp: true,
            conntrack_max: Some(CONNTRACK_MAX),
            abi: Abi::default(),
        });
        *self = Self::new(datapath, &self.folder.clone());
    }

    /// Makes the tables these, whatever they were.
    pub fn set_tables(&mut self, wanted: &Tables) {
        let maps = self.datapath.maps();
        let have = std::mem::replace(&mut self.tables, wanted.clone());
        if have.config != wanted.config {
            maps.set_config(wanted.config).unwrap();
        }
        macro_rules! replace {
            ($($table:ident $key:ident $value:ident: $set:expr, $remove:expr;)*) => {$(
                for $key in have.$table.keys().filter(|it| !wanted.$table.contains_key(*it)) {
                    $remove.unwrap();
                }
                for ($key, $value) in &wanted.$table {
                    if have.$table.get($key) != Some($value) {
                        $set.unwrap();
                    }
                }
            )*};
        }
        replace! {
            hosts key value: maps.set_host(*key, *value), maps.remove_host(key);
            networks key value: maps.set_network(*key, *value), maps.remove_network(*key);
            endpoints key value: maps.set_endpoint(*key, *value), maps.remove_endpoint(key);
            ports key value: maps.set_port(*key, *value), maps.remove_port(*key);
            published key value: maps.set_published(*key, *value), maps.remove_published(key);
        }
    }

    /// Runs a program; the kernel's return code and the packet afterwards. A test run refuses an IP
    /// packet shorter than its header, so such a one is longer at first and cut off on the way.
    pub fn run(&mut self, input: &Input) -> (u32, Vec<u8>) {
        let Input { program, packet, repeat, .. } = input;
        let mut context = context(input);
        let minimum = match packet.get(12..14) {
            Some([0x08, 0x00]) => 14 + 20,
            Some([0x86, 0xdd]) => 14 + 40,
            _ => 14,
        };
        let cut = packet.len() < minimum;
        if cut {
            let length = u32::try_from(packet.len()).unwrap();
            set(&mut context, Prelude::LENGTH, length);
        }
        let result = match program {
            Program::UplinkXdp => {
                let program = self.datapath.ebpf().program_mut(program.name()).unwrap();
                let program: &mut Xdp = program.try_into().unwrap();
                syscall::test_run(program.fd().unwrap().as_fd(), packet, &[], *repeat)
            }
            _ if cut || input.vlan != 0 || input.tunnel_key.is_some() => {
                let mut packet = packet.clone();
                packet.resize(packet.len().max(minimum), 0);
                syscall::test_run(self.preludes[program].program(), &packet, &context, *repeat)
            }
            _ => {
                let program = classifier(&mut self.datapath, *program);
                syscall::test_run(program.fd().unwrap().as_fd(), packet, &context, *repeat)
            }
        };
        result.unwrap_or_else(|error| panic!("run {input:?}: {error}"))
    }

    /// Every counter that is not zero.
    pub fn counters(&mut self) -> Counters {
        let mut counters = Counters::default();
        let maps = self.datapath.maps();
        let last = u8::try_from(CODES_PER_PROGRAM - 1).unwrap();
        for program in Program::ALL {
            for code in (0..=last).filter(|code| label(*code).is_some() || *code == last) {
                let counter = maps.counter(program, code).unwrap();
                if counter != Counter::default() {
                    counters.verdicts.insert((program, code), counter);
                }
            }
        }
        for port in self.tables.ports.keys() {
            let counter = maps.port_counters(*port).unwrap();
            if counter != PortCounters::default() {
                counters.ports.insert(*port, counter);
            }
        }
        counters
    }
}

fn classifier(datapath: &mut Datapath, program: Program) -> &mut SchedClassifier {
    datapath.ebpf().program_mut(program.name()).unwrap().try_into().unwrap()
}

/// The `struct __sk_buff` of a run, as far as `convert___skb_to_skb()` of `net/bpf/test_run.c`
/// takes it; every other field must be zero.
pub fn context(input: &Input) -> [u8; 192] {
    const IFINDEX: usize = 40;
    const GSO_SIZE: usize = 176;
    let mut context = [0; 192];
    set(&mut context, IFINDEX, input.ifindex);
    set(&mut context, GSO_SIZE, input.gso_size);
    set(&mut context, Prelude::VLAN, input.vlan.into());
    if let Some(TunnelKey { vni, remote, local }) = input.tunnel_key {
        set(&mut context, Prelude::KEY, vni);
        // bpf_skb_get_tunnel_key() calls the sender `remote`, bpf_skb_set_tunnel_key() the
        // receiver: what is set as one comes out as the other.
        set(&mut context, Prelude::KEY + 4, u32::from_be_bytes(local));
        set(&mut context, Prelude::KEY + 8, u32::from_be_bytes(remote));
    }
    context
}

fn set(context: &mut [u8], at: usize, value: u32) {
    context[at..at + 4].copy_from_slice(&value.to_ne_bytes());
}

/// Makes the interfaces of the host under test, for [`with_bpffs`], each with the ifindex the
/// constants say.
pub fn build_links() {
    let mac = |party: Party| {
        let octets: Vec<String> = party.mac.iter().map(|byte| format!("{byte:02x}")).collect();
        octets.join(":")
    };
    let address = |party: Party| std::net::Ipv4Addr::from(party.address).to_string();
    ip("link set lo up");
    for (index, name) in [
        (UPLINK, "ens33"),
        (PORT_A1, "a1"),
        (PORT_A2, "a2"),
        (PORT_A3, "a3"),
        (PORT_A4, "a4"),
        (PORT_UNKNOWN, "unknown"),
        (GATEWAY_PORT, "gw"),
        (OTHER_GATEWAY_PORT, "gw2"),
    ] {
        let peer = index + 100;
        ip(&format!("link add {name} index {index} type veth peer name p-{name} index {peer}"));
        for end in [name, &format!("p-{name}")] {
            fs::write(format!("/proc/sys/net/ipv6/conf/{end}/disable_ipv6"), "1").unwrap();
            ip(&format!("link set {end} up"));
        }
        let forwarding = if index == PORT_A3 { "0" } else { "1" };
        fs::write(format!("/proc/sys/net/ipv4/conf/{name}/forwarding"), forwarding).unwrap();
    }
    ip(&format!("link set ens33 address {} mtu {UPLINK_MTU}", mac(HOST_A)));
    ip(&format!("address add {}/24 dev ens33", address(HOST_A)));
    for known in [HOST_B, ROUTER] {
        let (address, mac) = (address(known), mac(known));
        ip(&format!("neigh replace {address} lladdr {mac} dev ens33 nud permanent"));
    }
    let (far, router) = (address(HOST_E), address(ROUTER));
    ip(&format!("route add {far}/32 via {router} mtu lock {ROUTED_MTU}"));
    ip(&format!("route add {}/32 via {router}", address(CLIENT)));
    // As a default route would lead them.
    ip(&format!("route add 224.0.0.0/4 via {router}"));
    ip(&format!("address add {}/32 dev lo", std::net::Ipv4Addr::from(SECOND_ADDRESS)));
    // A network behind another interface of this host.
    ip(&format!("address add {}/24 dev gw", address(GWBRIDGE)));
}

/// Runs `ip` in the namespace of the calling thread.
pub fn ip(arguments: &str) {
    let output = Command::new("ip").args(arguments.split(' ')).output().expect("run ip");
    assert!(
        output.status.success(),
        "ip {arguments}: {}",
        String::from_utf8_lossy(&output.stderr).trim()
    );
}
