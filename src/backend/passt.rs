//! A network without rights of our own: frames go to a `passt` process, which turns them into ordinary sockets of
//! the user.
//!
//! It is our child, and lives as long as the socket between us: when this process ends, however that happens, passt
//! reads the end of its stream and leaves.

use std::io::{self, PipeReader, Read};
use std::net::{Ipv4Addr, Shutdown};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, Command, Stdio};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::OFlags;
use rustix::io::FdFlags;
use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::frames::{FrameError, FrameStream};
use super::host::HostFiles;
use super::io_error;
use crate::config::{ForwardedProtocol, UserNetwork};

/// The guest's address, and what else is in its network of 24 bits: the same numbers as QEMU's.
pub const GUEST: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 15);
pub const GATEWAY: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 2);
pub const DNS: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 3);
const PREFIX_LENGTH: &str = "24";
const GATEWAY_MAC: &str = "52:55:0a:00:02:02";

/// How long passt may take until it answers.
const PATIENCE: Timespec = Timespec { tv_sec: 10, tv_nsec: 0 };

/// As large as the host allows (`net.core.wmem_max`), if that is less.
const SOCKET_BUFFER: usize = 16 << 20;

/// How long it may take to end.
const LAST_PATIENCE: Timespec = Timespec { tv_sec: 1, tv_nsec: 0 };

/// How much of what passt complains about is kept until somebody asks: what a pipe holds.
const COMPLAINTS: usize = 64 << 10;

#[derive(Debug, Error, Serialize, Deserialize)]
pub enum PasstError {
    #[error("cannot start passt, which carries the network of --net user")]
    Start(
        #[source]
        #[serde(with = "io_error")]
        io::Error,
    ),
    #[error("passt gives up: {0}")]
    GaveUp(String),
    #[error("passt does not answer")]
    Silent,
    #[error("cannot connect to passt")]
    Connect(
        #[source]
        #[serde(with = "io_error")]
        io::Error,
    ),
}

impl PasstError {
    /// What the user may do about it.
    #[must_use]
    pub fn hint(&self) -> Option<&'static str> {
        match self {
            Self::Start(error) if error.kind() == io::ErrorKind::NotFound => Some("install it: apt-get install passt"),
            Self::GaveUp(why) if why.contains("port") => {
                Some("is the port of a forward in use ('ss -lntu')? Those below 1024 are not for ordinary users")
            }
            Self::GaveUp(why) if why.contains("interface") => Some(
                "passt takes after the interface that this host's default route leads through: 'ip route' shows it",
            ),
            _ => None,
        }
    }
}

/// What passt is to do, as its command line says it; its socket is named besides.
fn arguments(network: &UserNetwork, mtu: u16) -> Vec<String> {
    let mut arguments: Vec<String> = ["--foreground", "--quiet", "--one-off"].map(String::from).to_vec();
    let mut set = |option: &str, value: &str| arguments.extend([option.to_owned(), value.to_owned()]);
    set("--address", &GUEST.to_string());
    set("--netmask", PREFIX_LENGTH);
    set("--gateway", &GATEWAY.to_string());
    set("--mac-addr", GATEWAY_MAC);
    set("--dns-forward", &DNS.to_string());
    set("--mtu", &mtu.to_string());
    for (option, protocol) in [("--tcp-ports", ForwardedProtocol::Tcp), ("--udp-ports", ForwardedProtocol::Udp)] {
        let mut any = false;
        for forward in network.forwards.iter().filter(|forward| forward.protocol == protocol) {
            set(option, &format!("127.0.0.1/{}:{}", forward.host_port, forward.guest_port));
            any = true;
        }
        if !any {
            set(option, "none");
        }
    }
    if !network.host {
        // Else the gateway's address is this host's 127.0.0.1, with all that listens there.
        arguments.push("--no-map-gw".into());
    }
    arguments
}

