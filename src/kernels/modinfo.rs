//! What a kernel module says of itself: the strings `key=value` in its ELF section `.modinfo`.

/// Looks into an ELF64 relocatable; `None` if it is none, or has no such section.
pub fn section(elf: &[u8]) -> Option<&[u8]> {
    let u16_at = |at: usize| Some(u16::from_le_bytes(*elf.get(at..)?.first_chunk()?));
    let u32_at = |at: usize| Some(u32::from_le_bytes(*elf.get(at..)?.first_chunk()?));
    let offset_at = |at: usize| usize::try_from(u64::from_le_bytes(*elf.get(at..)?.first_chunk()?)).ok();
    if !elf.starts_with(b"\x7fELF\x02\x01") {
        return None;
    }
    let (table, entry, count, names) =
        (offset_at(0x28)?, usize::from(u16_at(0x3a)?), usize::from(u16_at(0x3c)?), usize::from(u16_at(0x3e)?));
    let header = |index: usize| table.checked_add(index.checked_mul(entry)?);
    let content = |index: usize| {
        let at = header(index)?;
        let start = offset_at(at.checked_add(0x18)?)?;
        elf.get(start..start.checked_add(offset_at(at.checked_add(0x20)?)?)?)
    };
    let names = content(names)?;
    (0..count).find_map(|index| {
        let name = names.get(u32_at(header(index)?)? as usize..)?;
        name.starts_with(b".modinfo\0").then(|| content(index))?
    })
}

/// All values of `key`.
pub fn values<'a>(section: &'a [u8], key: &'a str) -> impl Iterator<Item = &'a str> {
    let strings = section.split(|b| *b == 0).filter_map(|text| std::str::from_utf8(text).ok());
    strings.filter_map(move |text| text.strip_prefix(key)?.strip_prefix('='))
}

#[cfg(test)]
pub mod tests {
    use super::*;
    use proptest::prelude::*;

    /// A module with nothing but its `.modinfo`.
    pub fn module(info: &[u8]) -> Vec<u8> {
        const NAMES: &[u8] = b"\0.modinfo\0";
        let mut elf = vec![0; 64];
        elf[..6].copy_from_slice(b"\x7fELF\x02\x01");
        let names_at = elf.len();
        elf.extend_from_slice(NAMES);
        let info_at = elf.len();
        elf.extend_from_slice(info);
        let table = elf.len();
        let header = |name: u32, at: usize, len: usize| {
            let mut header = vec![0; 64];
            header[..4].copy_from_slice(&name.to_le_bytes());
            header[0x18..0x20].copy_from_slice(&(at as u64).to_le_bytes());
            header[0x20..0x28].copy_from_slice(&(len as u64).to_le_bytes());
            header
        };
        elf.extend(header(0, names_at, NAMES.len()));
        elf.extend(header(1, info_at, info.len()));
        elf[0x28..0x30].copy_from_slice(&(table as u64).to_le_bytes());
        elf[0x3a..0x3c].copy_from_slice(&64u16.to_le_bytes());
        elf[0x3c..0x3e].copy_from_slice(&2u16.to_le_bytes());
        elf
    }

    #[test]
    fn values_by_key() {
        let elf = module(b"depends=a,b\0alias=x\0alias=y\0dependsnot=z\0");
        let info = section(&elf).unwrap();
        assert_eq!(values(info, "depends").collect::<Vec<_>>(), ["a,b"]);
        assert_eq!(values(info, "alias").collect::<Vec<_>>(), ["x", "y"]);
        assert_eq!(section(b"\x7fELF\x01\x01"), None);
    }

    proptest! {
        #[test]
        fn any_bytes_may_be_there(noise in proptest::collection::vec(any::<u8>(), 0..80), at in 0usize..200, len in 0usize..300) {
            let mut elf = module(b"depends=a\0");
            for (to, from) in elf.iter_mut().skip(at).zip(&noise) {
                *to = *from;
            }
            elf.truncate(len);
            if let Some(info) = section(&elf) {
                let _ = values(info, "depends").count();
            }
        }
    }
}
