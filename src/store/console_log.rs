//! A VM's console, kept with times and bounded in size: each line begins with the time of its first byte. When the file is
//! full it becomes the older one of two, and the one that was that is gone.

use std::fs::{self, File, OpenOptions};
use std::io::{self, BufRead, BufReader, Read, Seek, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use crate::observe::rfc3339;

/// Most bytes of each of the two files.
pub const MAX_LEN: u64 = 1 << 20;

/// Bytes of a line's time and the space behind it.
const PREFIX: usize = "2026-11-27T06:22:01.123Z ".len();

/// Longest line that is handed out as one; the rest of it follows as the next.
const LONGEST_LINE: u64 = 64 << 10;

fn older(path: &Path) -> PathBuf {
    let mut older = path.as_os_str().to_owned();
    older.push(".1");
    older.into()
}

/// Adds to the log.
#[derive(Debug)]
pub struct LogWriter {
    path: PathBuf,
    file: File,
    len: u64,
    in_line: bool,
    buffer: Vec<u8>,
}

impl LogWriter {
    /// Goes on with the log at `path`, on a line of its own.
    ///
    /// # Errors
    /// The host's.
    pub fn open(path: &Path) -> io::Result<Self> {
        let file = OpenOptions::new().append(true).create(true).open(path)?;
        let len = file.metadata()?.len();
        let mut writer = Self { path: path.to_owned(), file, len, in_line: false, buffer: Vec::new() };
        let mut last = [0];
        if len > 0 && File::open(path)?.read_exact_at_end(&mut last).is_ok() && last != *b"\n" {
            writer.append(b"\n")?;
        }
        Ok(writer)
    }

    /// Adds what the guest has written just now.
    ///
    /// # Errors
    /// The host's; that much is lost then.
    pub fn write(&mut self, bytes: &[u8], now: SystemTime) -> io::Result<()> {
        let mut text = std::mem::take(&mut self.buffer);
        text.clear();
        let time = rfc3339(now);
        for line in bytes.split_inclusive(|&byte| byte == b'\n') {
            if !self.in_line {
                text.extend_from_slice(time.as_bytes());
                text.push(b' ');
            }
            text.extend_from_slice(line);
            self.in_line = !line.ends_with(b"\n");
        }
        let written = self.append(&text);
        self.buffer = text;
        written
    }

    fn append(&mut self, text: &[u8]) -> io::Result<()> {
        self.file.write_all(text)?;
        self.len += text.len() as u64;
        if self.len >= MAX_LEN {
            fs::rename(&self.path, older(&self.path))?;
            self.file = OpenOptions::new().append(true).create(true).open(&self.path)?;
            (self.len, self.in_line) = (0, false);
        }
        Ok(())
    }
}

trait ReadAtEnd {
    /// The file's last bytes.
    fn read_exact_at_end(&mut self, bytes: &mut [u8]) -> io::Result<()>;
}

impl ReadAtEnd for File {
    fn read_exact_at_end(&mut self, bytes: &mut [u8]) -> io::Result<()> {
        self.seek(io::SeekFrom::End(-(bytes.len() as i64)))?;
        self.read_exact(bytes)
    }
}

/// A line, or the part of one that there is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LogLine {
    /// When its first byte came, as RFC 3339 has it; none in the midst of a line.
    pub time: Option<String>,
    /// With its end, if it has come.
    pub text: Vec<u8>,
}

/// Reads a log from its beginning, and what is added.
#[derive(Debug)]
pub struct LogReader {
    path: PathBuf,
    /// The file that is read, once there is one.
    file: Option<BufReader<File>>,
    in_line: bool,
}

