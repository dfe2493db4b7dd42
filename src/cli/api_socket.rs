//! The API's socket: made before anything else can fail, served when the VM has an owner.

use std::io;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::start_error::StartError;
use crate::api::server::{Limits, Server, ServerHandle};
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

/// An API that is served: calls come from there.
pub struct RunningApi {
    pub calls: Calls,
    /// What the API counts.
    pub counts: Option<ApiCounts>,
    server: Option<ServerHandle>,
    _file: SocketFile,
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

    /// Starts the server's thread, for the owner who publishes in `view`.
    pub fn serve(self, view: Arc<View>) -> io::Result<RunningApi> {
        let (sender, calls) = calls(view)?;
        let limits = Limits { max_body: self.max_body, ..Limits::default() };
        let api = Api::new(sender);
        let counts = api.counts();
        let server = Server::spawn(self.listener, self.thread, limits, api)?;
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
