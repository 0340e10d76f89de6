//! The pinned links: their names, and what is behind them.
//!
//! TCX and XDP links are pinned as `links/<program>-<ifindex>[-<mode>]`, in every version. What
//! counts of a former agent's is the hook, not the program's name: there must be one of ours on it.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs, io,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result};
use aya::{
    maps::MapInfo,
    programs::{
        ProgramInfo,
        links::{FdLink, PinnedLink},
        loaded_programs,
    },
};

use super::{Attachment, XdpMode, former::Former};

/// What a packet passes one program of ours at.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Hook {
    ifindex: u32,
    /// The mode, of the XDP hook.
    xdp: Option<XdpMode>,
}

impl Hook {
    /// That of an attachment.
    pub(super) fn of(attachment: &Attachment) -> Self {
        Self { ifindex: attachment.ifindex, xdp: attachment.xdp }
    }

    /// That of a pin, by its name.
    fn parse(pin: &str) -> Option<Self> {
        let modes = [("-native", XdpMode::Native), ("-generic", XdpMode::Generic)];
        let xdp = modes.into_iter().find_map(|(end, mode)| Some((pin.strip_suffix(end)?, mode)));
        let (rest, xdp) = xdp.map_or((pin, None), |(rest, mode)| (rest, Some(mode)));
        let (_, ifindex) = rest.rsplit_once('-')?;
        Some(Self { ifindex: ifindex.parse().ok()?, xdp })
    }

    /// Whether both are the XDP hook of one interface, in different modes: the kernel takes one.
    fn excludes(self, other: Self) -> bool {
        let both = self.xdp.is_some() && other.xdp.is_some();
        both && self.ifindex == other.ifindex && self.xdp != other.xdp
    }
}

/// The name of an attachment's pin.
pub(super) fn pin_name(attachment: &Attachment) -> String {
    let Attachment { program, ifindex, interface: _, xdp } = attachment;
    let mode = match xdp {
        None => "",
        Some(XdpMode::Native) => "-native",
        Some(XdpMode::Generic) => "-generic",
    };
    format!("{}-{ifindex}{mode}", program.name())
}

/// Where an attachment is pinned.
pub(super) fn path(folder: &Path, attachment: &Attachment) -> PathBuf {
    folder.join("links").join(pin_name(attachment))
}

/// Whether there are links in a folder of pins.
pub(super) fn any(folder: &Path) -> bool {
    fs::read_dir(folder.join("links")).is_ok_and(|mut entries| entries.next().is_some())
}

/// The pins in a folder of pins, each with its hook; none where there is no such folder.
pub(super) fn list(folder: &Path) -> Result<Vec<(Option<Hook>, PathBuf)>> {
    let links = folder.join("links");
    let listed = || format!("list {}", links.display());
    let entries = match fs::read_dir(&links) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries.with_context(listed)?,
    };
    let hook =
        |entry: fs::DirEntry| (entry.file_name().to_str().and_then(Hook::parse), entry.path());
    entries.map(|entry| entry.map(hook).with_context(listed)).collect()
}

/// The pins that are on an attachment's hook, ours first, and those it cannot have beside it.
pub(super) fn on_hook(
    attachment: &Attachment,
    folder: &Path,
    formers: &[Former],
) -> (Vec<PathBuf>, Vec<PathBuf>) {
    let wanted = Hook::of(attachment);
    let pin = |xdp| {
        let pin = folder.join("links").join(pin_name(&Attachment { xdp, ..attachment.clone() }));
        pin.exists().then_some(pin)
    };
    let other_mode = wanted.xdp.and_then(|mode| match mode {
        XdpMode::Native => pin(Some(XdpMode::Generic)),
        XdpMode::Generic => pin(Some(XdpMode::Native)),
    });
    let mut same = Vec::from_iter(pin(wanted.xdp));
    let mut excluded = Vec::from_iter(other_mode);
    for (hook, pin) in formers.iter().flat_map(|former| &former.links) {
        match hook {
            Some(hook) if *hook == wanted => same.push(pin.clone()),
            Some(hook) if hook.excludes(wanted) => excluded.push(pin.clone()),
            _ => {}
        }
    }
    (same, excluded)
}

/// Pins in a folder that belong to none of the wanted attachments.
pub(super) fn stale(folder: &Path, wanted: &BTreeSet<Attachment>) -> Result<Vec<PathBuf>> {
    let names: BTreeSet<String> = wanted.iter().map(pin_name).collect();
    let of_none = |pin: &PathBuf| {
        let name = pin.file_name().and_then(|name| name.to_str());
        !name.is_some_and(|name| names.contains(name))
    };
    Ok(list(folder)?.into_iter().map(|(_, pin)| pin).filter(of_none).collect())
}

/// Opens a pinned link; `None` where there is none.
pub(super) fn open(pin: &Path) -> Result<Option<FdLink>> {
    if !pin.exists() {
        return Ok(None);
    }
    let link = PinnedLink::from_pin(pin).with_context(|| format!("open {}", pin.display()))?;
    Ok(Some(FdLink::from(link)))
}

/// Removes a pinned link, which detaches its program where nothing else holds it, and says whether
/// there was one.
pub(super) fn remove(pin: &Path) -> Result<bool> {
    match fs::remove_file(pin) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error).with_context(|| format!("remove the link {}", pin.display())),
    }
}

