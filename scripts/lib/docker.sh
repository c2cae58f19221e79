# shellcheck shell=bash
# A current Docker daemon for the tests. Debian's is older than the interfaces between create and
# start that they are about.
# shellcheck source=go.sh
source "$ROOT/scripts/lib/go.sh"

# Released version of Docker's daemon, by its module's numbers: this one is Docker 29's.
DOCKERD_VERSION=v2.0.0-beta.24

# build_dockerd: builds dockerd and docker-proxy of DOCKERD_VERSION into the cache; sets DOCKERD_BIN,
# empty where it can't be done.
build_dockerd() {
    build_go_programs "Docker's daemon $DOCKERD_VERSION" github.com/moby/moby/v2 "$DOCKERD_VERSION" \
        "$CACHE/docker/$DOCKERD_VERSION" dockerd docker-proxy
    DOCKERD_BIN=$GO_BIN
}
