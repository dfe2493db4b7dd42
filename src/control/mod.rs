//! What a client may ask of a VM: one typed channel to the thread that owns it.
//!
//! ```text
//!   API server's thread ── Call + Answerer ──▶ Calls (channel, eventfd) ──▶ owner's thread: Owner ── Machine
//!            ▲                                                                       │
//!            └────────── answers to calls that only ask ── View ◀── published ───────┘
//! ```
//! The owner knows what has been asked for before the start ([`Plan`]: described as a client described it, and open
//! already, so that what cannot be opened is told at once), and what may be asked when.

mod call;
mod calls;
mod fault;
mod latencies;
mod metrics;
mod owner;
mod plan;
mod reset;
mod resize;
mod running;
mod snapshots;
mod view;
pub mod views;

pub use self::call::{Answer, Answerer, Call, Power, When};
pub use self::calls::{CallSender, Calls, Listener, Message, calls};
pub use self::fault::{Fault, FaultKind};
pub use self::metrics::ApiCounts;
pub use self::owner::{BeforeGuest, Disks, Drives, FIRECRACKER_VERSION, Identity, Owner};
pub use self::resize::{Keeper, NextSize, ResizeRequest, Size};
pub use self::snapshots::{RestoreRequest, Revival, SnapshotRequest, SnapshotTimes};
pub use self::view::{View, Work};
