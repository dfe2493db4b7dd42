//! An initrd: a cpio archive of the "newc" kind (Linux's Documentation/driver-api/early-userspace/buffer-format.rst).
//! The same content gives the same bytes.

use std::io::{self, Write};

const DIRECTORY: u32 = 0o040_000;
const REGULAR: u32 = 0o100_000;
const CHARACTERS: u32 = 0o020_000;

pub struct Archive<W> {
    out: W,
    written: u64,
    inode: u32,
}

impl<W: Write> Archive<W> {
    pub fn new(out: W) -> Self {
        Self { out, written: 0, inode: 0 }
    }

    pub fn directory(&mut self, path: &str) -> io::Result<()> {
        self.entry(path, DIRECTORY | 0o755, (0, 0), &[])
    }

    /// # Errors
    /// `FileTooLarge` past 4 GiB, which the format cannot tell.
    pub fn file(&mut self, path: &str, mode: u32, content: &[u8]) -> io::Result<()> {
        self.entry(path, REGULAR | mode, (0, 0), content)
    }

    pub fn character_device(&mut self, path: &str, mode: u32, major: u32, minor: u32) -> io::Result<()> {
        self.entry(path, CHARACTERS | mode, (major, minor), &[])
    }

    pub fn finish(mut self) -> io::Result<W> {
        self.entry("TRAILER!!!", 0, (0, 0), &[])?;
        self.out.flush()?;
        Ok(self.out)
    }

    fn entry(&mut self, path: &str, mode: u32, device: (u32, u32), content: &[u8]) -> io::Result<()> {
        let size = u32::try_from(content.len()).map_err(|_| io::ErrorKind::FileTooLarge)?;
        self.inode += 1;
        let (owner, links, time, checksum) = (0, 1, 0, 0);
        let fields = [
            self.inode,
            mode,
            owner,
            owner,
            links,
            time,
            size,
            0,
            0,
            device.0,
            device.1,
            path.len() as u32 + 1,
            checksum,
        ];
        self.put(b"070701")?;
        for field in fields {
            self.put(format!("{field:08x}").as_bytes())?;
        }
        self.put(path.as_bytes())?;
        self.put(&[0])?;
        self.pad()?;
        self.put(content)?;
        self.pad()
    }

    fn put(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.written += bytes.len() as u64;
        self.out.write_all(bytes)
    }

    fn pad(&mut self) -> io::Result<()> {
        let missing = self.written.next_multiple_of(4) - self.written;
        self.put(&[0; 3][..missing as usize])
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::{Command, Stdio};

    #[test]
    fn cpio_reads_it() {
        let mut archive = Archive::new(Vec::new());
        archive.directory("dir").unwrap();
        archive.file("dir/odd", 0o644, b"12345").unwrap();
        archive.file("init", 0o755, &[7; 8192]).unwrap();
        archive.character_device("console", 0o600, 5, 1).unwrap();
        let bytes = archive.finish().unwrap();
        assert!(bytes.len().is_multiple_of(4));
        let mut cpio = Command::new("cpio");
        cpio.args(["--list", "--verbose", "--numeric-uid-gid", "--quiet"]);
        let mut cpio = cpio.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("cpio is installed");
        cpio.stdin.take().unwrap().write_all(&bytes).unwrap();
        let listed = String::from_utf8(cpio.wait_with_output().unwrap().stdout).unwrap();
        let lines: Vec<Vec<&str>> = listed.lines().map(|line| line.split_whitespace().collect()).collect();
        let brief = |i: usize| (lines[i][0], *lines[i].last().unwrap());
        assert_eq!(brief(0), ("drwxr-xr-x", "dir"));
        assert_eq!((brief(1), lines[1][4]), (("-rw-r--r--", "dir/odd"), "5"));
        assert_eq!((brief(2), lines[2][4]), (("-rwxr-xr-x", "init"), "8192"));
        assert_eq!(brief(3), ("crw-------", "console"));
    }
}
