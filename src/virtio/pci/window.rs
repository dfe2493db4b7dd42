//! The PCI configuration access capability (virtio 1.2, 4.1.4.9): a window in the configuration space through
//! which a driver that cannot map the BAR, as firmware may not, reaches it all the same.

use super::config_space::{ConfigSpace, VENDOR_SPECIFIC};
use super::{BAR_SIZE, CAP_WINDOW, virtio_capability};

/// Offsets into the capability, which a driver fills in: BAR, offset, length; then the data.
const BAR: usize = 4;
const OFFSET: usize = 8;
const DATA: usize = 16;
pub const DATA_LEN: usize = 4;

/// Where the capability is.
pub struct Window(usize);

impl Window {
    pub fn add_to(config: &mut ConfigSpace) -> Self {
        let at = config.add_capability(VENDOR_SPECIFIC, &virtio_capability(CAP_WINDOW, 0, 0, &[0; DATA_LEN]));
        config.make_writable(at + BAR, 1);
        config.make_writable(at + OFFSET, DATA + DATA_LEN - OFFSET);
        Self(at)
    }

    pub fn data_at(&self) -> u16 {
        (self.0 + DATA) as u16
    }

    /// Offset and length in the BAR of what an access of the configuration space reaches through the window;
    /// `None` if it does not touch the data, or the driver chose a place that is not there.
    pub fn target(&self, config: &ConfigSpace, offset: u16, len: usize) -> Option<(u64, usize)> {
        let (start, data) = (usize::from(offset), usize::from(self.data_at()));
        let touches = start < data + DATA_LEN && data < start + len;
        if !touches {
            return None;
        }
        let mut fields = [0; DATA - BAR];
        config.read((self.0 + BAR) as u16, &mut fields);
        let [bar, _, _, _, place @ ..] = fields;
        let place = u64::from_le_bytes(place);
        let (at, length) = (place & 0xffff_ffff, place >> 32);
        let valid = bar == 0 && [1, 2, 4].contains(&length) && at.is_multiple_of(length) && at + length <= BAR_SIZE;
        valid.then_some((at, length as usize))
    }
}
