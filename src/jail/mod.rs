//! What takes rights away from processes of ours.

mod tool;

pub use self::tool::{ConfineError, confine_to_file, landlock_version};
