//! What a process that was killed has in use until it is gone, which takes the kernel a moment.

use std::time::Duration;

const TRIES: u32 = 50;
const PAUSE: Duration = Duration::from_millis(10);

/// Tries something again for half a second, as long as somebody else has it.
///
/// # Errors
/// The last attempt's.
pub fn until_free<T, E>(mut attempt: impl FnMut() -> Result<T, E>, is_in_use: impl Fn(&E) -> bool) -> Result<T, E> {
    for _ in 1..TRIES {
        match attempt() {
            Err(error) if is_in_use(&error) => std::thread::sleep(PAUSE),
            done => return done,
        }
    }
    attempt()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_in_use_is_waited_for() {
        let mut tries = 0;
        let mut attempt = |free_at| {
            until_free(
                || {
                    tries += 1;
                    if tries == free_at { Ok(tries) } else { Err(tries) }
                },
                |&tries| tries != 3,
            )
        };
        assert_eq!(attempt(2), Ok(2));
        assert_eq!(attempt(9), Err(3));
    }
}
