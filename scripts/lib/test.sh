# shellcheck shell=bash
# scripts/dev test: everything there is to test.
# shellcheck source=build.sh
source "$ROOT/scripts/lib/build.sh"
# shellcheck source=containerd.sh
source "$ROOT/scripts/lib/containerd.sh"
# shellcheck source=docker.sh
source "$ROOT/scripts/lib/docker.sh"
# shellcheck source=fs-programs.sh
source "$ROOT/scripts/lib/fs-programs.sh"
# shellcheck source=svm.sh
source "$ROOT/scripts/lib/svm.sh"

test_usage() {
    cat <<'HELP'
Usage: scripts/dev test [--unit | --e2e [FILTER...] | --svm [FILTER...]]

Builds, then runs the crates' own tests, the guest root image's, those of scripts/dev, and the
end-to-end ones: real microVMs, driven by the VMM's contract, by a shim without containerd, by
Debian's containerd, and, where Go's toolchain is there to build them, by a current containerd and
Docker's daemon.
Needs root. Where no guest can run, the tests that need one are named and counted as skipped.
The last line is the sum: N passed, N failed, N skipped.

Options:
  --unit            only what needs no guest
  --e2e [FILTER...] only end-to-end scenarios whose name contains a FILTER
  --svm [FILTER...] the same, but in a machine with SVM that QEMU emulates: for hosts that have
                    neither VMX nor SVM; installs QEMU and fetches Debian's kernel

Examples:
  scripts/dev test
  scripts/dev test --e2e containerd-debian shim-
HELP
}

# count_results LOG: adds the sums that cargo's and our own test programs print. A cargo test can't
# say that it was skipped: ours print "SKIPPED 1 test: why" and then count as passed; not here.
count_results() {
    awk '/^test result:/ {
            for (i = 2; i <= NF; i++) {
                if ($i ~ /^passed;?$/) passed += $(i - 1)
                if ($i ~ /^failed;?$/) failed += $(i - 1)
                if ($i ~ /^(skipped|ignored);?$/) skipped += $(i - 1)
            }
        }
        /^SKIPPED [0-9]+ test:/ { passed -= $2; skipped += $2 }
        END { printf "%d %d %d\n", passed, failed, skipped }' "$1"
}

# run_tests TITLE COMMAND...: runs a test program, shows its output and counts it. One that ends
# with a failure but counts none (it didn't compile, it crashed) is one failure.
run_tests() {
    local title=$1 log status=0 passed failed skipped
    shift
    log=$TEST_LOGS/$((++TEST_PARTS)).log
    step "$title" tee_output "$log" "$@" || status=$?
    read -r passed failed skipped < <(count_results "$log")
    if [ "$status" -ne 0 ] && [ "$failed" -eq 0 ]; then failed=1; fi
    if [ "$status" -eq 0 ] && [ $((passed + failed + skipped)) -eq 0 ]; then
        say "    no test ran: that is a failure too"
        failed=1
    fi
    TEST_PASSED=$((TEST_PASSED + passed))
    TEST_FAILED=$((TEST_FAILED + failed))
    TEST_SKIPPED=$((TEST_SKIPPED + skipped))
    [ "$failed" -eq 0 ] || TEST_FAILURES+=("$title")
}

tee_output() {
    local log=$1
    shift
    "$@" 2>&1 | tee "$log"
}

# All of them of the whole workspace: of another choice of packages Cargo would build the common
# dependencies once more, with other features. The end-to-end tests leave when they are asked for
# what is a harness's.
unit_tests() {
    (cd "$ROOT" && cargo test --locked --workspace --no-fail-fast -- --show-output)
}
# Beside the host programs' build: Cargo's profiles don't wait for each other, and where one build is
# at a single large crate, the other has a core. What fails fails again, and is told, in unit_tests.
build_unit_tests() {
    (cd "$ROOT" && exec cargo test --locked --workspace --no-run) >/dev/null 2>&1 &
    UNIT_BUILD=$!
}
e2e_tests() {
    (cd "$ROOT" && BULKHEAD_OUT=$OUT BULKHEAD_CONTAINERD2=${CONTAINERD2_BIN:-} \
        BULKHEAD_DOCKERD=${DOCKERD_BIN:-} BULKHEAD_FS_PROGRAMS=${FS_PROGRAMS_BIN:-} \
        cargo test --locked --quiet --workspace --test e2e -- "$@")
}

cmd_test() {
    local what=all
    TEST_PASSED=0 TEST_FAILED=0 TEST_SKIPPED=0 TEST_PARTS=0 TEST_FAILURES=()
    case ${1:-} in
        -h | --help)
            test_usage
            return
            ;;
        --unit) what=unit ;;
        --e2e) what=e2e ;;
        --svm) what=svm ;;
        '') ;;
        *) usage_error "'test' takes no argument '$1'" "run 'scripts/dev test --help'" ;;
    esac
    [ $# -eq 0 ] || shift
    case $what in e2e | svm) ;; *) no_arguments test "$@" ;; esac
    [ "$what" = unit ] || need_root "testing microVMs (mounts, namespaces, /dev/kvm)" test
    TEST_LOGS=$(mktemp -d)
    UNIT_BUILD=
    trap '[ -z "$UNIT_BUILD" ] || kill "$UNIT_BUILD" 2>/dev/null; rm -rf -- "$TEST_LOGS"' EXIT

    ensure_setup
    [ "$what" != all ] || build_unit_tests
    [ "$what" = unit ] || ensure_built
    if [ -n "$UNIT_BUILD" ]; then
        step "unit tests of all crates: waiting for their build" wait "$UNIT_BUILD" || true
        UNIT_BUILD=
    fi
    if [ "$what" = unit ] || [ "$what" = all ]; then
        run_tests "unit tests of all crates: waiting for cargo" unit_tests
        run_tests "guest root image" "$ROOT/guest-rootfs/test"
        run_tests "scripts/dev" "$ROOT/tests/scripts-dev"
        [ ! -x "$ROOT/guest-kernel/test" ] || run_tests "guest kernel's build" "$ROOT/guest-kernel/test"
    fi
    if [ "$what" = svm ]; then
        build_containerd2
        build_fs_programs
        run_tests "end-to-end tests in an emulated machine with SVM" svm_tests "$@"
    fi
    if [ "$what" = e2e ] || [ "$what" = all ]; then
        build_containerd2
        build_dockerd
        build_fs_programs
        run_tests "end-to-end tests: each guest boots in some 5 to 30 s on an emulating KVM" e2e_tests "$@"
    fi

    say ""
    [ ${#TEST_FAILURES[@]} -eq 0 ] || printf 'failed: %s\n' "${TEST_FAILURES[@]}"
    [ "$TEST_SKIPPED" -eq 0 ] || printf 'SKIPPED %s tests; the reasons are above\n' "$TEST_SKIPPED"
    printf '%s passed, %s failed, %s skipped\n' "$TEST_PASSED" "$TEST_FAILED" "$TEST_SKIPPED"
    [ "$TEST_FAILED" -eq 0 ]
}
