//! What a VM is: plain data with defaults, units and validation.
