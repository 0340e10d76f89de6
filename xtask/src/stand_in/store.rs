//! What the stand-in holds: keys, locks, sessions and the index, with Consul's rules for them.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use uuid::Uuid;

use super::parse_duration;

/// Everything there is.
#[derive(Debug, Default)]
pub struct Store {
    index: u64,
    pairs: BTreeMap<String, Pair>,
    /// The index of each key's deletion, so that a deletion wakes whoever watches a prefix.
    tombstones: BTreeMap<String, u64>,
    sessions: BTreeMap<String, Session>,
    /// Until when a key cannot be locked, after the session that held it was invalidated.
    delays: BTreeMap<String, Instant>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Pair {
    create: u64,
    modify: u64,
    lock: u64,
    flags: u64,
    value: Vec<u8>,
    session: Option<String>,
}

#[derive(Debug)]
struct Session {
    created: u64,
    options: NewSession,
    expires: Option<Instant>,
}

/// What a session is created with.
#[derive(Debug)]
pub struct NewSession {
    name: String,
    ttl: Option<Duration>,
    delay: Duration,
    delete: bool,
}

impl NewSession {
    /// Reads the body of `/v1/session/create`, refusing a TTL that Consul would refuse.
    pub fn parse(body: &Value) -> Result<Self> {
        let duration = |field: &str| -> Result<Option<Duration>> {
            match body.get(field).and_then(Value::as_str).filter(|text| !text.is_empty()) {
                None => Ok(None),
                Some(text) => {
                    let duration = parse_duration(text);
                    Ok(Some(duration.with_context(|| format!("Invalid {field} '{text}'"))?))
                }
            }
        };
        let ttl = duration("TTL")?;
        if let Some(ttl) = ttl {
            ensure!(
                (10..=86400).contains(&ttl.as_secs()),
                "Invalid Session TTL '{}', must be between [10s=24h0m0s]",
                ttl.as_nanos()
            );
        }
        let behavior = body.get("Behavior").and_then(Value::as_str).unwrap_or("release");
        ensure!(
            ["", "release", "delete"].contains(&behavior),
            "Invalid Behavior setting '{behavior}'"
        );
        Ok(Self {
            name: body.get("Name").and_then(Value::as_str).unwrap_or_default().to_owned(),
            ttl,
            delay: duration("LockDelay")?.unwrap_or(Duration::from_secs(15)),
            delete: behavior == "delete",
        })
    }
}

/// One step of a transaction.
#[derive(Clone, Debug, Default)]
pub struct Operation {
    /// Consul's name of what to do.
    pub verb: String,
    /// The key, or prefix.
    pub key: String,
    /// The value, decoded.
    pub value: Vec<u8>,
    /// The index to compare with.
    pub index: u64,
    /// Opaque flags kept with the value.
    pub flags: u64,
    /// The session that locks or unlocks.
    pub session: String,
}

impl Operation {
    /// Reads one element of the body of `/v1/txn`.
    pub fn parse(element: &Value) -> Result<Self> {
        let kv = element.get("KV").context("only KV operations are known here")?;
        let text = |name: &str| kv.get(name).and_then(Value::as_str).unwrap_or_default().to_owned();
        let number = |name: &str| kv.get(name).and_then(Value::as_u64).unwrap_or(0);
        Ok(Self {
            verb: text("Verb"),
            key: text("Key"),
            value: decode_base64(&text("Value")).context("illegal base64 data")?,
            index: number("Index"),
            flags: number("Flags"),
            session: text("Session"),
        })
    }
}

impl Store {
    /// An empty store; its index is 1, as that of a Consul that was just started.
    pub fn new() -> Self {
        Self { index: 1, ..Self::default() }
    }

    /// The index of the last change.
    pub fn index(&self) -> u64 {
        self.index
    }

    /// The index to block on for one key.
    pub fn key_index(&self, key: &str) -> u64 {
        self.pairs.get(key).map_or(self.index, |pair| pair.modify)
    }

