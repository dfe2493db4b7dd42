//! Points in time as text.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// In UTC, to the millisecond, as RFC 3339 has it: `2026-11-23T14:25:56.192Z`.
#[must_use]
pub fn rfc3339(time: SystemTime) -> String {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    format!("{}.{:03}Z", civil(since, 0), since.subsec_millis())
}

/// In the host's time zone, to the nanosecond, without its name: `2026-11-23T14:25:56.192744248`.
pub fn local(time: SystemTime) -> String {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    format!("{}.{:09}", civil(since, utc_offset(since)), since.subsec_nanos())
}

/// Date and time of a point in time that is `offset` seconds ahead of UTC.
fn civil(since: Duration, offset: i64) -> String {
    let seconds = i64::try_from(since.as_secs()).unwrap_or(i64::MAX).saturating_add(offset);
    let (days, second) = (seconds.div_euclid(86_400), seconds.rem_euclid(86_400));
    let (year, month, day) = date(days);
    let (hour, minute, second) = (second / 3600, second / 60 % 60, second % 60);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}")
}

/// Year, month and day of a number of days since 1970-01-01, in the Gregorian calendar. Years are counted from March
/// here, so that a leap day is the last of its year, and in eras of 400 years, which are all of one length.
fn date(days: i64) -> (i64, i64, i64) {
    const ERA: i64 = 146_097;
    // From 0000-03-01.
    let days = days.saturating_add(719_468);
    let (era, day) = (days.div_euclid(ERA), days.rem_euclid(ERA));
    let year = (day - day / 1460 + day / 36_524 - day / (ERA - 1)) / 365;
    let day = day - (365 * year + year / 4 - year / 100);
    let month = (5 * day + 2) / 153;
    let day = day - (153 * month + 2) / 5 + 1;
    let (month, next) = if month < 10 { (month + 3, 0) } else { (month - 9, 1) };
    (era * 400 + year + next, month, day)
}

#[expect(unsafe_code, reason = "only the C library knows the host's time zone")]
fn utc_offset(since: Duration) -> i64 {
    let Ok(seconds) = libc::time_t::try_from(since.as_secs()) else { return 0 };
    // SAFETY: all zeroes are a valid `tm`, whose pointer is not read before `localtime_r` has set it.
    let mut fields: libc::tm = unsafe { std::mem::zeroed() };
    // SAFETY: both point to what they should, for the time of the call.
    let known = unsafe { libc::localtime_r(&raw const seconds, &raw mut fields) };
    if known.is_null() { 0 } else { fields.tm_gmtoff }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_are_right() {
        for (seconds, text) in [
            (0, "1970-01-01T00:00:00.000Z"),
            (951_782_400, "2000-02-29T00:00:00.000Z"),
            (951_868_799, "2000-02-29T23:59:59.000Z"),
            (4_107_542_400, "2100-03-01T00:00:00.000Z"),
            (1_795_703_156, "2026-11-26T14:25:56.000Z"),
        ] {
            assert_eq!(rfc3339(UNIX_EPOCH + Duration::from_secs(seconds)), text);
        }
        assert_eq!(rfc3339(UNIX_EPOCH + Duration::from_millis(1234)), "1970-01-01T00:00:01.234Z");
        assert_eq!(civil(Duration::from_secs(0), 3600), "1970-01-01T01:00:00");
        assert_eq!(civil(Duration::from_secs(0), -3600), "1969-12-31T23:00:00");
    }
}
