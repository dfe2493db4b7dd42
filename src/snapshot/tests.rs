//! Directories and files of snapshots, with a state that a machine has left.

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use proptest::prelude::*;

use super::*;
use crate::backend::{HostFiles, OpenDirectly};
use crate::machine::tests::saved_for_tests;

fn host() -> Arc<dyn HostFiles> {
    Arc::new(OpenDirectly)
}

fn saved() -> Option<Saved> {
    let (config, machine) = saved_for_tests()?;
    Some(Saved { config, state: SavedState { machine, description: VmDescription::default() } })
}

/// A snapshot of a machine with 64 MiB that hold a few words.
fn folder(dir: &Path) -> Option<PathBuf> {
    let path = dir.join("snap");
    let new = NewFolder::begin(&path, &host()).unwrap();
    new.memory().set_len(64 << 20).unwrap();
    new.memory().write_all_at(b"words", 0x1000).unwrap();
    new.finish(&saved()?).unwrap();
    Some(path)
}

fn names(dir: &Path) -> Vec<String> {
    let names = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let mut names: Vec<_> = names.collect();
    names.sort();
    names
}

#[test]
fn a_snapshot_is_there_whole_or_not_at_all() {
    let Some(saved) = saved() else { return };
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("snap");
    let new = NewFolder::begin(&path, &host()).unwrap();
    assert_eq!(names(dir.path()), [".snap.partial"]);
    let error = NewFolder::begin(&path, &host()).err().unwrap();
    assert!(
        matches!(&error, SnapshotError::Write { source, .. } if source.to_string().contains("another process")),
        "{error:?}"
    );
    drop(new);
    assert!(names(dir.path()).is_empty());

    // What a killed process has left.
    fs::create_dir(dir.path().join(".snap.partial")).unwrap();
    fs::write(dir.path().join(".snap.partial/memory"), "half").unwrap();
    let new = NewFolder::begin(&path, &host()).unwrap();
    new.memory().set_len(64 << 20).unwrap();
    new.finish(&saved).unwrap();
    assert_eq!(names(dir.path()), ["snap"]);
    assert_eq!(names(&path), ["config.json", "manifest.json", "memory", "state.json"]);
    assert!(matches!(NewFolder::begin(&path, &host()), Err(SnapshotError::Exists(_))));

    // One that comes in between is not replaced.
    let new = NewFolder::begin(&dir.path().join("other"), &host()).unwrap();
    fs::create_dir(dir.path().join("other")).unwrap();
    assert!(matches!(new.finish(&saved), Err(SnapshotError::Exists(_))));
    assert_eq!(names(dir.path()), ["other", "snap"]);
}

#[test]
fn what_was_written_is_read() {
    let dir = tempfile::tempdir().unwrap();
    let Some(path) = folder(dir.path()) else { return };
    let folder = Folder::open(&path, &OpenDirectly).unwrap();
    let saved = saved().unwrap();
    assert_eq!(folder.snapshot.config, saved.config);
    assert!(folder.stored_memory().unwrap() <= 64 << 10);
    assert!(folder.verify(&OpenDirectly).unwrap().is_empty());
    assert!(!folder.manifest.cpu.features.is_empty());

    let text = fs::read_to_string(path.join("config.json")).unwrap();
    fs::write(path.join("config.json"), text.replace("pci", "pci ").replace("\"pci \"", "\"pci\"") + "\n\n").unwrap();
    assert_eq!(Folder::open(&path, &OpenDirectly).unwrap().verify(&OpenDirectly).unwrap(), ["config.json"]);
}

#[test]
fn the_damaged_part_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let Some(path) = folder(dir.path()) else { return };
    let refused = |name: &str, damage: &dyn Fn(&Path)| {
        let part = path.join(name);
        let before = fs::read(&part).unwrap();
        damage(&part);
        let error = Folder::open(&path, &OpenDirectly).and_then(|folder| folder.verify(&OpenDirectly)).unwrap_err();
        fs::write(&part, before).unwrap();
        match error.hint() {
            Some(_) => error.to_string(),
            None => panic!("no hint for {error}"),
        }
    };
    for part in ["memory", "state.json", "config.json"] {
        let gone = refused(part, &|path| fs::remove_file(path).unwrap());
        assert!(gone.contains(part), "{gone}");
    }
    assert!(refused("manifest.json", &|path| fs::remove_file(path).unwrap()).contains("no manifest.json"));
    assert!(
        refused("memory", &|path| fs::File::options().write(true).open(path).unwrap().set_len(1 << 20).unwrap())
            .contains("it has 1048576 bytes where it had 67108864")
    );
    let flip = |path: &Path| fs::File::options().write(true).open(path).unwrap().write_all_at(b"X", 0x1001).unwrap();
    assert!(refused("memory", &flip).contains("its checksum is another"));
    assert!(refused("state.json", &flip).contains("state.json is damaged: its checksum is another"));
    let say = |what: &'static str| move |path: &Path| fs::write(path, what).unwrap();
    assert!(refused("config.json", &say("{}")).contains("config.json does not say what it should"));
    assert!(refused("manifest.json", &say("{\"format\":\"x\",\"version\":1}")).contains("no snapshot"));
    let newer = refused("manifest.json", &say("{\"format\":\"tranche-snapshot\",\"version\":2}"));
    assert!(newer.contains("is of version 2, and this release knows 1"), "{newer}");
    assert!(Folder::open(&path, &OpenDirectly).unwrap().verify(&OpenDirectly).unwrap().is_empty());
    assert!(matches!(Folder::open(dir.path(), &OpenDirectly), Err(SnapshotError::NotASnapshot(_))));
    assert!(matches!(Folder::open(Path::new("/nowhere"), &OpenDirectly), Err(SnapshotError::NotASnapshot(_))));
}