impl LogReader {
    /// # Errors
    /// The host's; that there is no log yet is none.
    pub fn open(path: &Path) -> io::Result<Self> {
        let file = match File::open(older(path)) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            file => Some(BufReader::new(file?)),
        };
        Ok(Self { path: path.to_owned(), file, in_line: false })
    }

    /// The next line, or part of one; nothing when that was all so far.
    ///
    /// # Errors
    /// The host's.
    pub fn next_line(&mut self) -> io::Result<Option<LogLine>> {
        loop {
            if let Some(file) = &mut self.file {
                let mut text = Vec::new();
                file.take(LONGEST_LINE).read_until(b'\n', &mut text)?;
                if !text.is_empty() {
                    return Ok(Some(self.split(text)));
                }
            }
            // At the end of a file: the next one, if this is not the one that is written to.
            let current = match File::open(&self.path) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
                current => current?,
            };
            let inode = |file: &File| file.metadata().map(|metadata| (metadata.dev(), metadata.ino()));
            if let Some(file) = &self.file
                && inode(file.get_ref())? == inode(&current)?
            {
                return Ok(None);
            }
            // What was added to the old one before it was put aside.
            if let Some(file) = &mut self.file
                && !file.fill_buf()?.is_empty()
            {
                continue;
            }
            (self.file, self.in_line) = (Some(BufReader::new(current)), false);
        }
    }

    fn split(&mut self, mut text: Vec<u8>) -> LogLine {
        let begins = !self.in_line;
        self.in_line = !text.ends_with(b"\n");
        let time = text.get(..PREFIX).and_then(|time| std::str::from_utf8(time).ok());
        match time.filter(|time| begins && time.ends_with("Z ")) {
            Some(time) => {
                let time = time.trim_end().to_owned();
                text.drain(..PREFIX);
                LogLine { time: Some(time), text }
            }
            None => LogLine { time: None, text },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::time::{Duration, UNIX_EPOCH};

    fn read(reader: &mut LogReader) -> Vec<LogLine> {
        std::iter::from_fn(|| reader.next_line().unwrap()).collect()
    }

    fn text(lines: &[LogLine]) -> Vec<u8> {
        lines.iter().flat_map(|line| line.text.clone()).collect()
    }

    #[test]
    fn lines_have_the_time_of_their_first_byte() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("console.log");
        let mut reader = LogReader::open(&path).unwrap();
        assert_eq!(read(&mut reader), []);
        let mut writer = LogWriter::open(&path).unwrap();
        let at = |second| UNIX_EPOCH + Duration::from_secs(second);
        writer.write(b"one\ntw", at(1)).unwrap();
        let line =
            |second: Option<u64>, text: &[u8]| LogLine { time: second.map(|s| rfc3339(at(s))), text: text.into() };
        assert_eq!(read(&mut reader), [line(Some(1), b"one\n"), line(Some(1), b"tw")]);
        writer.write(b"o\n", at(2)).unwrap();
        assert_eq!(read(&mut reader), [line(None, b"o\n")]);
        writer.write(b"login: ", at(3)).unwrap();
        drop(writer);
        // Another start's output begins on a line of its own.
        LogWriter::open(&path).unwrap().write(b"four\n", at(4)).unwrap();
        let all = read(&mut LogReader::open(&path).unwrap());
        let expected =
            [line(Some(1), b"one\n"), line(Some(1), b"two\n"), line(Some(3), b"login: \n"), line(Some(4), b"four\n")];
        assert_eq!(all, expected);
    }

    #[test]
    fn a_log_is_bounded_and_a_reader_that_follows_loses_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("console.log");
        let mut writer = LogWriter::open(&path).unwrap();
        let mut reader = LogReader::open(&path).unwrap();
        let (mut expected, mut got) = (Vec::new(), Vec::new());
        for number in 0..400 {
            let chunk = format!("{number:>9999}\n").into_bytes();
            writer.write(&chunk, UNIX_EPOCH).unwrap();
            expected.extend(chunk);
            got.extend(text(&read(&mut reader)));
        }
        assert!(got == expected);
        let size = fs::read_dir(dir.path()).unwrap().map(|entry| entry.unwrap().metadata().unwrap().len()).sum::<u64>();
        assert!((MAX_LEN..2 * MAX_LEN + 20_000).contains(&size), "{size}");
        let kept = text(&read(&mut LogReader::open(&path).unwrap()));
        assert!(expected.ends_with(&kept) && kept.len() as u64 > MAX_LEN);
    }

    proptest! {
        #[test]
        fn what_a_guest_writes_is_what_is_read(chunks in proptest::collection::vec(".{0,40}|\n|a\nb", 0..20)) {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("log");
            let mut writer = LogWriter::open(&path).unwrap();
            for chunk in &chunks {
                writer.write(chunk.as_bytes(), SystemTime::now()).unwrap();
            }
            let read = text(&read(&mut LogReader::open(&path).unwrap()));
            prop_assert_eq!(read, chunks.concat().into_bytes());
        }

        #[test]
        fn a_log_of_anything_is_read(bytes: Vec<u8>) {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("log");
            fs::write(&path, bytes).unwrap();
            let mut reader = LogReader::open(&path).unwrap();
            while reader.next_line().unwrap().is_some() {}
        }
    }
}
