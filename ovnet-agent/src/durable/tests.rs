//! Every state a crash can leave, and what is read from each.

use std::collections::BTreeMap;

use serde::Deserialize;

use super::*;

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Object {
    id: String,
    text: String,
}

fn object(id: &str, text: &str) -> Object {
    Object { id: id.into(), text: text.into() }
}

/// [`Effect`] with what it borrows.
#[derive(Clone, Debug)]
enum Done {
    Write(PathBuf, Vec<u8>),
    Sync(PathBuf),
    Rename(PathBuf, PathBuf),
    SyncFolder,
    Remove(PathBuf),
}

/// Carries effects out and remembers them.
#[derive(Default)]
struct Recorder(Vec<Done>);

impl Disk for Recorder {
    fn carry_out(&mut self, effect: Effect<'_>) -> io::Result<()> {
        self.0.push(match effect {
            Effect::Write(path, _, bytes) => Done::Write(path.into(), bytes.into()),
            Effect::Sync(path) => Done::Sync(path.into()),
            Effect::Rename(from, to) => Done::Rename(from.into(), to.into()),
            Effect::SyncFolder(_) => Done::SyncFolder,
            Effect::Remove(path) => Done::Remove(path.into()),
        });
        Kernel.carry_out(effect)
    }
}

/// What a crash may leave: content by name.
type Names = BTreeMap<PathBuf, Vec<u8>>;

/// Every state that may be on disk after a cut of the power behind these effects, begun with
/// `before`. What was not synced may be there or not, each for itself: names until their folder is
/// synced, in their order, and content until its file is, cut at any byte.
fn left(before: &Names, done: &[Done]) -> Vec<Names> {
    let synced_names = done.iter().rposition(|it| matches!(it, Done::SyncFolder)).unwrap_or(0);
    let names: Vec<usize> = (0..done.len())
        .filter(|at| !matches!(done[*at], Done::Sync(_) | Done::SyncFolder))
        .collect();
    let must = names.iter().filter(|at| **at < synced_names).count();
    let mut states = Vec::new();
    for count in must..=names.len() {
        // Files by a number of their own: content belongs to a file and not to a name.
        let mut state = before.clone();
        let mut cut: Option<(PathBuf, Vec<u8>)> = None;
        for at in &names[..count] {
            match &done[*at] {
                Done::Write(path, bytes) => {
                    let synced = done.iter().any(|it| matches!(it, Done::Sync(of) if of == path));
                    state.insert(path.clone(), bytes.clone());
                    cut = (!synced).then(|| (path.clone(), bytes.clone()));
                }
                Done::Rename(from, to) => {
                    if let Some(bytes) = state.remove(from) {
                        state.insert(to.clone(), bytes);
                    }
                    if let Some((path, _)) = &mut cut
                        && path == from
                    {
                        path.clone_from(to);
                    }
                }
                Done::Remove(path) => {
                    state.remove(path);
                    cut = cut.filter(|(of, _)| of != path);
                }
                Done::Sync(_) | Done::SyncFolder => {}
            }
        }
        if let Some((path, bytes)) = cut {
            for length in 0..bytes.len() {
                let mut state = state.clone();
                state.insert(path.clone(), bytes[..length].to_vec());
                states.push(state);
            }
        }
        states.push(state);
    }
    states
}

fn contents(folder: &Path) -> Names {
    let files = fs::read_dir(folder).unwrap().map(|it| it.unwrap().path());
    files.map(|path| (path.clone(), fs::read(&path).unwrap())).collect()
}

/// Does something to a folder, and reads the folder in every state that a cut at any point of it
/// can leave. Gives what was read, each once.
fn outcomes(
    prepare: impl Fn(&Folder),
    act: impl Fn(&mut Recorder, &Folder) -> io::Result<()>,
) -> Vec<Vec<Object>> {
    let place = tempfile::tempdir().unwrap();
    let folder = Folder::open(place.path()).unwrap();
    prepare(&folder);
    let before = contents(place.path());
    let mut recorder = Recorder::default();
    act(&mut recorder, &folder).unwrap();
    let mut found: Vec<Vec<Object>> = Vec::new();
    for cut in 0..=recorder.0.len() {
        for state in left(&before, &recorder.0[..cut]) {
            for path in contents(place.path()).keys() {
                fs::remove_file(path).unwrap();
            }
            for (path, bytes) in &state {
                fs::write(path, bytes).unwrap();
            }
            let again = Folder::open(place.path()).unwrap();
            let loaded = again.load(|it: &Object| &it.id).unwrap();
            assert_eq!(loaded.set_aside, 0, "{cut} of {:?}: {state:?}", recorder.0);
            let rest = contents(place.path());
            assert_eq!(rest.len(), loaded.objects.len(), "something is left: {rest:?}");
            if !found.contains(&loaded.objects) {
                found.push(loaded.objects);
            }
        }
    }
    found
}

