# shellcheck shell=bash
# What all commands of scripts/dev share: places, messages, timed steps, checks of the host.
# Sourced by scripts/dev with ROOT set to the workspace's root.

TARGET=${CARGO_TARGET_DIR:-$ROOT/target}
# Everything that a host needs to run microVMs is collected here.
OUT=$TARGET/bulkhead
CACHE=${XDG_CACHE_HOME:-$HOME/.cache}/bulkhead

# say TEXT: progress; on stderr, so that a command's result on stdout stays clean.
say() { printf '%s\n' "$*" >&2; }

# die WHAT NEXT: a failure in two lines, what went wrong and what to do about it.
die() {
    printf 'scripts/dev: error: %s\n' "$1" >&2
    [ $# -lt 2 ] || printf 'scripts/dev: next:  %s\n' "$2" >&2
    exit 1
}

# usage_error WHAT NEXT: the command line makes no sense; exit status 2, as getopt's users expect.
usage_error() {
    printf 'scripts/dev: error: %s\n' "$1" >&2
    printf 'scripts/dev: next:  %s\n' "$2" >&2
    exit 2
}

# no_arguments COMMAND ARG...: refuses arguments that a command does not take.
no_arguments() {
    local command=$1
    shift
    [ $# -eq 0 ] || usage_error "'$command' takes no argument '$1'" "run 'scripts/dev $command --help'"
}

# now_ms: milliseconds since the epoch, without a process.
now_ms() {
    local micros=${EPOCHREALTIME/[.,]/}
    printf '%s' "$((micros / 1000))"
}

# seconds MS: as "12.3 s".
seconds() { printf '%d.%d s' "$(($1 / 1000))" "$(($1 % 1000 / 100))"; }

# step TITLE COMMAND...: runs a long step, says what is being waited for and the time it took. A
# function runs as a condition here, so `set -e` does nothing in it.
step() {
    local title=$1 began
    shift
    began=$(now_ms)
    say "==> $title"
    if "$@"; then
        say "    done in $(seconds $(($(now_ms) - began)))"
    else
        local status=$?
        say "    FAILED after $(seconds $(($(now_ms) - began)))"
        return "$status"
    fi
}

have() { command -v -- "$1" >/dev/null 2>&1; }

need_root() {
    [ "$(id -u)" -eq 0 ] || die "$1 needs root, and this is user '$(id -un)'" \
        "run it as root, for instance: sudo -E env \"PATH=\$PATH\" scripts/dev $2"
}

need_kvm() {
    [ -e /dev/kvm ] || die "/dev/kvm does not exist, so no microVM can run here" \
        "enable virtualisation in the firmware (or nested virtualisation, or pass --device /dev/kvm to this container), then 'modprobe kvm'"
    { : <>/dev/kvm; } 2>/dev/null || die "/dev/kvm cannot be opened for reading and writing by '$(id -un)'" \
        "run as root or join the group that owns it: $(stat -c '%U:%G %a' /dev/kvm)"
}

# Adds the folders in which Debian and rustup put programs, for shells that lack them.
PATH=$PATH:$HOME/.cargo/bin:/usr/local/sbin:/usr/sbin:/sbin
export PATH
