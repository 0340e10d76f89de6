//! Attaches programs, and finds out whether they still are.
//!
//! TCX and XDP links are pinned, see [`super::links`]. One of another version's folder is taken over
//! like our own: the program behind it is replaced, and the pin moved, each in one step, so there is
//! one program on the hook throughout. A clsact filter is no link: it has a fixed priority and
//! handle instead, by which it is replaced atomically, and stays when the agent ends.

use std::{
    fs, io,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use aya::{
    Ebpf,
    programs::{
        self, LinkOrder, SchedClassifier, TcAttachType, Xdp,
        links::FdLink,
        tc::{self, NlOptions, SchedClassifierLink, TcAttachOptions, TcHandle},
        xdp::XdpLink,
    },
    sys::SyscallError,
};

use ovnet_common::abi::Program;

use super::{Attachment, TcMode, XdpMode, former::Former, links};

/// Priority of our clsact filters; the handle is 1.
const PRIORITY: u16 = 100;
const HANDLE: TcHandle = TcHandle::new(0, 1);

/// Whether the kernel has TCX (Linux 6.6), by asking it what is attached so to the loopback device:
/// one without TCX knows no such question. A version would say nothing of a kernel built without
/// `CONFIG_NET_XGRESS`, or of an older one that a distribution gave it.
pub fn has_tcx() -> bool {
    SchedClassifier::query_tcx("lo", TcAttachType::Ingress).is_ok()
}

/// Attaches or takes over: what is pinned in our folder, or in a former one.
pub(super) fn attach(
    ebpf: &mut Ebpf,
    folder: &Path,
    formers: &[Former],
    mode: TcMode,
    attachment: &Attachment,
) -> Result<()> {
    let Attachment { program, ifindex, interface, xdp } = attachment;
    let name = program.name();
    let context = || format!("attach {name} to {interface}");
    // By its name another interface would be meant, under the pin of the one that is gone.
    let found = nix::net::if_::if_nametoindex(interface.as_str());
    ensure!(
        found == Ok(*ifindex),
        "attach {name} to {interface}: the interface is gone, or another has its name"
    );
    let handle = ebpf.program_mut(name).with_context(|| format!("the object has no {name}"))?;
    let pin = folder.join("links").join(links::pin_name(attachment));
    let (there, excluded) = links::on_hook(attachment, folder, formers);
    let mut there = there.into_iter();
    let taken_over = match (xdp, mode) {
        (Some(_), _) => {
            let handle: &mut Xdp = (&mut *handle).try_into()?;
            take_over(&mut there, &pin, |link| {
                let id = handle.attach_to_link(XdpLink::try_from(link)?)?;
                // The link is pinned already; letting go of our descriptor leaves it there.
                drop(handle.take_link(id)?);
                Ok(())
            })
        }
        (None, TcMode::Tcx) => {
            let handle: &mut SchedClassifier = (&mut *handle).try_into()?;
            take_over(&mut there, &pin, |link| {
                let id = handle.attach_to_link(link.try_into()?)?;
                drop(handle.take_link(id)?);
                Ok(())
            })
        }
        (None, TcMode::Clsact) => Ok(false),
    };
    if !taken_over.with_context(context)? {
        match (xdp, mode) {
            (Some(xdp), _) => {
                // The kernel takes one mode per interface: a link of the other one goes first.
                let mut gone = false;
                for other in &excluded {
                    gone |= links::remove(other)?;
                }
                attach_xdp(handle.try_into()?, *ifindex, *xdp, gone, &pin).with_context(context)?;
            }
            (None, TcMode::Tcx) => {
                attach_tcx(handle.try_into()?, interface, &pin).with_context(context)?;
            }
            (None, TcMode::Clsact) => {
                attach_clsact(handle.try_into()?, interface).with_context(context)?;
            }
        }
    }
    // A packet would pass both: what else there is on the hook, or, with clsact, the links of a
    // kernel or an option that had TCX.
    there.try_for_each(|other| links::remove(&other).map(drop))
}

/// Puts a program behind the first of the pinned links that still has its interface, and pins that
/// link as `pin` instead; says whether there was one. Those that come after it are left in `there`.
fn take_over(
    there: &mut impl Iterator<Item = PathBuf>,
    pin: &Path,
    mut replace: impl FnMut(FdLink) -> Result<()>,
) -> Result<bool> {
    for found in there {
        let Some(link) = links::open(&found)? else { continue };
        match replace(link) {
            Ok(()) => {
                if found != pin {
                    fs::rename(&found, pin).with_context(|| {
                        format!("move the link {} to {}", found.display(), pin.display())
                    })?;
                }
                return Ok(true);
            }
            Err(error) => forget_defunct(&found, error)?,
        }
    }
    Ok(false)
}

fn attach_tcx(program: &mut SchedClassifier, interface: &str, pin: &Path) -> Result<()> {
    let options = TcAttachOptions::TcxOrder(LinkOrder::default());
    let id = program.attach_with_options(interface, TcAttachType::Ingress, options)?;
    let link: FdLink = program.take_link(id)?.try_into()?;
    link.pin(pin).with_context(|| format!("pin the link as {}", pin.display()))?;
    Ok(())
}

/// `gone` says whether a link was just removed from the interface.
fn attach_xdp(
    program: &mut Xdp,
    ifindex: u32,
    mode: XdpMode,
    gone: bool,
    pin: &Path,
) -> Result<()> {
    let mode = match mode {
        XdpMode::Native => programs::XdpMode::Driver,
        XdpMode::Generic => programs::XdpMode::Skb,
    };
    // A link whose pin was removed is released a moment later, by a work queue of the kernel's.
    let mut attempts = if gone { 50 } else { 1 };
    let id = loop {
        attempts -= 1;
        match program.attach_to_if_index(ifindex, mode) {
            Err(_) if attempts > 0 => std::thread::sleep(Duration::from_millis(10)),
            other => break other?,
        }
    };
    let link: FdLink = program.take_link(id)?.try_into().map_err(|_| {
        anyhow::anyhow!("the kernel has no XDP links (Linux 5.9), which a restart needs")
    })?;
    link.pin(pin).with_context(|| format!("pin the link as {}", pin.display()))?;
    Ok(())
}

fn attach_clsact(program: &mut SchedClassifier, interface: &str) -> Result<()> {
    match tc::qdisc_add_clsact(interface) {
        Ok(()) | Err(tc::TcError::AlreadyAttached) => {}
        Err(error) if is_exists(&error) => {}
        Err(error) => return Err(error).context("add the clsact qdisc"),
    }
    let known =
        SchedClassifierLink::attached(interface, TcAttachType::Ingress, PRIORITY, HANDLE, None)?;
    let id = match program.attach_to_link(known) {
        Ok(id) => id,
        Err(_) => {
            let options = NlOptions { priority: PRIORITY, handle: HANDLE, classid: None };
            program.attach_with_options(
                interface,
                TcAttachType::Ingress,
                TcAttachOptions::Netlink(options),
            )?
        }
    };
    // Dropping a netlink link removes the filter, which must outlive us (invariant 1).
    std::mem::forget(program.take_link(id)?);
    Ok(())
}

/// Detaches; what is gone already is no error.
pub(super) fn detach(folder: &Path, mode: TcMode, attachment: &Attachment) -> Result<()> {
    let Attachment { program, ifindex: _, interface, xdp } = attachment;
    let name = program.name();
    if mode == TcMode::Clsact && xdp.is_none() {
        return match tc::qdisc_detach_program(interface, TcAttachType::Ingress, name) {
            Err(tc::TcError::IoError(error)) if error.raw_os_error().is_none() => Ok(()),
            Err(tc::TcError::IoError(error)) if error.raw_os_error() == Some(libc::ENODEV) => {
                Ok(())
            }
            other => other.with_context(|| format!("detach {name} from {interface}")),
        };
    }
    links::remove(&folder.join("links").join(links::pin_name(attachment))).map(drop)
}

/// Takes our clsact filters off an interface, whoever put them there; says whether there were any.
/// Pinned links go with their pins.
pub fn unhook(interface: &str) -> Result<bool> {
    let mut unhooked = false;
    for program in Program::ALL {
        match tc::qdisc_detach_program(interface, TcAttachType::Ingress, program.name()) {
            Ok(()) => unhooked = true,
            Err(tc::TcError::IoError(error)) if error.kind() == io::ErrorKind::NotFound => {}
            // No clsact qdisc, or no such interface any more: nothing of ours can be there.
            Err(tc::TcError::NetlinkError(_) | tc::TcError::IoError(_)) => {}
            Err(error) => {
                return Err(error).with_context(|| format!("take filters off {interface}"));
            }
        }
    }
    Ok(unhooked)
}

/// Whether the program of this process is still where it was attached; `open` is its link, which
/// needs no pin to be in force.
pub(super) fn in_force(
    ebpf: &Ebpf,
    mode: TcMode,
    attachment: &Attachment,
    open: Option<&FdLink>,
) -> bool {
    let Attachment { program, ifindex, interface, xdp } = attachment;
    let Some(own) = program_id(ebpf, *program) else { return false };
    match (xdp, mode) {
        (Some(_), _) => {
            let info = open.and_then(|link| link.info().ok());
            info.is_some_and(|link| link.program_id() == own)
        }
        (None, TcMode::Tcx) => {
            let query = SchedClassifier::query_tcx(interface, TcAttachType::Ingress);
            open.is_some() && query.is_ok_and(|(_, list)| list.iter().any(|it| it.id() == own))
        }
        // aya cannot list filters. The interface at least must be the same one; the repair looks at
        // the filter itself, see `Datapath::check_hooks`.
        (None, TcMode::Clsact) => {
            nix::net::if_::if_nametoindex(interface.as_str()).is_ok_and(|it| it == *ifindex)
        }
    }
}

/// The id that the kernel gave to a program of this process.
pub(super) fn program_id(ebpf: &Ebpf, program: Program) -> Option<u32> {
    Some(ebpf.program(program.name())?.info().ok()?.id())
}

/// Removes the pin of a link whose interface is gone (ENOLINK); any other error is one.
fn forget_defunct(pin: &Path, error: anyhow::Error) -> Result<()> {
    let number = match error.downcast_ref() {
        Some(programs::ProgramError::SyscallError(SyscallError { io_error, .. })) => {
            io_error.raw_os_error()
        }
        _ => None,
    };
    if number != Some(libc::ENOLINK) {
        return Err(error.context(format!("take over {}", pin.display())));
    }
    fs::remove_file(pin).with_context(|| format!("remove the defunct link {}", pin.display()))
}

fn is_exists(error: &tc::TcError) -> bool {
    let mut source: Option<&dyn std::error::Error> = Some(error);
    while let Some(current) = source {
        if let Some(io) = current.downcast_ref::<io::Error>()
            && io.raw_os_error() == Some(libc::EEXIST)
        {
            return true;
        }
        source = current.source();
    }
    false
}
