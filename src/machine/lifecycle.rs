//! The lifecycle as a table: which request leads from which state to which.

use crate::cpu::VcpuFault;

/// How a VM ended.
#[derive(Debug, Clone)]
pub enum End {
    PowerOff,
    Reset,
    Panicked,
    /// Somebody outside wanted it so.
    Killed,
    Fault(VcpuFault),
    /// Who gave the pages of its memory has ended.
    MemoryLost,
}

#[derive(Debug, Clone)]
pub enum State {
    Built,
    Running,
    /// The power button was pressed; the guest has not ended yet.
    Stopping,
    /// vCPUs are leaving the guest: one of them still is on its way, or in the hands of a device. When all are out it is
    /// paused, and then goes on as it was before.
    Pausing {
        stopping: bool,
    },
    Paused {
        stopping: bool,
    },
    Ended(End),
}

#[derive(Debug, Clone)]
pub enum Request {
    Start,
    Pause,
    /// No vCPU is in the guest any more.
    AllParked,
    Resume,
    PowerButton,
    Kill,
    GuestEnded(End),
}

impl Request {
    pub fn name(&self) -> &'static str {
        match self {
            Self::Start => "start",
            Self::Pause => "pause",
            Self::AllParked => "the rest of a pause",
            Self::Resume => "resume",
            Self::PowerButton => "power button",
            Self::Kill => "kill",
            Self::GuestEnded(_) => "end of the guest",
        }
    }
}

impl State {
    /// The state after a request, or `None` if it means nothing now.
    pub fn after(&self, request: Request) -> Option<State> {
        match (self, request) {
            (Self::Built, Request::Start) => Some(Self::Running),
            (Self::Running, Request::Pause) => Some(Self::Pausing { stopping: false }),
            (Self::Stopping, Request::Pause) => Some(Self::Pausing { stopping: true }),
            (&Self::Pausing { stopping }, Request::AllParked) => Some(Self::Paused { stopping }),
            (Self::Pausing { stopping: false } | Self::Paused { stopping: false }, Request::Resume) => {
                Some(Self::Running)
            }
            (Self::Pausing { stopping: true } | Self::Paused { stopping: true }, Request::Resume) => {
                Some(Self::Stopping)
            }
            // What is so already.
            (Self::Pausing { .. } | Self::Paused { .. }, Request::Pause)
            | (Self::Running | Self::Stopping, Request::Resume) => Some(self.clone()),
            // A second press is passed on too: a guest may have missed the first. To one that is paused it is passed
            // on as well, to be found when it goes on.
            (Self::Running | Self::Stopping, Request::PowerButton) => Some(Self::Stopping),
            (Self::Pausing { .. }, Request::PowerButton) => Some(Self::Pausing { stopping: true }),
            (Self::Paused { .. }, Request::PowerButton) => Some(Self::Paused { stopping: true }),
            // The last thing a guest did before it was paused may have been to end.
            (Self::Running | Self::Stopping | Self::Pausing { .. } | Self::Paused { .. }, Request::GuestEnded(end)) => {
                Some(Self::Ended(end))
            }
            (
                Self::Built | Self::Running | Self::Stopping | Self::Pausing { .. } | Self::Paused { .. },
                Request::Kill,
            ) => Some(Self::Ended(End::Killed)),
            (
                Self::Built,
                Request::Pause | Request::AllParked | Request::Resume | Request::PowerButton | Request::GuestEnded(_),
            )
            | (Self::Running | Self::Stopping, Request::Start | Request::AllParked)
            | (Self::Pausing { .. }, Request::Start)
            | (Self::Paused { .. }, Request::Start | Request::AllParked)
            | (Self::Ended(_), _) => None,
        }
    }

    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            Self::Built => "built",
            Self::Running => "running",
            Self::Stopping => "stopping",
            Self::Pausing { .. } => "pausing",
            Self::Paused { .. } => "paused",
            Self::Ended(_) => "ended",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_is_exactly_this() {
        let pausing = |stopping| State::Pausing { stopping };
        let paused = |stopping| State::Paused { stopping };
        let states = [
            State::Built,
            State::Running,
            State::Stopping,
            pausing(false),
            pausing(true),
            paused(false),
            paused(true),
            State::Ended(End::Reset),
        ];
        let requests = [
            Request::Start,
            Request::Pause,
            Request::AllParked,
            Request::Resume,
            Request::PowerButton,
            Request::Kill,
            Request::GuestEnded(End::PowerOff),
        ];
        // A `+` for a guest that has been asked to power off.
        let table = [
            ["running", "-", "-", "-", "-", "ended", "-"],
            ["-", "pausing", "-", "running", "stopping", "ended", "ended"],
            ["-", "pausing+", "-", "stopping", "stopping", "ended", "ended"],
            ["-", "pausing", "paused", "running", "pausing+", "ended", "ended"],
            ["-", "pausing+", "paused+", "stopping", "pausing+", "ended", "ended"],
            ["-", "paused", "-", "running", "paused+", "ended", "ended"],
            ["-", "paused+", "-", "stopping", "paused+", "ended", "ended"],
            ["-", "-", "-", "-", "-", "-", "-"],
        ];
        let shown = |state: State| match state {
            State::Pausing { stopping: true } | State::Paused { stopping: true } => format!("{}+", state.name()),
            _ => state.name().to_owned(),
        };
        for (state, row) in states.iter().zip(table) {
            for (request, expected) in requests.iter().zip(row) {
                let got = state.after(request.clone()).map_or("-".to_owned(), shown);
                assert_eq!(got, expected, "{} in state {}", request.name(), shown(state.clone()));
            }
        }
    }

    #[test]
    fn the_first_end_stays() {
        let ended = State::Running.after(Request::GuestEnded(End::Panicked)).unwrap();
        assert!(matches!(ended, State::Ended(End::Panicked)));
        assert!(ended.after(Request::Kill).is_none());
    }
}
