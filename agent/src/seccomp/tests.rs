//! Filters run as the kernel runs them, against a plain reading of the rules.

use super::program::{AND, JUMP, JUMP_EQUAL, JUMP_GREATER, JUMP_NOT_LESS, LOAD, RETURN};
use super::*;
use crate::error::Kind;
use proptest::prelude::*;
use serde_json::json;

const ALLOW: u32 = libc::SECCOMP_RET_ALLOW;
const NATIVE: u32 = 0xc000_003e;
const I386: u32 = 0x4000_0003;

fn errno(number: i32) -> u32 {
    libc::SECCOMP_RET_ERRNO | number.cast_unsigned()
}

fn filter(json: serde_json::Value) -> Result<Filter, Failure> {
    let seccomp: LinuxSeccomp = serde_json::from_value(json).expect("seccomp");
    Filter::new(&seccomp)
}

/// Runs a filter; a jump out of it panics.
fn answer(filter: &Filter, architecture: u32, number: u32, arguments: [u64; 6]) -> u32 {
    let mut data = Vec::new();
    data.extend(number.to_le_bytes());
    data.extend(architecture.to_le_bytes());
    data.extend([0; 8]);
    data.extend(arguments.iter().flat_map(|argument| argument.to_le_bytes()));
    let (mut at, mut value) = (0, 0u32);
    loop {
        let step = filter.program[at];
        at += 1;
        let jump = |holds: bool| usize::from(if holds { step.yes } else { step.no });
        match step.code {
            LOAD => {
                let from = step.operand as usize;
                value = u32::from_le_bytes(data[from..from + 4].try_into().expect("a word"));
            }
            AND => value &= step.operand,
            JUMP => at += step.operand as usize,
            JUMP_EQUAL => at += jump(value == step.operand),
            JUMP_GREATER => at += jump(value > step.operand),
            JUMP_NOT_LESS => at += jump(value >= step.operand),
            RETURN => return step.operand,
            other => panic!("no such operation {other:#x}"),
        }
    }
}

fn native(filter: &Filter, name: &str, arguments: [u64; 6]) -> u32 {
    let number = Abi::X86_64.number(name).expect("a call");
    answer(filter, NATIVE, number, arguments)
}

#[test]
fn default_and_named_calls() {
    let filter = filter(json!({
        "defaultAction": "SCMP_ACT_ERRNO", "defaultErrnoRet": 38,
        "architectures": ["SCMP_ARCH_X86_64"],
        "syscalls": [
            {"names": ["read", "write", "not_a_call"], "action": "SCMP_ACT_ALLOW"},
            {"names": ["mkdir"], "action": "SCMP_ACT_ERRNO", "errnoRet": 30},
            {"names": ["rmdir"], "action": "SCMP_ACT_ERRNO"},
            {"names": ["reboot"], "action": "SCMP_ACT_KILL_PROCESS"},
            {"names": ["acct"], "action": "SCMP_ACT_TRAP"},
            {"names": ["sync"], "action": "SCMP_ACT_LOG"},
            {"names": ["chroot"], "action": "SCMP_ACT_KILL"},
        ],
    }))
    .expect("a filter");
    for (name, expected) in [
        ("read", ALLOW),
        ("write", ALLOW),
        ("mkdir", errno(30)),
        ("rmdir", errno(1)),
        ("reboot", libc::SECCOMP_RET_KILL_PROCESS),
        ("acct", libc::SECCOMP_RET_TRAP),
        ("sync", libc::SECCOMP_RET_LOG),
        ("chroot", libc::SECCOMP_RET_KILL_THREAD),
        ("open", errno(38)),
        ("getpid", errno(38)),
    ] {
        assert_eq!(native(&filter, name, [0; 6]), expected, "{name}");
    }
}

#[test]
fn architectures_keep_their_own_numbers() {
    let rules = json!([{"names": ["read", "ioctl"], "action": "SCMP_ACT_ALLOW"}]);
    let only_native =
        filter(json!({"defaultAction": "SCMP_ACT_ERRNO", "syscalls": rules})).expect("a filter");
    let kill = libc::SECCOMP_RET_KILL_THREAD;
    assert_eq!(answer(&only_native, NATIVE, 0, [0; 6]), ALLOW);
    assert_eq!(answer(&only_native, NATIVE, 0x4000_0000, [0; 6]), kill);
    assert_eq!(answer(&only_native, I386, 3, [0; 6]), kill);
    assert_eq!(answer(&only_native, 0xc000_00b7, 63, [0; 6]), kill);
    let all = filter(json!({
        "defaultAction": "SCMP_ACT_ERRNO", "syscalls": rules,
        "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32", "SCMP_ARCH_AARCH64"],
    }))
    .expect("a filter");
    assert_eq!(answer(&all, NATIVE, 0x4000_0000, [0; 6]), ALLOW, "x32 read");
    assert_eq!(
        answer(&all, NATIVE, 0x4000_0000 | 514, [0; 6]),
        ALLOW,
        "x32 ioctl"
    );
    assert_eq!(
        answer(&all, NATIVE, 0x4000_0000 | 16, [0; 6]),
        errno(1),
        "not x32's ioctl"
    );
    assert_eq!(answer(&all, I386, 3, [0; 6]), ALLOW, "i386 read");
    assert_eq!(answer(&all, I386, 54, [0; 6]), ALLOW, "i386 ioctl");
    assert_eq!(
        answer(&all, I386, 0, [0; 6]),
        errno(1),
        "i386 has another call there"
    );
    assert_eq!(
        answer(&all, 0xc000_00b7, 63, [0; 6]),
        kill,
        "not of this kernel"
    );
}

