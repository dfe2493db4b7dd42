//! The channel to the owner.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, Sender};

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::{Answerer, Call, Fault, View};

/// Whoever listens to a VM's life, line by line; `false` when it listens no more. Does not block.
pub type Listener = Box<dyn FnMut(&str) -> bool + Send>;

/// What comes through the channel.
pub enum Message {
    Call(Call, Answerer),
    Listen(Listener),
}

/// The owner's end.
pub struct Calls {
    inbox: Receiver<Message>,
    bell: EventFd,
}

/// A client's end. How many calls wait is bounded by whoever has one: the server takes a few of each connection.
pub struct CallSender {
    outbox: Sender<Message>,
    bell: EventFd,
    view: Arc<View>,
}

/// Makes the channel to the owner who publishes in `view`.
///
/// # Errors
/// When the host is out of descriptors.
pub fn calls(view: Arc<View>) -> io::Result<(CallSender, Calls)> {
    let bell = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?;
    let (outbox, inbox) = mpsc::channel();
    Ok((CallSender { outbox, bell: bell.try_clone()?, view }, Calls { inbox, bell }))
}

impl CallSender {
    /// Hands a call over, for when the owner has done what it has in hand. The answer comes through `answerer`: at once if
    /// it can be had from what the owner has published, or if there is no owner any more.
    pub fn send(&self, call: Call, answerer: Answerer) {
        if let Some(answer) = self.view.get().and_then(|shown| shown.answer(&call)) {
            return answerer(Ok(answer));
        }
        match self.outbox.send(Message::Call(call, answerer)) {
            Err(mpsc::SendError(Message::Call(_, answerer))) => answerer(Err(Fault::Ended)),
            _ => self.ring(),
        }
    }

    /// The same for who would rather hear that the owner is at work than wait for it.
    pub fn send_unless_busy(&self, call: Call, answerer: Answerer) {
        match self.view.get().and_then(|shown| shown.work) {
            Some(work) if !call.only_asks() => answerer(Err(Fault::Busy(work))),
            _ => self.send(call, answerer),
        }
    }

    /// Has `listener` told of what happens from now on; not at all when there is no owner any more.
    pub fn subscribe(&self, listener: Listener) {
        let _ = self.outbox.send(Message::Listen(listener));
        self.ring();
    }

    fn ring(&self) {
        // It fails only when the counter is full, and then the owner is awake.
        let _ = self.bell.write(1);
    }
}

impl Calls {
    /// Readable when there is a call.
    #[must_use]
    pub fn fd(&self) -> RawFd {
        self.bell.as_raw_fd()
    }

    pub fn next(&self) -> Option<Message> {
        match self.inbox.try_recv() {
            Ok(message) => Some(message),
            Err(_) => {
                // First quiet, then another look: what comes in between rings again.
                let _ = self.bell.read();
                self.inbox.try_recv().ok()
            }
        }
    }
}
