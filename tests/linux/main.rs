//! Real Linux guests on a real KVM: Debian's kernels as they come, a root disk, a tap.
//!
//! `TRANCHE_GUEST_DIR` names the directory that `make guest` fills. The tests run one at a time: most machines
//! that run them emulate KVM.

#[path = "../support/mod.rs"]
mod support;

mod boot;
mod bundles;
mod clients;
mod disk;
mod endings;
mod generation;
mod guest;
mod hotplug;
mod mmio;
mod named;
mod net;
mod pause;
mod profiles;
mod qcow2;
mod queues;
mod shape;
mod shares;
mod small_kernel;
mod snapshots;
mod user_network;
