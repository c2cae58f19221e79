# shellcheck shell=bash
# scripts/dev demo: a busybox container in its own microVM, started by a private containerd.
# shellcheck source=build.sh
source "$ROOT/scripts/lib/build.sh"
# shellcheck source=containerd.sh
source "$ROOT/scripts/lib/containerd.sh"

DEMO_IMAGE=bulkhead.local/busybox:latest

demo_usage() {
    cat <<'HELP'
Usage: scripts/dev demo [--keep-going-without-build]

Sets up and builds what is missing, starts a private containerd, imports a busybox image made on the
spot, runs it with the runtime io.containerd.bulkhead.v2, shows that it has a kernel of its own, and
removes every trace. Needs root and /dev/kvm.

Options:
  --keep-going-without-build   take what is in target/bulkhead as it is

Example:
  scripts/dev demo
HELP
}

demo_ctr() { ctr --address "$DEMO_DIR/containerd.sock" --namespace demo "$@"; }

# timed NAME COMMAND...: runs a phase and adds its time to the summary.
timed() {
    local name=$1 began status=0
    shift
    began=$(now_ms)
    "$@" || status=$?
    DEMO_TIMES+=("$(printf '%-44s %s' "$name" "$(seconds $(($(now_ms) - began)))")")
    return "$status"
}

# The processes whose command line names the demo's folder or container, this script left out.
demo_processes() {
    local file pid line
    for file in /proc/[0-9]*/cmdline; do
        pid=${file#/proc/}
        pid=${pid%/cmdline}
        [ "$pid" != "$$" ] && [ "$pid" != "$BASHPID" ] || continue
        line=$(tr '\0' ' ' 2>/dev/null <"$file") || continue
        case $line in
            *"$DEMO_DIR"* | *"$DEMO_ID"*) printf '%s %s\n' "$pid" "$line" ;;
        esac
    done
}

# Sockets that shims of the demo listen on; their folder is fixed by containerd.
demo_shim_sockets() { find /run/containerd/s -type s 2>/dev/null | sort || true; }

demo_cleanup() {
    local status=$?
    trap - EXIT INT TERM
    [ -n "${DEMO_DIR:-}" ] || exit "$status"
    demo_ctr tasks kill --signal SIGKILL "$DEMO_ID" >/dev/null 2>&1 || true
    demo_ctr tasks delete --force "$DEMO_ID" >/dev/null 2>&1 || true
    stop_containerd
    [ "$status" -eq 0 ] || demo_logs
    local left
    left=$(demo_leftovers)
    rm -rf --one-file-system -- "$DEMO_DIR"
    # Folders that containerd makes with fixed names: gone again, if they weren't there before.
    [ -n "$DEMO_HAD_RUN_CONTAINERD" ] || rmdir /run/containerd/{s,fifo,runc,.} /run/containerd 2>/dev/null || true
    if [ -n "$left" ]; then
        say "demo: left behind:"
        say "$left"
        [ "$status" -ne 0 ] || status=1
    else
        say "demo: nothing left: no process, mount, socket or folder"
    fi
    exit "$status"
}

demo_logs() {
    say "demo: it failed; the last messages of the private containerd and of the VM were:"
    tail -n 15 "$DEMO_DIR/containerd.log" >&2 2>/dev/null || true
    find "$DEMO_DIR/run" -name '*.log' -exec tail -n 15 {} + >&2 2>/dev/null || true
}

# demo_leftovers: what is still there of the demo, once all should have ended; waits a little, since
# a shim leaves just after it has answered its last call.
demo_leftovers() {
    local left tries
    for tries in 1 2 3 4 5 6 7 8 9 10; do
        left=$(
            demo_processes | sed 's/^/  process /'
            grep -F -- "$DEMO_DIR" /proc/self/mounts | sed 's/^/  mount /' || true
            comm -13 <(printf '%s\n' "$DEMO_SOCKETS_BEFORE") <(demo_shim_sockets) | sed 's/^/  socket /'
            find "$DEMO_DIR/run" -mindepth 1 2>/dev/null | sed 's/^/  runtime file /'
        )
        [ -n "$left" ] || return 0
        [ "$tries" -eq 10 ] || sleep 1
    done
    printf '%s\n' "$left"
}