    /// The index to block on for a prefix.
    pub fn prefix_index(&self, prefix: &str) -> u64 {
        let pairs = self.under(prefix).map(|(_, pair)| pair.modify);
        let tombstones = self.tombstones.range(prefix.to_owned()..);
        let tombstones = tombstones.take_while(|(key, _)| key.starts_with(prefix));
        pairs.chain(tombstones.map(|(_, index)| *index)).max().unwrap_or(self.index)
    }

    /// One pair as JSON.
    pub fn get(&self, key: &str) -> Option<Value> {
        self.pairs.get(key).map(|pair| describe(key, pair, true))
    }

    /// One value.
    pub fn raw(&self, key: &str) -> Option<Vec<u8>> {
        self.pairs.get(key).map(|pair| pair.value.clone())
    }

    /// Every pair under a prefix as JSON.
    pub fn list(&self, prefix: &str) -> Vec<Value> {
        self.under(prefix).map(|(key, pair)| describe(key, pair, true)).collect()
    }

    /// Every key under a prefix, up to and including the separator where one is given.
    pub fn keys(&self, prefix: &str, separator: &str) -> Vec<Value> {
        let mut keys: Vec<&str> = self
            .under(prefix)
            .map(|(key, _)| match key[prefix.len()..].find(separator) {
                Some(at) if !separator.is_empty() => &key[..prefix.len() + at + separator.len()],
                _ => key,
            })
            .collect();
        keys.dedup();
        keys.into_iter().map(Value::from).collect()
    }

    /// Carries out all operations at one index, or none; then the errors say which failed and why.
    pub fn apply(&mut self, operations: &[Operation]) -> Result<Vec<Value>, Vec<(usize, String)>> {
        let before = (self.pairs.clone(), self.tombstones.clone());
        self.index += 1;
        let (mut results, mut errors) = (Vec::new(), Vec::new());
        for (number, operation) in operations.iter().enumerate() {
            match self.apply_one(operation) {
                Ok(answer) => results.extend(answer),
                Err(what) => errors.push((number, what)),
            }
        }
        if errors.is_empty() {
            return Ok(results.into_iter().map(|pair| json!({ "KV": pair })).collect());
        }
        (self.pairs, self.tombstones) = before;
        Err(errors)
    }

    fn apply_one(&mut self, operation: &Operation) -> Result<Vec<Value>, String> {
        let Operation { verb, key, index, session, .. } = operation;
        let existing = self.pairs.get(key).cloned();
        let held = existing.as_ref().and_then(|pair| pair.session.clone());
        let written = |pair: &Pair| vec![describe(key, pair, false)];
        match (verb.as_str(), existing) {
            ("set", _) => Ok(written(self.set(operation, held, 0))),
            ("cas", existing) => {
                if existing.map_or(0, |pair| pair.modify) != *index {
                    return Err(format!("failed to set key {key:?}, index is stale"));
                }
                Ok(written(self.set(operation, held, 0)))
            }
            ("lock", existing) => {
                if !self.sessions.contains_key(session) {
                    return Err(format!("failed to lock key {key:?}, invalid session"));
                }
                if self.delays.get(key).is_some_and(|until| Instant::now() < *until) {
                    return Err(format!("failed to lock key {key:?} due to lock delay"));
                }
                let lock = existing.map_or(0, |pair| pair.lock);
                match held {
                    Some(holder) if holder != *session => {
                        Err(format!("failed to lock key {key:?}, lock is already held"))
                    }
                    Some(_) => Ok(written(self.set(operation, Some(session.clone()), lock))),
                    None => Ok(written(self.set(operation, Some(session.clone()), lock + 1))),
                }
            }
            ("unlock", Some(pair)) if held.as_ref() == Some(session) => {
                Ok(written(self.set(operation, None, pair.lock)))
            }
            ("unlock", _) => Err(format!(
                "failed to unlock key {key:?}, lock isn't held, or is held by another session"
            )),
            ("get", Some(pair)) => Ok(vec![describe(key, &pair, true)]),
            ("get", None) => Err(format!("key {key:?} doesn't exist")),
            ("get-tree", _) => Ok(self.list(key)),
            ("check-index", None) => {
                Err(format!("failed to check index, key {key:?} doesn't exist"))
            }
            ("check-index", Some(pair)) if pair.modify == *index => Ok(written(&pair)),
            ("check-index", Some(_)) => {
                Err(format!("current modify index for key {key:?} does not match {index}"))
            }
            ("check-session", Some(pair)) if held.as_ref() == Some(session) => Ok(written(&pair)),
            ("check-session", None) => {
                Err(format!("failed to check session, key {key:?} doesn't exist"))
            }
            ("check-session", Some(_)) => {
                Err(format!("failed session check for key {key:?}: held by another session"))
            }
            ("check-not-exists", None) => Ok(Vec::new()),
            ("check-not-exists", Some(_)) => Err(format!("key {key:?} exists")),
            ("delete", _) => {
                self.delete(key);
                Ok(Vec::new())
            }
            ("delete-cas", Some(pair)) if pair.modify != *index => {
                Err(format!("failed to delete key {key:?}, index is stale"))
            }
            ("delete-cas", _) => {
                self.delete(key);
                Ok(Vec::new())
            }
            ("delete-tree", _) => {
                let keys: Vec<_> = self.under(key).map(|(key, _)| key.to_owned()).collect();
                for key in keys {
                    self.delete(&key);
                }
                Ok(Vec::new())
            }
            (verb, _) => Err(format!("unknown KV verb {verb:?}")),
        }
    }

