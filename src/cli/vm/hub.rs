//! The console of a named VM: kept in its log, and shown to whoever is attached to its socket.
//!
//! A client says `write` or `watch`, and hears `writer` or `watcher`: as one writes at a time, it may be less than it
//! asked for. What follows is what the guest writes, after the last of what it wrote before, and the writer's keys.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::{Duration, SystemTime};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::pipe::{PipeFlags, pipe_with};

use crate::cli::console::Console;
use crate::config::{OpenFile, SerialConfig};
use crate::observe::guest_warning;
use crate::store::LogWriter;

/// Of what the guest wrote before, how much a new client gets to see.
const HISTORY: usize = 16 << 10;
/// More clients wait until others leave.
const MAX_CLIENTS: usize = 16;
/// A client that is further behind is let go of.
const MAX_BACKLOG: usize = 256 << 10;
/// How long a client may take in the end to take in what there is for it.
const LAST_PATIENCE: Duration = Duration::from_millis(500);

/// The console's thread.
pub struct Hub {
    stop: UnixStream,
    thread: JoinHandle<()>,
}

/// The guest's ends of its console.
pub struct HubEnds {
    output: Arc<File>,
    keys: Option<File>,
}

/// A hub that does nothing yet.
pub struct QuietHub {
    room: Room,
    stop: UnixStream,
}

impl QuietHub {
    /// Opens `log`, and listens on `socket`, which must not be there.
    ///
    /// # Errors
    /// The host's.
    pub fn open(log: &Path, socket: &Path) -> io::Result<(Self, HubEnds)> {
        let log = LogWriter::open(log)?;
        let listener = UnixListener::bind(socket)?;
        listener.set_nonblocking(true)?;
        // The guest waits for the log, as it would for a slow terminal; nothing that it writes is lost.
        let (output_read, output) = pipe_with(PipeFlags::CLOEXEC)?;
        let (keys, keys_write) = pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK)?;
        rustix::io::ioctl_fionbio(&output_read, true)?;
        let (stop, stopped) = UnixStream::pair()?;
        let room = Room {
            log,
            listener,
            output: output_read.into(),
            keys: keys_write.into(),
            stopped,
            typed: Vec::new(),
            history: VecDeque::with_capacity(HISTORY),
            clients: Vec::new(),
        };
        Ok((Self { room, stop }, HubEnds { output: Arc::new(output.into()), keys: Some(keys.into()) }))
    }

    /// Starts its thread.
    ///
    /// # Errors
    /// When the host has no more of them.
    pub fn start(self) -> io::Result<Hub> {
        let Self { room, stop } = self;
        let thread = thread::Builder::new().name("console".into()).spawn(move || room.serve())?;
        Ok(Hub { stop, thread })
    }
}

impl HubEnds {
    /// Where the guest's output goes.
    pub fn output(&self) -> SerialConfig {
        SerialConfig::Open(OpenFile(self.output.clone()))
    }

    /// Where its keys come from; once.
    pub fn console(&mut self) -> Console {
        self.keys.take().map_or_else(Console::none, Console::of_keys)
    }
}

impl Hub {
    /// Lets go of all clients, once they have what the guest has written.
    pub fn finish(self) {
        drop(self.stop);
        let _ = self.thread.join();
    }
}

/// What the thread has.
struct Room {
    log: LogWriter,
    listener: UnixListener,
    output: File,
    keys: File,
    /// At its end when all is over.
    stopped: UnixStream,
    /// Keys that the guest has not taken yet. As long as there are any, the writer is not listened to.
    typed: Vec<u8>,
    history: VecDeque<u8>,
    clients: Vec<Client>,
}

struct Client {
    stream: UnixStream,
    /// What it has asked for, as far as that has come.
    asked: Vec<u8>,
    role: Option<Role>,
    /// What it has not taken yet.
    backlog: Vec<u8>,
    gone: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Role {
    Writer,
    Watcher,
}

/// What to wait for.
#[derive(Clone, Copy)]
enum Source {
    Stopped,
    Output,
    Listener,
    Keys,
    Client(usize),
}

impl Room {
    fn serve(mut self) {
        let mut buffer = vec![0; 64 << 10];
        loop {
            let ready = match self.wait() {
                Ok(ready) => ready,
                Err(error) => {
                    tracing::error!("the console is not served any more: {error}");
                    return;
                }
            };
            let mut stopped = false;
            for source in ready {
                match source {
                    Source::Stopped => stopped = true,
                    Source::Output => drop(self.take_output(&mut buffer)),
                    Source::Listener => self.accept(),
                    Source::Keys => self.push_keys(),
                    Source::Client(index) => self.serve_client(index),
                }
            }
            self.clients.retain(|client| !client.gone);
            if stopped {
                while self.take_output(&mut buffer) {}
                self.clients.iter_mut().for_each(Client::finish);
                return;
            }
        }
    }

