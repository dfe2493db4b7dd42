//! Tranche: a paravirtualized micro-VM monitor over KVM.
//!
//! One process is one micro-VM. Each module is a room of the house; data flows from the top of this list to
//! the bottom, and a room uses only rooms below it (`config` and `observe` are open to all):
//!
//! - [`cli`]: one file per verb; parse, call, render
//! - [`api`]: HTTP on a unix socket: Firecracker's API, and ours below `/v2`
//! - [`jail`]: what takes rights away from processes of ours
//! - [`resize`]: a named VM of another size: a plan, and the steps
//! - [`store`]: named VMs on disk: definitions, locks, lives, consoles
//! - [`control`]: what a client may ask of a VM, and the owner that does it
//! - [`snapshot`]: a machine at rest: format, save, restore
//! - [`machine`]: a running VM; the builder, the lifecycle, the one owner of it all
//! - [`kernels`]: kernels of distributions, imported once and booted by name
//! - [`boot`]: from a kernel file to the first instruction
//! - [`platform`]: what a PC needs: memory map, ACPI tables, buses, interrupts, PCI root, serial, reset
//! - [`cpu`]: a vCPU: CPUID, MSRs, registers, run loop
//! - [`devices`]: one virtio device per file; each knows its queues, never its transport
//! - [`virtio`]: the device contract, queues and the two transports, PCI and MMIO
//! - [`backend`]: the host side of a device: disk files, taps, vhost; every host file enters here
//! - [`shelf`]: our files and directories on the host's disk, whole or not at all
//! - [`memory`]: guest RAM: regions, backing, dirty tracking
//! - [`threads`]: threads of a VM, each of a kind that may do no more than it needs
//! - [`config`]: what a VM is: plain data with defaults, units and validation
//! - [`observe`]: logs and the boot timeline
//!
//! Apart from them all, [`guest_init`] is what runs first inside a guest with an imported kernel, and `fuzzing` (of the
//! feature `fuzzing` and of tests) what fuzzers drive.

pub mod api;
pub mod backend;
pub mod boot;
pub mod cli;
pub mod config;
pub mod control;
pub mod cpu;
pub mod devices;
#[cfg(any(test, feature = "fuzzing"))]
pub mod fuzzing;
pub mod guest_init;
pub mod jail;
pub mod kernels;
pub mod machine;
pub mod memory;
pub mod observe;
pub mod platform;
pub mod resize;
pub mod shelf;
pub mod snapshot;
pub mod store;
pub mod threads;
pub mod virtio;