    fn set(&mut self, operation: &Operation, session: Option<String>, lock: u64) -> &Pair {
        let Operation { key, value, flags, .. } = operation;
        let index = self.index;
        self.tombstones.remove(key);
        let pair = self.pairs.entry(key.clone()).or_insert_with(|| Pair {
            create: index,
            modify: 0,
            lock: 0,
            flags: 0,
            value: Vec::new(),
            session: None,
        });
        let new = Pair {
            create: pair.create,
            modify: pair.modify,
            lock,
            flags: *flags,
            value: value.clone(),
            session,
        };
        // Like Consul, writing what is there already does not move the key's index.
        if pair.modify == 0 || *pair != new {
            *pair = Pair { modify: index, ..new };
        }
        pair
    }

    fn delete(&mut self, key: &str) {
        if self.pairs.remove(key).is_some() {
            self.tombstones.insert(key.to_owned(), self.index);
        }
    }

    /// Creates a session and returns its id.
    pub fn create_session(&mut self, options: NewSession, now: Instant) -> String {
        self.index += 1;
        let id = Uuid::new_v4().to_string();
        let expires = options.ttl.map(|ttl| now + ttl * 2);
        self.sessions.insert(id.clone(), Session { created: self.index, options, expires });
        id
    }

    /// Whether there is a session of this id.
    pub fn has_session(&self, id: &str) -> bool {
        self.sessions.contains_key(id)
    }

    /// Puts off a session's end; `None` where there is no such session.
    pub fn renew_session(&mut self, id: &str, now: Instant) -> Option<Value> {
        let session = self.sessions.get_mut(id)?;
        // Consul's own latitude: it ends a session after twice its TTL.
        session.expires = session.options.ttl.map(|ttl| now + ttl * 2);
        self.sessions.get(id).map(|session| describe_session(id, session))
    }

    /// Ends a session and releases, or deletes, what it held.
    pub fn destroy_session(&mut self, id: &str, now: Instant) {
        let Some(Session { options, .. }) = self.sessions.remove(id) else { return };
        self.index += 1;
        let held: Vec<_> = self
            .pairs
            .iter()
            .filter(|(_, pair)| pair.session.as_deref() == Some(id))
            .map(|(key, _)| key.clone())
            .collect();
        for key in held {
            if options.delete {
                self.delete(&key);
            } else if let Some(pair) = self.pairs.get_mut(&key) {
                pair.session = None;
                pair.modify = self.index;
            }
            if !options.delay.is_zero() {
                self.delays.insert(key, now + options.delay);
            }
        }
    }

