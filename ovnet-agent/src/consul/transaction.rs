//! Transactions, which `consulrs` lacks: all of their steps or none.

use base64::{Engine as _, prelude::BASE64_STANDARD as BASE64};
use consulrs::api::features::{FeaturedEndpoint, Features};
use rustify_derive::Endpoint;
use serde::{Deserialize, Serialize};

/// One step of a transaction. Keys are without the prefix.
#[derive(Clone, Debug)]
pub(super) struct Operation(pub(super) Kv);

#[derive(Clone, Debug, Default, Serialize)]
#[serde(rename_all = "PascalCase")]
pub(super) struct Kv {
    verb: &'static str,
    pub(super) key: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    value: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    index: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    session: Option<String>,
}

impl Operation {
    /// Writes a key whatever it held.
    pub(super) fn set(key: String, value: Vec<u8>) -> Self {
        Self(Kv { verb: "set", key, value: Some(BASE64.encode(&value)), ..Kv::default() })
    }

    /// Writes a key if its index is `index`; 0 stands for a key that does not exist.
    pub(super) fn cas(key: String, value: Vec<u8>, index: u64) -> Self {
        let (value, index) = (Some(BASE64.encode(&value)), Some(index));
        Self(Kv { verb: "cas", key, value, index, ..Kv::default() })
    }

    /// Writes a key and locks it for a session, if no other session has it.
    pub(super) fn lock(key: String, value: Vec<u8>, session: String) -> Self {
        let (value, session) = (Some(BASE64.encode(&value)), Some(session));
        Self(Kv { verb: "lock", key, value, session, ..Kv::default() })
    }

    /// Fails unless the key's index is `index`, which is not 0.
    pub(super) fn check_index(key: String, index: u64) -> Self {
        Self(Kv { verb: "check-index", key, index: Some(index), ..Kv::default() })
    }

    /// Deletes a key if its index is `index`.
    pub(super) fn delete_cas(key: String, index: u64) -> Self {
        Self(Kv { verb: "delete-cas", key, index: Some(index), ..Kv::default() })
    }

    /// Deletes every key of a folder (which ends in a slash).
    pub(super) fn delete_tree(folder: String) -> Self {
        Self(Kv { verb: "delete-tree", key: folder, ..Kv::default() })
    }
}

/// Why a transaction changed nothing.
#[derive(Clone, Debug)]
pub(super) struct Conflict {
    pub(super) errors: Vec<OperationError>,
}

impl Conflict {
    /// What Consul says where the ACL token does not allow one of the steps.
    pub(super) fn denied(&self) -> Option<String> {
        let mut said = self.errors.iter().map(|error| &error.what);
        said.find(|what| what.contains("Permission denied")).cloned()
    }
}

#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub(super) struct OperationError {
    what: String,
}

impl std::fmt::Display for Conflict {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let errors: Vec<_> = self.errors.iter().map(|error| error.what.as_str()).collect();
        f.write_str(&errors.join("; "))
    }
}

/// `PUT /v1/txn`, which consulrs has not.
#[derive(Debug, Endpoint)]
#[endpoint(path = "txn", method = "PUT", response = "TransactionAnswer")]
pub(super) struct Transaction {
    #[endpoint(raw)]
    pub(super) body: Vec<u8>,
}

impl FeaturedEndpoint for Transaction {
    fn features(&self) -> Option<Features> {
        None
    }
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub(super) struct TransactionAnswer {
    pub(super) errors: Option<Vec<OperationError>>,
}
