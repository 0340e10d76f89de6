//! Which Debian mirror this machine's apt uses, from its source files in either format.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};

/// Signs the archive; Debian's own images name it in their sources.
const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

/// A mirror of the Debian archive and what its releases are verified with.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Mirror {
    /// As in the source: `http://mirror.example.org/debian`.
    pub(super) uri: String,
    /// Path of a keyring.
    pub(super) signed_by: String,
}

/// The mirror that apt takes this machine's own Debian release from.
///
/// # Errors
/// This is no Debian, or no source names its release.
pub(super) fn debian_mirror() -> Result<Mirror> {
    let release = fs::read_to_string("/etc/os-release").context("cannot read /etc/os-release")?;
    let codename = release
        .lines()
        .find_map(|line| line.strip_prefix("VERSION_CODENAME="))
        .map(|name| name.trim_matches('"'))
        .context("/etc/os-release names no Debian release")?;
    let mut files = vec![PathBuf::from("/etc/apt/sources.list")];
    if let Ok(folder) = fs::read_dir("/etc/apt/sources.list.d") {
        files.extend(folder.flatten().map(|entry| entry.path()));
    }
    files.sort();
    files
        .iter()
        .filter_map(|file| in_file(file, codename))
        .next()
        .with_context(|| format!("no package source of this machine has {codename} main"))
}

fn in_file(file: &Path, codename: &str) -> Option<Mirror> {
    let text = fs::read_to_string(file).ok()?;
    match file.extension()?.to_str()? {
        "list" => in_list(&text, codename),
        "sources" => in_deb822(&text, codename),
        // apt ignores other names too: `*.disabled`, `*.save`.
        _ => None,
    }
}

/// `deb [signed-by=/path arch=amd64] URI suite component…`
fn in_list(text: &str, codename: &str) -> Option<Mirror> {
    text.lines().find_map(|line| {
        let rest = line.trim().strip_prefix("deb ")?.trim();
        let (options, rest) = match rest.strip_prefix('[') {
            Some(rest) => rest.split_once(']')?,
            None => ("", rest),
        };
        let mut words = rest.split_whitespace();
        let uri = words.next()?;
        let suite = words.next()?;
        let signed_by = options.split_whitespace().find_map(|o| o.strip_prefix("signed-by="));
        (suite == codename && words.any(|word| word == "main")).then(|| mirror(uri, signed_by))
    })
}

/// Stanzas of `Field: value` lines, with blank lines between them.
fn in_deb822(text: &str, codename: &str) -> Option<Mirror> {
    let lines: Vec<&str> = text.lines().filter(|line| !line.starts_with('#')).collect();
    lines.split(|line| line.trim().is_empty()).find_map(|stanza| {
        let fields: BTreeMap<String, &str> = stanza
            .iter()
            .filter(|line| !line.starts_with([' ', '\t']))
            .filter_map(|line| line.split_once(':'))
            .map(|(field, value)| (field.to_ascii_lowercase(), value.trim()))
            .collect();
        let has = |field: &str, word: &str| {
            fields.get(field).is_some_and(|value| value.split_whitespace().any(|w| w == word))
        };
        let enabled = fields.get("enabled").is_none_or(|value| *value != "no");
        let wanted = enabled && has("types", "deb") && has("components", "main");
        if !wanted || !has("suites", codename) {
            return None;
        }
        let uri = fields.get("uris")?.split_whitespace().next()?;
        Some(mirror(uri, fields.get("signed-by").copied()))
    })
}

/// A key that is written into the source itself, and none at all, become Debian's own keyring.
fn mirror(uri: &str, signed_by: Option<&str>) -> Mirror {
    let signed_by = signed_by.filter(|path| path.starts_with('/')).unwrap_or(KEYRING);
    Mirror { uri: uri.to_owned(), signed_by: signed_by.to_owned() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn expected(signed_by: &str) -> Option<Mirror> {
        let uri = "http://mirror.example.org/debian".to_owned();
        Some(Mirror { uri, signed_by: signed_by.to_owned() })
    }

    #[test]
    fn a_one_line_source_gives_its_mirror() {
        let text = "# comment\n\
                    deb https://example.org/other bookworm stable\n\
                    deb http://security.example.org bookworm-security main\n\
                    deb [arch=amd64 signed-by=/k.gpg] http://mirror.example.org/debian bookworm main\n";
        assert_eq!(in_list(text, "bookworm"), expected("/k.gpg"));
        let bare = "deb http://mirror.example.org/debian bookworm main contrib";
        assert_eq!(in_list(bare, "bookworm"), expected(KEYRING));
        assert_eq!(in_list(bare, "trixie"), None);
    }

    #[test]
    fn a_deb822_source_gives_its_mirror() {
        let text = "Types: deb\nEnabled: no\nURIs: http://off.example.org\nSuites: bookworm\n\
                    Components: main\n\nTypes: deb\n# comment within\n\
                    URIs: http://mirror.example.org/debian\nSuites: bookworm bookworm-updates\n\
                    Components: main\nSigned-By: /k.gpg\n";
        assert_eq!(in_deb822(text, "bookworm"), expected("/k.gpg"));
        assert_eq!(in_deb822(text, "trixie"), None);
    }

    #[test]
    fn a_key_inside_a_deb822_source_becomes_debians_keyring() {
        let text = "Types: deb\nURIs: http://mirror.example.org/debian\nSuites: bookworm\n\
                    Components: main\nSigned-By:\n -----BEGIN PGP PUBLIC KEY BLOCK-----\n .\n";
        assert_eq!(in_deb822(text, "bookworm"), expected(KEYRING));
    }
}
