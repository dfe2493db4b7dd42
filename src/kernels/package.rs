//! Debian packages: an `ar` archive with a compressed tar archive in it (deb(5)).

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{self, BufReader, Read, Seek, SeekFrom};
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path, PathBuf};

use super::error::Flaw;

const AR: &[u8] = b"!<arch>\n";
const HEADER: usize = 60;

/// More than any kernel package holds, in files and bytes.
const MAX_FILES: usize = 100_000;
const MAX_BYTES: u64 = 8 << 30;
/// Directories above one another. Whoever removes a tree has them all open at once.
const MAX_DEPTH: usize = 32;
/// Bytes of a path, and of one name in it, as Linux has them.
const MAX_PATH: u64 = 4096;
const MAX_NAME: usize = 255;

/// What it takes to unpack one.
pub enum UnpackError {
    Flaw(Flaw),
    /// The package cannot be read.
    Read(io::Error),
    /// There is no room for what is in it.
    Write(io::Error),
}

impl From<Flaw> for UnpackError {
    fn from(flaw: Flaw) -> Self {
        Self::Flaw(flaw)
    }
}

/// Unpacks kernels and modules, and nothing else, to the same places below `to`, which is empty.
pub fn unpack(package: &mut File, to: &Path) -> Result<(), UnpackError> {
    let data = data_member(package)?;
    let mut archive = tar::Archive::new(data.take(MAX_BYTES));
    let damaged = |error: io::Error| Flaw::Damaged(error.to_string());
    let (mut files, mut bytes) = (0, 0);
    // As they are in the archive: else the reader would take a long name whole, however long.
    let mut long_name = None;
    for entry in archive.entries().map_err(damaged)?.raw(true) {
        let mut entry = entry.map_err(damaged)?;
        let kind = entry.header().entry_type();
        if kind.is_gnu_longname() {
            long_name = Some(path_in(&mut entry)?);
            continue;
        }
        if kind.is_pax_local_extensions() || kind.is_pax_global_extensions() {
            return Err(Flaw::Damaged("its archive has pax headers, which no Debian package has".into()).into());
        }
        if kind.is_gnu_longlink() {
            continue;
        }
        let path = match long_name.take() {
            Some(path) => path,
            None => entry.path().map_err(damaged)?.into_owned(),
        };
        let Some(place) = wanted(&path).filter(|_| kind.is_file()) else { continue };
        if place.components().count() > MAX_DEPTH || place.iter().any(|name| name.len() > MAX_NAME) {
            return Err(Flaw::Damaged("it has a path that is too long".into()).into());
        }
        (files, bytes) = (files + 1, bytes + entry.size());
        if files > MAX_FILES || bytes > MAX_BYTES {
            return Err(Flaw::TooLarge(format!("more than {MAX_FILES} files, or {} GiB", MAX_BYTES >> 30)).into());
        }
        let path = to.join(place);
        // Only files and directories of ours are below `to`, so that no link leads elsewhere.
        let made = fs::create_dir_all(path.parent().expect("below `to`")).and_then(|()| File::create_new(&path));
        let mut file = made.map_err(|error| match error.kind() {
            io::ErrorKind::AlreadyExists | io::ErrorKind::NotADirectory | io::ErrorKind::IsADirectory => {
                Flaw::Damaged("a path is in it twice".into()).into()
            }
            _ => UnpackError::Write(error),
        })?;
        copy(&mut entry, &mut file)?;
    }
    Ok(())
}

/// The path that an entry holds for the one behind it.
fn path_in(entry: &mut impl Read) -> Result<PathBuf, Flaw> {
    let mut path = Vec::new();
    entry.take(MAX_PATH + 1).read_to_end(&mut path).map_err(|error| Flaw::Damaged(error.to_string()))?;
    if path.len() as u64 > MAX_PATH {
        return Err(Flaw::Damaged("it has a path that is too long".into()));
    }
    let name = path.split(|b| *b == 0).next().unwrap_or_default();
    Ok(PathBuf::from(OsStr::from_bytes(name)))
}

