#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| tranche::fuzzing::layout(input));
