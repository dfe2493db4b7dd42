//! Standard streams in the states that scripts and service managers leave them in.

use std::fs::File;
use std::io::{PipeWriter, Write};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use rustix::fs::{OFlags, fcntl_setfl};
use rustix::process::Signal;

use crate::guest::{LIMIT, expect_error, guest};
use crate::support::Running;

/// The same command, started by a shell that redirects its streams.
fn redirected(command: &Command, redirection: &str) -> Command {
    let mut shell = Command::new("sh");
    shell.arg("-c").arg(format!("exec \"$0\" \"$@\" {redirection}")).arg(command.get_program());
    shell.args(command.get_args());
    shell
}

#[test]
fn standard_input_may_be_anything() {
    for input in ["</dev/null", "<&-", "</etc/passwd", "</dev/zero", "<."] {
        let mut command = redirected(&guest("hello", "x"), input);
        let ended = Running::start(&mut command).wait(LIMIT).expect_code(0);
        assert!(ended.output.ends_with("\nend\n"), "{input}:\n{}", ended.output);
        assert_eq!(ended.errors, "", "{input}");
    }
}

#[test]
fn the_end_of_the_input_is_not_the_end_of_the_vm() {
    let mut command = redirected(&guest("hello", "end=button"), "</dev/null");
    let running = Running::start(&mut command);
    running.output.wait_for("\nend\n", LIMIT);
    running.signal(Signal::TERM);
    assert!(running.wait(LIMIT).expect_code(0).output.ends_with("button\n"));
}

#[test]
fn the_guest_goes_on_when_nobody_can_read_it() {
    // The reset comes after the last line of output: a guest held up by its console would not get there.
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let mut command = guest("hello", "end=reset");
    let command = command.stdin(Stdio::null()).stdout(writer).stderr(Stdio::piped());
    expect_error(Running::spawn(command).wait(LIMIT), 3, "reset itself");
    for output in [">&-", ">/dev/full", ">&- 2>&- <&-"] {
        let mut command = redirected(&guest("hello", "end=reset"), output);
        Running::start(&mut command).wait(LIMIT).expect_code(3);
    }
}

/// Fills a pipe until it takes no more.
fn fill(writer: &PipeWriter) {
    fcntl_setfl(writer, OFlags::NONBLOCK).unwrap();
    while (&*writer).write(&[b'.'; 4096]).is_ok() {}
    while (&*writer).write(b".").is_ok() {}
    fcntl_setfl(writer, OFlags::empty()).unwrap();
}

/// Whether a thread of the process hangs in write(2).
fn hangs_in_write(pid: u32) -> bool {
    let calls = std::fs::read_dir(format!("/proc/{pid}/task")).unwrap().flatten().filter_map(|thread| {
        let call = std::fs::read_to_string(thread.path().join("syscall")).ok()?;
        call.split_whitespace().next().map(str::to_owned)
    });
    calls.into_iter().any(|number| number == libc::SYS_write.to_string())
}

#[test]
fn a_guest_that_hangs_on_its_console_can_be_ended() {
    let (_reader, writer) = std::io::pipe().unwrap();
    fill(&writer);
    let mut command = guest("hello", "x");
    let command = command.args(["--log-level", "debug"]).stdin(Stdio::piped()).stdout(writer).stderr(Stdio::piped());
    let running = Running::spawn(command);
    let deadline = Instant::now() + LIMIT;
    while !hangs_in_write(running.vmm()) {
        assert!(Instant::now() < deadline, "the guest does not write");
        std::thread::sleep(Duration::from_millis(5));
    }
    running.signal(Signal::TERM);
    running.errors.wait_for("running -> stopping", LIMIT);
    running.signal(Signal::TERM);
    expect_error(running.wait(LIMIT), 5, "ended from outside");
}

#[test]
fn a_slow_reader_gets_everything() {
    let (mut reader, writer) = std::io::pipe().unwrap();
    fill(&writer);
    let mut command = guest("hello", "x");
    let running = Running::spawn(command.stdin(Stdio::null()).stdout(writer).stderr(Stdio::piped()));
    drop(command);
    let mut text = Vec::new();
    std::io::Read::read_to_end(&mut reader, &mut text).unwrap();
    running.wait(LIMIT).expect_code(0);
    let text = String::from_utf8(text).unwrap();
    assert!(text.trim_start_matches('.').starts_with("hello\n") && text.ends_with("\nend\n"), "{text}");
}

#[test]
fn a_file_as_output_is_appended_to_where_the_shell_says_so() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("log");
    std::fs::write(&path, "before\n").unwrap();
    let mut command = guest("hello", "x");
    let log = File::options().append(true).open(&path).unwrap();
    Running::spawn(command.stdin(Stdio::null()).stdout(log)).wait(LIMIT).expect_code(0);
    let text = std::fs::read_to_string(&path).unwrap();
    assert!(text.starts_with("before\nhello\n") && text.ends_with("\nend\n"), "{text}");
}
