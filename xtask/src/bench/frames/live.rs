//! One measurement of one contender: frames given to its program, what became of them counted.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use nix::sched::{CpuSet, sched_setaffinity};
use nix::unistd::Pid;

use super::bpf::{self, Injection, Statistics};
use super::contenders::{Contender, End, counted};
use crate::lab::{Lab, wait_until};

/// Frames between two looks at the redirect queues: what a driver's NAPI poll brings, and a quarter
/// of a veth's ring, which the container's end empties before the next ones are made.
const BATCH: u32 = 64;
/// Frames from which the rate is guessed.
const GUESS: u32 = 20_000;
/// How long the last frames may be under way.
const LAST: Duration = Duration::from_secs(5);
/// Of so many frames one may be lost before a rate means something else.
const LOSSES: u64 = 1000;

/// What one program took of it.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Share {
    /// The program.
    pub(super) program: String,
    /// Nanoseconds per run, with what measuring takes.
    pub(super) nanoseconds: f64,
}

/// Injects for about so long, with all the work on one processor; the frames in a second that arrive,
/// or are dropped where they are to be.
pub(super) fn measure(lab: &Lab, contender: &Contender, time: Duration) -> Result<f64> {
    let guess = inject(lab, contender, GUESS)?;
    let wanted = time.as_secs_f64() / guess.as_secs_f64();
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "a whole number of frames between two bounds is wanted"
    )]
    let count = wanted.clamp(f64::from(GUESS), 1e9) as u32;
    let before = settled(lab, contender)?;
    let each = inject(lab, contender, count)?;
    let injected = u64::from(count);
    let arrived = match contender.end {
        End::Nobody => injected,
        _ => settled(lab, contender)?.saturating_sub(before),
    };
    let lost = injected.saturating_sub(arrived);
    ensure!(arrived > 0, "none of {injected} frames was counted");
    ensure!(lost * LOSSES <= injected, "{lost} of {injected} frames were lost on the way");
    let share = float(arrived) / float(injected);
    Ok(share / each.as_secs_f64())
}

/// How much of it each program took, by the kernel's statistics. They cost some nanoseconds per run
/// themselves, so nothing else is measured meanwhile.
pub(super) fn shares(lab: &Lab, contender: &Contender) -> Result<Vec<Share>> {
    const FRAMES: u32 = 200_000;
    let _statistics = Statistics::keep()?;
    let before = bpf::all_runs()?;
    inject(lab, contender, FRAMES)?;
    let after = bpf::all_runs()?;
    let mut shares = Vec::new();
    for now in after {
        let then = before.iter().find(|it| it.id == now.id);
        let (nanoseconds, count) = then.map_or((0, 0), |then| (then.nanoseconds, then.count));
        let (nanoseconds, count) = (now.nanoseconds - nanoseconds, now.count - count);
        // Other programs of the machine ran, too, but not so often.
        if count >= u64::from(FRAMES) / 2 {
            shares
                .push(Share { program: now.name, nanoseconds: float(nanoseconds) / float(count) });
        }
    }
    Ok(shares)
}

/// Gives so many frames to the contender's program; how long it took for each.
fn inject(lab: &Lab, contender: &Contender, count: u32) -> Result<Duration> {
    let Contender { host, ifindex, frame, .. } = contender;
    let (program, ifindex, frame) = (contender.program.another()?, *ifindex, frame.clone());
    let each = lab
        .inside(host, move || {
            pin()?;
            program.inject(Injection { frame: &frame, ifindex, count, batch: BATCH })
        })
        .with_context(|| contender.label)?;
    ensure!(!each.is_zero(), "{}: the kernel took no time", contender.label);
    Ok(each)
}

/// Keeps this thread on the last processor. What the frames raise (the softirqs of veths, backlog
/// and tunnel) stays on the processor that raised it, so all of the work is done there.
fn pin() -> Result<()> {
    let processors = std::thread::available_parallelism().context("count the processors")?;
    let mut set = CpuSet::new();
    set.set(processors.get() - 1).context("choose a processor")?;
    sched_setaffinity(Pid::from_raw(0), &set).context("keep to one processor")
}

/// The count when it has come to rest: ksoftirqd may have the last frames.
fn settled(lab: &Lab, contender: &Contender) -> Result<u64> {
    let mut last = counted(lab, contender)?;
    wait_until(
        LAST,
        || format!("the frames of {} to arrive", contender.label),
        || {
            let now = counted(lab, contender)?;
            let rests = std::mem::replace(&mut last, now) == now;
            Ok(rests.then_some(now))
        },
    )
}

#[expect(clippy::cast_precision_loss, reason = "a count of nanoseconds or runs, for a mean")]
fn float(number: u64) -> f64 {
    number as f64
}