/// The hooks with programs of which any looks something up in a map that has the name of one of
/// `ours`, each with its id, and is another one; none where no program does. `folders` are of pins,
/// our own among them.
///
/// All of them: what an answer passes must share its connections with what the question passed.
pub(super) fn reading_others(
    ours: &BTreeMap<&'static str, u32>,
    folders: &[&Path],
) -> Result<BTreeSet<Hook>> {
    let mut on: BTreeMap<Hook, u32> = BTreeMap::new();
    for folder in folders {
        for (hook, pin) in list(folder)? {
            // One that cannot be opened or asked is no program in force.
            let info = open(&pin).ok().flatten().and_then(|link| link.info().ok());
            on.extend(hook.zip(info.map(|info| info.program_id())));
        }
    }
    if on.is_empty() {
        return Ok(BTreeSet::new());
    }
    let programs: BTreeSet<u32> = on.values().copied().collect();
    // Of those that are unloaded while they are listed none is in force.
    for program in loaded_programs().flatten().filter(|info| programs.contains(&info.id())) {
        let maps = maps_of(&program)?;
        if maps.iter().any(|(name, id)| ours.get(name.as_str()).is_some_and(|ours| ours != id)) {
            return Ok(on.into_keys().collect());
        }
    }
    Ok(BTreeSet::new())
}

/// Names and ids of the maps that a program uses.
fn maps_of(program: &ProgramInfo) -> Result<Vec<(String, u32)>> {
    let asked = || format!("ask which maps program {} uses", program.id());
    let ids = program.map_ids().with_context(asked)?.unwrap_or_default();
    let named = ids.into_iter().map(|id| {
        let info = MapInfo::from_id(id).with_context(asked)?;
        Ok((info.name_as_str().unwrap_or_default().to_owned(), id))
    });
    named.collect()
}

#[cfg(test)]
mod tests {
    use ovnet_common::abi::Program;

    use super::*;

    fn attachment(program: Program, ifindex: u32, xdp: Option<XdpMode>) -> Attachment {
        Attachment { program, ifindex, interface: "ens33".into(), xdp }
    }

    #[test]
    fn a_pin_is_named_after_its_hook() {
        for program in Program::ALL {
            for xdp in [None, Some(XdpMode::Native), Some(XdpMode::Generic)] {
                let attachment = attachment(program, 17, xdp);
                let parsed = Hook::parse(&pin_name(&attachment));
                assert_eq!(parsed, Some(Hook::of(&attachment)), "{attachment:?}");
            }
        }
        for name in ["", "from_uplink", "from_uplink-", "from_uplink-x", "uplink_xdp-3-offloaded"] {
            assert_eq!(Hook::parse(name), None, "{name}");
        }
    }

    #[test]
    fn a_former_program_is_found_by_its_hook_whatever_its_name() {
        let folder = tempfile::tempdir().unwrap();
        let links = folder.path().join("links");
        fs::create_dir(&links).unwrap();
        let pins = ["renamed-2", "from_uplink-3", "uplink_xdp-2-native", "uplink_xdp-3-generic"];
        for pin in pins {
            fs::write(links.join(pin), "").unwrap();
        }
        let former = Former {
            version: 2,
            folder: folder.path().to_owned(),
            links: list(folder.path()).unwrap(),
        };
        let find = |own: &Path, program, xdp| {
            let formers = std::slice::from_ref(&former);
            let (same, excluded) = on_hook(&attachment(program, 2, xdp), own, formers);
            let names = |pins: Vec<PathBuf>| -> Vec<String> {
                let names = pins.iter().map(|pin| pin.file_name().unwrap().to_str().unwrap());
                names.map(str::to_owned).collect()
            };
            (names(same).join(" "), names(excluded).join(" "))
        };
        let own = tempfile::tempdir().unwrap();
        let of_uplink = || find(own.path(), Program::FromUplink, None);
        assert_eq!(of_uplink(), ("renamed-2".into(), String::new()));
        let native = "uplink_xdp-2-native".to_owned();
        let with_mode = |mode| find(own.path(), Program::UplinkXdp, Some(mode));
        assert_eq!(with_mode(XdpMode::Native), (native.clone(), String::new()));
        assert_eq!(with_mode(XdpMode::Generic), (String::new(), native.clone()));
        fs::create_dir(own.path().join("links")).unwrap();
        for pin in ["from_uplink-2", "uplink_xdp-2-generic"] {
            fs::write(own.path().join("links").join(pin), "").unwrap();
        }
        assert_eq!(of_uplink(), ("from_uplink-2 renamed-2".into(), String::new()));
        let generic = "uplink_xdp-2-generic".to_owned();
        assert_eq!(with_mode(XdpMode::Native), (native, generic));
    }

    #[test]
    fn a_pin_without_an_attachment_is_stale() {
        let folder = tempfile::tempdir().unwrap();
        let links = folder.path().join("links");
        assert_eq!(stale(folder.path(), &BTreeSet::new()).unwrap(), Vec::<PathBuf>::new());
        fs::create_dir(&links).unwrap();
        for pin in ["from_uplink-2", "from_uplink-3", "anything"] {
            fs::write(links.join(pin), "").unwrap();
        }
        let wanted = BTreeSet::from([attachment(Program::FromUplink, 2, None)]);
        let mut found = stale(folder.path(), &wanted).unwrap();
        found.sort();
        assert_eq!(found, [links.join("anything"), links.join("from_uplink-3")]);
        assert!(any(folder.path()));
        assert!(remove(&links.join("anything")).unwrap());
        assert!(!remove(&links.join("anything")).unwrap());
    }
}
