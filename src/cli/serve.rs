//! Serving a VM: its machine's events, its console, signals and API calls, on one thread, until it ends.

use std::io;
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use super::api_socket::RunningApi;
use super::console::{Console, Input};
use super::escape::Action;
use super::signals::Signals;
use crate::control::{Calls, Owner};
use crate::machine::End;
use crate::memory::release_startup_code;

const MACHINE: u64 = 0;
const SIGNALS: u64 = 1;
const SERIAL: u64 = 2;
const LISTENER: u64 = 3;
const INPUT: u64 = 4;
const CALLS: u64 = 5;

/// How long to wait until a guest that was just writing may take input.
const BUSY_MS: i32 = 10;

/// What a signal means.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OnSignal {
    /// The first one presses the power button, the second one ends the VM. Before the start, one ends all.
    PowerButton,
    /// It ends all.
    Leave,
}

/// How serving came to its end.
#[derive(Debug, Clone)]
pub enum Served {
    Ended(End),
    /// By a signal, without an end of the VM.
    Signal(libc::c_int),
    /// Without a VM: the snapshot that it was to be could not be loaded.
    LoadFailed,
}

/// Serves until the VM ends or a signal ends it all; then the last answers get out, and the disks come to rest.
///
/// # Errors
/// When the host has no descriptors left.
pub fn serve(
    mut owner: Owner,
    console: &mut Console,
    signals: &mut Signals,
    on_signal: OnSignal,
    mut api: Option<RunningApi>,
) -> io::Result<Served> {
    if let Some(counts) = api.as_mut().and_then(|api| api.counts.take()) {
        owner.count_api(counts);
    }
    let calls = api.as_ref().map(|api| &api.calls);
    owner.begin_to_serve();
    let served = serve_until(&mut owner, console, signals, on_signal, calls);
    owner.write_metrics();
    if let Some(machine) = owner.machine() {
        console.finish(machine.serial());
    }
    owner.hang_up();
    drop(api);
    owner.close_disks();
    // Never dropped: a vCPU may hang on a console that nobody reads, and the process ends anyway.
    std::mem::forget(owner);
    served
}

fn serve_until(
    owner: &mut Owner,
    console: &mut Console,
    signals: &mut Signals,
    on_signal: OnSignal,
    calls: Option<&Calls>,
) -> io::Result<Served> {
    let epoll = Epoll::new()?;
    let watch = |fd, token| epoll.ctl(ControlOperation::Add, fd, EpollEvent::new(EventSet::IN, token));
    watch(signals.fd(), SIGNALS)?;
    if let Some(calls) = calls {
        watch(calls.fd(), CALLS)?;
    }
    let mut input = InputWatch::default();
    let (mut watched, mut listens) = (0, false);
    let mut presses = 0;
    let mut metrics = MetricsClock::default();
    loop {
        if let Some(end) = owner.end() {
            return Ok(Served::Ended(end.clone()));
        }
        if owner.has_given_up() {
            return Ok(Served::LoadFailed);
        }
        // Keys wait until there is somebody to take them.
        let mut ready = false;
        let life = owner.life();
        if let Some(machine) = owner.machine() {
            if watched != life {
                // Those of the machine before have left with it.
                watch(machine.events_fd(), MACHINE)?;
                watch(machine.serial().wake().as_raw_fd(), SERIAL)?;
                if let Some(fd) = console.listener_fd().filter(|_| !listens) {
                    // By edges: a client that cannot be accepted, for want of descriptors, must not wake us for ever.
                    let events = EventSet::IN | EventSet::EDGE_TRIGGERED;
                    epoll.ctl(ControlOperation::Add, fd, EpollEvent::new(events, LISTENER))?;
                }
                (watched, listens) = (life, true);
                // What the machine before has not got rid of.
                console.push(machine.serial());
                // What has built it is not needed any more; before, it would be in the way of the first answers.
                release_startup_code();
            }
            ready = input.follow(console.input(), &epoll);
        }
        let timeout = if ready {
            0
        } else if console.is_busy() {
            BUSY_MS
        } else {
            metrics.wait(owner)
        };
        let mut events = [EpollEvent::default(); 8];
        let count = match epoll.wait(timeout, &mut events) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => 0,
            result => result?,
        };
        metrics.look(owner);
        if count == 0
            && console.is_busy()
            && let Some(machine) = owner.machine()
        {
            console.push(machine.serial());
        }
        let from_poll = events[..count].iter().map(|event| (event.data(), event.event_set()));
        for (token, events) in from_poll.chain(ready.then_some((INPUT, EventSet::IN))) {
            match token {
                MACHINE => owner.handle_events(),
                SIGNALS => {
                    while let Some(signal) = signals.next() {
                        presses += 1;
                        if on_signal == OnSignal::Leave || owner.machine().is_none() {
                            return Ok(Served::Signal(signal));
                        }
                        if presses == 1 { owner.press_power_button() } else { owner.kill() }
                    }
                }
                CALLS => {
                    while let Some(message) = calls.and_then(Calls::next) {
                        owner.handle(message);
                    }
                }
                _ => {
                    let Some(machine) = owner.machine() else { continue };
                    match token {
                        SERIAL => {
                            let _ = machine.serial().wake().read();
                            console.push(machine.serial());
                        }
                        LISTENER => console.accept(machine.serial()),
                        _ => {
                            if console.go_on(events, machine.serial()) == Some(Action::Quit) {
                                owner.kill();
                            }
                        }
                    }
                }
            }
        }
    }
}