    fn wait(&self) -> io::Result<Vec<Source>> {
        let mut sources = vec![(self.stopped.as_fd(), Source::Stopped, PollFlags::IN)];
        sources.push((self.output.as_fd(), Source::Output, PollFlags::IN));
        if self.clients.len() < MAX_CLIENTS {
            sources.push((self.listener.as_fd(), Source::Listener, PollFlags::IN));
        }
        if !self.typed.is_empty() {
            sources.push((self.keys.as_fd(), Source::Keys, PollFlags::OUT));
        }
        for (index, client) in self.clients.iter().enumerate() {
            let mut events = PollFlags::empty();
            if client.role != Some(Role::Writer) || self.typed.is_empty() {
                events |= PollFlags::IN;
            }
            if !client.backlog.is_empty() {
                events |= PollFlags::OUT;
            }
            // One that is not to be waited for would still be reported when it hangs up, again and again.
            if !events.is_empty() {
                sources.push((client.stream.as_fd(), Source::Client(index), events));
            }
        }
        let mut fds: Vec<PollFd<'_>> =
            sources.iter().map(|(fd, _, events)| PollFd::from_borrowed_fd(*fd, *events)).collect();
        match poll(&mut fds, None) {
            Err(rustix::io::Errno::INTR) => return Ok(Vec::new()),
            polled => polled?,
        };
        let ready = fds.iter().zip(&sources).filter(|(fd, _)| !fd.revents().is_empty());
        Ok(ready.map(|(_, (_, source, _))| *source).collect())
    }

    /// Takes in what the guest has written; `false` when that was all.
    fn take_output(&mut self, buffer: &mut [u8]) -> bool {
        let Ok(count @ 1..) = self.output.read(buffer) else { return false };
        let bytes = &buffer[..count];
        if let Err(error) = self.log.write(bytes, SystemTime::now()) {
            guest_warning!("the console's log cannot be written: {error}");
        }
        let kept = &bytes[bytes.len().saturating_sub(HISTORY)..];
        let surplus = (self.history.len() + kept.len()).saturating_sub(HISTORY);
        self.history.drain(..surplus);
        self.history.extend(kept);
        self.clients.iter_mut().filter(|client| client.role.is_some()).for_each(|client| client.send(bytes));
        true
    }

    fn accept(&mut self) {
        if let Ok((stream, _)) = self.listener.accept()
            && stream.set_nonblocking(true).is_ok()
        {
            self.clients.push(Client { stream, asked: Vec::new(), role: None, backlog: Vec::new(), gone: false });
        }
    }

    fn push_keys(&mut self) {
        if let Ok(count) = self.keys.write(&self.typed) {
            self.typed.drain(..count);
        }
    }

    fn serve_client(&mut self, index: usize) {
        let has_writer = self.clients.iter().any(|client| client.role == Some(Role::Writer) && !client.gone);
        let client = &mut self.clients[index];
        client.send(&[]);
        let mut buffer = [0; 1024];
        let keys = match client.stream.read(&mut buffer) {
            Err(error) if [io::ErrorKind::WouldBlock, io::ErrorKind::Interrupted].contains(&error.kind()) => return,
            Ok(count @ 1..) => &buffer[..count],
            _ => {
                client.gone = true;
                return;
            }
        };
        if client.role.is_none() {
            client.asked.extend_from_slice(keys);
            let Some(end) = client.asked.iter().position(|&byte| byte == b'\n') else {
                client.gone = client.asked.len() > 16;
                return;
            };
            let keys = client.asked.split_off(end + 1);
            let role = match client.asked.as_slice() {
                b"write\n" if !has_writer => Role::Writer,
                b"write\n" | b"watch\n" => Role::Watcher,
                _ => {
                    client.gone = true;
                    return;
                }
            };
            client.role = Some(role);
            client.send(if role == Role::Writer { b"writer\n" } else { b"watcher\n" });
            client.send(self.history.make_contiguous());
            if role == Role::Writer {
                self.typed.extend(keys);
            }
        } else if client.role == Some(Role::Writer) {
            self.typed.extend_from_slice(keys);
        }
        self.push_keys();
    }
}

impl Client {
    /// Sends what there is for it, as far as it takes that now.
    fn send(&mut self, bytes: &[u8]) {
        self.backlog.extend_from_slice(bytes);
        while !self.backlog.is_empty() {
            match self.stream.write(&self.backlog) {
                Ok(count @ 1..) => drop(self.backlog.drain(..count)),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                _ => {
                    self.gone = true;
                    break;
                }
            }
        }
        self.gone |= self.backlog.len() > MAX_BACKLOG;
    }

