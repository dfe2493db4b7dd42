//! Which file system a device holds, and by which names it may be asked for, told by its superblock.

use std::fmt::Write as _;

/// Bytes from a device's start that hold all superblocks known here: btrfs's is the last, at 64 KiB.
pub const PROBED: usize = 68 << 10;

/// A file system that a root may be on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FileSystem {
    Ext4,
    Xfs,
    Btrfs,
    Squashfs,
    Erofs,
}

impl FileSystem {
    pub const ALL: [Self; 5] = [Self::Ext4, Self::Xfs, Self::Btrfs, Self::Squashfs, Self::Erofs];

    /// As mount(2) and the kernel's module call it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Ext4 => "ext4",
            Self::Xfs => "xfs",
            Self::Btrfs => "btrfs",
            Self::Squashfs => "squashfs",
            Self::Erofs => "erofs",
        }
    }
}

/// What a superblock says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Superblock {
    pub kind: FileSystem,
    /// Lower case, with hyphens.
    pub uuid: Option<String>,
    pub label: Option<String>,
}

/// Where a file system's superblock has what, in bytes from the start of the device.
struct Layout {
    kind: FileSystem,
    magic: (usize, &'static [u8]),
    uuid: Option<usize>,
    /// Offset and length of the label, which ends at its first NUL.
    label: Option<(usize, usize)>,
}

/// Linux's fs/ext4/ext4.h, fs/xfs/libxfs/xfs_format.h, fs/btrfs/ctree.h, fs/squashfs/squashfs_fs.h, fs/erofs/erofs_fs.h.
const LAYOUTS: [Layout; 5] = [
    Layout {
        kind: FileSystem::Ext4,
        magic: (1024 + 0x38, &[0x53, 0xef]),
        uuid: Some(1024 + 0x68),
        label: Some((1024 + 0x78, 16)),
    },
    Layout { kind: FileSystem::Xfs, magic: (0, b"XFSB"), uuid: Some(32), label: Some((108, 12)) },
    Layout {
        kind: FileSystem::Btrfs,
        magic: (0x1_0040, b"_BHRfS_M"),
        uuid: Some(0x1_0020),
        label: Some((0x1_012b, 256)),
    },
    Layout { kind: FileSystem::Squashfs, magic: (0, b"hsqs"), uuid: None, label: None },
    Layout {
        kind: FileSystem::Erofs,
        magic: (1024, &[0xe2, 0xe1, 0xf5, 0xe0]),
        uuid: Some(1024 + 48),
        label: Some((1024 + 64, 16)),
    },
];

/// Recognizes a file system by the first [`PROBED`] bytes of its device, or as many as there are.
#[must_use]
pub fn probe(start: &[u8]) -> Option<Superblock> {
    let at = |offset: usize, len: usize| start.get(offset..offset + len);
    let layout = LAYOUTS.iter().find(|layout| at(layout.magic.0, layout.magic.1.len()) == Some(layout.magic.1))?;
    let uuid = layout.uuid.and_then(|offset| at(offset, 16)).filter(|bytes| bytes.iter().any(|b| *b != 0));
    let label = layout.label.and_then(|(offset, len)| at(offset, len)).map(until_nul).filter(|l| !l.is_empty());
    Some(Superblock {
        kind: layout.kind,
        uuid: uuid.map(|bytes| format_uuid(bytes.try_into().expect("16 bytes"))),
        label: label.map(|label| String::from_utf8_lossy(label).into_owned()),
    })
}

fn until_nul(bytes: &[u8]) -> &[u8] {
    bytes.split(|b| *b == 0).next().unwrap_or_default()
}

/// A UUID as people write it, of bytes in the order in which they are written.
#[must_use]
pub fn format_uuid(bytes: &[u8; 16]) -> String {
    let mut text = String::with_capacity(36);
    for (i, byte) in bytes.iter().enumerate() {
        if [4, 6, 8, 10].contains(&i) {
            text.push('-');
        }
        let _ = write!(text, "{byte:02x}");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::process::Command;

    fn with(parts: &[(usize, &[u8])]) -> Vec<u8> {
        let mut start = vec![0; PROBED];
        for (at, bytes) in parts {
            start[*at..at + bytes.len()].copy_from_slice(bytes);
        }
        start
    }

    #[test]
    fn each_is_known_by_its_magic_alone() {
        for layout in &LAYOUTS {
            let found = probe(&with(&[layout.magic])).unwrap();
            assert_eq!((found.kind, found.uuid, found.label), (layout.kind, None, None));
        }
        assert_eq!(probe(&[0; PROBED]), None);
        assert_eq!(probe(&[]), None);
    }

    #[test]
    fn names_are_read_as_the_makers_of_file_systems_wrote_them() {
        let dir = tempfile::tempdir().unwrap();
        let uuid = "0123abcd-89ef-4a5b-8c6d-7e8f90a1b2c3";
        let content = dir.path().join("content");
        std::fs::create_dir(&content).unwrap();
        let (image, from) = (dir.path().join("image"), content.to_str().unwrap().to_owned());
        let image_name = image.to_str().unwrap().to_owned();
        type Maker<'a> = (&'a str, &'a [&'a str], Option<&'a str>, Option<&'a str>);
        let makers: [Maker<'_>; 5] = [
            ("mke2fs", &["-q", "-t", "ext4", "-L", "a label", "-U", uuid, "IMAGE"], Some(uuid), Some("a label")),
            (
                "mkfs.xfs",
                &["-q", "-L", "a-label", "-m", "uuid=0123abcd-89ef-4a5b-8c6d-7e8f90a1b2c3", "IMAGE"],
                Some(uuid),
                Some("a-label"),
            ),
            ("mkfs.btrfs", &["-q", "-L", "a label", "-U", uuid, "IMAGE"], Some(uuid), Some("a label")),
            ("mksquashfs", &["FROM", "IMAGE", "-noappend", "-quiet"], None, None),
            ("mkfs.erofs", &["-U", uuid, "IMAGE", "FROM"], Some(uuid), None),
        ];
        for ((program, arguments, uuid, label), kind) in makers.into_iter().zip(FileSystem::ALL) {
            std::fs::File::create(&image).unwrap().set_len(512 << 20).unwrap();
            let path = format!("{}:/sbin:/usr/sbin", std::env::var("PATH").unwrap());
            let arguments = arguments.iter().map(|a| a.replace("IMAGE", &image_name).replace("FROM", &from));
            let made = Command::new("env").arg(format!("PATH={path}")).arg(program).args(arguments).output().unwrap();
            assert_ne!(made.status.code(), Some(127), "{program} is not installed: run `make setup`");
            assert!(made.status.success(), "{program}: {}", String::from_utf8_lossy(&made.stderr));
            let start = std::fs::read(&image).unwrap();
            let found = probe(&start[..PROBED.min(start.len())]).unwrap_or_else(|| panic!("{program}: unknown"));
            assert_eq!((found.kind, found.uuid.as_deref(), found.label.as_deref()), (kind, uuid, label), "{program}");
        }
    }

    proptest! {
        #[test]
        fn any_bytes_may_be_there(which in 0..LAYOUTS.len(), noise in proptest::collection::vec(any::<u8>(), 0..2048), at in 0..PROBED, len in 0..=PROBED) {
            let mut start = with(&[LAYOUTS[which].magic]);
            let end = (at + noise.len()).min(PROBED);
            start[at..end].copy_from_slice(&noise[..end - at]);
            if let Some(found) = probe(&start[..len]) {
                prop_assert!(found.uuid.is_none_or(|uuid| uuid.len() == 36));
            }
        }
    }
}
