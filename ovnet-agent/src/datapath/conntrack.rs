//! The flows of published ports, as the agent sees them: it removes what is over.
//!
//! The programs write this map at the same time, so it is walked in batches, by bucket: a walk by
//! keys begins anew whenever the key it stands on is evicted, and would not end in a flood.

use std::{
    collections::BTreeMap,
    io,
    os::fd::{AsFd as _, AsRawFd as _, RawFd},
    path::Path,
};

use anyhow::{Context as _, Result, bail};
use aya::maps::{HashMap, MapData, MapError, MapInfo};
use ovnet_common::{
    abi::map,
    published::{Direction, FlowKey, FlowValue, PublishedKey, PublishedValue},
};

/// Entries per system call. A bucket must fit; LRU hash maps have about one entry per bucket.
const BATCH: usize = 4096;
/// Commands of bpf(2), `enum bpf_cmd` of `linux/bpf.h`.
const UPDATE_ELEM: libc::c_long = 2;
const LOOKUP_AND_DELETE_ELEM: libc::c_long = 21;
const LOOKUP_BATCH: libc::c_long = 24;
/// `BPF_NOEXIST`.
const NOEXIST: u64 = 1;

/// What a sweep found.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Swept {
    /// Entries before, two per flow.
    pub entries: u64,
    /// Entries removed.
    pub removed: u64,
    /// Entries that were used in the moment of their removal, and put back.
    pub put_back: u64,
}

/// The open map, and the one that says what ports lead to.
pub struct Conntrack {
    flows: Flows,
    published: HashMap<MapData, PublishedKey, PublishedValue>,
}

/// A map of flows.
pub(super) struct Flows {
    map: MapData,
    max: u32,
}

impl std::fmt::Debug for Conntrack {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Conntrack").field("max", &self.flows.max).finish_non_exhaustive()
    }
}

impl Conntrack {
    /// Opens the pinned map of the folder of maps.
    pub(super) fn open(maps: &Path) -> Result<Self> {
        let flows = Flows::open(&maps.join(map::CONNTRACK))?;
        let pin = maps.join(map::PUBLISHED);
        let opened = || format!("open {}", pin.display());
        let published = aya::maps::Map::HashMap(MapData::from_pin(&pin).with_context(opened)?);
        Ok(Self { flows, published: published.try_into().with_context(opened)? })
    }

    /// How many entries fit, two per flow.
    pub fn capacity(&self) -> u32 {
        self.flows.max
    }

    /// Removes the flows that were silent for longer than their state allows at `now_ns`
    /// (CLOCK_MONOTONIC), and those whose port leads elsewhere now, or nowhere.
    ///
    /// Never a live one: an entry is looked at and removed in one step, and put back where it was
    /// used since it was found silent. What ports lead to is read before the walk, for which it is
    /// good enough, and again where an entry is to go: it may be that of a port published since.
    pub fn sweep(&self, now_ns: u64) -> Result<Swept> {
        let mut swept = Swept::default();
        let ports: Result<BTreeMap<_, _>, MapError> = self.published.iter().collect();
        let ports = ports.context("read PUBLISHED")?;
        self.flows.walk(|key, value| {
            swept.entries += 1;
            let leads = |port: &PublishedKey| ports.get(port).copied();
            let may_be_orphaned = !leads_there(key, value, leads);
            if !may_be_orphaned && !value.is_stale(key.protocol, now_ns) {
                return Ok(());
            }
            let is_orphaned = may_be_orphaned
                && match self.published.get(&port(key, value), 0) {
                    Ok(to) => !leads_there(key, value, |_| Some(to)),
                    Err(MapError::KeyNotFound) => true,
                    Err(error) => return Err(error).context("read PUBLISHED"),
                };
            if !is_orphaned && !value.is_stale(key.protocol, now_ns) {
                return Ok(());
            }
            let Some(last) = self.flows.take(key)? else { return Ok(()) };
            if is_orphaned || last.is_stale(key.protocol, now_ns) {
                swept.removed += 1;
            } else {
                self.flows.put_back(key, &last)?;
                swept.put_back += 1;
            }
            Ok(())
        })?;
        Ok(swept)
    }

