//! The few bpf(2) commands a test needs and aya does not offer: running a program that is not
//! aya's, and a map of the wrong shape.

use std::{
    ffi::CString,
    io,
    os::fd::{AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd, RawFd},
    path::Path,
};

const MAP_CREATE: u32 = 0;
const MAP_UPDATE_ELEM: u32 = 2;
const PROG_LOAD: u32 = 5;
const OBJ_PIN: u32 = 6;
const PROG_TEST_RUN: u32 = 10;

/// `BPF_PROG_TYPE_SCHED_CLS`.
const SCHED_CLS: u32 = 3;
/// `BPF_MAP_TYPE_PROG_ARRAY`.
const PROG_ARRAY: u32 = 3;

/// The part of `union bpf_attr` that `BPF_PROG_TEST_RUN` reads.
#[derive(Default)]
#[repr(C)]
struct TestRun {
    prog_fd: u32,
    retval: u32,
    data_size_in: u32,
    data_size_out: u32,
    data_in: u64,
    data_out: u64,
    repeat: u32,
    duration: u32,
    ctx_size_in: u32,
    ctx_size_out: u32,
    ctx_in: u64,
    ctx_out: u64,
    flags: u32,
    cpu: u32,
    batch_size: u32,
    reserved: u32,
}

/// Runs a program over a packet; its return value and the packet afterwards. With `repeat` over
/// one it runs again on what the run before left. `context` is a `struct __sk_buff`, or empty.
pub fn test_run(
    program: BorrowedFd<'_>,
    packet: &[u8],
    context: &[u8],
    repeat: u32,
) -> io::Result<(u32, Vec<u8>)> {
    let mut out = vec![0; packet.len() + 256];
    let mut run = TestRun {
        prog_fd: number(program.as_raw_fd()),
        data_size_in: length(packet),
        data_size_out: length(&out),
        data_in: packet.as_ptr() as u64,
        data_out: out.as_mut_ptr() as u64,
        repeat,
        ctx_size_in: length(context),
        ctx_in: if context.is_empty() { 0 } else { context.as_ptr() as u64 },
        ..TestRun::default()
    };
    bpf(PROG_TEST_RUN, &mut run)?;
    out.truncate(run.data_size_out as usize);
    Ok((run.retval, out))
}

#[derive(Default)]
#[repr(C)]
struct MapCreate {
    kind: u32,
    key_size: u32,
    value_size: u32,
    max_entries: u32,
    flags: u32,
    reserved: u32,
}

/// Makes a map of type `kind` (`enum bpf_map_type`).
pub fn create_map(
    kind: u32,
    key_size: u32,
    value_size: u32,
    max_entries: u32,
) -> io::Result<OwnedFd> {
    let mut attr = MapCreate { kind, key_size, value_size, max_entries, ..MapCreate::default() };
    descriptor(bpf(MAP_CREATE, &mut attr)?)
}

#[repr(C)]
struct ObjPin {
    path: u64,
    fd: u32,
    flags: u32,
}

/// Pins a map or program.
pub fn pin(object: BorrowedFd<'_>, path: &Path) -> io::Result<()> {
    let path = CString::new(path.as_os_str().as_encoded_bytes())?;
    let fd = number(object.as_raw_fd());
    bpf(OBJ_PIN, &mut ObjPin { path: path.as_ptr() as u64, fd, flags: 0 })?;
    Ok(())
}

/// A TC program in front of another one, which makes of the packet what BPF_PROG_TEST_RUN itself
/// cannot: it gives it a tunnel key, as the kernel's vxlan device does, or a VLAN tag beside it, as
/// the kernel does with an 802.1Q header, and cuts it off, since a test run refuses an IPv4 packet
/// shorter than its header.
#[derive(Debug)]
pub struct Prelude {
    program: OwnedFd,
    /// Holds the program that is called; a program array lives as long as its descriptor.
    _target: OwnedFd,
}

#[repr(C)]
struct MapUpdate {
    fd: u32,
    reserved: u32,
    key: u64,
    value: u64,
    flags: u64,
}

#[repr(C)]
struct ProgLoad {
    kind: u32,
    count: u32,
    instructions: u64,
    license: u64,
    log: [u32; 2],
    log_buffer: u64,
    version: u32,
    flags: u32,
    name: [u8; 16],
}

impl Prelude {
    /// Offset in `struct __sk_buff` (in `cb`) of the VNI, the remote and the local address of the
    /// key, each a `u32` in host byte order. No key where the VNI is zero.
    pub const KEY: usize = 48;
    /// Offset of the length to cut the packet off at; not cut where it is zero.
    pub const LENGTH: usize = 60;
    /// Offset of the VLAN tag; none where it is zero.
    pub const VLAN: usize = 64;

