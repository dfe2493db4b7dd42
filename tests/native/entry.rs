//! What a kernel finds at its first instruction, by either boot protocol.

use tempfile::tempdir;

use crate::guest::{guest, hex, output_of};

/// `(start, size, type)`, as the guest prints its memory map.
fn memory_map(output: &str) -> Vec<(u64, u64, u64)> {
    let number = |text| u64::from_str_radix(text, 16).unwrap();
    let ranges = output.lines().filter_map(|line| line.strip_prefix("memory=")?.split_once(" type="));
    let split = ranges.map(|(range, kind)| (range.split_once('+').unwrap(), kind));
    split.map(|((start, size), kind)| (number(start), number(size), number(kind))).collect()
}

fn expect_fields(output: &str, fields: &[(&str, u64)]) {
    for &(key, value) in fields {
        assert_eq!(hex(output, key), value, "{key} in:\n{output}");
    }
}

/// What both protocols ask for: flat segments, interrupts off, ring 0.
const BOTH: [(&str, u64); 9] = [
    ("cpl", 0),
    ("interrupts", 0),
    ("flags", 2),
    ("cs", 0x10),
    ("ds", 0x18),
    ("es", 0x18),
    ("ss", 0x18),
    ("rsp", 0),
    ("rsdp", 0xe_0000),
];

#[test]
fn pvh_enters_protected_mode_with_the_start_info_in_ebx() {
    let output = output_of(&mut guest("hello-pvh", "x"));
    assert!(output.contains("entry=pvh\n"), "{output}");
    expect_fields(&output, &BOTH);
    let own = [("cr0", 0x11), ("cr4", 0), ("efer", 0), ("paging", 0), ("long", 0), ("rbx", 0x6000), ("rsi", 0)];
    expect_fields(&output, &own);
}

#[test]
fn the_64_bit_entry_is_in_long_mode_with_the_zero_page_in_rsi() {
    let output = output_of(&mut guest("hello", "x"));
    assert!(output.contains("entry=linux64\n"), "{output}");
    expect_fields(&output, &BOTH);
    let own = [("cr0", 0x8000_0011), ("cr3", 0x9000), ("cr4", 0x20), ("efer", 0x500), ("paging", 1), ("long", 1)];
    expect_fields(&output, &own);
    expect_fields(&output, &[("rsi", 0x7000), ("rbx", 0), ("rdi", 0), ("r15", 0)]);
}

#[test]
fn the_command_line_has_defaults_root_disk_and_the_users_text_in_this_order() {
    let dir = tempdir().unwrap();
    let disk = crate::support::disk_with(dir.path(), "root.img", b"root");
    for name in ["hello", "hello-pvh"] {
        for (options, root) in [("", "rw"), (",ro", "ro")] {
            let mut command = guest(name, "panic=9 init=/x");
            command.arg("--rootfs").arg(format!("{}{options}", disk.display()));
            let output = output_of(&mut command);
            let expected = format!("\ncmdline=console=ttyS0 panic=1 root=/dev/vda {root} panic=9 init=/x\n");
            assert!(output.contains(&expected), "{output}");
        }
        // As long as a kernel without a setup header takes: 2047 bytes.
        let rest = "y".repeat(2047 - "console=ttyS0 panic=1 ".len());
        let output = output_of(&mut guest(name, &rest));
        assert!(output.contains(&format!("\ncmdline=console=ttyS0 panic=1 {rest}\n")), "{output}");
    }
}

#[test]
fn the_memory_map_goes_around_the_gap() {
    for name in ["hello", "hello-pvh"] {
        let output = output_of(guest(name, "x").args(["--memory", "5G"]));
        let expected = [
            (0, 0x9_fc00, 1),
            (0xe_0000, 0x2_0000, 2),
            (0x10_0000, 0xbff0_0000, 1),
            (0xe000_0000, 0x10_0000, 2),
            (0x1_0000_0000, 0x8000_0000, 1),
        ];
        assert_eq!(memory_map(&output), expected, "{name}");
    }
}

#[test]
fn all_memory_asked_for_is_in_the_map() {
    const HOLE: u64 = 0x10_0000 - 0x9_fc00;
    let sizes =
        [("32M", 32 << 20), ("33558528", (32 << 20) + 4096), ("3G", 3 << 30), ("3073M", 3073 << 20), ("64G", 64 << 30)];
    for name in ["hello", "hello-pvh"] {
        for (text, size) in sizes {
            let map = memory_map(&output_of(guest(name, "x").args(["--memory", text])));
            let ram: u64 = map.iter().filter(|range| range.2 == 1).map(|range| range.1).sum();
            assert_eq!(ram, size - HOLE, "{name} with {text}: {map:x?}");
            let is_sorted = map.windows(2).all(|pair| pair[0].0 + pair[0].1 <= pair[1].0);
            assert!(is_sorted, "ranges are in order and apart: {map:x?}");
        }
    }
}

#[test]
fn an_initrd_lies_in_ram_behind_the_kernel() {
    let dir = tempdir().unwrap();
    let path = dir.path().join("initrd");
    std::fs::write(&path, vec![7; 5000]).unwrap();
    for name in ["hello", "hello-pvh"] {
        let mut command = guest(name, "x");
        let output = output_of(command.args(["--memory", "64M", "--initrd"]).arg(&path));
        let place = output.split_whitespace().find_map(|word| word.strip_prefix("initrd=")).unwrap();
        // As high as it can be, on a page of its own.
        assert_eq!(place, "3ffe000+1388", "{name}");
    }
}
