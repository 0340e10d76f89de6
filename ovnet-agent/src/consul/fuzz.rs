//! Every reader of records and of files made of them, against whatever bytes there may be: what
//! cannot be read is refused in one line, what can is written back as it was read.
//!
//! proptest keeps what it finds beside this file, in `proptest-regressions`, and tries it first.

use proptest::{collection::vec, prelude::*, sample::Index};
use serde::{Serialize, de::DeserializeOwned};

use super::{
    client::{Entry, Listing},
    folder::{Folder, Outcome},
    schema::{EndpointRecord, HostRecord, NetworkRecord, PendingRecord},
    sentinel,
};
use crate::{docker::book::Bound, state::LocalEndpoint};

const HOST: &str =
    r#"{"v":1,"node":"docker01","vtep":"192.168.1.11","port":4789,"mtu":1500,"agent":"0.1.0"}"#;
const NETWORK: &str = r#"{"v":1,"id":"4d0b","name":"ov_net1","vni":4096,"subnet":"10.0.0.0/24",
    "gateway":"10.0.0.1","ip_range":"10.0.0.128/25","aux":{"router":"10.0.0.9"},"mtu":1400,
    "internal":false,"options":{"a":"b"},"labels":{"c":"d"},"created_by":"docker02"}"#;
const PENDING: &str = r#"{"v":1,"id":"4d0b","host":"docker01","vni":4096,"subnet":"10.0.0.0/24",
    "ip_range":null}"#;
const ENDPOINT: &str = r#"{"v":1,"id":"9f","address":"10.0.0.2","mac":"02:42:0a:00:00:02",
    "host":"docker01","names":["t1"],"state":"up"}"#;

/// Files of the state folder: an endpoint of this host, and a network of Docker's.
fn files() -> [String; 2] {
    [
        format!(
            r#"{{"record":{ENDPOINT},"network":{NETWORK},"netns":"/run/netns/t1","ifname":"eth0",
            "host_ifname":"ovnet01234567","mtu":1450,"docker":{{"network":"ab","container":null}},
            "gateway":{{"bridge":"ovnet_gwbridge","host_ifname":"ovnetg1","ifname":"eth1",
            "address":"172.18.0.2","mac":"02:42:ac:12:00:02"}}}}"#
        ),
        format!(r#"{{"docker":"ab","network":{NETWORK},"consul":"7 word"}}"#),
    ]
}

/// Reads these bytes as every kind of record and file; says how many took them.
fn read_all(bytes: &[u8]) -> usize {
    let file = |read: bool| usize::from(read);
    file(record(|bytes| HostRecord::parse("docker01", bytes), bytes))
        + file(record(|bytes| NetworkRecord::parse("ov_net1", bytes), bytes))
        + file(record(|bytes| PendingRecord::parse("4d0b", bytes), bytes))
        + file(record(|bytes| EndpointRecord::parse("10.0.0.2", bytes), bytes))
        + file(record(json::<LocalEndpoint>, bytes))
        + file(record(json::<Bound>, bytes))
}

fn json<T: DeserializeOwned>(bytes: &[u8]) -> anyhow::Result<T> {
    Ok(serde_json::from_slice(bytes)?)
}

/// Whether it was read. Then it must come out of what is written of it as it was.
fn record<T: Serialize + PartialEq + std::fmt::Debug>(
    parse: impl Fn(&[u8]) -> anyhow::Result<T>,
    bytes: &[u8],
) -> bool {
    match parse(bytes) {
        Ok(read) => {
            let written = serde_json::to_vec(&read).unwrap();
            assert_eq!(parse(&written).unwrap(), read);
            true
        }
        Err(why) => {
            let line = format!("{why:#}");
            assert!(!line.contains('\n'), "more than one line: {line:?}");
            false
        }
    }
}

/// One thing done to the bytes of a record.
#[derive(Clone, Debug)]
enum Damage {
    Flip(Index, u8),
    Cut(Index),
    Remove(Index, Index),
    Repeat(Index, Index),
    Insert(Index, String),
}

fn damage() -> impl Strategy<Value = Damage> {
    let scrap = prop_oneof![
        Just("null".to_owned()),
        Just("-1".to_owned()),
        Just("1e309".to_owned()),
        Just("18446744073709551616".to_owned()),
        Just("\"\\ud800\"".to_owned()),
        Just("\\u0000".to_owned()),
        Just("[".repeat(300)),
        Just("{\"a\":".repeat(300)),
        Just("9".repeat(5000)),
        ".{0,8}",
    ];
    prop_oneof![
        (any::<Index>(), any::<u8>()).prop_map(|(at, with)| Damage::Flip(at, with)),
        any::<Index>().prop_map(Damage::Cut),
        (any::<Index>(), any::<Index>()).prop_map(|(from, to)| Damage::Remove(from, to)),
        (any::<Index>(), any::<Index>()).prop_map(|(from, to)| Damage::Repeat(from, to)),
        (any::<Index>(), scrap).prop_map(|(at, scrap)| Damage::Insert(at, scrap)),
    ]
}