/// Where a path of the archive goes, if it is a kernel's, a module's or the list of what is built in.
fn wanted(path: &Path) -> Option<PathBuf> {
    let mut parts = Vec::new();
    for component in path.components() {
        match component {
            Component::Normal(part) => parts.push(part.to_str()?),
            Component::CurDir => {}
            _ => return None,
        }
    }
    if parts.first() == Some(&"usr") {
        parts.remove(0);
    }
    let keep = match parts[..] {
        ["boot", name] => name.starts_with("vmlinuz-"),
        ["lib", "modules", _, "vmlinuz" | "modules.builtin"] => true,
        ["lib", "modules", _, .., name] => name.ends_with(".ko") || name.contains(".ko."),
        _ => false,
    };
    keep.then(|| parts.iter().collect())
}

/// Tells a failure to read from one to write.
fn copy(from: &mut impl Read, to: &mut File) -> Result<(), UnpackError> {
    let mut chunk = [0; 64 << 10];
    loop {
        match from.read(&mut chunk) {
            Ok(0) => return Ok(()),
            Ok(n) => io::Write::write_all(to, &chunk[..n]).map_err(UnpackError::Write)?,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(Flaw::Damaged(error.to_string()).into()),
        }
    }
}

/// The uncompressed stream of the member `data.tar.*`.
fn data_member(package: &mut File) -> Result<Box<dyn Read + '_>, UnpackError> {
    let mut magic = Vec::new();
    package.take(AR.len() as u64).read_to_end(&mut magic).map_err(UnpackError::Read)?;
    if magic != AR {
        return Err(what_else(&magic).into());
    }
    loop {
        let mut header = [0; HEADER];
        package.read_exact(&mut header).map_err(|error| match error.kind() {
            io::ErrorKind::UnexpectedEof => Flaw::Damaged("it has no data".into()).into(),
            _ => UnpackError::Read(error),
        })?;
        let text = |range: std::ops::Range<usize>| std::str::from_utf8(&header[range]).unwrap_or("").trim_end();
        let name = text(0..16).trim_end_matches('/');
        let size: u64 = text(48..58).parse().map_err(|_| Flaw::Damaged("a member has no size".into()))?;
        if header[58..] != *b"`\n" {
            return Err(Flaw::Damaged("a member's header is broken".into()).into());
        }
        if let Some(kind) = name.strip_prefix("data.tar") {
            return uncompressed(BufReader::with_capacity(64 << 10, package.take(size)), kind);
        }
        // Members start at even offsets.
        let skip = i64::try_from(size.next_multiple_of(2)).map_err(|_| Flaw::Damaged("a member has no end".into()))?;
        package.seek(SeekFrom::Current(skip)).map_err(UnpackError::Read)?;
    }
}

/// What a file is that is no Debian package.
fn what_else(magic: &[u8]) -> Flaw {
    match magic {
        [0xed, 0xab, 0xee, 0xdb, ..] => Flaw::OtherPackage("an RPM package"),
        [0x28, 0xb5, 0x2f, 0xfd, ..] | [0xfd, b'7', b'z', ..] | [0x1f, 0x8b, ..] => {
            Flaw::OtherPackage("a compressed archive")
        }
        _ => Flaw::NotAPackage,
    }
}

/// Undoes the compression that the ending of a name tells: of a package's data, of a module.
pub fn uncompressed<'a>(packed: impl io::BufRead + 'a, ending: &str) -> Result<Box<dyn Read + 'a>, UnpackError> {
    Ok(match ending {
        "" => Box::new(packed),
        ".gz" => Box::new(flate2::bufread::GzDecoder::new(packed)),
        ".xz" => Box::new(lzma_rust2::XzReader::new(packed, true)),
        ".zst" => {
            let decoder = ruzstd::decoding::StreamingDecoder::new(packed);
            Box::new(decoder.map_err(|error| Flaw::Damaged(error.to_string()))?)
        }
        other => return Err(Flaw::Damaged(format!("its compression {other} is none of gz, xz and zst")).into()),
    })
}

