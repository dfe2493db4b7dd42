//! The console's escape key: Ctrl-A, then a letter.

const ESCAPE: u8 = 0x01;

pub const HELP: &str = "\r\n\
Ctrl-A x  end the VM, as pulling the plug does\r\n\
Ctrl-A h  this help\r\n\
Ctrl-A Ctrl-A  send Ctrl-A to the guest\r\n";

/// Where the VM goes on without its terminal.
pub const DETACH_HELP: &str = "\r\n\
Ctrl-A d  let go of the console; the VM goes on\r\n\
Ctrl-A h  this help\r\n\
Ctrl-A Ctrl-A  send Ctrl-A to the guest\r\n";

#[derive(Debug, PartialEq, Eq)]
pub enum Action {
    Quit,
    Detach,
    Help,
}

/// Takes keys in, lets the guest's through, and finds the user's commands.
#[derive(Debug, Default)]
pub struct EscapeFilter {
    escaped: bool,
    /// Does the VM live without this terminal? Then one lets go of it, and cannot end the VM by it.
    attached: bool,
}

impl EscapeFilter {
    /// That of a terminal without which the VM goes on.
    pub fn attached() -> Self {
        Self { escaped: false, attached: true }
    }

    /// Appends what is for the guest to `out`. Stops at the first command; the rest of the keys is dropped, as
    /// they were typed for a VM that is ending or a help text.
    pub fn feed(&mut self, keys: &[u8], out: &mut Vec<u8>) -> Option<Action> {
        for &key in keys {
            if !std::mem::take(&mut self.escaped) {
                if key == ESCAPE {
                    self.escaped = true;
                } else {
                    out.push(key);
                }
                continue;
            }
            match key {
                b'x' | b'X' if !self.attached => return Some(Action::Quit),
                b'd' | b'D' if self.attached => return Some(Action::Detach),
                b'h' | b'H' | b'?' => return Some(Action::Help),
                ESCAPE => out.push(ESCAPE),
                // No command: the guest gets both keys.
                other => out.extend([ESCAPE, other]),
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn commands_are_found_across_reads() {
        let mut filter = EscapeFilter::default();
        let mut out = Vec::new();
        assert_eq!(filter.feed(b"ls\x01", &mut out), None);
        assert_eq!(filter.feed(b"h", &mut out), Some(Action::Help));
        assert_eq!(filter.feed(b"\x01\x01\x01q\x01x", &mut out), Some(Action::Quit));
        assert_eq!(out, b"ls\x01\x01q");

        out.clear();
        let mut filter = EscapeFilter::attached();
        assert_eq!(filter.feed(b"\x01x\x01", &mut out), None);
        assert_eq!(filter.feed(b"dls", &mut out), Some(Action::Detach));
        assert_eq!(out, b"\x01x");
    }

    proptest! {
        #[test]
        fn keys_without_an_escape_reach_the_guest(keys in proptest::collection::vec(2u8.., 0..100)) {
            let mut out = Vec::new();
            prop_assert_eq!(EscapeFilter::default().feed(&keys, &mut out), None);
            prop_assert_eq!(out, keys);
        }
    }
}
