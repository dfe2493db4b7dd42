//! Seccomp policies, from text (src/jail/policies) to programs of the kernel's filter machine.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::Path;
use std::{env, fs};

use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule, TargetArch,
};

/// The kinds of threads, each with a policy; of some another one for a VMM that opens files for itself.
const KINDS: [&str; 6] = ["main", "vcpu", "api", "io", "open_main", "open_api"];

const DIR: &str = "src/jail/policies";

/// What a policy says of one system call.
#[derive(Default)]
struct Call {
    /// Without any, all of its calls are allowed.
    rules: Vec<SeccompRule>,
    always: bool,
    /// It fails with this instead.
    error: Option<u32>,
}

type Policy = BTreeMap<i64, Call>;

/// Writes a program for each kind of thread, as a constant.
pub fn compile() {
    println!("cargo:rerun-if-changed={DIR}");
    println!("cargo:rerun-if-changed=build");
    let numbers = numbers();
    let mut text = String::new();
    for kind in KINDS {
        let mut policy = Policy::new();
        read(kind, &numbers, &mut policy);
        let refused: BTreeMap<_, _> = policy.iter().filter_map(|(&call, rule)| Some((call, rule.error?))).collect();
        let allowed = policy
            .into_iter()
            .map(|(call, Call { rules, always, .. })| (call, if always { Vec::new() } else { rules }));
        let mut programs = vec![filter(allowed.collect(), SeccompAction::Trap, SeccompAction::Allow)];
        for (call, error) in refused {
            let only = BTreeMap::from([(call, Vec::new())]);
            programs.push(filter(only, SeccompAction::Allow, SeccompAction::Errno(error)));
        }
        let _ = writeln!(text, "/// The programs of `{kind}`.\npub const {}: &[&[[u8; 8]]] = &[", kind.to_uppercase());
        for program in programs {
            text.push_str("    &[");
            for i in program {
                let code = i.code.to_le_bytes();
                let k = i.k.to_le_bytes();
                let _ = write!(text, "{:?}, ", [code[0], code[1], i.jt, i.jf, k[0], k[1], k[2], k[3]]);
            }
            text.push_str("],\n");
        }
        text.push_str("];\n");
    }
    let names: Vec<_> = (0..=super::syscalls::SYSCALLS.iter().map(|known| known.1).max().unwrap_or(0))
        .map(|number| super::syscalls::SYSCALLS.iter().find(|known| known.1 == number).map_or("", |known| known.0))
        .collect();
    let _ = writeln!(text, "/// The names of system calls, one a line, in the order of their numbers.");
    let _ = writeln!(text, "pub const NAMES: &str = {:?};", names.join("\n"));
    let out = env::var_os("OUT_DIR").expect("cargo sets it");
    fs::write(Path::new(&out).join("seccomp.rs"), text).expect("the build directory can be written to");
}

fn filter(rules: BTreeMap<i64, Vec<SeccompRule>>, others: SeccompAction, these: SeccompAction) -> BpfProgram {
    let filter = SeccompFilter::new(rules, others, these, TargetArch::x86_64).expect("a filter of these rules");
    filter.try_into().expect("a filter that is not too long")
}

fn lines(name: &str) -> Vec<(usize, String)> {
    let path = format!("{DIR}/{name}");
    let text = fs::read_to_string(&path).unwrap_or_else(|error| panic!("{path}: {error}"));
    let lines = text.lines().map(|line| line.split('#').next().unwrap_or_default().trim().to_owned());
    lines.enumerate().filter(|(_, line)| !line.is_empty()).map(|(index, line)| (index + 1, line)).collect()
}

fn numbers() -> BTreeMap<String, u64> {
    let number = |text: &str| match text.strip_prefix("0x") {
        Some(digits) => u64::from_str_radix(digits, 16),
        None => text.parse(),
    };
    let entry = |(at, line): (usize, String)| {
        let (name, value) = line.split_once(' ').unwrap_or_else(|| panic!("{DIR}/numbers:{at}: a name and a number"));
        (name.to_owned(), number(value.trim()).unwrap_or_else(|error| panic!("{DIR}/numbers:{at}: {error}")))
    };
    lines("numbers").into_iter().map(entry).collect()
}

/// Adds what a policy says: `CALL`, `CALL: argN == NUMBER | NUMBER`, `CALL: argN & NUMBER == 0`, `CALL: ENOSYS`, or
/// `include NAME`.
fn read(name: &str, numbers: &BTreeMap<String, u64>, policy: &mut Policy) {
    let file = format!("{name}.policy");
    for (at, line) in lines(&file) {
        let wrong = |what: &str| -> ! { panic!("{DIR}/{file}:{at}: {what}: {line}") };
        let number = |word: &str| *numbers.get(word.trim()).unwrap_or_else(|| wrong("an unknown number"));
        if let Some(other) = line.strip_prefix("include ") {
            read(other, numbers, policy);
            continue;
        }
        let (call, rule) = line.split_once(':').map_or((line.as_str(), None), |(call, rule)| (call, Some(rule.trim())));
        let Some(&(_, call)) = super::syscalls::SYSCALLS.iter().find(|known| known.0 == call) else {
            wrong("an unknown system call");
        };
        let entry = policy.entry(call).or_default();
        let Some(rule) = rule else {
            entry.always = true;
            continue;
        };
        if rule == "ENOSYS" {
            (entry.always, entry.error) = (true, Some(38));
            continue;
        }
        let Some((left, right)) = rule.split_once("==") else { wrong("neither a comparison nor an error") };
        let (argument, mask) = left.split_once('&').map_or((left, None), |(left, mask)| (left, Some(number(mask))));
        let index = argument.trim().strip_prefix("arg").and_then(|index| index.parse().ok());
        let Some(index) = index else { wrong("an argument is arg0 to arg5") };
        let mut allow = |operator, value| {
            // Requests and flags are numbers of 32 bits, and the kernel ignores what is above them.
            let condition = SeccompCondition::new(index, SeccompCmpArgLen::Dword, operator, value);
            let rule = condition.and_then(|condition| SeccompRule::new(vec![condition]));
            entry.rules.push(rule.expect("a rule of one condition"));
        };
        match mask {
            Some(mask) if right.trim() == "0" => allow(SeccompCmpOp::MaskedEq(mask), 0),
            Some(_) => wrong("a mask is compared with 0"),
            None => right.split('|').for_each(|word| allow(SeccompCmpOp::Eq, number(word))),
        }
    }
}
