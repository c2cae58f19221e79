# shellcheck shell=bash
# Public programs that test file systems, from crates.io: pjdfstest (BSD-2-Clause) and fsx
# (APSL-2.0). They run as they are, and nothing of them is linked or installed.
# shellcheck source=common.sh
source "$ROOT/scripts/lib/common.sh"

PJDFSTEST_VERSION=0.2.2
FSX_VERSION=0.3.2

# build_fs_programs: builds both into the cache, unless they are there; sets FS_PROGRAMS_BIN, empty
# where it can't be done, and then says why. Static, so that they run in any container.
build_fs_programs() {
    local folder=$CACHE/fs-programs/$PJDFSTEST_VERSION-$FSX_VERSION
    FS_PROGRAMS_BIN=$folder/bin
    if [ -x "$FS_PROGRAMS_BIN/pjdfstest" ] && [ -x "$FS_PROGRAMS_BIN/fsx" ]; then return; fi
    if ! step "pjdfstest and fsx: waiting for cargo (minutes, once)" install_fs_programs "$folder"; then
        say "    file systems are not tested by them: they could not be built, see above"
        FS_PROGRAMS_BIN=
    fi
}

install_fs_programs() {
    RUSTFLAGS='-C target-feature=+crt-static -C relocation-model=static' \
        cargo install --locked --quiet --target x86_64-unknown-linux-gnu --root "$1" \
        "pjdfstest@$PJDFSTEST_VERSION" "fsx@$FSX_VERSION"
}
