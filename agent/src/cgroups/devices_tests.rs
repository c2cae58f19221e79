//! The rules against a plain reading of them, and the programs against the kernel's verifier.

use super::*;
use proptest::prelude::*;

fn rules(json: serde_json::Value) -> Result<DeviceRules, Failure> {
    let list: Vec<LinuxDeviceCgroup> = serde_json::from_value(json).expect("rules");
    DeviceRules::new(&list)
}

/// Runs a program as the kernel does.
fn answer(program: &[Instruction], kind: i32, access: u8, major: u32, minor: u32) -> bool {
    let context = [i32::from(access) << 16 | kind, major as i32, minor as i32];
    let mut registers = [0i32; 16];
    let mut at = 0usize;
    loop {
        let instruction = program[at];
        let to = usize::from(instruction.registers & 15);
        let from = usize::from(instruction.registers >> 4);
        at += 1;
        let jump = match instruction.code {
            LOAD_WORD => {
                registers[to] = context[instruction.offset as usize / 4];
                false
            }
            COPY => {
                registers[to] = registers[from];
                false
            }
            SET => {
                registers[to] = instruction.immediate;
                false
            }
            AND => {
                registers[to] &= instruction.immediate;
                false
            }
            RIGHT_SHIFT => {
                registers[to] = (registers[to] as u32 >> instruction.immediate) as i32;
                false
            }
            JUMP => true,
            JUMP_UNEQUAL => registers[to] != instruction.immediate,
            JUMP_ANY_BIT => registers[to] & instruction.immediate != 0,
            EXIT => return registers[usize::from(RESULT)] != 0,
            other => panic!("no such operation {other:#x}"),
        };
        if jump {
            at += usize::try_from(instruction.offset).expect("only forward");
        }
    }
}

#[test]
fn the_default_devices_and_nothing_else() {
    for json in [
        serde_json::json!([]),
        serde_json::json!([{"allow": false, "access": "rwm"}]),
    ] {
        let rules = rules(json).expect("rules");
        assert_eq!(
            rules,
            DeviceRules::default(),
            "the same program serves both"
        );
        assert!(!rules.allow_all());
        let program = rules.program();
        let ask = |kind, access, major, minor| answer(&program, kind, access, major, minor);
        for (major, minor) in [
            (1, 3),
            (1, 5),
            (1, 7),
            (1, 8),
            (1, 9),
            (5, 0),
            (5, 1),
            (5, 2),
            (136, 0),
            (136, 77),
        ] {
            assert!(
                ask(CHARACTER, READ | WRITE, major, minor),
                "{major}:{minor}"
            );
        }
        for (kind, major, minor) in [
            (CHARACTER, 1, 1),
            (CHARACTER, 10, 229),
            (CHARACTER, 10, 200),
            (BLOCK, 1, 3),
            (BLOCK, 254, 0),
        ] {
            assert!(!ask(kind, READ, major, minor), "{kind} {major}:{minor}");
            assert!(!ask(kind, WRITE, major, minor), "{kind} {major}:{minor}");
            assert!(ask(kind, MKNOD, major, minor), "{kind} {major}:{minor}");
        }
    }
}

#[test]
fn later_rules_win() {
    let program = rules(serde_json::json!([
        {"allow": true, "type": "b", "major": 8, "access": "rwm"},
        {"allow": false, "access": "rwm"},
        {"allow": true, "type": "b", "major": 254, "minor": 16, "access": "rw"},
        {"allow": false, "type": "b", "major": 254, "access": "w"},
        {"allow": true, "type": "c", "major": 10, "minor": 200, "access": "rwm"},
        {"allow": false, "type": "c", "major": 1, "minor": 3, "access": "rwm"},
    ]))
    .expect("rules")
    .program();
    let ask = |kind, access, major, minor| answer(&program, kind, access, major, minor);
    assert!(!ask(BLOCK, READ, 8, 0), "before a rule for everything");
    assert!(ask(BLOCK, READ, 254, 16));
    assert!(!ask(BLOCK, WRITE, 254, 16));
    assert!(!ask(BLOCK, READ | WRITE, 254, 16), "both must be allowed");
    assert!(ask(CHARACTER, READ | WRITE, 10, 200));
    assert!(ask(CHARACTER, READ | WRITE, 1, 3), "always allowed");
}

#[test]
fn privileged_containers_need_no_program() {
    let all =
        serde_json::json!([{"allow": false, "access": "rwm"}, {"allow": true, "access": "rwm"}]);
    assert!(rules(all).expect("rules").allow_all());
    let some = serde_json::json!([{"allow": true, "access": "rwm"}, {"allow": false, "type": "b", "access": "w"}]);
    let some = rules(some).expect("rules");
    assert!(!some.allow_all());
    assert!(answer(&some.program(), BLOCK, READ, 7, 7));
    assert!(!answer(&some.program(), BLOCK, WRITE, 7, 7));
}

#[test]
fn refuses_by_name_what_is_no_rule() {
    for json in [
        serde_json::json!([{"allow": true, "type": "p", "access": "r"}]),
        serde_json::json!([{"allow": true, "type": "c", "access": "rx"}]),
        serde_json::json!([{"allow": true, "type": "c", "major": -2, "access": "r"}]),
    ] {
        let failure = rules(json.clone()).expect_err("refused");
        assert!(
            failure.message.starts_with("linux.resources.devices[0]"),
            "{json}: {failure}"
        );
    }
}

/// What the rules say, read one by one.
fn plainly(list: &[Rule], kind: i32, access: u8, major: u32, minor: u32) -> bool {
    [MKNOD, READ, WRITE]
        .into_iter()
        .filter(|bit| access & bit != 0)
        .all(|bit| {
            list.iter()
                .chain(&DEFAULT)
                .rev()
                .find(|rule| {
                    rule.access & bit != 0
                        && rule.kind.is_none_or(|own| own == kind)
                        && rule.major.is_none_or(|own| own == major)
                        && rule.minor.is_none_or(|own| own == minor)
                })
                .is_some_and(|rule| rule.allow)
        })
}

fn any_rule() -> impl Strategy<Value = Rule> {
    let number = || proptest::option::of(0u32..4);
    (
        any::<bool>(),
        proptest::option::of(1..=2),
        number(),
        number(),
        1u8..=7,
    )
        .prop_map(|(allow, kind, major, minor, access)| Rule {
            allow,
            kind,
            major: major.filter(|_| kind.is_some()),
            minor: minor.filter(|_| kind.is_some()),
            access,
        })
}

proptest! {
    #[test]
    fn programs_say_what_the_rules_say(
        list in proptest::collection::vec(any_rule(), 0..8),
        kind in 1..=2i32, access in 1u8..=7, major in 0u32..4, minor in 0u32..4,
    ) {
        let rules = DeviceRules::of(list.clone());
        let expected = plainly(&list, kind, access, major, minor);
        prop_assert_eq!(answer(&rules.program(), kind, access, major, minor), expected);
        prop_assert!(expected || !rules.allow_all());
    }
}

#[test]
fn the_kernel_takes_the_programs() {
    if !rustix::process::geteuid().is_root() {
        eprintln!("SKIPPED 1 test: loading a program into the kernel needs root");
        return;
    }
    let longest = DeviceRules::of(vec![
        Rule::allow(CHARACTER, Some(9), Some(9), READ);
        MAX_RULES
    ]);
    for rules in [DeviceRules::default(), longest] {
        rules.load().expect("loaded");
    }
}
