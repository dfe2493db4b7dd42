//! Writes the man pages and the shell completions, as the command line defines them, into a directory:
//! `man1/*.1`, `bash/tranche`, `zsh/_tranche`, `fish/tranche.fish`.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use clap_complete::{Shell, generate_to};

fn main() -> io::Result<()> {
    let usage = || io::Error::other("usage: manual DIRECTORY");
    write(&PathBuf::from(std::env::args_os().nth(1).ok_or_else(usage)?))
}

/// Writes all of it below `top`.
pub fn write(top: &Path) -> io::Result<()> {
    let mut command = tranche::cli::command();
    let man = top.join("man1");
    fs::create_dir_all(&man)?;
    clap_mangen::generate_to(command.clone(), &man)?;
    for (shell, name) in [(Shell::Bash, "bash"), (Shell::Zsh, "zsh"), (Shell::Fish, "fish")] {
        let dir = top.join(name);
        fs::create_dir_all(&dir)?;
        generate_to(shell, &mut command, "tranche", &dir)?;
    }
    // Completion files of bash are named after the program alone.
    fs::rename(top.join("bash/tranche.bash"), top.join("bash/tranche"))
}