fn damaged(whole: &str, done: &[Damage]) -> Vec<u8> {
    let mut bytes = whole.as_bytes().to_vec();
    for damage in done {
        let length = bytes.len() + 1;
        let range = |a: &Index, b: &Index| {
            let (a, b) = (a.index(length), b.index(length));
            a.min(b)..a.max(b)
        };
        match damage {
            Damage::Flip(at, with) => {
                let at = at.index(length);
                bytes.get_mut(at).into_iter().for_each(|byte| *byte ^= with);
            }
            Damage::Cut(at) => bytes.truncate(at.index(length)),
            Damage::Remove(from, to) => drop(bytes.drain(range(from, to))),
            Damage::Repeat(from, to) => {
                let again = bytes[range(from, to)].to_vec();
                bytes.splice(range(from, from), again).for_each(drop);
            }
            Damage::Insert(at, scrap) => {
                let at = at.index(length);
                bytes.splice(at..at, scrap.bytes()).for_each(drop);
            }
        }
    }
    bytes
}

/// A folder's answer: of each key whether it is there, its value and when it was created.
fn answer() -> impl Strategy<Value = Option<Listing>> {
    let value = prop_oneof![
        Just(HOST.as_bytes().to_vec()),
        Just(HOST.replace("192.168.1.11", "192.168.1.66").into_bytes()),
        vec(any::<u8>(), 0..40),
    ];
    let entries = vec((0..4usize, value, 1..4u64), 0..6);
    let sentinel = proptest::option::of(1..3u64);
    (entries, sentinel, 0..20u64, any::<bool>()).prop_map(|(entries, sentinel, index, empty)| {
        let entry = |key: String, value: Vec<u8>, created| Entry {
            key,
            value,
            create_index: created,
            modify_index: index,
            session: None,
        };
        let mut listing: Vec<Entry> = entries
            .into_iter()
            .map(|(name, value, created)| entry(format!("hosts/{}", NAMES[name]), value, created))
            .collect();
        let word = b"word".to_vec();
        listing.extend(sentinel.map(|created| entry(sentinel::key("hosts/"), word, created)));
        (!empty || index % 3 != 0).then_some(Listing { index, entries: listing })
    })
}

/// Ends of keys: of one that the record is of, and of others.
const NAMES: [&str; 4] = ["docker01", "docker02", "", "a/b"];

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn arbitrary_bytes_are_refused_or_come_back_as_they_were(bytes in vec(any::<u8>(), 0..2000)) {
        read_all(&bytes);
    }

    #[test]
    fn damaged_records_are_refused_or_come_back_as_they_were(
        which in 0..6usize,
        done in vec(damage(), 0..6),
    ) {
        let [endpoint, bound] = files();
        let whole = [HOST, NETWORK, PENDING, ENDPOINT, &endpoint, &bound][which];
        let took = read_all(&damaged(whole, &done));
        prop_assert!(!done.is_empty() || took > 0, "the whole of {whole} is not read");
    }

    #[test]
    fn of_a_folder_every_key_is_read_or_counted_and_only_a_conclusive_absence_removes(
        answers in vec(answer(), 1..12),
    ) {
        let mut folder = Folder::new("hosts/".into());
        let mut index = 0;
        let mut known = None;
        for answer in answers {
            let before: Vec<String> = folder.records().map(|(name, _)| name.to_owned()).collect();
            let was_read = folder.was_read();
            let listing = answer.clone();
            let outcome = folder.take_in(answer, |name, entry| {
                let record = HostRecord::parse(name, &entry.value)?;
                Ok(super::HostEntry { record, locked: false })
            });
            let after: Vec<String> = folder.records().map(|(name, _)| name.to_owned()).collect();
            let gone = before.iter().any(|name| !after.contains(name));
            let Some(listing) = listing else {
                prop_assert!(!gone);
                (index, known) = (0, None);
                continue;
            };
            let sentinel = listing.entries.iter().find(|entry| entry.key.ends_with(".keep"));
            let sentinel = sentinel.map(|entry| entry.create_index);
            if gone {
                prop_assert!(was_read && sentinel.is_some() && sentinel == known);
                prop_assert!(listing.index >= index);
            }
            for entry in &listing.entries {
                let name = entry.key.trim_start_matches("hosts/").to_owned();
                let skipped = folder.unreadable().any(|it| it == name);
                prop_assert!(name == ".keep" || skipped || after.contains(&name));
            }
            prop_assert_eq!(sentinel.is_none(), matches!(outcome, Outcome::NoSentinel { .. }));
            (index, known) = (listing.index, sentinel);
        }
    }
}

#[test]
fn records_that_are_huge_or_deep_are_refused_without_a_stack_overflow() {
    let deep = |open: &str, close: &str| {
        format!(r#"{{"v":1,"x":{}1{}}}"#, open.repeat(200_000), close.repeat(200_000))
    };
    for bytes in [deep("[", "]"), deep("{\"a\":", "}"), "[".repeat(1 << 20), "9".repeat(1 << 20)] {
        assert_eq!(read_all(bytes.as_bytes()), 0);
    }
    // What is ignored may be as long as Consul takes it.
    let long = HOST.replace("{\"v\"", &format!("{{\"x\":\"{}\",\"v\"", "y".repeat(500_000)));
    assert!(HostRecord::parse("docker01", long.as_bytes()).is_ok());
}
