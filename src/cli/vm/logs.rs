//! `tranche logs`: what a named VM's console has said.

use std::io::{self, Write};
use std::process::ExitCode;
use std::time::{Duration, SystemTime};

use clap::Args;

use super::failure::{Failure, conclude};
use super::lifecycle::seconds;
use crate::cli::exit;
use crate::observe::rfc3339;
use crate::store::{LogLine, LogReader, Store};

/// Print what a named VM's guest has written to its console
///
/// Of all its starts, the last 1 to 2 MiB are kept.
#[derive(Debug, Args)]
#[command(after_help = exit::HELP)]
pub struct LogsArgs {
    /// The VM
    name: String,

    /// Go on with what is written, until the VM ends
    #[arg(long, short)]
    follow: bool,

    /// Of the last seconds, or from a time on, such as 2026-11-27T06:22:01Z
    #[arg(long, value_name = "SECONDS|TIME", value_parser = since)]
    since: Option<String>,

    /// Only so many of the last lines
    #[arg(long, value_name = "LINES")]
    tail: Option<usize>,

    /// Put in front of each line when it was begun
    #[arg(long, short)]
    timestamps: bool,
}

/// How often a log is looked at that is followed.
const PACE: Duration = Duration::from_millis(50);

fn since(text: &str) -> Result<String, String> {
    if let Ok(ago) = seconds(text) {
        return Ok(rfc3339(SystemTime::now().checked_sub(ago).unwrap_or(SystemTime::UNIX_EPOCH)));
    }
    // Times are compared as the log has them, letter by letter.
    let shape = text.bytes().map(|byte| if byte.is_ascii_digit() { b'0' } else { byte });
    let is_time = b"0000-00-00T00:00:00.000Z";
    if shape.clone().count() >= 10 && shape.zip(is_time).all(|(is, wanted)| is == *wanted || is == b'Z') {
        return Ok(text.trim_end_matches('Z').to_owned());
    }
    Err("give seconds, or a UTC time such as 2026-11-27T06:22:01Z".into())
}

pub fn run(args: &LogsArgs) -> ExitCode {
    conclude(Store::of_user().map_err(Failure::from).and_then(|store| logs(&store, args)))
}

fn logs(store: &Store, args: &LogsArgs) -> Result<(), Failure> {
    let vm = store.find(&args.name)?;
    let failed = || Failure::host("read the console's log");
    let mut log = LogReader::open(&vm.console_log()).map_err(failed())?;
    let mut lines = Lines::new(args);
    let mut last = Vec::new();
    while let Some(line) = log.next_line().map_err(failed())? {
        if lines.wants(&line) {
            last.push(line);
        }
    }
    let skipped = args.tail.map_or(0, |tail| skipped(&last, tail));
    let mut printed = lines.print(&last[skipped..]);
    drop(last);
    while args.follow && printed.is_ok() {
        // Looked at before the log: what was written before the end is printed.
        let goes_on = vm.is_locked();
        let mut more = Vec::new();
        while let Some(line) = log.next_line().map_err(failed())? {
            if lines.wants(&line) {
                more.push(line);
            }
        }
        printed = lines.print(&more);
        if !goes_on {
            break;
        }
        if more.is_empty() {
            std::thread::sleep(PACE);
        }
    }
    // Nobody reads any more, which ends it as well as anything.
    drop(printed);
    Ok(())
}

/// How many parts of lines come before the last `tail` lines.
fn skipped(parts: &[LogLine], tail: usize) -> usize {
    let begins = parts.iter().enumerate().rev().filter(|(_, part)| part.time.is_some()).map(|(index, _)| index);
    match tail {
        0 => parts.len(),
        _ => begins.take(tail).last().unwrap_or(0),
    }
}

struct Lines<'a> {
    args: &'a LogsArgs,
    /// Does the line count whose parts come?
    counts: bool,
    at_line_start: bool,
}

impl<'a> Lines<'a> {
    fn new(args: &'a LogsArgs) -> Self {
        Self { args, counts: args.since.is_none(), at_line_start: true }
    }

    fn wants(&mut self, line: &LogLine) -> bool {
        if let (Some(time), Some(since)) = (&line.time, &self.args.since) {
            self.counts = time >= since;
        }
        self.counts
    }

    fn print(&mut self, lines: &[LogLine]) -> io::Result<()> {
        let mut out = io::stdout().lock();
        for line in lines {
            if let Some(time) = &line.time {
                // A line that was never ended, of the start before.
                if !self.at_line_start {
                    out.write_all(b"\n")?;
                }
                if self.args.timestamps {
                    write!(out, "{time} ")?;
                }
            }
            out.write_all(&line.text)?;
            self.at_line_start = line.text.ends_with(b"\n");
        }
        out.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_as_people_give_them() {
        assert_eq!(since("2026-11-27T06:22:01Z").unwrap(), "2026-11-27T06:22:01");
        assert_eq!(since("2026-11-27").unwrap(), "2026-11-27");
        assert!(since("10").unwrap() < rfc3339(SystemTime::now()));
        for wrong in ["", "yesterday", "2026-1", "06:22:01", "-1"] {
            assert!(since(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn the_last_lines_are_whole() {
        let part = |begins: bool| LogLine { time: begins.then(String::new), text: Vec::new() };
        let parts = [part(true), part(true), part(false), part(true)];
        for (tail, expected) in [(0, 4), (1, 3), (2, 1), (3, 0), (9, 0)] {
            assert_eq!(skipped(&parts, tail), expected, "{tail}");
        }
        assert_eq!(skipped(&[], 3), 0);
    }
}
