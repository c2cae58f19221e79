# shellcheck shell=bash
# A private containerd: own root, state, socket and configuration below one folder, no systemd, and
# nothing of the host's own containerd touched.
# shellcheck source=go.sh
source "$ROOT/scripts/lib/go.sh"

# Released version of containerd that the tests build besides Debian's 1.6.
CONTAINERD2_VERSION=v2.3.7

# start_containerd DIR: starts it with the shim on its PATH, waits until it answers, and sets
# CONTAINERD_PID. DIR must exist and hold bulkhead.toml.
start_containerd() {
    sed "s,@DIR@,$1,g" "$ROOT/scripts/lib/containerd.toml.in" >"$1/config.toml"
    PATH="$OUT/bin:$PATH" BULKHEAD_CONFIG="$1/bulkhead.toml" \
        containerd --config "$1/config.toml" >"$1/containerd.log" 2>&1 &
    CONTAINERD_PID=$!
    local waited=0
    until ctr --address "$1/containerd.sock" --connect-timeout 2s version >/dev/null 2>&1; do
        kill -0 "$CONTAINERD_PID" 2>/dev/null || {
            tail -n 5 "$1/containerd.log" >&2
            die "the private containerd ended at its start" "read its last messages above"
        }
        waited=$((waited + 1))
        [ "$waited" -le 300 ] ||
            die "the private containerd does not answer after 60 s" "see $1/containerd.log"
        sleep 0.2
    done
}

# stop_containerd: ends it and waits for its end.
stop_containerd() {
    [ -n "${CONTAINERD_PID:-}" ] || return 0
    kill "$CONTAINERD_PID" 2>/dev/null || true
    wait "$CONTAINERD_PID" 2>/dev/null || true
    CONTAINERD_PID=
}

# pick_snapshotter DIR: prints overlayfs where an overlay can be mounted with DIR's file system
# below, and native (which copies files) where it can't, for instance on the overlay root of an
# outer container.
pick_snapshotter() {
    local probe=$1/overlay-probe
    mkdir -p "$probe"/{lower,upper,work,merged}
    if mount -t overlay overlay -o "lowerdir=$probe/lower,upperdir=$probe/upper,workdir=$probe/work" \
        "$probe/merged" 2>/dev/null; then
        umount "$probe/merged"
        printf overlayfs
    else
        printf native
    fi
    rm -rf -- "$probe"
}

# build_containerd2: builds containerd and ctr of CONTAINERD2_VERSION into the cache; sets
# CONTAINERD2_BIN, empty where it can't be done.
build_containerd2() {
    build_go_programs "containerd $CONTAINERD2_VERSION" github.com/containerd/containerd/v2 \
        "$CONTAINERD2_VERSION" "$CACHE/containerd/$CONTAINERD2_VERSION" containerd ctr
    CONTAINERD2_BIN=$GO_BIN
}
