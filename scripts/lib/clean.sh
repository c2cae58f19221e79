# shellcheck shell=bash
# scripts/dev clean: removes what was built.

clean_usage() {
    cat <<'HELP'
Usage: scripts/dev clean [--all]

Removes the target folder. The guest kernel and the containerd built for the tests stay in
~/.cache/bulkhead, so that the next build is quick.

Options:
  --all   remove ~/.cache/bulkhead too

Examples:
  scripts/dev clean
  scripts/dev clean --all
HELP
}

cmd_clean() {
    local all=
    case ${1:-} in
        -h | --help)
            clean_usage
            return
            ;;
        --all)
            all=yes
            shift
            ;;
    esac
    no_arguments clean "$@"
    say "clean: removing $TARGET"
    rm -rf -- "$TARGET"
    if [ -n "$all" ]; then
        say "clean: removing $CACHE"
        # The Go module cache is read-only by design.
        [ ! -d "$CACHE" ] || chmod -R u+w -- "$CACHE"
        rm -rf -- "$CACHE"
    fi
}