#[test]
fn two_files_replace_others_when_they_are_whole() {
    let Some(saved) = saved() else { return };
    let dir = tempfile::tempdir().unwrap();
    let (state, memory) = (dir.path().join("state"), dir.path().join("memory"));
    fs::write(&state, "old").unwrap();
    fs::write(&memory, "old").unwrap();
    let new = NewFiles::begin(&state, &memory, &host()).unwrap();
    new.memory().set_len(64 << 20).unwrap();
    drop(new);
    assert_eq!(names(dir.path()), ["memory", "state"]);
    assert_eq!(fs::read(&memory).unwrap(), b"old");
    assert!(matches!(Snapshot::open_files(&state, &memory, &OpenDirectly), Err(SnapshotError::Syntax { .. })));

    let new = NewFiles::begin(&state, &memory, &host()).unwrap();
    new.memory().set_len(64 << 20).unwrap();
    new.finish(&saved).unwrap();
    assert_eq!(names(dir.path()), ["memory", "state"]);
    let opened = Snapshot::open_files(&state, &memory, &OpenDirectly).unwrap();
    assert_eq!(opened.config, saved.config);
    assert!(matches!(
        Snapshot::open_files(&memory, &memory, &OpenDirectly),
        Err(SnapshotError::Syntax { .. } | SnapshotError::Damaged { .. })
    ));
    assert!(matches!(NewFiles::begin(&state, Path::new("/nowhere/m"), &host()), Err(SnapshotError::Write { .. })));
}

/// A copy of one snapshot, which was brought to stable storage once.
fn copy(dir: &Path) -> Option<PathBuf> {
    static ONE: std::sync::OnceLock<Option<(tempfile::TempDir, PathBuf)>> = std::sync::OnceLock::new();
    let one = ONE.get_or_init(|| {
        let dir = tempfile::tempdir().unwrap();
        folder(dir.path()).map(|path| (dir, path))
    });
    let (_, from) = one.as_ref()?;
    let path = dir.join("copy");
    fs::create_dir(&path).unwrap();
    for part in DOCUMENTS {
        fs::copy(from.join(part), path.join(part)).unwrap();
    }
    let memory = fs::File::create(path.join("memory")).unwrap();
    memory.set_len(64 << 20).unwrap();
    memory.write_all_at(b"words", 0x1000).unwrap();
    Some(path)
}

const DOCUMENTS: [&str; 3] = ["config.json", "state.json", "manifest.json"];

proptest! {
    /// Whatever is in a document, it is read or refused.
    #[test]
    fn hostile_documents_are_refused(part in 0usize..3, at in any::<prop::sample::Index>(), bytes in prop::collection::vec(any::<u8>(), 1..8)) {
        let dir = tempfile::tempdir().unwrap();
        let Some(path) = copy(dir.path()) else { return Ok(()) };
        let part = path.join(DOCUMENTS[part]);
        let mut text = fs::read(&part).unwrap();
        let at = at.index(text.len());
        text.splice(at..(at + bytes.len()).min(text.len()), bytes);
        fs::write(&part, &text).unwrap();
        let _ = Folder::open(&path, &OpenDirectly).map(|folder| folder.verify(&OpenDirectly));
        // Without the checksum in front.
        let _ = serde_json::from_slice::<SavedState>(&text);
    }

    /// One byte is another, in any file of a snapshot: the file is named.
    #[test]
    fn damage_is_found_where_it_is(part in 0usize..3, at in any::<prop::sample::Index>(), flip in 1u8.., cut in any::<bool>()) {
        let dir = tempfile::tempdir().unwrap();
        let Some(path) = copy(dir.path()) else { return Ok(()) };
        let name = ["config.json", "state.json", "memory"][part];
        let file = fs::File::options().read(true).write(true).open(path.join(name)).unwrap();
        let at = at.index(file.metadata().unwrap().len() as usize) as u64;
        if cut {
            file.set_len(at).unwrap();
        } else {
            let mut byte = [0];
            file.read_exact_at(&mut byte, at).unwrap();
            file.write_all_at(&[byte[0] ^ flip], at).unwrap();
        }
        match Folder::open(&path, &OpenDirectly).and_then(|folder| folder.verify(&OpenDirectly)) {
            // A person may change it.
            Ok(changed) => prop_assert_eq!(changed, ["config.json"]),
            Err(error) => prop_assert!(error.to_string().contains(&format!("{name} ")), "{}", error),
        }
    }

    /// What a manifest says of the others has to be so.
    #[test]
    fn a_manifest_that_was_changed_says_the_same_or_is_refused(at in any::<prop::sample::Index>(), flip in 1u8..) {
        let dir = tempfile::tempdir().unwrap();
        let Some(path) = copy(dir.path()) else { return Ok(()) };
        let parts = |path: &Path| Folder::read_manifest(path, &OpenDirectly).unwrap().parts;
        let before = parts(&path);
        let mut text = fs::read(path.join("manifest.json")).unwrap();
        let at = at.index(text.len());
        text[at] ^= flip;
        fs::write(path.join("manifest.json"), text).unwrap();
        match Folder::open(&path, &OpenDirectly).and_then(|folder| folder.verify(&OpenDirectly)) {
            Ok(changed) if changed.is_empty() => prop_assert_eq!(parts(&path), before),
            Ok(_) => {}
            Err(error) => prop_assert!(error.hint().is_some()),
        }
    }
}
