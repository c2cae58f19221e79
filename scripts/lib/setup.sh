# shellcheck shell=bash
# scripts/dev setup: installs what is missing. Works offline when nothing is.

# Package, and a path that shows it is there: looking at files is quicker than asking dpkg and also
# sees what was installed by other means.
NEEDED_PACKAGES=(
    "gcc /usr/bin/gcc"
    "libc6-dev /usr/include/stdio.h"
    "make /usr/bin/make"
    "patch /usr/bin/patch"
    "flex /usr/bin/flex"
    "bison /usr/bin/bison"
    "bc /usr/bin/bc"
    "perl /usr/bin/perl"
    "xz-utils /usr/bin/xz"
    "libelf-dev /usr/include/libelf.h"
    "linux-source-6.12 /usr/src/linux-source-6.12.tar.xz"
    "erofs-utils /usr/bin/mkfs.erofs"
    "e2fsprogs /usr/sbin/mkfs.ext4 /sbin/mkfs.ext4"
    "busybox-static /bin/busybox"
    "containerd /usr/bin/containerd"
    "containernetworking-plugins /usr/lib/cni/ptp"
    "protobuf-compiler /usr/bin/protoc"
    "iptables /usr/sbin/iptables /sbin/iptables"
    "attr /usr/bin/setfattr"
    "curl /usr/bin/curl"
    "strace /usr/bin/strace"
    "iproute2 /usr/sbin/ip /sbin/ip /bin/ip"
    "ca-certificates /etc/ssl/certs/ca-certificates.crt"
)

setup_usage() {
    cat <<'HELP'
Usage: scripts/dev setup [--list]

Installs, with apt and as root, the Debian 12 packages that the build, the demo and the tests need
and that are missing. Does nothing, and needs no network, when all are there.

Options:
  --list   print the packages and whether each is there; install nothing

Examples:
  scripts/dev setup
  scripts/dev setup --list
HELP
}

# missing_packages: the names of those of NEEDED_PACKAGES of which no path exists.
missing_packages() {
    local entry package paths path found
    for entry in "${NEEDED_PACKAGES[@]}"; do
        read -r package paths <<<"$entry"
        found=
        for path in $paths; do
            [ ! -e "$path" ] || found=yes
        done
        [ -n "$found" ] || printf '%s\n' "$package"
    done
}

# install_packages PACKAGE...: fetches the package lists only if they don't know what is needed.
install_packages() {
    export DEBIAN_FRONTEND=noninteractive
    have apt-get || die "this host has no apt-get, and these are missing: $*" \
        "install them with your distribution's package manager; 'scripts/dev setup --list' shows which files are looked for"
    local package
    for package in "$@"; do
        if [ -z "$(apt-cache policy "$package" 2>/dev/null | sed -n 's/^ *Candidate: \((none)\)\{0,1\}//p')" ]; then
            step "package lists (apt-get update): waiting for the Debian mirrors" \
                apt-get -qq update >&2 ||
                die "apt-get update failed" "check the network and /etc/apt/sources.list*"
            break
        fi
    done
    # Lists older than the mirror's point to files that are gone: one more try with fresh lists.
    step "packages: downloading and installing $*" apt_install "$@" ||
        { step "package lists again, and a second try" apt-get -qq update >&2 && apt_install "$@"; } ||
        die "apt-get could not install: $*" "read apt's message above; on Debian 12 all of them are in main"
}

apt_install() {
    apt-get -qq -y -o Dpkg::Use-Pty=0 install --no-install-recommends "$@" >&2
}

check_rust() {
    have cargo || die "Rust is missing: there is no 'cargo' on PATH or in ~/.cargo/bin" \
        "install it from https://rustup.rs (stable, 1.90 or later), then run this again"
}

# ensure_setup: what the other commands call before they begin; quiet when all is there.
ensure_setup() {
    local missing
    check_rust
    mapfile -t missing < <(missing_packages)
    [ ${#missing[@]} -ne 0 ] || return 0
    need_root "installing the missing packages (${missing[*]})" setup
    install_packages "${missing[@]}"
    mapfile -t missing < <(missing_packages)
    [ ${#missing[@]} -eq 0 ] ||
        die "apt-get succeeded, yet these are still missing: ${missing[*]}" \
            "compare with 'scripts/dev setup --list'"
}

cmd_setup() {
    case ${1:-} in
        -h | --help) setup_usage ;;
        --list)
            local entry package paths
            for entry in "${NEEDED_PACKAGES[@]}"; do
                read -r package paths <<<"$entry"
                if missing_packages | grep -qx -- "$package"; then
                    printf '%-20s missing (looked for %s)\n' "$package" "$paths"
                else
                    printf '%-20s there\n' "$package"
                fi
            done
            ;;
        *)
            no_arguments setup "$@"
            ensure_setup
            say "setup: everything is there ($(cargo --version), $(containerd --version | cut -d' ' -f2-3))"
            ;;
    esac
}
