//! Small guests without a kernel, on whatever `/dev/kvm` this machine has: everything a VM does that needs no Linux.

#[path = "../support/mod.rs"]
mod support;

mod block;
mod endings;
mod entry;
mod guest;
mod hostile;
mod memory;
mod pty;
mod serial;
mod streams;
mod terminal;
