//! A vCPU: CPUID, MSRs, registers, run loop.

mod entry;

pub use entry::EntryPoint;
