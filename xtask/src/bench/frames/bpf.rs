//! The few bpf(2) commands that injecting frames takes. The programs under test are loaded by the
//! agent; here they are only found, run and read.

use std::io;
use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd, RawFd};
use std::time::Duration;

use anyhow::{Context as _, Result};
use nix::libc;

const PROG_LOAD: u32 = 5;
const PROG_TEST_RUN: u32 = 10;
const PROG_GET_NEXT_ID: u32 = 11;
const PROG_GET_FD_BY_ID: u32 = 13;
const OBJ_GET_INFO_BY_FD: u32 = 15;
const ENABLE_STATS: u32 = 32;

/// `BPF_PROG_TYPE_XDP`.
const XDP: u32 = 6;
/// `BPF_F_TEST_XDP_LIVE_FRAMES`: what the program decides about a frame is carried out, as if the
/// interface's driver had received it (Linux 5.18).
const LIVE_FRAMES: u32 = 1 << 1;

/// What an XDP program of one decision decides (`enum xdp_action`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Action {
    /// `XDP_DROP`.
    Drop = 1,
    /// `XDP_PASS`: the frame becomes an skb and enters the stack.
    Pass = 2,
}

/// A loaded program.
#[derive(Debug)]
pub(super) struct Program(OwnedFd);

/// How frames are given to a program.
#[derive(Clone, Copy, Debug)]
pub(super) struct Injection<'a> {
    /// The frame, from its Ethernet header on.
    pub(super) frame: &'a [u8],
    /// The interface it comes in by, in the network namespace of the calling thread.
    pub(super) ifindex: u32,
    /// How many frames.
    pub(super) count: u32,
    /// How many are made before what was decided about them is carried out: a driver's NAPI budget.
    pub(super) batch: u32,
}

/// What the kernel counts of a program while it keeps statistics.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Runs {
    /// The program's id.
    pub(super) id: u32,
    /// Its name, cut to 15 bytes.
    pub(super) name: String,
    /// Nanoseconds in it.
    pub(super) nanoseconds: u64,
    /// How often it ran.
    pub(super) count: u64,
}

