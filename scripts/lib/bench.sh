# shellcheck shell=bash
# scripts/dev bench: measures; the programs are tests/src/bin/bench.
# shellcheck source=build.sh
source "$ROOT/scripts/lib/build.sh"

bench_usage() {
    cat <<'HELP'
Usage: scripts/dev bench boot [--json] [--profile] [--runs N] [--timeout SECONDS]
       scripts/dev bench run [--json] [--runs N]
       scripts/dev bench start [--json] [--runs N] [--only SUBJECT,...] [--timeout SECONDS]
       scripts/dev bench density N [--json] [--cold] [--settle SECONDS]
       scripts/dev bench parallel N [--json] [--cold] [--timeout SECONDS]
       scripts/dev bench task [--json] [--runs N] [--containers N] [--cold]
       scripts/dev bench storm [--json] [--execs N] [--at-once N]
       scripts/dev bench layers [--json] [--runs N] [--mib N]
       scripts/dev bench io [--json] [--runs N] [--only SUBJECT,...] [--cases PART,...] [--profile]
       scripts/dev bench net [--json] [--runs N] [--only SUBJECT,...] [--vcpus N] [--mib N] [--profile]
       scripts/dev bench devices [FILTER]
       scripts/dev bench plot JSON SVG

boot   From the VMM's start to the agent's ready message, for 1 vCPU and 128 MiB; medians of N runs:
         guest_instructions  guest kernel instructions, exact (tracepoint kvm:kvm_emulate_insn);
                             null where KVM doesn't emulate all of guest kernel mode
         userspace_exits     returns from KVM to the VMM
         wall_ms             time on the clock
         vmm_cpu_ms          the VMM's own CPU time, without what KVM does for the guest
         vmm_private_kib     the VMM's private memory beyond guest memory
         kernel_bytes, rootfs_bytes, kvm_kind
       --profile boots once more and prints the guest kernel's functions by share.
run    'ctr run --rm' of busybox 'true' from cold, and 'ctr tasks exec' into a running container.
start  Starts side by side, interleaved, N rounds (10): `template` (a saved machine goes on), `cold`
       (the kernel boots), `qemu_microvm` (QEMU's microvm machine, same kernel and root image;
       qemu-system-x86 is installed when it's missing) and `runc` (no virtual machine). Medians,
       quartiles and ratios of:
         vmm_to_guest_ms     VMM's process start to the first guest instruction
         vmm_to_agent_ms     the same to the agent ready, or acknowledging its new identity
         first_output_ms     the same to the container's first output
         agent_instructions, first_exec_instructions
                             guest instructions to the agent, and to the container's first
         private_kib, shared_kib
                             the VMM's memory, and more; the output says what was compared.
density
       N idle pods at once: private and shared memory of each pod's processes together, threads,
       descriptors, and what the host's free memory lost.
parallel
       N starts at once, of Bulkhead and of runc: starts a second, median and worst.
task   One more container in a pod that runs, and the same with runc; medians of N lives (10):
         create_ms, start_ms, exec_ms, kill_ms, delete_ms
         create_to_exec_instructions
                             guest kernel instructions from Create to the container's first one
         exec_instructions   the same from Exec to the first instruction of `true`
         shim_private_kib, shim_private_kib_per_container
                             the shim's private memory with one container, and what each of N
                             further ones (8) adds; the output says more.
storm  N execs in a row (1000) and N at once (50): what shim, VMM and agent hold before and after;
       fails when a process, thread or descriptor is left.
layers An image's layers read by virtio-fs (`share`) and as disks (`converted`, `convert_layers` of the
       configuration), side by side; medians of N containers (3), and the ratios:
         convert_ms          the conversion: what the first container waits for it
         create_ms, start_ms, create_to_exec_instructions
                             a container's start
         read_ms_per_mib, read_instructions_per_mib
                             a large file's first read
         files_ms_per_file, files_instructions_per_file
                             the same of files of 16 KiB; the output says more
io     fio in guests of `bulkhead` and `qemu_microvm`, interleaved, N rounds (3), and under `runc`:
       sequential and random reads and writes on a disk, on the EROFS root, on virtio-fs. Medians,
       quartiles, and Bulkhead's by QEMU's:
         mib_per_s, requests_per_s, latency_us
                             as fio says
         instructions_per_mib, instructions_per_request
                             guest kernel instructions
         exits_per_mib, exits_per_request
                             returns of KVM to the monitor
         device_cpu_ms_per_mib
                             CPU time on the host of the threads that run no vCPU; the output says more
       --profile prints the guest kernel's functions by share for each case instead.
net    The same for TCP between a guest and its host: throughput both ways by iperf3, and messages of 64
       bytes that are answered.
devices
       The device models without a guest: block, net and fs driven by a fake driver, at the host's
       full speed. Times by criterion, with what has changed since the last run: wall/DEVICE/CASE/N
       is a request's time on the clock with N in flight (thrpt: requests a second), cpu/... the CPU
       time that the device's thread spends on N requests (thrpt: on one). Needs no /dev/kvm, but
       root. FILTER is part of a name. All figures are in target/criterion, as JSON, too.
plot   Draws the phases of a start, from the JSON of 'start', as SVG.

Where KVM emulates guest kernel mode a cold round of 'start' takes some 40 s, one of 'io' and 'net' two
minutes. 'io' and 'net' install qemu-system-x86 and iperf3, and build a static fio from Debian's source
package, when they are missing. --cold boots where templates would be used. All but 'plot' need root,
and all but 'plot' and 'devices' /dev/kvm. Nothing is left after the end, an
error or Ctrl-C.

Examples:
  scripts/dev bench boot --json
  scripts/dev bench boot --runs 1 --profile
  scripts/dev bench run
  scripts/dev bench start --json >start.json
  scripts/dev bench start --runs 3 --only cold,qemu_microvm
  scripts/dev bench density 100
  scripts/dev bench parallel 8 --json
  scripts/dev bench task --json
  scripts/dev bench layers --mib 16
  scripts/dev bench io --runs 1 --only bulkhead,qemu_microvm --cases block_
  scripts/dev bench io --json >io.json
  scripts/dev bench net --vcpus 2
  scripts/dev bench devices cpu/block
  scripts/dev bench plot start.json docs/bench-start.svg
HELP
}