demo_run() {
    # The container prints what it sees of its kernel; all of it comes out of the microVM.
    # shellcheck disable=SC2016
    demo_ctr run --rm --snapshotter "$DEMO_SNAPSHOTTER" --fifo-dir "$DEMO_DIR/fifo" \
        --runtime io.containerd.bulkhead.v2 "$DEMO_IMAGE" "$DEMO_ID" /bin/sh -c '
            echo "hello from a container in its own microVM"
            echo "guest kernel:  $(uname -sr)"
            echo "guest memory:  $(grep MemTotal /proc/meminfo)"
            echo "I am process $$ of $(hostname), user $(id -u)"
            ls /' 2>&1 | sed 's/^/    | /'
}

demo_import() {
    "$ROOT/scripts/busybox-image" --out "$DEMO_DIR/busybox.tar" --name "$DEMO_IMAGE" &&
        demo_ctr images import --snapshotter "$DEMO_SNAPSHOTTER" "$DEMO_DIR/busybox.tar" >/dev/null
}

cmd_demo() {
    DEMO_TIMES=() CONTAINERD_PID='' DEMO_DIR=''
    case ${1:-} in
        -h | --help)
            demo_usage
            return
            ;;
        --keep-going-without-build)
            shift
            no_arguments demo "$@"
            [ -x "$OUT/bin/bulkhead-vmm" ] || die "$OUT/bin holds nothing yet" "run: scripts/dev build"
            ;;
        *)
            no_arguments demo "$@"
            need_root "the demo (it mounts file systems and opens /dev/kvm)" demo
            timed "setup and build" ensure_built
            ;;
    esac
    need_root "the demo (it mounts file systems and opens /dev/kvm)" demo
    need_kvm
    PATH="$OUT/bin:$PATH" BULKHEAD_CONFIG="$OUT/config.toml" "$OUT/bin/bulkhead" check >&2 ||
        die "this host cannot run microVMs" "do what 'bulkhead check' says above"

    # A short path: Unix socket paths end at 107 characters.
    DEMO_ID=bulkhead-demo-$$
    DEMO_HAD_RUN_CONTAINERD=$([ ! -d /run/containerd ] || echo yes)
    DEMO_SOCKETS_BEFORE=$(demo_shim_sockets)
    DEMO_DIR=$(mktemp -d /tmp/bulkhead-demo.XXXXXX)
    trap demo_cleanup EXIT
    trap 'exit 130' INT
    trap 'exit 143' TERM
    mkdir "$DEMO_DIR/run"
    write_config "$DEMO_DIR/bulkhead.toml" "$DEMO_DIR/run"
    DEMO_SNAPSHOTTER=$(pick_snapshotter "$DEMO_DIR")
    [ "$DEMO_SNAPSHOTTER" = overlayfs ] ||
        say "demo: no overlay can be mounted below $DEMO_DIR, so the snapshotter 'native' is used (it copies files)"

    say "==> private containerd in $DEMO_DIR"
    timed "private containerd answers" start_containerd "$DEMO_DIR" || exit
    say "==> image $DEMO_IMAGE, made of Debian's busybox-static"
    timed "image made and imported" demo_import || die "the image could not be made or imported" "read the message above"
    say "==> ctr run --rm --runtime io.containerd.bulkhead.v2 $DEMO_IMAGE (waiting for the microVM)"
    printf '    host kernel:   %s\n' "$(uname -sr)"
    timed "container, from cold to its end" demo_run || die "the container did not run" "read the message above and the logs below"
    say ""
    printf '    %s\n' "${DEMO_TIMES[@]}"
}
