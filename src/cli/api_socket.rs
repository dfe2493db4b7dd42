//! The API's socket: made before anything else can fail, served when the VM has an owner.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};

use super::start_error::StartError;
use crate::api::relay::Relay;
use crate::api::server::{Clients, Limits, Server, ServerHandle};
use crate::api::service::Api;
use crate::backend::HostFiles;
use crate::control::{ApiCounts, Calls, View, calls};

/// A socket that is listened on. Its file goes with it, unless it is to stay.
pub struct ApiSocket {
    listener: UnixListener,
    file: SocketFile,
    pub thread: &'static str,
    pub max_body: usize,
}

/// What the API's server needs: where its clients come from.
pub struct ApiClients {
    clients: Clients,
    file: Option<SocketFile>,
    thread: &'static str,
    max_body: usize,
}

/// What stands before the server of another process.
pub struct ApiFront {
    pub relay: Relay,
    file: SocketFile,
}

/// An API that is served: calls come from there.
pub struct RunningApi {
    pub calls: Calls,
    /// What the API counts.
    pub counts: Option<ApiCounts>,
    server: Option<ServerHandle>,
    _file: Option<SocketFile>,
}

/// Removes the socket's file in the end.
struct SocketFile {
    path: PathBuf,
    stays: bool,
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        if !self.stays {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

impl ApiSocket {
    /// Listens on `path`; a socket that nobody listens on any more is replaced.
    pub fn listen(path: &Path, host: &dyn HostFiles) -> Result<Self, StartError> {
        let listener = host.listen(path).map_err(|source| StartError::ApiSocket { path: path.to_owned(), source })?;
        Ok(Self::of(listener, path, false))
    }

    /// Listens on `path`, which must not be there; its file stays in the end.
    pub fn listen_anew(path: &Path) -> io::Result<Self> {
        Ok(Self::of(UnixListener::bind(path)?, path, true))
    }

    fn of(listener: UnixListener, path: &Path, stays: bool) -> Self {
        let file = SocketFile { path: path.to_owned(), stays };
        Self { listener, file, thread: "api", max_body: Limits::default().max_body }
    }

    /// For a server of this process.
    pub fn into_clients(self) -> ApiClients {
        let Self { listener, file, thread, max_body } = self;
        ApiClients { clients: Clients::Listener(listener), file: Some(file), thread, max_body }
    }

    /// For a server of another process, which this one is about to make.
    pub fn into_front(self) -> io::Result<(ApiFront, ApiClients)> {
        let Self { listener, file, thread, max_body } = self;
        let (ours, theirs): (OwnedFd, OwnedFd) =
            socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
        let relay = Relay::new(listener, ours, max_body)?;
        let clients = ApiClients { clients: Clients::Passed(theirs), file: None, thread, max_body };
        Ok((ApiFront { relay, file }, clients))
    }
}

impl ApiFront {
    /// Closes the descriptors of it that a child has got too.
    pub fn forget(mut self) {
        self.file.stays = true;
    }
}

impl ApiClients {
    /// Starts the server's thread, for the owner who publishes in `view`.
    pub fn serve(self, view: Arc<View>) -> io::Result<RunningApi> {
        let (sender, calls) = calls(view)?;
        let limits = Limits { max_body: self.max_body, ..Limits::default() };
        let api = Api::new(sender);
        let counts = api.counts();
        let server = Server::spawn(self.clients, self.thread, limits, api)?;
        Ok(RunningApi { calls, counts: Some(counts), server: Some(server), _file: self.file })
    }
}

impl Drop for RunningApi {
    fn drop(&mut self) {
        // The last answers get out before the process ends.
        if let Some(server) = self.server.take() {
            server.stop();
        }
    }
}