# The comparison is worth a package, but can do without.
ensure_qemu() {
    [ ! -x /usr/bin/qemu-system-x86_64 ] || return 0
    # A subshell: what fails there must not end the bench.
    (install_packages qemu-system-x86) ||
        say "bench: qemu-system-x86 could not be installed, so QEMU's column stays empty"
}

# What 'io' and 'net' measure in: a root image with PID 1, fio and iperf3.
BENCH_GUEST=$TARGET/guest-build/$AGENT_TARGET/guest/bulkhead-bench-guest

build_bench_guest() {
    (cd "$ROOT" && RUSTFLAGS=$AGENT_FLAGS cargo build --locked --quiet -p bulkhead-bench-guest \
        --profile guest --target "$AGENT_TARGET" --target-dir "$TARGET/guest-build") || return
    cmp -s "$BENCH_GUEST" "$OUT/bench-guest" || install -m 0755 "$BENCH_GUEST" "$OUT/bench-guest"
}

ensure_bench_image() {
    local fio
    [ -x /usr/bin/iperf3 ] || install_packages iperf3
    # By the script that builds it, so that a change of that builds it anew.
    fio=$CACHE/fio-$(sha256sum "$ROOT/scripts/static-fio" | cut -c1-16)
    [ -x "$fio" ] || step "static fio: waiting for Debian's source package and make" \
        "$ROOT/scripts/static-fio" --out "$fio" ||
        die "fio could not be built" "read the message of scripts/static-fio above"
    cmp -s "$fio" "$OUT/bench-fio" || install -m 0755 "$fio" "$OUT/bench-fio"
    step "the bench's guest (static): waiting for cargo" build_bench_guest ||
        die "the bench's guest could not be built" "read cargo's message above"
    step "the bench's root image: waiting for mkfs.erofs" "$ROOT/scripts/bench-image" \
        --guest "$OUT/bench-guest" --fio "$fio" --out "$OUT/bench.erofs" ||
        die "the bench's root image could not be built" "read the message of scripts/bench-image above"
}

cmd_bench() {
    local argument
    for argument in "$@"; do
        case $argument in
            -h | --help)
                bench_usage
                return
                ;;
        esac
    done
    case ${1:-} in
        boot | run | start | density | parallel | task | storm | layers | io | net) ;;
        plot)
            [ -x "$OUT/bin/bulkhead-bench" ] || ensure_built
            "$OUT/bin/bulkhead-bench" "$@"
            return
            ;;
        devices)
            need_root "measuring the devices" "bench devices"
            shift
            (cd "$ROOT" && cargo bench --locked --quiet -p bulkhead-vmm --features fake-driver \
                --target-dir "$TARGET" --bench devices -- "$@")
            return
            ;;
        *)
            usage_error "bench measures 'boot', 'run', 'start', 'density', 'parallel', 'task', 'storm', 'layers', 'io', 'net' or 'devices', or draws a 'plot'; not '${1:-}'" \
                "run 'scripts/dev bench --help'"
            ;;
    esac
    need_root "measuring" "bench $1"
    need_kvm
    # Progress goes to stderr, so that stdout holds the figures alone.
    ensure_built
    case $1 in start | io | net) ensure_qemu ;; esac
    case $1 in io | net) ensure_bench_image ;; esac
    BULKHEAD_OUT=$OUT "$OUT/bin/bulkhead-bench" "$@"
}