/// A running passt and the frames to and from it.
pub struct Passt {
    pub frames: FrameStream,
    mtu: u16,
    process: Option<Process>,
}

/// A passt that runs.
#[derive(Debug)]
pub struct Process {
    pub socket: UnixStream,
    /// What it writes on its standard error. Does not wait.
    pub complaints: PipeReader,
    /// None of another process's.
    pub child: Option<Child>,
}

/// Starts passt, whose packets may have so many bytes.
///
/// # Errors
/// When there is none, or the host is short of something.
pub fn spawn(network: &UserNetwork, mtu: u16) -> Result<Process, PasstError> {
    let (socket, theirs) = UnixStream::pair().map_err(PasstError::Connect)?;
    let (complaints, their_complaints) = io::pipe().map_err(PasstError::Connect)?;
    let set_up = || -> rustix::io::Result<()> {
        // Neither may wait for the other: a full pipe takes no more.
        rustix::fs::fcntl_setfl(&complaints, rustix::fs::fcntl_getfl(&complaints)? | OFlags::NONBLOCK)?;
        rustix::fs::fcntl_setfl(&their_complaints, rustix::fs::fcntl_getfl(&their_complaints)? | OFlags::NONBLOCK)?;
        // A frame that finds no room is lost, and passt takes seconds to send it again.
        for end in [&socket, &theirs] {
            rustix::net::sockopt::set_socket_send_buffer_size(end, SOCKET_BUFFER)?;
        }
        // The one descriptor that a program started by us is to have. Nothing else starts meanwhile.
        rustix::io::fcntl_setfd(&theirs, FdFlags::empty())
    };
    set_up().map_err(|errno| PasstError::Connect(errno.into()))?;
    let mut command = Command::new("passt");
    command.args(arguments(network, mtu)).arg("--fd").arg(theirs.as_raw_fd().to_string());
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(their_complaints);
    let child = command.spawn().map_err(PasstError::Start)?;
    Ok(Process { socket, complaints, child: Some(child) })
}

impl Passt {
    /// Starts passt and waits until it serves us: `mac` is what it shall know the guest by.
    ///
    /// # Errors
    /// When there is no passt, or it does not do what it is asked to; its own words are in the error.
    pub fn start(files: &dyn HostFiles, network: &UserNetwork, mtu: u16, mac: [u8; 6]) -> Result<Self, PasstError> {
        let process = files.start_passt(network, mtu)?;
        let frames = FrameStream::new(process.socket.try_clone().map_err(PasstError::Connect)?);
        let frames = frames.map_err(PasstError::Connect)?;
        let mut passt = Self { frames, mtu, process: Some(process) };
        passt.greet(mac)?;
        Ok(passt)
    }

    /// One whose part is played by the other end of `socket`.
    #[cfg(any(test, feature = "fuzzing"))]
    pub fn played_by(socket: UnixStream, mtu: u16) -> Self {
        Self { frames: FrameStream::new(socket).expect("a socket of ours"), mtu, process: None }
    }

    /// The largest packet in bytes behind the Ethernet header.
    #[must_use]
    pub fn mtu(&self) -> u16 {
        self.mtu
    }

    /// Asks who has the gateway's address (ARP, RFC 826), as the guest will. The answer means that all is set up.
    fn greet(&mut self, mac: [u8; 6]) -> Result<(), PasstError> {
        let mut request = Vec::with_capacity(42);
        request.extend([0xff; 6]);
        request.extend(mac);
        // ARP; Ethernet, IPv4, their lengths; a request.
        request.extend([8, 6, 0, 1, 8, 0, 6, 4, 0, 1]);
        request.extend(mac);
        request.extend(GUEST.octets());
        request.extend([0; 6]);
        request.extend(GATEWAY.octets());
        let answered = self.frames.send_bytes(&request).and_then(|_| {
            loop {
                if self.frames.peek()?.is_some() {
                    self.frames.consume();
                    return Ok(true);
                }
                let mut readable = [PollFd::from_borrowed_fd(self.frames.reading(), PollFlags::IN)];
                match poll(&mut readable, Some(&PATIENCE)) {
                    Ok(0) => return Ok(false),
                    Ok(_) | Err(rustix::io::Errno::INTR) => {}
                    Err(errno) => return Err(FrameError::Socket(errno.into())),
                }
            }
        });
        match answered {
            Ok(true) => {
                // What it has said so far did not matter.
                self.process.as_mut().map(Process::said);
                Ok(())
            }
            Ok(false) => Err(PasstError::Silent),
            Err(error) => Err(PasstError::GaveUp(self.end(&error))),
        }
    }