#[test]
fn newer_calls_than_the_rules_know_do_not_exist() {
    let rules = json!([{"names": ["read", "clone3"], "action": "SCMP_ACT_ALLOW"}]);
    let newer = Abi::X86_64.number("clone3").expect("a call") + 1;
    for (default, expected) in [
        ("SCMP_ACT_ERRNO", errno(libc::ENOSYS)),
        ("SCMP_ACT_KILL_PROCESS", errno(libc::ENOSYS)),
        ("SCMP_ACT_ALLOW", ALLOW),
        ("SCMP_ACT_LOG", libc::SECCOMP_RET_LOG),
    ] {
        let filter =
            filter(json!({"defaultAction": default, "syscalls": rules})).expect("a filter");
        assert_eq!(
            answer(&filter, NATIVE, newer, [0; 6]),
            expected,
            "{default}"
        );
        assert_eq!(
            answer(&filter, NATIVE, newer - 1, [0; 6]),
            ALLOW,
            "{default}"
        );
    }
    // A rule that says what the default says still makes its call known.
    let rules = json!([{"names": ["clone3"], "action": "SCMP_ACT_ERRNO"}]);
    let filter =
        filter(json!({"defaultAction": "SCMP_ACT_ERRNO", "syscalls": rules})).expect("a filter");
    assert_eq!(answer(&filter, NATIVE, newer - 1, [0; 6]), errno(1));
    assert_eq!(answer(&filter, NATIVE, newer, [0; 6]), errno(libc::ENOSYS));
}

#[test]
fn conditions_on_one_argument_are_alternatives() {
    let rule = |args: serde_json::Value| {
        let rules = json!([{"names": ["personality"], "action": "SCMP_ACT_ALLOW", "args": args}]);
        filter(json!({"defaultAction": "SCMP_ACT_ERRNO", "syscalls": rules})).expect("a filter")
    };
    let either = rule(json!([
        {"index": 0, "value": 0, "op": "SCMP_CMP_EQ"},
        {"index": 0, "value": 8, "op": "SCMP_CMP_EQ"},
    ]));
    let ask = |filter: &Filter, a, b| native(filter, "personality", [a, b, 0, 0, 0, 0]);
    assert_eq!(ask(&either, 0, 0), ALLOW);
    assert_eq!(ask(&either, 8, 0), ALLOW);
    assert_eq!(ask(&either, 1, 0), errno(1));
    let both = rule(json!([
        {"index": 0, "value": 1, "op": "SCMP_CMP_EQ"},
        {"index": 1, "value": 2, "op": "SCMP_CMP_EQ"},
    ]));
    assert_eq!(ask(&both, 1, 2), ALLOW);
    assert_eq!(ask(&both, 1, 3), errno(1));
    assert_eq!(ask(&both, 3, 2), errno(1));
}