/// Has the kernel keep statistics of programs, until this is dropped.
#[derive(Debug)]
pub(super) struct Statistics(#[expect(dead_code, reason = "held, not read")] OwnedFd);

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

/// `struct xdp_md`.
#[derive(Default)]
#[repr(C)]
struct Context {
    data: u32,
    data_end: u32,
    data_meta: u32,
    ingress_ifindex: u32,
    rx_queue_index: u32,
    egress_ifindex: u32,
}

#[derive(Default)]
#[repr(C)]
struct Load {
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

#[derive(Default)]
#[repr(C)]
struct Id {
    /// The program, or the one before the one asked for.
    id: u32,
    next: u32,
    flags: u32,
}

#[repr(C)]
struct Info {
    fd: u32,
    length: u32,
    info: u64,
}

impl Program {
    /// Loads an XDP program that always decides the same.
    pub(super) fn always(action: Action) -> Result<Self> {
        // r0 = action; exit
        let code: [[u8; 8]; 2] =
            [[0xb7, 0, 0, 0, action as u8, 0, 0, 0], [0x95, 0, 0, 0, 0, 0, 0, 0]];
        let mut load = Load {
            kind: XDP,
            count: 2,
            instructions: code.as_ptr() as u64,
            license: c"GPL".as_ptr() as u64,
            name: *b"always\0\0\0\0\0\0\0\0\0\0",
            ..Load::default()
        };
        let fd = bpf(PROG_LOAD, &mut load).and_then(descriptor);
        Ok(Self(fd.context("load an XDP program that does nothing")?))
    }

    /// The program of this id.
    pub(super) fn of_id(id: u32) -> Result<Self> {
        let fd = bpf(PROG_GET_FD_BY_ID, &mut Id { id, ..Id::default() }).and_then(descriptor);
        Ok(Self(fd.with_context(|| format!("open program {id}"))?))
    }

    /// Another handle of the same program, for another thread.
    pub(super) fn another(&self) -> Result<Self> {
        Ok(Self(self.0.try_clone().context("a program's descriptor")?))
    }

    /// Runs this XDP program over live frames, and carries out what it decides about each. Returns
    /// when all were given to it and the softirqs that this raised on this processor have run; the
    /// time for a frame is the kernel's, in whole nanoseconds. A clock around the call would also count
    /// how long the kernel takes to patch its dispatcher of XDP programs, some milliseconds for one
    /// that is attached nowhere, and the time in which others had the processor.
    pub(super) fn inject(&self, injection: Injection<'_>) -> Result<Duration> {
        let Injection { frame, ifindex, count, batch } = injection;
        let length = u32::try_from(frame.len()).context("a frame's length")?;
        let context = Context { data_end: length, ingress_ifindex: ifindex, ..Context::default() };
        let mut run = TestRun {
            prog_fd: number(self.0.as_raw_fd()),
            data_size_in: length,
            data_in: frame.as_ptr() as u64,
            repeat: count,
            ctx_size_in: u32::try_from(size_of::<Context>()).context("a context's size")?,
            ctx_in: &raw const context as u64,
            flags: LIVE_FRAMES,
            batch_size: batch,
            ..TestRun::default()
        };
        bpf(PROG_TEST_RUN, &mut run).with_context(|| {
            format!("run an XDP program over {count} live frames (Linux 5.18) of ifindex {ifindex}")
        })?;
        Ok(Duration::from_nanos(run.duration.into()))
    }

    fn runs(&self) -> Result<Runs> {
        // `struct bpf_prog_info` as far as `run_cnt`, in words.
        const ID: usize = 0;
        const NAME: usize = 8;
        const RUN_TIME: usize = 24;
        const RUN_COUNT: usize = 25;
        let mut info = [0u64; RUN_COUNT + 1];
        let length = u32::try_from(size_of_val(&info)).context("the length of a description")?;
        let fd = number(self.0.as_raw_fd());
        let mut attr = Info { fd, length, info: info.as_mut_ptr() as u64 };
        bpf(OBJ_GET_INFO_BY_FD, &mut attr).context("describe a program")?;
        let name = [info[NAME].to_ne_bytes(), info[NAME + 1].to_ne_bytes()].concat();
        let name = name.split(|byte| *byte == 0).next().unwrap_or_default();
        let [_, _, _, _, id @ ..] = info[ID].to_ne_bytes();
        Ok(Runs {
            id: u32::from_ne_bytes(id),
            name: String::from_utf8_lossy(name).into_owned(),
            nanoseconds: info[RUN_TIME],
            count: info[RUN_COUNT],
        })
    }
}

impl Statistics {
    /// Begins.
    pub(super) fn keep() -> Result<Self> {
        // BPF_STATS_RUN_TIME
        let fd = bpf(ENABLE_STATS, &mut 0u32).and_then(descriptor);
        Ok(Self(fd.context("have the kernel keep statistics of programs (Linux 5.8)")?))
    }
}

/// What was counted of every program there is. One that goes meanwhile is left out.
pub(super) fn all_runs() -> Result<Vec<Runs>> {
    let mut all = Vec::new();
    let mut id = Id::default();
    loop {
        match bpf(PROG_GET_NEXT_ID, &mut id) {
            Ok(_) => id.id = id.next,
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => return Ok(all),
            Err(error) => return Err(error).context("list the programs"),
        }
        if let Ok(program) = Program::of_id(id.id) {
            all.push(program.runs()?);
        }
    }
}

/// Makes the system call; what it returned.
fn bpf<T>(command: u32, attr: &mut T) -> io::Result<i64> {
    // SAFETY: the attribute is as large as we say, and every address in it is of a buffer, with its
    // length beside it, that the caller holds for the time of the call.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, &raw mut *attr, size_of::<T>()) };
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
