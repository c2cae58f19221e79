# shellcheck shell=bash
# scripts/dev build: everything that a host needs, collected in $OUT.
# shellcheck source=setup.sh
source "$ROOT/scripts/lib/setup.sh"

# The agent is linked statically, so that the guest root needs no libc; a name of the target must be
# given, or the static flags would also hit build scripts and procedural macros.
AGENT_TARGET=x86_64-unknown-linux-gnu
AGENT_FLAGS='-C target-feature=+crt-static -C relocation-model=static'

build_usage() {
    cat <<'HELP'
Usage: scripts/dev build [--kernel-source TARBALL]

Builds the guest kernel, the static agent, the guest root image and the host programs, and collects
them in target/bulkhead:

  bin/containerd-shim-bulkhead-v2   what containerd starts
  bin/bulkhead                      the command line
  bin/bulkhead-vmm                  the virtual machine monitor
  bin/bulkhead-bench                behind 'scripts/dev bench'
  vmlinux, rootfs.erofs             what a microVM boots
  config.toml                       a configuration that names the above

The first time takes about 15 minutes on two cores, most of it for the kernel; later runs rebuild
only what changed. The kernel is kept in ~/.cache/bulkhead by the hash of its inputs.

Options:
  --kernel-source TARBALL   linux-6.12.*.tar.* instead of Debian's linux-source-6.12

Examples:
  scripts/dev build
  scripts/dev build --kernel-source ~/linux-6.12.93.tar.xz
HELP
}

build_kernel() { "$ROOT/guest-kernel/build" --out "$OUT" "$@" >&2; }

build_agent() {
    (cd "$ROOT" && RUSTFLAGS=$AGENT_FLAGS cargo build --locked --quiet -p bulkhead-agent \
        --profile guest --target "$AGENT_TARGET" --target-dir "$TARGET/guest-build")
}

build_rootfs() {
    "$ROOT/guest-rootfs/build" --out "$OUT/rootfs.erofs" \
        --agent "$TARGET/guest-build/$AGENT_TARGET/guest/bulkhead-agent" >&2
}

# `step` runs these as conditions, where `set -e` does nothing: hence each `|| return`.
build_host() {
    (cd "$ROOT" && cargo build --locked --quiet --release --target-dir "$TARGET" --bins \
        -p bulkhead-vmm -p bulkhead-shim -p bulkhead-tests) || return
    local program
    for program in containerd-shim-bulkhead-v2 bulkhead bulkhead-vmm bulkhead-bench; do
        # Renamed into place: a running program can't be written to, and an unchanged one keeps its
        # time stamp.
        cmp -s "$TARGET/release/$program" "$OUT/bin/$program" && continue
        install -m 0755 "$TARGET/release/$program" "$OUT/bin/.$program.$$" &&
            mv -f "$OUT/bin/.$program.$$" "$OUT/bin/$program" || return
    done
}

# write_config FILE RUNTIME_DIR: a configuration for what was built.
write_config() {
    cat >"$1" <<TOML
# Written by scripts/dev. Every key is explained in shim/config/bulkhead.toml.
kernel = "$OUT/vmlinux"
rootfs = "$OUT/rootfs.erofs"
vmm = "$OUT/bin/bulkhead-vmm"
runtime_dir = "$2"
template_dir = "$OUT/templates"
TOML
}

ensure_built() {
    ensure_setup
    mkdir -p "$OUT/bin"
    # Two builds at once would take files from under each other.
    exec {BUILD_LOCK}>"$OUT/.lock"
    flock --nonblock "$BUILD_LOCK" || step "another build is running: waiting for it" flock "$BUILD_LOCK"
    local failed='the build failed'
    step "guest kernel: waiting for make, or for the cache" build_kernel "$@" ||
        die "$failed: guest kernel" "read the message of guest-kernel/build above"
    step "agent (static): waiting for cargo" build_agent ||
        die "$failed: agent" "read cargo's message above; offline, its crates must be in ~/.cargo"
    step "guest root image: waiting for mkfs.erofs" build_rootfs ||
        die "$failed: guest root image" "read the message of guest-rootfs/build above"
    step "host programs: waiting for cargo" build_host ||
        die "$failed: host programs" "read cargo's message above; offline, its crates must be in ~/.cargo"
    write_config "$OUT/config.toml" /run/bulkhead
    exec {BUILD_LOCK}>&-
}

cmd_build() {
    case ${1:-} in
        -h | --help) build_usage ;;
        --kernel-source)
            [ $# -eq 2 ] || usage_error "--kernel-source takes one tarball" "run 'scripts/dev build --help'"
            [ -f "$2" ] || die "the kernel tarball '$2' does not exist" "give the path of linux-6.12.*.tar.*"
            ensure_built --source "$(readlink -f -- "$2")"
            ;;
        *)
            no_arguments build "$@"
            ensure_built
            say "build: all in $OUT"
            ;;
    esac
}