#[cfg(test)]
pub mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::io::Write;

    /// A package with these files.
    pub fn package(files: &[(&str, &[u8])]) -> Vec<u8> {
        let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        gzip.write_all(&tar(files)).unwrap();
        ar("data.tar.gz", &gzip.finish().unwrap())
    }

    pub fn tar(files: &[(&str, &[u8])]) -> Vec<u8> {
        let mut tar = tar::Builder::new(Vec::new());
        for (path, content) in files {
            let mut header = tar::Header::new_gnu();
            // Set by hand, as the builder refuses what a hostile one would not.
            header.as_old_mut().name[..path.len()].copy_from_slice(path.as_bytes());
            header.set_size(content.len() as u64);
            header.set_mode(0o644);
            header.set_cksum();
            tar.append(&header, *content).unwrap();
        }
        tar.into_inner().unwrap()
    }

    /// A package with this data.
    pub fn ar(name: &str, data: &[u8]) -> Vec<u8> {
        let mut package = AR.to_vec();
        for (name, content) in [("debian-binary", &b"2.0\n"[..]), ("control.tar", b"odd"), (name, data)] {
            writeln!(package, "{name:<16}{:<32}{:<10}`", "", content.len()).unwrap();
            package.extend_from_slice(content);
            package.resize(package.len().next_multiple_of(2), b'\n');
        }
        package
    }

    fn unpacked(package: &[u8]) -> (Result<(), UnpackError>, Vec<String>) {
        let (dir, mut file) = (tempfile::tempdir().unwrap(), tempfile::tempfile().unwrap());
        file.write_all(package).unwrap();
        file.rewind().unwrap();
        let inner = dir.path().join("inner");
        fs::create_dir(&inner).unwrap();
        let result = unpack(&mut file, &inner);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1, "nothing outside is written");
        let mut found = Vec::new();
        let mut dirs = vec![inner.clone()];
        while let Some(at) = dirs.pop() {
            for entry in fs::read_dir(at).unwrap().flatten() {
                if entry.file_type().unwrap().is_dir() {
                    dirs.push(entry.path());
                } else {
                    found.push(entry.path().strip_prefix(&inner).unwrap().to_str().unwrap().to_owned());
                }
            }
        }
        found.sort();
        (result, found)
    }

    #[test]
    fn only_kernels_and_modules_come_out() {
        let package = package(&[
            ("./boot/vmlinuz-1", b"k"),
            ("./boot/config-1", b"c"),
            ("./usr/lib/modules/1/kernel/a.ko.xz", b"m"),
            ("./lib/modules/1/modules.builtin", b""),
            ("./usr/share/doc/x", b"d"),
            ("../boot/vmlinuz-2", b"k"),
            ("/boot/vmlinuz-3", b"k"),
            ("./boot/../../boot/vmlinuz-4", b"k"),
        ]);
        let (result, found) = unpacked(&package);
        assert!(result.is_ok());
        assert_eq!(found, ["boot/vmlinuz-1", "lib/modules/1/kernel/a.ko.xz", "lib/modules/1/modules.builtin"]);
    }

    #[test]
    fn what_is_wrong_is_named() {
        let flaw = |package: &[u8]| match unpacked(package).0 {
            Err(UnpackError::Flaw(flaw)) => flaw.to_string(),
            _ => panic!("no flaw was found"),
        };
        let whole = package(&[("./boot/vmlinuz-1", &[1; 5000])]);
        assert!(flaw(b"").contains("neither"));
        assert!(flaw(b"\xed\xab\xee\xdb....").contains("RPM"));
        assert!(flaw(AR).contains("no data"));
        assert!(flaw(&whole[..whole.len() - 40]).contains("damaged"));
        assert!(flaw(&package(&[("./boot/vmlinuz-1", b"k"), ("./boot/vmlinuz-1", b"k")])).contains("twice"));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn any_bytes_may_be_there(at in 0usize..400, noise in proptest::collection::vec(any::<u8>(), 0..40), len in 0usize..500) {
            let mut bytes = package(&[("./boot/vmlinuz-1", b"kernel"), ("./lib/modules/1/a.ko", b"module")]);
            for (to, from) in bytes.iter_mut().skip(at).zip(&noise) {
                *to = *from;
            }
            bytes.truncate(len);
            let _ = unpacked(&bytes);
        }
    }
}