    /// Ends passt after an error, and tells why there was one: its last words, if there are some.
    pub fn end(&mut self, error: &FrameError) -> String {
        let Some(mut process) = self.process.take() else { return error.to_string() };
        process.last_words(matches!(error, FrameError::Closed)).unwrap_or_else(|| error.to_string())
    }
}

impl Drop for Passt {
    fn drop(&mut self) {
        if let Some(mut process) = self.process.take() {
            process.end();
        }
    }
}

impl Process {
    fn end(&mut self) {
        // It ends by itself when it is alone, as one that is not our child does then.
        let _ = self.socket.shutdown(Shutdown::Both);
        if let Some(child) = &mut self.child {
            let _ = child.kill();
            let _ = child.wait();
        }
    }

    /// What it has said and nobody has asked for yet.
    fn said(&mut self) -> String {
        let mut text = Vec::new();
        // Ends at the latest when there is no more at the moment.
        let _ = (&mut self.complaints).take(COMPLAINTS as u64).read_to_end(&mut text);
        String::from_utf8_lossy(&text).into_owned()
    }

    /// `is_ending`: by itself, as it has hung up.
    fn last_words(&mut self, is_ending: bool) -> Option<String> {
        let mut status = None;
        if !is_ending {
            let _ = self.socket.shutdown(Shutdown::Both);
        }
        // Should it not end, it has to.
        let mut complains = [PollFd::from_borrowed_fd(self.complaints.as_fd(), PollFlags::empty())];
        let _ = poll(&mut complains, Some(&LAST_PATIENCE));
        if let Some(child) = &mut self.child {
            let _ = child.kill();
            status = child.wait().ok().filter(|status| status.signal() != Some(libc::SIGKILL));
        }
        let text = self.said();
        // Without a system log it complains about each of its lines.
        let said = text.lines().map(str::trim).rfind(|line| !line.is_empty() && !line.contains("to syslog"));
        match (said, status) {
            (Some(said), _) if !said.contains("run as root") => Some(said.to_owned()),
            (_, Some(status)) => Some(format!("it has ended ({status})")),
            // How, only its parent knows.
            _ if self.child.is_none() && is_ending => Some("it has ended without a word".into()),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{NetBackend, NetConfig};

    fn of(text: &str) -> String {
        let NetBackend::User(network) = text.parse::<NetConfig>().unwrap().backend else { panic!("{text}") };
        arguments(&network, 1500).join(" ")
    }

    #[test]
    fn forwards_listen_on_the_loopback_alone() {
        let text = of("user,forward=tcp:8080:80,forward=udp:53:5353,forward=tcp:2222:22");
        assert!(text.contains("--tcp-ports 127.0.0.1/8080:80 --tcp-ports 127.0.0.1/2222:22"), "{text}");
        assert!(text.contains("--udp-ports 127.0.0.1/53:5353"), "{text}");
        let text = of("user");
        assert!(text.contains("--tcp-ports none --udp-ports none"), "{text}");
    }

    #[test]
    fn the_hosts_loopback_is_reached_only_if_that_is_wanted() {
        assert!(of("user").contains("--no-map-gw"));
        assert!(!of("user,host=on").contains("--no-map-gw"));
    }
}
