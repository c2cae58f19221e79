# shellcheck shell=bash
# A current Docker daemon for the tests. Debian's is older than the interfaces between create and
# start that they are about.

# Released version of Docker's daemon, by its module's numbers: this one is Docker 29's.
DOCKERD_VERSION=v2.0.0-beta.24

# build_dockerd: builds dockerd and docker-proxy of DOCKERD_VERSION by their module name into the
# cache, unless they are there; sets DOCKERD_BIN, empty where it can't be done, and then says why.
build_dockerd() {
    DOCKERD_BIN=$CACHE/docker/$DOCKERD_VERSION
    if [ -x "$DOCKERD_BIN/dockerd" ] && [ -x "$DOCKERD_BIN/docker-proxy" ]; then return; fi
    if ! have go; then
        say "    Docker is not tested: there is no Go toolchain to build its daemon with"
        DOCKERD_BIN=
    elif ! step "dockerd $DOCKERD_VERSION: waiting for the Go module proxy and 'go build' (minutes, once)" \
        go_build_dockerd "$DOCKERD_BIN"; then
        say "    Docker is not tested: its daemon could not be built, see above"
        DOCKERD_BIN=
    fi
}

go_build_dockerd() {
    local work module=github.com/moby/moby/v2
    work=$(mktemp -d)
    printf 'module bulkhead.invalid/docker\n' >"$work/go.mod"
    (
        cd "$work" && go get "$module@$DOCKERD_VERSION" &&
            CGO_ENABLED=0 go build -mod=mod -trimpath -ldflags '-s -w' -o "$work/bin/" \
                "$module/cmd/dockerd" "$module/cmd/docker-proxy"
    ) >"$work/log" 2>&1 || {
        tail -n 5 "$work/log" >&2
        rm -rf -- "$work"
        return 1
    }
    mkdir -p "$1"
    mv -f -- "$work/bin/dockerd" "$work/bin/docker-proxy" "$1/"
    rm -rf -- "$work"
}
