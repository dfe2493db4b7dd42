//! The command line's answers to what is wrong: an exit code for each mistake, three lines at most, nothing left.

#[path = "../support/mod.rs"]
mod support;

mod boot_files;
mod disk_tools;
mod disks;
mod full_disk;
mod help;
mod hostile_packages;
mod io_uring;
mod kernels;
mod kvm;
mod mistake;
mod package;
mod serial;
mod taps;
mod usage;
mod user_network;
