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
}

#[derive(Debug, Clone)]
pub enum State {
    Built,
    Running,
    /// The power button was pressed; the guest has not ended yet.
    Stopping,
    Ended(End),
}

#[derive(Debug, Clone)]
pub enum Request {
    Start,
    PowerButton,
    Kill,
    GuestEnded(End),
}

impl Request {
    pub fn name(&self) -> &'static str {
        match self {
            Self::Start => "start",
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
            // A second press is passed on too: a guest may have missed the first.
            (Self::Running | Self::Stopping, Request::PowerButton) => Some(Self::Stopping),
            (Self::Running | Self::Stopping, Request::GuestEnded(end)) => Some(Self::Ended(end)),
            (Self::Built | Self::Running | Self::Stopping, Request::Kill) => Some(Self::Ended(End::Killed)),
            (Self::Built, Request::PowerButton | Request::GuestEnded(_))
            | (Self::Running | Self::Stopping, Request::Start)
            | (Self::Ended(_), _) => None,
        }
    }

    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            Self::Built => "built",
            Self::Running => "running",
            Self::Stopping => "stopping",
            Self::Ended(_) => "ended",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_is_exactly_this() {
        let states = [State::Built, State::Running, State::Stopping, State::Ended(End::Reset)];
        let requests = [Request::Start, Request::PowerButton, Request::Kill, Request::GuestEnded(End::PowerOff)];
        let table = [
            ["running", "-", "ended", "-"],
            ["-", "stopping", "ended", "ended"],
            ["-", "stopping", "ended", "ended"],
            ["-", "-", "-", "-"],
        ];
        for (state, row) in states.iter().zip(table) {
            for (request, expected) in requests.iter().zip(row) {
                let got = state.after(request.clone()).map_or("-", |s| s.name());
                assert_eq!(got, expected, "{} in state {}", request.name(), state.name());
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
