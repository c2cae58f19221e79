# shellcheck shell=bash
# scripts/dev check: what a change must pass before it is committed, without booting anything.
# shellcheck source=setup.sh
source "$ROOT/scripts/lib/setup.sh"

check_usage() {
    cat <<'HELP'
Usage: scripts/dev check

Checks formatting (cargo fmt), lints (clippy, warnings are errors), the shell scripts (bash -n, and
shellcheck where it is installed), and asks 'bulkhead check' whether this host can run microVMs.

Example:
  scripts/dev check
HELP
}

shell_scripts() {
    printf '%s\n' "$ROOT/scripts/dev" "$ROOT/scripts/busybox-image" "$ROOT"/scripts/lib/*.sh \
        "$ROOT/guest-rootfs/build" "$ROOT/guest-rootfs/test" "$ROOT/guest-kernel/build" "$ROOT/.ci/run"
}

check_shell() {
    local script
    while read -r script; do
        [ ! -f "$script" ] || bash -n -- "$script" || return 1
    done < <(shell_scripts)
    if have shellcheck; then
        shell_scripts | xargs -d '\n' shellcheck -x
    else
        say "    shellcheck is not installed: only the syntax was checked (apt-get install shellcheck)"
    fi
}

check_format() { (cd "$ROOT" && cargo fmt --all --check); }
# With the feature that the benchmark of the devices needs.
check_lints() {
    (cd "$ROOT" && cargo clippy --locked --quiet --workspace --all-targets \
        --features bulkhead-vmm/fake-driver -- -D warnings)
}
check_host() { (cd "$ROOT" && PATH="$OUT/bin:$PATH" BULKHEAD_CONFIG=$OUT/config.toml cargo run --locked --quiet --release --target-dir "$TARGET" -p bulkhead-shim --bin bulkhead -- check); }

cmd_check() {
    case ${1:-} in
        -h | --help)
            check_usage
            return
            ;;
    esac
    no_arguments check "$@"
    ensure_setup
    local failed=0
    step "formatting (cargo fmt)" check_format || failed=$((failed + 1))
    step "lints (cargo clippy)" check_lints || failed=$((failed + 1))
    step "shell scripts" check_shell || failed=$((failed + 1))
    step "host (bulkhead check)" check_host || failed=$((failed + 1))
    [ "$failed" -eq 0 ] || die "$failed of 4 checks failed" "read their messages above"
    say "check: all 4 checks passed"
}
