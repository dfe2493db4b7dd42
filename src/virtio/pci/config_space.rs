//! The configuration space of a type 0 function (PCI Local Bus 3.0, 6.1 and 6.7): what is there, and which bits
//! a guest can write. 256 bytes; the extended space behind them reads as zeroes.

/// Vendor-specific capability.
pub const VENDOR_SPECIFIC: u8 = 0x09;
const MSIX: u8 = 0x11;

/// Of what there is, in bytes.
pub const SIZE: usize = 256;

const COMMAND: usize = 0x04;
const STATUS: usize = 0x06;
const BAR0: usize = 0x10;
const CAPABILITIES: usize = 0x34;
const FIRST_CAPABILITY: usize = 0x40;
const INTERRUPT_LINE: usize = 0x3c;

const COMMAND_MEMORY: u8 = 1 << 1;
/// Memory, bus master; interrupt disable is in the high byte.
const COMMAND_WRITABLE: [u8; 2] = [0x06, 0x04];
const STATUS_CAPABILITIES: u8 = 1 << 4;
const BAR_MEMORY_64: u32 = 0b0100;

/// Who the function says it is.
pub struct Identity {
    pub vendor: u16,
    pub device: u16,
    /// Class, subclass, programming interface.
    pub class: u32,
}

pub struct ConfigSpace {
    bytes: [u8; SIZE],
    writable: [u8; SIZE],
    /// End of the capabilities so far, and where the last one's link is.
    next: usize,
    link: usize,
    msix: Option<usize>,
}

impl ConfigSpace {
    pub fn new(identity: Identity) -> Self {
        let mut space =
            Self { bytes: [0; SIZE], writable: [0; SIZE], next: FIRST_CAPABILITY, link: CAPABILITIES, msix: None };
        space.put(0, &identity.vendor.to_le_bytes());
        space.put(2, &identity.device.to_le_bytes());
        // Revision 1 or above: a modern-only virtio device (virtio 1.2, 4.1.2.1).
        space.put(8, &(identity.class << 8 | 1).to_le_bytes());
        // Subsystem IDs of 0x40 or more tell the same.
        space.put(0x2c, &identity.vendor.to_le_bytes());
        space.put(0x2e, &0x40u16.to_le_bytes());
        space.writable[COMMAND..COMMAND + 2].copy_from_slice(&COMMAND_WRITABLE);
        space.writable[INTERRUPT_LINE] = 0xff;
        space
    }

    /// A 64-bit memory BAR of `size` bytes (a power of two) at `addr`, in BARs 0 and 1.
    pub fn set_bar0(&mut self, addr: u64, size: u64) {
        self.put(BAR0, &(addr | u64::from(BAR_MEMORY_64)).to_le_bytes());
        self.writable[BAR0..BAR0 + 8].copy_from_slice(&(!(size - 1)).to_le_bytes());
    }

    /// BAR 0's address while memory decoding is on.
    pub fn bar0(&self) -> Option<u64> {
        let raw = u64::from_le_bytes(self.bytes[BAR0..BAR0 + 8].try_into().expect("8 bytes"));
        let size = !u64::from_le_bytes(self.writable[BAR0..BAR0 + 8].try_into().expect("8 bytes")) + 1;
        let addr = raw & !0xf;
        // All ones is a driver asking for the size, and nothing can be mapped so that it wraps.
        let real = addr != 0 && addr.checked_add(size).is_some();
        (self.bytes[COMMAND] & COMMAND_MEMORY != 0 && real).then_some(addr)
    }

    /// Appends a capability: its ID, a link, then `body`. Returns its offset.
    pub fn add_capability(&mut self, id: u8, body: &[u8]) -> usize {
        let at = self.next;
        self.put(self.link, &[at as u8]);
        self.put(at, &[id, 0]);
        self.put(at + 2, body);
        self.bytes[STATUS] |= STATUS_CAPABILITIES;
        self.link = at + 1;
        self.next = (at + 2 + body.len()).next_multiple_of(4);
        at
    }

    /// Appends MSI-X for `vectors`, its table and pending bits at these offsets into BAR 0.
    pub fn add_msix(&mut self, vectors: u16, table: u32, pending: u32) {
        let mut body = (vectors - 1).to_le_bytes().to_vec();
        body.extend_from_slice(&table.to_le_bytes());
        body.extend_from_slice(&pending.to_le_bytes());
        let at = self.add_capability(MSIX, &body);
        // Function mask and enable.
        self.writable[at + 3] = 0xc0;
        self.msix = Some(at);
    }

