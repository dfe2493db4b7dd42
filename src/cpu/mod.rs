//! A vCPU: CPUID, MSRs, registers, run loop, its state.

mod cpuid;
mod entry;
mod features;
mod gate;
mod kick;
mod msrs;
mod raw;
mod state;
mod vcpu;
mod vcpus;

pub use cpuid::{HostCpuid, Topology};
pub use entry::{EntryPoint, gdt};
pub use features::Incompatible;
pub use kick::install_handler as install_kick_handler;
pub use raw::{Raw, RawBytes};
pub use state::{StateShape, VcpuStateV1};
pub use vcpu::{CpuError, ExitHandler, Vcpu, VcpuFault};
pub use vcpus::Vcpus;
