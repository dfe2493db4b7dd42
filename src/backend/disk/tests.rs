//! Disks as devices use them.

use std::sync::{PoisonError, RwLock};

use super::*;
use crate::backend::OpenDirectly;
use crate::memory::anonymous;
use vm_memory::{Bytes, GuestAddress};

/// Programs that a test starts have all our locks for a moment, until they have begun. Whoever starts one takes
/// this for itself; a test that looks at locks shares it.
pub static STARTING_PROGRAMS: RwLock<()> = RwLock::new(());

/// Opens what nobody else has locked. A program that another test starts has our locks too, for a moment: they are not
/// held against us.
pub fn patiently<T, E: Into<Box<dyn std::error::Error>>>(mut open: impl FnMut() -> Result<T, E>) -> T {
    for _ in 0..1000 {
        match open().map_err(Into::into) {
            Ok(opened) => return opened,
            Err(error) if error.to_string().ends_with("is in use already") => {
                std::thread::sleep(std::time::Duration::from_millis(5));
            }
            Err(error) => panic!("{error}"),
        }
    }
    panic!("it is locked for good");
}

fn open(path: &Path, read_only: bool) -> Result<Disk, DiskError> {
    Disk::open(&OpenDirectly, path, read_only)
}

#[test]
fn only_disks_are_disks() {
    let dir = tempfile::tempdir().unwrap();
    let fifo = dir.path().join("fifo");
    rustix::fs::mknodat(rustix::fs::CWD, &fifo, rustix::fs::FileType::Fifo, 0o600.into(), 0).unwrap();
    let socket = dir.path().join("socket");
    let _listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
    for (path, read_only, what) in [
        (dir.path(), false, "a directory"),
        (dir.path(), true, "a directory"),
        (fifo.as_path(), false, "a named pipe"),
        (fifo.as_path(), true, "a named pipe"),
        (socket.as_path(), false, "a socket"),
        (Path::new("/dev/null"), false, "a character device"),
    ] {
        let error = open(path, read_only).unwrap_err();
        assert!(error.to_string().contains(what), "{error}");
    }
    let missing = open(&dir.path().join("missing"), false).unwrap_err();
    assert!(matches!(&missing, DiskError::Open { source, .. } if source.kind() == io::ErrorKind::NotFound));
    let small = dir.path().join("small");
    std::fs::write(&small, [0; 511]).unwrap();
    assert!(matches!(open(&small, false).unwrap_err(), DiskError::Empty { .. }));
    std::fs::write(&small, [0; 1300]).unwrap();
    assert_eq!(open(&small, false).unwrap().bytes(), 1024);
}

#[test]
fn one_writer_or_many_readers() {
    let _quiet = STARTING_PROGRAMS.read().unwrap_or_else(PoisonError::into_inner);
    let file = tempfile::NamedTempFile::new().unwrap();
    file.as_file().set_len(4096).unwrap();
    let writer = open(file.path(), false).unwrap();
    assert!(matches!(open(file.path(), false), Err(DiskError::Locked { read_only: false, .. })));
    assert!(matches!(open(file.path(), true), Err(DiskError::Locked { read_only: true, .. })));
    drop(writer);
    let _readers = (open(file.path(), true).unwrap(), open(file.path(), true).unwrap());
    assert!(open(file.path(), false).unwrap_err().hint().unwrap().contains(",ro"));
}

#[test]
fn long_lists_of_buffers_and_files_that_shrink() {
    let ram = anonymous(&[(GuestAddress(0), 0x1_0000)]).unwrap();
    let file = tempfile::NamedTempFile::new().unwrap();
    let contents: Vec<u8> = (0..8192u32).map(|i| (i % 251) as u8).collect();
    std::fs::write(file.path(), &contents).unwrap();
    let disk = open(file.path(), false).unwrap();
    let mut buf = IoBuf::new(ram.clone());
    // Four bytes apiece: twice what one system call takes.
    for i in 0..2048 {
        buf.push(i * 8, 4).unwrap();
    }
    let mut waited = 0;
    disk.read(&mut buf, 0, Some(&mut || waited += 1)).unwrap();
    assert!(waited <= 1);
    for i in 0..2048 {
        let mut got = [0; 4];
        ram.read_slice(&mut got, GuestAddress(i * 8)).unwrap();
        assert_eq!(got, contents[i as usize * 4..][..4]);
    }
    file.as_file().set_len(4096).unwrap();
    buf.push(0, 8192).unwrap();
    assert_eq!(disk.read(&mut buf, 0, None).unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
}
