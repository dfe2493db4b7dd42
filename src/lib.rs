//! Tranche: a paravirtualized micro-VM monitor over KVM.
