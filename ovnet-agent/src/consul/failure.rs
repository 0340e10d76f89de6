//! How requests to Consul fail, and what a user is told of it.

use std::time::Duration;

use anyhow::anyhow;
use consulrs::error::ClientError;

use super::{connect, token::Token};

/// Characters of an answer's text that are shown.
const LONGEST_LINE: usize = 200;

/// Consul's refusal, which is the same however often one asks.
#[derive(Debug)]
pub(super) struct Refused(String);

impl std::fmt::Display for Refused {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Refused {}

/// How a request failed.
pub(super) enum Failure {
    /// Consul answered, with an error.
    Answered { code: u16, message: String },
    /// No answer, or none that can be read.
    Unreached(String),
    /// No answer within this time.
    Late(Duration),
}

impl Failure {
    /// The one line a user reads: what failed and what to do. `consul` is its address, `prefix` what
    /// we may write under.
    pub(super) fn explain(self, consul: &str, token: &Token, prefix: &str) -> anyhow::Error {
        match self.in_one_line() {
            // Consul's words for a token that it does not know, not even as one without rights.
            Self::Answered { code: 403, message } if message.contains("ACL not found") => {
                Refused(format!(
                    "Consul at {consul} does not know {} ({message}): was it deleted?",
                    token.describe()
                ))
                .into()
            }
            Self::Answered { code: 403, message } => Refused(format!(
                "Consul at {consul} refused access ({message}): {} does not allow to write under \
                 {prefix} and to create sessions, see consul-policy.hcl",
                token.describe()
            ))
            .into(),
            Self::Answered { code, message } => {
                anyhow!("Consul at {consul} answered {code}: {message}")
            }
            Self::Unreached(cause) => match connect::advice(consul, &cause) {
                Some(advice) => anyhow!("cannot talk to Consul at {consul}: {cause}: {advice}"),
                None => anyhow!("cannot reach Consul at {consul}: {cause}"),
            },
            Self::Late(limit) => {
                anyhow!("cannot reach Consul at {consul}: no answer within {} s", limit.as_secs())
            }
        }
    }
}

impl Failure {
    /// Without the rest of a page that something in front of Consul may have answered with.
    fn in_one_line(self) -> Self {
        match self {
            Self::Answered { code, message } => {
                let line = message.lines().next().unwrap_or_default();
                let line = line.chars().filter(|it| !it.is_control()).take(LONGEST_LINE);
                Self::Answered { code, message: line.collect() }
            }
            other => other,
        }
    }
}

impl From<ClientError> for Failure {
    fn from(error: ClientError) -> Self {
        match error {
            ClientError::APIError { code, message } => {
                let message = message.unwrap_or_default().trim().to_owned();
                Self::Answered { code, message }
            }
            // The outer errors of the chain only say that an error occurred; the innermost one is
            // the cause ("Connection refused (os error 111)").
            error => Self::Unreached(anyhow::Error::from(error).root_cause().to_string()),
        }
    }
}

/// The request's outcome, or the failure to have one in time.
pub(super) async fn bounded<T>(
    limit: Duration,
    request: impl Future<Output = Result<T, Failure>>,
) -> Result<T, Failure> {
    tokio::time::timeout(limit, request).await.unwrap_or(Err(Failure::Late(limit)))
}