    /// Loads the program in front of `target`.
    pub fn before(target: BorrowedFd<'_>) -> io::Result<Self> {
        let array = create_map(PROG_ARRAY, 4, 4, 1)?;
        let (key, value) = (0u32, number(target.as_raw_fd()));
        let mut update = MapUpdate {
            fd: number(array.as_raw_fd()),
            reserved: 0,
            key: &raw const key as u64,
            value: &raw const value as u64,
            flags: 0,
        };
        bpf(MAP_UPDATE_ELEM, &mut update)?;

        // struct bpf_tunnel_key is 44 bytes: tunnel_id at 0, remote_ipv4 at 4, local_ipv4 at 28.
        let mut set_key: Vec<_> =
            (0..6).map(|word| instruction(0x7a, 10, 0, -48 + 8 * word, 0)).collect();
        for (from, to) in [(48, -48), (52, -44), (56, -20)] {
            set_key.push(instruction(0x61, 2, 6, from, 0));
            set_key.push(instruction(0x63, 10, 2, to, 0));
        }
        set_key.extend([
            instruction(0xbf, 1, 6, 0, 0),
            instruction(0xbf, 2, 10, 0, 0),
            instruction(0x07, 2, 0, 0, -48),
            instruction(0xb7, 3, 0, 0, 44),
            instruction(0xb7, 4, 0, 0, 0),
            instruction(0x85, 0, 0, 0, 21), // bpf_skb_set_tunnel_key
        ]);
        let tag = [
            instruction(0xbf, 3, 2, 0, 0),
            instruction(0xbf, 1, 6, 0, 0),
            instruction(0xb7, 2, 0, 0, 0),  // 802.1Q
            instruction(0x85, 0, 0, 0, 18), // bpf_skb_vlan_push
        ];
        let cut = [
            instruction(0xbf, 1, 6, 0, 0),
            instruction(0xb7, 3, 0, 0, 0),
            instruction(0x85, 0, 0, 0, 38), // bpf_skb_change_tail
        ];
        let skip = |count: usize| {
            instruction(0x15, 2, 0, i16::try_from(count).unwrap_or(i16::MAX), 0) // if r2 == 0
        };
        let mut code = vec![instruction(0xbf, 6, 1, 0, 0)]; // r6 = ctx
        code.push(instruction(0x61, 2, 6, 48, 0)); // r2 = VNI
        code.push(skip(set_key.len()));
        code.extend(set_key);
        code.push(instruction(0x61, 2, 6, 64, 0)); // r2 = VLAN tag
        code.push(skip(tag.len()));
        code.extend(tag);
        code.push(instruction(0x61, 2, 6, 60, 0)); // r2 = length
        code.push(skip(cut.len()));
        code.extend(cut);
        code.extend([
            instruction(0xbf, 1, 6, 0, 0),
            instruction(0x18, 2, 1, 0, array.as_raw_fd()),
            instruction(0, 0, 0, 0, 0),
            instruction(0xb7, 3, 0, 0, 0),
            instruction(0x85, 0, 0, 0, 12), // bpf_tail_call
            instruction(0xb7, 0, 0, 0, 99), // only reached where the call failed
            instruction(0x95, 0, 0, 0, 0),
        ]);
        let mut load = ProgLoad {
            kind: SCHED_CLS,
            count: u32::try_from(code.len()).unwrap_or(u32::MAX),
            instructions: code.as_ptr() as u64,
            license: c"GPL".as_ptr() as u64,
            log: [0, 0],
            log_buffer: 0,
            version: 0,
            flags: 0,
            name: [0; 16],
        };
        let program = descriptor(bpf(PROG_LOAD, &mut load)?)?;
        Ok(Self { program, _target: array })
    }

    /// The program to run.
    pub fn program(&self) -> BorrowedFd<'_> {
        use std::os::fd::AsFd as _;
        self.program.as_fd()
    }
}

/// Nanoseconds since boot, without suspend, at the last tick, as `bpf_ktime_get_coarse_ns()` counts them.
pub fn now_ns() -> u64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the structure is ours, and the clock always exists.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC_COARSE, &raw mut time) };
    let number = |value: i64| u64::try_from(value).unwrap_or(0);
    number(time.tv_sec) * 1_000_000_000 + number(time.tv_nsec)
}

/// One instruction as the kernel takes it (`struct bpf_insn`).
fn instruction(code: u8, destination: u8, source: u8, offset: i16, immediate: i32) -> [u8; 8] {
    let [o0, o1] = offset.to_ne_bytes();
    let [i0, i1, i2, i3] = immediate.to_ne_bytes();
    [code, destination | source << 4, o0, o1, i0, i1, i2, i3]
}

/// Makes the system call; what it returned.
fn bpf<T>(command: u32, attr: &mut T) -> io::Result<i64> {
    let size = u32::try_from(size_of::<T>()).unwrap_or(u32::MAX);
    // SAFETY: the attribute is as large as we say, and every address in it is of a buffer, with its
    // length beside it, that the caller holds for the time of the call.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, &raw mut *attr, size) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

fn descriptor(result: i64) -> io::Result<OwnedFd> {
    let fd = RawFd::try_from(result).map_err(io::Error::other)?;
    // SAFETY: the kernel just made this descriptor for us, and nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn number(fd: RawFd) -> u32 {
    u32::try_from(fd).unwrap_or(u32::MAX)
}

fn length(bytes: &[u8]) -> u32 {
    u32::try_from(bytes.len()).unwrap_or(u32::MAX)
}
