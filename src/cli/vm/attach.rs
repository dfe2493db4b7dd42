//! `tranche attach`: the console of a named VM, on this terminal.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::process::ExitCode;
use std::time::Duration;

use clap::Args;
use rustix::event::{PollFd, PollFlags, poll};

use super::failure::{Failure, conclude_with};
use crate::cli::escape::{Action, DETACH_HELP, EscapeFilter};
use crate::cli::exit::{self, Exit};
use crate::cli::signals::{Signals, die_of};
use crate::cli::terminal::RawTerminal;
use crate::store::{State, Store, StoreError, Vm};

/// Show a named VM's console on this terminal
///
/// Ctrl-A d lets go of it; the VM goes on. When the VM ends, this ends with its exit code. One who attaches writes, others watch.
#[derive(Debug, Args)]
#[command(after_help = exit::HELP)]
pub struct AttachArgs {
    /// The VM
    name: String,

    /// Only look on
    #[arg(long)]
    watch: bool,
}

pub fn run(args: &AttachArgs) -> ExitCode {
    let attach = |store: Store| attach(&store.find(&args.name)?, args.watch);
    conclude_with(Store::of_user().map_err(Failure::from).and_then(attach))
}

/// How the console was left.
enum Left {
    Detached,
    Ended,
    Signal(libc::c_int),
}

/// Shows a VM's console until the VM ends, whose exit code it returns, or until its user lets go of it.
pub fn attach(vm: &Vm, watch: bool) -> Result<u8, Failure> {
    let mut console = UnixStream::connect(vm.console_socket()).map_err(|source| match source.kind() {
        io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => StoreError::NotRunning(vm.name().into()).into(),
        _ => Failure::Host { what: "reach the console", source },
    })?;
    let failed = || Failure::host("use the console");
    console.write_all(if watch { b"watch\n" } else { b"write\n" }).map_err(failed())?;
    let may_write = hear_role(&mut console).map_err(failed())? == "writer";
    if !watch && !may_write {
        exit::say("tranche: somebody else writes to this console: this is to look on\n");
    }
    let terminal = RawTerminal::enter().map_err(Failure::host("use the terminal"))?;
    let left = show(console, may_write, terminal.is_some()).map_err(failed());
    drop(terminal);
    match left? {
        Left::Signal(signal) => die_of(signal),
        Left::Detached => {
            exit::say(&format!("\ntranche: detached; 'tranche attach {}' attaches again\n", vm.name()));
            Ok(0)
        }
        Left::Ended => Ok(how_it_ended(vm)),
    }
}

fn hear_role(console: &mut UnixStream) -> io::Result<String> {
    let mut answer = String::new();
    let mut byte = [0];
    while answer.len() < 16 {
        console.read_exact(&mut byte)?;
        match byte[0] {
            b'\n' => break,
            letter => answer.push(letter.into()),
        }
    }
    Ok(answer)
}

fn show(mut console: UnixStream, may_write: bool, on_terminal: bool) -> io::Result<Left> {
    let mut signals = Signals::block()?;
    let mut input = Some(File::from(io::stdin().as_fd().try_clone_to_owned()?)).filter(|_| may_write || on_terminal);
    let mut escape = EscapeFilter::attached();
    let mut buffer = vec![0; 16 << 10];
    loop {
        let mut fds = vec![PollFd::new(&signals, PollFlags::IN), PollFd::new(&console, PollFlags::IN)];
        fds.extend(input.as_ref().map(|input| PollFd::new(input, PollFlags::IN)));
        match poll(&mut fds, None) {
            Err(rustix::io::Errno::INTR) => continue,
            polled => polled?,
        };
        let ready: Vec<bool> = fds.iter().map(|fd| !fd.revents().is_empty()).collect();
        if ready[0]
            && let Some(signal) = signals.next()
        {
            return Ok(Left::Signal(signal));
        }
        if ready[1] {
            match console.read(&mut buffer) {
                Ok(count @ 1..) => {
                    let mut stdout = io::stdout().lock();
                    stdout.write_all(&buffer[..count]).and_then(|()| stdout.flush())?;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                _ => return Ok(Left::Ended),
            }
        }
        if ready.get(2) == Some(&true)
            && let Some(file) = &mut input
        {
            let count = file.read(&mut buffer)?;
            if count == 0 {
                // The end of the input is not the end of the VM.
                input = None;
                continue;
            }
            let mut keys = Vec::new();
            let action = if on_terminal {
                escape.feed(&buffer[..count], &mut keys)
            } else {
                keys.extend_from_slice(&buffer[..count]);
                None
            };
            if may_write && console.write_all(&keys).is_err() {
                return Ok(Left::Ended);
            }
            match action {
                Some(Action::Detach) => return Ok(Left::Detached),
                Some(Action::Help) => exit::say(DETACH_HELP),
                Some(Action::Quit) | None => {}
            }
        }
    }
}

/// Says how a VM has ended whose console has, and tells the exit code.
fn how_it_ended(vm: &Vm) -> u8 {
    // Its process has let go of the console, and is about to end.
    let gone = vm.wait_until_it_ends(Some(Duration::from_secs(5)));
    match vm.life().and_then(|life| life.ended) {
        Some(ended) => {
            if ended.code != 0 {
                exit::say(&format!("tranche: {}\n", ended.reason));
            }
            ended.code
        }
        // It lives, and does without us: we took too little of what there was.
        None if !gone => {
            exit::say("tranche: the VM has let go of this terminal, and goes on\n");
            Exit::Internal as u8
        }
        None => {
            if let State::Dead(why) = vm.state() {
                exit::say(&format!("tranche: {why}\n"));
            }
            Exit::Internal as u8
        }
    }
}