    /// Every entry that is there throughout the walk, and perhaps others.
    pub fn entries(&self) -> Result<Vec<(FlowKey, FlowValue)>> {
        let mut entries = Vec::new();
        self.flows.walk(|key, value| {
            entries.push((*key, *value));
            Ok(())
        })?;
        Ok(entries)
    }

    /// Enters what another map had, where it is not there yet.
    pub(super) fn adopt(&self, other: &Flows) -> Result<()> {
        other.walk(|key, value| self.flows.put_back(key, value))
    }
}

impl Flows {
    /// Opens the pinned map.
    pub(super) fn open(pin: &Path) -> Result<Self> {
        let opened = || format!("open {}", pin.display());
        let max = MapInfo::from_pin(pin).with_context(opened)?.max_entries();
        Ok(Self { map: MapData::from_pin(pin).with_context(opened)?, max })
    }

    fn walk(&self, mut each: impl FnMut(&FlowKey, &FlowValue) -> Result<()>) -> Result<()> {
        let mut keys = vec![FlowKey::default(); BATCH];
        let mut values = vec![FlowValue::default(); BATCH];
        let (mut position, mut next) = (0u32, 0u32);
        let mut first = true;
        // Each call goes on by at least a bucket, and there are fewer than twice the capacity.
        for _ in 0..=u64::from(self.max) * 2 {
            let mut attributes = Batch {
                in_batch: if first { 0 } else { &raw const position as u64 },
                out_batch: &raw mut next as u64,
                keys: keys.as_mut_ptr() as u64,
                values: values.as_mut_ptr() as u64,
                count: u32::try_from(BATCH).unwrap_or(u32::MAX),
                map_fd: self.fd(),
                ..Batch::default()
            };
            // SAFETY: the pointers are to memory of the sizes the kernel takes from the map and
            // from `count`, and live until after the call.
            let result = unsafe { call(LOOKUP_BATCH, &mut attributes) };
            let is_last = match result {
                Ok(()) => false,
                Err(error) if error.raw_os_error() == Some(libc::ENOENT) => true,
                Err(error) => return Err(error).context("read CONNTRACK"),
            };
            let count = usize::try_from(attributes.count).unwrap_or(0).min(BATCH);
            for (key, value) in keys.iter().zip(&values).take(count) {
                each(key, value)?;
            }
            if is_last {
                return Ok(());
            }
            position = next;
            first = false;
        }
        bail!("read CONNTRACK: the walk does not end");
    }

    /// Removes an entry and returns what it was in that moment.
    fn take(&self, key: &FlowKey) -> Result<Option<FlowValue>> {
        let mut value = FlowValue::default();
        let mut attributes = Element {
            map_fd: self.fd(),
            padding: 0,
            key: &raw const *key as u64,
            value: &raw mut value as u64,
            flags: 0,
        };
        // SAFETY: key and value have the sizes of the map's, and live until after the call.
        match unsafe { call(LOOKUP_AND_DELETE_ELEM, &mut attributes) } {
            Ok(()) => Ok(Some(value)),
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(None),
            Err(error) => Err(error).context("remove from CONNTRACK"),
        }
    }

    /// Enters what is not there; what came there meanwhile is newer.
    fn put_back(&self, key: &FlowKey, value: &FlowValue) -> Result<()> {
        let mut attributes = Element {
            map_fd: self.fd(),
            padding: 0,
            key: &raw const *key as u64,
            value: &raw const *value as u64,
            flags: NOEXIST,
        };
        // SAFETY: as in `take`.
        match unsafe { call(UPDATE_ELEM, &mut attributes) } {
            Err(error) if error.raw_os_error() != Some(libc::EEXIST) => {
                Err(error).context("write CONNTRACK")
            }
            _ => Ok(()),
        }
    }

    fn fd(&self) -> RawFd {
        self.map.fd().as_fd().as_raw_fd()
    }
}

