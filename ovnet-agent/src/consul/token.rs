//! The ACL token: from a file or a variable, never from the command line, which everybody can read.

use std::{
    env, fs,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    sync::{Mutex, PoisonError},
};

use anyhow::{Context as _, Result, ensure};

/// Names the file where no option does, as for Consul's own command.
const FILE_VARIABLE: &str = "CONSUL_HTTP_TOKEN_FILE";
/// Holds the token itself.
const VARIABLE: &str = "CONSUL_HTTP_TOKEN";

/// Where the token comes from, and what it is now.
pub(super) struct Token {
    file: Option<PathBuf>,
    read: Mutex<Read>,
}

struct Read {
    token: Option<String>,
    /// Tells the file as it was read from a later one: its device, inode, size and time of change.
    stamp: Option<[i64; 5]>,
}

impl Token {
    /// The token of `file`, else of the file that `CONSUL_HTTP_TOKEN_FILE` names, else of
    /// `CONSUL_HTTP_TOKEN`, else none. Fails where there is one that cannot be read or be a token.
    pub(super) fn find(file: Option<&Path>) -> Result<Self> {
        let named = || env::var_os(FILE_VARIABLE).filter(|it| !it.is_empty()).map(PathBuf::from);
        let file = file.map(Path::to_owned).or_else(named);
        let read = match &file {
            Some(file) => Read::from(file)?,
            None => {
                let token = env::var(VARIABLE).ok().filter(|token| !token.is_empty());
                if let Some(token) = &token {
                    check(token).with_context(|| format!("read {VARIABLE}"))?;
                }
                Read { token, stamp: None }
            }
        };
        Ok(Self { file, read: Mutex::new(read) })
    }

    /// The token as it is now: a file that was replaced is read again. One that cannot be read
    /// leaves the token what it was.
    pub(super) fn now(&self) -> Option<String> {
        let mut read = self.read.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(file) = &self.file
            && let Ok(stamp) = stamp(file)
            && read.stamp != Some(stamp)
        {
            match Read::from(file) {
                Ok(new) => {
                    tracing::info!(file = %file.display(), "read Consul's token again");
                    *read = new;
                }
                Err(error) => {
                    tracing::warn!("{error:#}; going on with the token before");
                    // So that this is said once.
                    read.stamp = Some(stamp);
                }
            }
        }
        read.token.clone()
    }

    /// Where it comes from, for messages.
    pub(super) fn describe(&self) -> String {
        match &self.file {
            Some(file) => format!("the token of {}", file.display()),
            None if self.now().is_some() => format!("the token of {VARIABLE}"),
            None => "no token (--consul-token-file names one's file)".into(),
        }
    }
}

impl Read {
    fn from(file: &Path) -> Result<Self> {
        let failed = || format!("read Consul's token from {}", file.display());
        // Taken first: what is written meanwhile is then read again.
        let stamp = stamp(file).with_context(failed)?;
        let text = fs::read_to_string(file).with_context(failed)?;
        let token = text.trim();
        ensure!(!token.is_empty(), "{}: the file is empty", failed());
        check(token).with_context(failed)?;
        Ok(Self { token: Some(token.to_owned()), stamp: Some(stamp) })
    }
}

fn stamp(file: &Path) -> Result<[i64; 5]> {
    let data = fs::metadata(file)?;
    // Only ever compared.
    let number = |it: u64| i64::from_ne_bytes(it.to_ne_bytes());
    Ok([
        number(data.dev()),
        number(data.ino()),
        number(data.size()),
        data.ctime(),
        data.ctime_nsec(),
    ])
}

/// Refuses what could not be sent. It does not say what it found: that may be a secret all the same.
fn check(token: &str) -> Result<()> {
    ensure!(token.chars().all(|c| c.is_ascii_graphic()), "it holds characters that no token has");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_file_that_was_replaced_is_read_again_and_a_bad_one_changes_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("token");
        let replace = |text: &str| {
            let new = folder.path().join("new");
            fs::write(&new, text).unwrap();
            fs::rename(&new, &file).unwrap();
        };
        replace("one\n");
        let token = Token::find(Some(&file)).unwrap();
        assert_eq!(token.now().as_deref(), Some("one"));
        for (text, expected) in [("two", "two"), ("", "two"), ("a b\u{1}", "two"), ("six", "six")] {
            replace(text);
            assert_eq!(token.now().as_deref(), Some(expected), "{text:?}");
        }
        fs::remove_file(&file).unwrap();
        assert_eq!(token.now().as_deref(), Some("six"));
        assert!(!token.describe().contains("six"));
    }

    #[test]
    fn a_token_file_that_holds_no_token_is_refused_without_telling_what_it_holds() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("token");
        assert!(Token::find(Some(&file)).is_err());
        for text in ["", " \n", "secret\nsecret", "s\u{e9}cret"] {
            fs::write(&file, text).unwrap();
            let line = format!("{:#}", Token::find(Some(&file)).err().unwrap());
            assert!(line.contains(&file.display().to_string()), "{line}");
            assert!(!line.contains("cret") && !line.contains('\n'), "{line}");
        }
    }
}