    /// Ends the sessions that were not renewed; whether there were any.
    pub fn expire(&mut self, now: Instant) -> bool {
        let expired: Vec<_> = self
            .sessions
            .iter()
            .filter(|(_, session)| session.expires.is_some_and(|expires| expires <= now))
            .map(|(id, _)| id.clone())
            .collect();
        for id in &expired {
            self.destroy_session(id, now);
        }
        !expired.is_empty()
    }

    /// Every session as JSON.
    pub fn sessions(&self) -> Vec<Value> {
        self.sessions.iter().map(|(id, session)| describe_session(id, session)).collect()
    }

    fn under(&self, prefix: &str) -> impl Iterator<Item = (&str, &Pair)> {
        self.pairs
            .range(prefix.to_owned()..)
            .take_while(move |(key, _)| key.starts_with(prefix))
            .map(|(key, pair)| (key.as_str(), pair))
    }
}

fn describe(key: &str, pair: &Pair, with_value: bool) -> Value {
    let Pair { create, modify, lock, flags, value, session } = pair;
    let value = (with_value && !value.is_empty()).then(|| encode_base64(value));
    let mut described = json!({
        "LockIndex": lock, "Key": key, "Flags": flags, "Value": value,
        "CreateIndex": create, "ModifyIndex": modify,
    });
    if let Some(session) = session {
        described["Session"] = json!(session);
    }
    described
}

fn describe_session(id: &str, session: &Session) -> Value {
    let Session { created, options, .. } = session;
    json!({
        "ID": id, "Name": options.name, "Node": "stand-in",
        "LockDelay": u64::try_from(options.delay.as_nanos()).unwrap_or(u64::MAX),
        "Behavior": if options.delete { "delete" } else { "release" },
        "TTL": options.ttl.map_or(String::new(), |ttl| format!("{}s", ttl.as_secs())),
        "NodeChecks": [], "ServiceChecks": null,
        "CreateIndex": created, "ModifyIndex": created,
    })
}

const BASE64: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";

fn encode_base64(bytes: &[u8]) -> String {
    let mut text = String::new();
    for chunk in bytes.chunks(3) {
        let byte = |i: usize| u32::from(chunk.get(i).copied().unwrap_or(0));
        let group = byte(0) << 16 | byte(1) << 8 | byte(2);
        for digit in 0..4 {
            match digit <= chunk.len() {
                true => text.push(char::from(BASE64[(group >> (18 - 6 * digit)) as usize & 63])),
                false => text.push('='),
            }
        }
    }
    text
}

fn decode_base64(text: &str) -> Option<Vec<u8>> {
    let digits = text.trim_end_matches('=');
    if !text.len().is_multiple_of(4) || text.len() - digits.len() > 2 {
        return None;
    }
    let (mut bytes, mut group, mut bits) = (Vec::new(), 0_u32, 0);
    for digit in digits.bytes() {
        let value = BASE64.iter().position(|known| *known == digit)?;
        group = group << 6 | u32::try_from(value).ok()?;
        bits += 6;
        if bits >= 8 {
            bits -= 8;
            bytes.push(u8::try_from(group >> bits & 0xff).ok()?);
        }
        group &= 0xffff;
    }
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn base64_comes_back_as_it_went() {
        for length in 0..70_u8 {
            let bytes: Vec<u8> = (0..length).map(|i| i.wrapping_mul(37)).collect();
            assert_eq!(decode_base64(&encode_base64(&bytes)).unwrap(), bytes);
        }
        assert!(decode_base64("a").is_none() && decode_base64("====").is_none());
    }

    #[test]
    fn a_failed_transaction_changes_nothing() {
        let mut store = Store::new();
        let operation = |verb: &str, key: &str, index| Operation {
            verb: verb.into(),
            key: key.into(),
            index,
            ..Operation::default()
        };
        let operations = [operation("set", "a", 0), operation("check-index", "b", 4)];
        let errors = store.apply(&operations).unwrap_err();
        assert_eq!(errors[0].0, 1);
        assert!(store.get("a").is_none());
    }
}
