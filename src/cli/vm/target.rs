//! A running VM, as the command line names it.

use std::convert::Infallible;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use super::failure::Failure;
use crate::store::{Store, StoreError, is_name};

/// The name of a VM, or the path of an API socket. A word that could be either is a name if there is such a VM.
#[derive(Debug, Clone)]
pub struct Target(String);

impl FromStr for Target {
    type Err = Infallible;

    fn from_str(text: &str) -> Result<Self, Infallible> {
        Ok(Self(text.to_owned()))
    }
}

impl Target {
    /// Where its API is.
    ///
    /// # Errors
    /// When it is the name of a VM that does not run, or nothing at all.
    pub fn socket(&self) -> Result<PathBuf, Failure> {
        let path = Path::new(&self.0);
        if !is_name(&self.0) {
            return Ok(path.to_owned());
        }
        match Store::of_user().and_then(|store| store.find(&self.0)) {
            Ok(vm) if vm.is_locked() => Ok(vm.api_socket()),
            Ok(vm) => Err(StoreError::NotRunning(vm.name().to_owned()).into()),
            Err(_) if path.exists() => Ok(path.to_owned()),
            Err(error) => Err(error.into()),
        }
    }
}