#[test]
fn a_cut_at_any_byte_of_any_write_leaves_the_old_or_the_new() {
    let (kept, old, new) = (object("k", "kept"), object("a", "old"), object("a", "a newer one"));
    let write = |disk: &mut Recorder, folder: &Folder, object: &Object| {
        let bytes = serde_json::to_vec_pretty(object).unwrap();
        replace_on(disk, &folder.path_of(&object.id), 0o600, &bytes)
    };
    let first = outcomes(
        |folder| folder.store("k", &kept).unwrap(),
        |disk, folder| write(disk, folder, &new),
    );
    assert_eq!(first, [vec![kept.clone()], vec![new.clone(), kept.clone()]]);

    let both = |folder: &Folder| {
        folder.store("k", &kept).unwrap();
        folder.store("a", &old).unwrap();
        // Of a write that was cut short before: it must be in nobody's way.
        fs::write(folder.path_of("a").with_extension("json.ovnet-new"), "{\"id").unwrap();
    };
    let replaced = outcomes(both, |disk, folder| write(disk, folder, &new));
    assert_eq!(replaced, [vec![old.clone(), kept.clone()], vec![new, kept.clone()]]);

    let removed = outcomes(both, |disk, folder| remove_on(disk, &folder.path_of("a")));
    assert_eq!(removed, [vec![old, kept.clone()], vec![kept]]);
}

/// The model would find what it is there for: a rename before the content is on disk.
#[test]
fn without_its_sync_a_write_would_leave_half_a_file() {
    struct Careless(Recorder);
    impl Disk for Careless {
        fn carry_out(&mut self, effect: Effect<'_>) -> io::Result<()> {
            match effect {
                Effect::Sync(_) => Ok(()),
                other => self.0.carry_out(other),
            }
        }
    }
    let place = tempfile::tempdir().unwrap();
    let path = place.path().join("a.json");
    let mut careless = Careless(Recorder::default());
    replace_on(&mut careless, &path, 0o600, b"whole").unwrap();
    let states = left(&Names::new(), &careless.0.0);
    assert!(states.iter().any(|state| state.get(&path).is_some_and(|it| it == b"who")));
}

#[test]
fn a_write_that_fails_leaves_the_old_file_and_nothing_else() {
    /// Has room for the name and for nothing in it.
    struct Full;
    impl Disk for Full {
        fn carry_out(&mut self, effect: Effect<'_>) -> io::Result<()> {
            match effect {
                Effect::Write(path, mode, bytes) => {
                    Kernel.carry_out(Effect::Write(path, mode, &bytes[..3]))?;
                    Err(io::Error::from_raw_os_error(libc::ENOSPC))
                }
                other => Kernel.carry_out(other),
            }
        }
    }
    let place = tempfile::tempdir().unwrap();
    let folder = Folder::open(place.path()).unwrap();
    folder.store("a", &object("a", "old")).unwrap();
    let before = contents(place.path());
    let error = replace_on(&mut Full, &folder.path_of("a"), 0o600, b"newer").unwrap_err();
    assert_eq!(contents(place.path()), before);
    let line = format!("{:#}", told(error, "write", &folder.path_of("a")));
    assert!(line.contains("the disk is full: free some space under"), "{line}");
}

#[test]
fn what_cannot_be_read_is_set_aside_once_and_hides_nothing() {
    let place = tempfile::tempdir().unwrap();
    let folder = Folder::open(place.path()).unwrap();
    folder.store("a", &object("a", "whole")).unwrap();
    let whole = fs::read(folder.path_of("a")).unwrap();
    fs::write(folder.path_of("cut"), &whole[..whole.len() / 2]).unwrap();
    fs::write(folder.path_of("empty"), "").unwrap();
    fs::write(folder.path_of("other"), &whole).unwrap();
    fs::write(folder.path_of("zeros"), [0; 4096]).unwrap();
    fs::create_dir(folder.path_of("folder")).unwrap();
    let load = || folder.load(|it: &Object| &it.id).unwrap();
    assert_eq!(load(), Loaded { objects: vec![object("a", "whole")], set_aside: 5 });
    assert_eq!(load().set_aside, 0);
    let aside = ["cut", "empty", "folder", "other", "zeros"].map(str::to_owned);
    assert_eq!(folder.set_aside().unwrap(), BTreeSet::from(aside));
    assert_eq!(folder.ids().unwrap(), BTreeSet::from(["a".to_owned()]));

    // What is stored anew is aside no more, and what is removed is gone whole.
    folder.store("cut", &object("cut", "again")).unwrap();
    assert!(!folder.set_aside().unwrap().contains("cut"));
    folder.remove("cut").unwrap();
    folder.remove("cut").unwrap();
    assert!(!folder.path_of("cut").with_extension(ASIDE).exists());
}

#[test]
fn a_folder_is_roots_alone_and_an_id_cannot_leave_it() {
    let place = tempfile::tempdir().unwrap();
    let path = place.path().join("x/endpoints");
    let folder = Folder::open(&path).unwrap();
    for made in [path.as_path(), &place.path().join("x")] {
        assert_eq!(fs::metadata(made).unwrap().permissions().mode() & 0o777, 0o700);
    }
    assert_eq!(folder.path_of("../../x").parent(), Some(path.as_path()));
    folder.store("a", &object("a", "")).unwrap();
    assert_eq!(fs::metadata(folder.path_of("a")).unwrap().permissions().mode() & 0o777, 0o600);
}