#[test]
fn refuses_by_name_what_it_cannot_honour() {
    let rule =
        |rule: serde_json::Value| json!({"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [rule]});
    for (json, words) in [
        (
            json!({"defaultAction": "SCMP_ACT_NOTIFY"}),
            "defaultAction: SCMP_ACT_NOTIFY",
        ),
        (
            json!({"defaultAction": "SCMP_ACT_ALLOW", "listenerPath": "/run/x"}),
            "listenerPath",
        ),
        (
            json!({"defaultAction": "SCMP_ACT_ALLOW", "defaultErrnoRet": 1}),
            "errnoRet",
        ),
        (
            rule(json!({"names": ["read"], "action": "SCMP_ACT_NOTIFY"})),
            "syscalls[0]: SCMP_ACT_NOTIFY",
        ),
        (
            rule(json!({"names": [], "action": "SCMP_ACT_KILL"})),
            "names",
        ),
        (
            rule(json!({"names": ["read"], "action": "SCMP_ACT_ERRNO", "errnoRet": 4096})),
            "4096",
        ),
        (
            rule(
                json!({"names": ["read"], "action": "SCMP_ACT_ERRNO", "args": [{"index": 6, "value": 0, "op": "SCMP_CMP_EQ"}]}),
            ),
            "argument 6",
        ),
    ] {
        let failure = filter(json.clone()).expect_err("refused");
        assert_eq!(failure.kind, Kind::InvalidArgument);
        assert!(failure.message.starts_with("linux.seccomp."), "{failure}");
        assert!(failure.message.contains(words), "{json}: {failure}");
    }
}

#[test]
fn flags_are_passed_on() {
    let flags = json!([
        "SECCOMP_FILTER_FLAG_LOG",
        "SECCOMP_FILTER_FLAG_SPEC_ALLOW",
        "SECCOMP_FILTER_FLAG_TSYNC"
    ]);
    let filter =
        filter(json!({"defaultAction": "SCMP_ACT_ALLOW", "flags": flags})).expect("a filter");
    assert_eq!(
        filter.flags,
        SECCOMP_FILTER_FLAG_LOG | SECCOMP_FILTER_FLAG_SPEC_ALLOW
    );
}

#[test]
fn a_long_list_of_single_calls_is_searched_by_halving() {
    let names: Vec<String> = (0..330)
        .step_by(2)
        .filter_map(syscalls::x86_64::Sysno::new)
        .map(|call| call.name().to_owned())
        .collect();
    let rules = json!([{"names": names, "action": "SCMP_ACT_ALLOW"}]);
    let filter =
        filter(json!({"defaultAction": "SCMP_ACT_ERRNO", "syscalls": rules})).expect("a filter");
    for number in 0..329 {
        let known = number % 2 == 0 && syscalls::x86_64::Sysno::new(number).is_some();
        let expected = if known { ALLOW } else { errno(1) };
        assert_eq!(
            answer(&filter, NATIVE, number as u32, [0; 6]),
            expected,
            "{number}"
        );
    }
}

fn holds(condition: &Condition, argument: u64) -> bool {
    match condition.comparison {
        Comparison::Unequal(value) => argument != value,
        Comparison::Less(value) => argument < value,
        Comparison::LessOrEqual(value) => argument <= value,
        Comparison::Equal(value) => argument == value,
        Comparison::GreaterOrEqual(value) => argument >= value,
        Comparison::Greater(value) => argument > value,
        Comparison::Masked { mask, value } => argument & mask == value & mask,
    }
}

/// Values on both sides of the border between the halves of a word.
fn any_value() -> impl Strategy<Value = u64> {
    prop_oneof![0u64..4, (1u64 << 32) - 2..(1 << 32) + 3, any::<u64>()]
}

fn any_condition() -> impl Strategy<Value = Condition> {
    (0u8..6, 0..7, any_value(), any_value()).prop_map(|(argument, kind, value, mask)| Condition {
        argument,
        comparison: match kind {
            0 => Comparison::Unequal(value),
            1 => Comparison::Less(value),
            2 => Comparison::LessOrEqual(value),
            3 => Comparison::Equal(value),
            4 => Comparison::GreaterOrEqual(value),
            5 => Comparison::Greater(value),
            _ => Comparison::Masked { mask, value },
        },
    })
}

proptest! {
    #[test]
    fn filters_say_what_the_rules_say(
        calls in proptest::collection::btree_map(
            0u32..20,
            (proptest::collection::vec((proptest::collection::vec(any_condition(), 1..4), 1u32..5), 0..3), proptest::option::of(5u32..8)),
            0..8),
        beyond in proptest::option::of(20u32..22),
        number in 0u32..25,
        arguments in proptest::array::uniform6(any_value()),
    ) {
        let calls: BTreeMap<u32, Outcome> = calls
            .into_iter()
            .map(|(number, (rules, action))| (number, Outcome { rules, action }))
            .collect();
        let default = 99;
        let expected = match calls.get(&number) {
            Some(outcome) => outcome.rules.iter()
                .find(|(conditions, _)| conditions.iter().all(|condition| {
                    holds(condition, arguments[usize::from(condition.argument)])
                }))
                .map(|(_, action)| *action)
                .or(outcome.action)
                .unwrap_or(default),
            None if beyond.is_some_and(|newest| number > newest) => errno(libc::ENOSYS),
            None => default,
        };
        let sections = [Section { abi: Abi::X86_64, calls, default, beyond }];
        let filter = Filter { program: program::assemble(&sections), flags: 0 };
        prop_assert_eq!(answer(&filter, NATIVE, number, arguments), expected);
    }

    #[test]
    fn never_panics(names in proptest::collection::vec("[a-z_]{0,12}", 0..4), action in 0usize..4, index: usize, value: u64) {
        let actions = ["SCMP_ACT_ALLOW", "SCMP_ACT_ERRNO", "SCMP_ACT_TRACE", "SCMP_ACT_NOTIFY"];
        let rule = json!({"names": names, "action": actions[action], "args": [{"index": index, "value": value, "op": "SCMP_CMP_GE"}]});
        let _ = filter(json!({"defaultAction": "SCMP_ACT_KILL", "syscalls": [rule]}));
    }
}
