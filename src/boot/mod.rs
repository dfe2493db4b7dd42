//! From a kernel file to the first instruction.

mod error;
mod payload;
mod room;
mod sparse;