    fn finish(&mut self) {
        let is_patient = self.stream.set_nonblocking(false).is_ok();
        if is_patient && self.stream.set_write_timeout(Some(LAST_PATIENCE)).is_ok() {
            let _ = self.stream.write_all(&self.backlog);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::LogReader;
    use std::io::{BufRead, BufReader};
    use std::net::Shutdown;

    fn connect(socket: &Path, ask: &str) -> (BufReader<UnixStream>, String) {
        let mut stream = UnixStream::connect(socket).unwrap();
        stream.write_all(ask.as_bytes()).unwrap();
        let mut stream = BufReader::new(stream);
        let mut answer = String::new();
        stream.read_line(&mut answer).unwrap();
        (stream, answer)
    }

    fn read(stream: &mut BufReader<UnixStream>, expected: &str) {
        let mut got = vec![0; expected.len()];
        stream.read_exact(&mut got).unwrap();
        assert_eq!(String::from_utf8(got).unwrap(), expected);
    }

    /// What the guest would get of `hub`'s keys.
    fn keys(keys: &File, count: usize) -> Vec<u8> {
        let mut got = Vec::new();
        while got.len() < count {
            poll(&mut [PollFd::new(keys, PollFlags::IN)], None).unwrap();
            let mut more = vec![0; count - got.len()];
            let n = (&mut &*keys).read(&mut more).unwrap();
            got.extend_from_slice(&more[..n]);
        }
        got
    }

    #[test]
    fn one_writes_others_watch_and_all_see_everything() {
        let dir = tempfile::tempdir().unwrap();
        let (log, socket) = (dir.path().join("log"), dir.path().join("sock"));
        let (quiet, mut ends) = QuietHub::open(&log, &socket).unwrap();
        let hub = quiet.start().unwrap();
        let keys_end = ends.keys.take().unwrap();
        (&*ends.output).write_all(b"before\n").unwrap();
        let (mut writer, answer) = connect(&socket, "write\nls\r");
        assert_eq!(answer, "writer\n");
        let (mut other, answer) = connect(&socket, "write\n");
        assert_eq!(answer, "watcher\n", "there is a writer already");
        let (mut watcher, answer) = connect(&socket, "watch\n");
        assert_eq!(answer, "watcher\n");
        // Neither garbage nor silence is in anybody's way.
        let (_, answer) = connect(&socket, "GET / HTTP/1.1\r\n\r\n");
        assert_eq!(answer, "");
        let _silent = UnixStream::connect(&socket).unwrap();
        other.get_mut().write_all(b"unheard").unwrap();
        assert_eq!(keys(&keys_end, 3), b"ls\r");
        (&*ends.output).write_all(b"after").unwrap();
        for client in [&mut writer, &mut other, &mut watcher] {
            read(client, "before\nafter");
        }
        // More keys than the guest takes at once: none is lost.
        let many = vec![b'k'; 200_000];
        thread::scope(|threads| {
            threads.spawn(|| writer.get_mut().write_all(&many).unwrap());
            assert!(keys(&keys_end, many.len()) == many);
        });
        // When the writer has left, another can be one.
        writer.get_ref().shutdown(Shutdown::Both).unwrap();
        while connect(&socket, "write\n").1 != "writer\n" {}
        (&*ends.output).write_all(b" the end").unwrap();
        hub.finish();
        let mut rest = String::new();
        watcher.read_to_string(&mut rest).unwrap();
        assert_eq!(rest, " the end");
        let mut log = LogReader::open(&log).unwrap();
        let lines: Vec<_> = std::iter::from_fn(|| log.next_line().unwrap()).map(|line| line.text).collect();
        assert_eq!(lines, [&b"before\n"[..], b"after the end"]);
    }

    #[test]
    fn a_client_that_takes_nothing_is_let_go_of() {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("sock");
        let (quiet, ends) = QuietHub::open(&dir.path().join("log"), &socket).unwrap();
        let hub = quiet.start().unwrap();
        let (mut lazy, _) = connect(&socket, "watch\n");
        let line = [b'x'; 4096];
        for _ in 0..500 {
            (&*ends.output).write_all(&line).unwrap();
        }
        hub.finish();
        let mut got = Vec::new();
        let _ = lazy.read_to_end(&mut got);
        assert!(got.len() < 500 * line.len(), "{}", got.len());
    }
}