/// Whether the port a flow came by still leads where the flow goes. Pure.
fn leads_there(
    key: &FlowKey,
    value: &FlowValue,
    leads: impl Fn(&PublishedKey) -> Option<PublishedValue>,
) -> bool {
    let inside = if value.direction == Direction::In as u8 {
        (value.address, value.port_be, value.ifindex)
    } else {
        (key.source, key.source_port_be, value.arrival_ifindex)
    };
    leads(&port(key, value)).is_some_and(|to| (to.address, to.port_be, to.ifindex) == inside)
}

/// The published port a flow came by. Pure.
fn port(key: &FlowKey, value: &FlowValue) -> PublishedKey {
    let (address, port_be) = if value.direction == Direction::In as u8 {
        (key.destination, key.destination_port_be)
    } else {
        (value.address, value.port_be)
    };
    PublishedKey { address, port_be, protocol: key.protocol, reserved: 0 }
}

/// The attributes of the commands on one element, `union bpf_attr` of `linux/bpf.h`.
#[repr(C)]
struct Element {
    map_fd: RawFd,
    padding: u32,
    key: u64,
    value: u64,
    flags: u64,
}

/// The attributes of the batch commands.
#[derive(Default)]
#[repr(C)]
struct Batch {
    in_batch: u64,
    out_batch: u64,
    keys: u64,
    values: u64,
    count: u32,
    map_fd: RawFd,
    elem_flags: u64,
    flags: u64,
}

/// bpf(2), of which aya has no batches, and `LOOKUP_AND_DELETE_ELEM` for queues only.
///
/// # Safety
/// The attributes must be those of the command, and their pointers valid for what it does.
unsafe fn call<T>(command: libc::c_long, attributes: &mut T) -> io::Result<()> {
    let attributes: *mut T = attributes;
    // SAFETY: the caller's promise.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, attributes, size_of::<T>()) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ovnet_common::abi::mapped;

    #[test]
    fn a_flow_stays_while_its_port_leads_to_its_container() {
        let port = PublishedKey {
            address: mapped([192, 168, 1, 11]),
            port_be: 90u16.to_be(),
            protocol: 6,
            reserved: 0,
        };
        let to = PublishedValue {
            address: mapped([172, 18, 0, 2]),
            port_be: 80u16.to_be(),
            ifindex: 7,
            ..PublishedValue::default()
        };
        let client = mapped([192, 168, 1, 100]);
        let key = FlowKey {
            source: client,
            source_port_be: 1,
            destination: port.address,
            destination_port_be: port.port_be,
            protocol: 6,
            reserved: [0; 3],
        };
        let value = FlowValue {
            address: to.address,
            port_be: to.port_be,
            ifindex: 7,
            direction: Direction::In as u8,
            ..FlowValue::default()
        };
        let back = FlowKey {
            source: to.address,
            source_port_be: to.port_be,
            destination: client,
            destination_port_be: 1,
            protocol: 6,
            reserved: [0; 3],
        };
        let back_value = FlowValue {
            address: port.address,
            port_be: port.port_be,
            arrival_ifindex: 7,
            direction: Direction::Back as u8,
            ..FlowValue::default()
        };
        let holds = |published: &BTreeMap<PublishedKey, PublishedValue>| {
            let leads = |port: &PublishedKey| published.get(port).copied();
            let holds = leads_there(&key, &value, leads);
            assert_eq!(holds, leads_there(&back, &back_value, leads));
            holds
        };
        assert!(holds(&BTreeMap::from([(port, to)])));
        assert!(!holds(&BTreeMap::new()));
        // Another container with the same address, another port, another protocol.
        assert!(!holds(&BTreeMap::from([(port, PublishedValue { ifindex: 8, ..to })])));
        assert!(!holds(&BTreeMap::from([(port, PublishedValue { port_be: 81, ..to })])));
        assert!(!holds(&BTreeMap::from([(PublishedKey { protocol: 17, ..port }, to)])));
    }
}
