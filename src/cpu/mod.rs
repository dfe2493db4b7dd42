//! A vCPU: CPUID, MSRs, registers, run loop.

mod cpuid;
mod entry;
mod gate;
mod kick;
mod msrs;
mod vcpu;
mod vcpus;

pub use cpuid::{HostCpuid, Topology};
pub use entry::{EntryPoint, gdt};
pub use kick::install_handler as install_kick_handler;
pub use vcpu::{CpuError, ExitHandler, Vcpu, VcpuFault};
pub use vcpus::Vcpus;
