//! Named VMs, as a user meets them, with bare-metal guests on whatever `/dev/kvm` this machine has.

#[path = "../support/mod.rs"]
mod support;

#[path = "../native/pty.rs"]
#[expect(dead_code, reason = "other tests use more of it")]
mod pty;

#[path = "../../examples/manual.rs"]
#[expect(dead_code, reason = "a program of its own")]
mod manual;

mod console;
mod home;
mod killed;
mod life;
mod resize;
mod services;
mod trouble;
