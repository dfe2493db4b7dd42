//! The host's errors on their way from one process to another (for serde's `with`).

use std::io;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

#[derive(Serialize, Deserialize)]
enum Told {
    Os(i32),
    Other(String),
}

/// # Errors
/// The serializer's.
pub fn serialize<S: Serializer>(error: &io::Error, serializer: S) -> Result<S::Ok, S::Error> {
    let number = error.raw_os_error().or(match error.kind() {
        io::ErrorKind::NotFound => Some(libc::ENOENT),
        io::ErrorKind::PermissionDenied => Some(libc::EACCES),
        io::ErrorKind::AlreadyExists => Some(libc::EEXIST),
        io::ErrorKind::InvalidInput => Some(libc::EINVAL),
        io::ErrorKind::Unsupported => Some(libc::EOPNOTSUPP),
        _ => None,
    });
    number.map_or_else(|| Told::Other(error.to_string()), Told::Os).serialize(serializer)
}

/// # Errors
/// The deserializer's.
pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<io::Error, D::Error> {
    Ok(match Told::deserialize(deserializer)? {
        Told::Os(number) => io::Error::from_raw_os_error(number),
        Told::Other(text) => io::Error::other(text),
    })
}