/// When the next line of metrics is due.
#[derive(Default)]
struct MetricsClock(Option<Instant>);

const METRICS_PERIOD: Duration = Duration::from_secs(60);

impl MetricsClock {
    /// How long to wait for it, in milliseconds; for ever without a file.
    fn wait(&mut self, owner: &Owner) -> i32 {
        if !owner.has_metrics() {
            return -1;
        }
        let due = *self.0.get_or_insert_with(|| Instant::now() + METRICS_PERIOD);
        // Rounded up, so as not to be too early by a part of one.
        due.saturating_duration_since(Instant::now()).as_millis() as i32 + 1
    }

    /// Has it written if it is due.
    fn look(&mut self, owner: &mut Owner) {
        if self.0.is_some_and(|due| due <= Instant::now()) {
            owner.write_metrics();
            self.0 = None;
        }
    }
}

/// Keeps epoll's view of the input in step with the console's. Files and /dev/null cannot be polled: they are
/// always ready.
#[derive(Default)]
struct InputWatch {
    watched: Option<Input>,
}

impl InputWatch {
    /// Returns whether the input is to be read without waiting.
    fn follow(&mut self, wanted: Option<Input>, epoll: &Epoll) -> bool {
        if wanted == self.watched {
            return false;
        }
        if let Some(old) = self.watched.take() {
            // It fails for a client that another one has replaced: closed everywhere, it has left by itself.
            let _ = epoll.ctl(ControlOperation::Delete, old.fd, EpollEvent::default());
        }
        let Some(new) = wanted else { return false };
        match epoll.ctl(ControlOperation::Add, new.fd, EpollEvent::new(new.events, INPUT)) {
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => return true,
            Err(error) => tracing::warn!("the console has no input: it cannot be waited for: {error}"),
            Ok(()) => {}
        }
        self.watched = wanted;
        false
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;
    use std::os::fd::OwnedFd;
    use std::os::unix::net::UnixStream;

    #[test]
    fn a_console_that_cannot_be_watched_is_no_end() {
        let (ours, _theirs) = UnixStream::pair().unwrap();
        let console = Console::of_keys(File::from(OwnedFd::from(ours)));
        let (epoll, input) = (Epoll::new().unwrap(), console.input());
        // It is watched already, so that it cannot be.
        let watched = EpollEvent::new(EventSet::IN, INPUT);
        epoll.ctl(ControlOperation::Add, input.unwrap().fd, watched).unwrap();
        let mut watch = InputWatch::default();
        assert!(!watch.follow(input, &epoll));
        assert_eq!(watch.watched, input, "it is not tried again and again");
        // The next one is.
        assert!(!watch.follow(None, &epoll));
        assert!(!watch.follow(input, &epoll));
        assert_eq!(epoll.ctl(ControlOperation::Modify, input.unwrap().fd, watched).ok(), Some(()));
    }
}