    /// Lets the guest write every bit of `at..at + len`.
    pub fn make_writable(&mut self, at: usize, len: usize) {
        self.writable[at..at + len].fill(0xff);
    }

    /// The MSI-X message control register.
    pub fn msix_control(&self) -> Option<u16> {
        self.msix.map(|at| u16::from_le_bytes([self.bytes[at + 2], self.bytes[at + 3]]))
    }

    /// Reads; what lies behind the first 256 bytes is zero.
    pub fn read(&self, offset: u16, data: &mut [u8]) {
        for (i, byte) in data.iter_mut().enumerate() {
            *byte = self.bytes.get(usize::from(offset) + i).copied().unwrap_or(0);
        }
    }

    /// Writes the writable bits.
    pub fn write(&mut self, offset: u16, data: &[u8]) {
        for (i, &new) in data.iter().enumerate() {
            let at = usize::from(offset) + i;
            if let Some(byte) = self.bytes.get_mut(at) {
                let mask = self.writable[at];
                *byte = *byte & !mask | new & mask;
            }
        }
    }

    /// All that is not zeroes for sure.
    pub fn save(&self) -> Vec<u8> {
        self.bytes.to_vec()
    }

    /// Could a guest have made that of this space? Else returns where it could not.
    pub fn check(&self, saved: &[u8; SIZE]) -> Result<(), usize> {
        let kept = |at: &usize| (self.bytes[*at] ^ saved[*at]) & !self.writable[*at] == 0;
        (0..SIZE).find(|at| !kept(at)).map_or(Ok(()), Err)
    }

    /// The same space with what [`Self::check`] has found to be possible.
    #[must_use]
    pub fn with(&self, saved: &[u8; SIZE]) -> Self {
        Self { bytes: *saved, ..*self }
    }

    fn put(&mut self, at: usize, bytes: &[u8]) {
        self.bytes[at..at + bytes.len()].copy_from_slice(bytes);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn space() -> ConfigSpace {
        let mut space = ConfigSpace::new(Identity { vendor: 0x1af4, device: 0x1042, class: 0x01_8000 });
        space.set_bar0(0xd000_8000, 0x8000);
        space.add_capability(VENDOR_SPECIFIC, &[16, 1, 0, 0]);
        space.add_msix(3, 0x4000, 0x6000);
        space
    }

    fn read32(space: &ConfigSpace, at: u16) -> u32 {
        let mut data = [0; 4];
        space.read(at, &mut data);
        u32::from_le_bytes(data)
    }

    #[test]
    fn a_driver_can_size_and_move_the_bar() {
        let mut space = space();
        space.write(0x10, &[0xff; 4]);
        space.write(0x14, &[0xff; 4]);
        assert_eq!((read32(&space, 0x10), read32(&space, 0x14)), (0xffff_8004, u32::MAX));
        space.write(0x04, &[2]);
        assert_eq!(space.bar0(), None, "an address that wraps is no address");
        space.write(0x10, &0xd100_0000u32.to_le_bytes());
        space.write(0x14, &[0; 4]);
        assert_eq!(space.bar0(), Some(0xd100_0000));
        space.write(0x04, &[0]);
        assert_eq!(space.bar0(), None);
    }

    #[test]
    fn the_capability_list_is_whole() {
        let space = space();
        assert_ne!(read32(&space, 0x04) >> 16 & 0x10, 0);
        let mut at = read32(&space, 0x34) as u16 & 0xff;
        let mut ids = Vec::new();
        while at != 0 {
            let cap = read32(&space, at);
            ids.push(cap as u8);
            at = (cap >> 8) as u16 & 0xff;
        }
        assert_eq!(ids, [VENDOR_SPECIFIC, MSIX]);
        assert_eq!(space.msix_control(), Some(2));
    }

    proptest! {
        #[test]
        fn only_writable_bits_ever_change(writes in proptest::collection::vec((any::<u16>(), any::<[u8; 8]>(), 0usize..9), 0..50)) {
            let (before, mut after) = (space(), space());
            for (offset, data, len) in writes {
                after.write(offset, &data[..len]);
                let _ = (after.bar0(), after.msix_control());
            }
            for i in 0..256 {
                prop_assert_eq!((before.bytes[i] ^ after.bytes[i]) & !before.writable[i], 0);
            }
        }
    }
}
