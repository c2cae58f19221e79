# shellcheck shell=bash
# Programs of public Go modules that the tests run against.

# build_go_programs WHAT MODULE VERSION FOLDER PROGRAM...: builds the programs of a module's cmd/, by
# its name, into FOLDER, unless they are there; sets GO_BIN to FOLDER, or to nothing where it can't be
# done, and then says why.
build_go_programs() {
    local what=$1 program missing=
    GO_BIN=$4
    for program in "${@:5}"; do
        [ -x "$GO_BIN/$program" ] || missing=1
    done
    [ -n "$missing" ] || return 0
    if ! have go; then
        say "    $what is not tested: there is no Go toolchain to build it with"
        GO_BIN=
    elif ! step "$what: waiting for the Go module proxy and 'go build' (minutes, once)" \
        go_build "${@:2}"; then
        say "    $what is not tested: it could not be built, see above"
        GO_BIN=
    fi
}

go_build() {
    local work module=$1 version=$2 folder=$3
    shift 3
    work=$(mktemp -d)
    printf 'module bulkhead.invalid/programs\n' >"$work/go.mod"
    (
        cd "$work" && go get "$module@$version" &&
            CGO_ENABLED=0 go build -mod=mod -trimpath -ldflags '-s -w' -o "$work/bin/" \
                "${@/#/$module/cmd/}"
    ) >"$work/log" 2>&1 || {
        tail -n 5 "$work/log" >&2
        rm -rf -- "$work"
        return 1
    }
    mkdir -p "$folder"
    mv -f -- "$work/bin"/* "$folder/"
    rm -rf -- "$work"
}
