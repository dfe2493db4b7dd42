//! VMs driven through their API socket, with bare-metal guests on whatever `/dev/kvm` this machine has.

#[path = "../support/mod.rs"]
mod support;

mod clients;
mod clones;
mod command_line;
mod devices;
mod endings;
mod generation;
mod golden;
mod jailer;
mod killed;
mod lifecycle;
mod pages;
mod personality;
mod reset;
mod rules;
mod schemathesis;
mod snapshots;
mod stored_disks;
mod vm;
