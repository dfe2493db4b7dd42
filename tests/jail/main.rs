//! What a VMM that has been taken over can do: a table of attempts, made from within (`src/jail/attacker.rs`, which only
//! builds with debug assertions have), and what has to come of each.

#[path = "../support/mod.rs"]
mod support;

mod attempts;
mod levels;
