# shellcheck shell=bash
# The end-to-end tests on a KVM with SVM, on any host: QEMU emulates a machine whose CPU has SVM,
# Debian's kernel runs in it with this host's root file system (read-only, below an overlay), and
# its KVM runs the guests. Slow, but guest kernel mode runs there as it does on hardware.

# Modules that the machine needs to begin, in the order in which they can be loaded. All others are
# loaded when the kernel asks for them, or the job below.
SVM_MODULES=(
    drivers/virtio/virtio_ring drivers/virtio/virtio drivers/virtio/virtio_pci_modern_dev
    drivers/virtio/virtio_pci_legacy_dev drivers/virtio/virtio_pci fs/netfs/netfs
    fs/fscache/fscache net/9p/9pnet net/9p/9pnet_virtio fs/9p/9p fs/overlayfs/overlay
    virt/lib/irqbypass drivers/crypto/ccp/ccp arch/x86/kvm/kvm arch/x86/kvm/kvm-amd
)

# svm_kernel DIR: Debian's newest kernel image, unpacked into DIR; sets SVM_KERNEL and SVM_LIB.
svm_kernel() {
    local dir=$1 package
    if ! compgen -G "$dir/boot/vmlinuz-*" >/dev/null; then
        package=$(apt-cache depends linux-image-amd64 | sed -n 's/^ *Depends: \(linux-image-[0-9].*-amd64\).*/\1/p' | tail -n 1)
        [ -n "$package" ] || die "apt knows no linux-image-amd64" "run: apt-get update"
        mkdir -p "$dir"
        (cd "$dir" && apt-get -qq download "$package" && dpkg-deb -x "$package"_*.deb . && rm -- "$package"_*.deb) >&2 ||
            die "Debian's kernel $package could not be fetched" "read apt's message above"
    fi
    SVM_KERNEL=$(compgen -G "$dir/boot/vmlinuz-*" | tail -n 1)
    SVM_LIB=$(compgen -G "$dir/lib/modules/*/kernel" | tail -n 1)
    [ -s "${SVM_LIB%/kernel}/modules.dep" ] || depmod -b "$dir" "$(basename "${SVM_LIB%/kernel}")"
}

# svm_initrd WORK: a first root that mounts the host's, and then runs WORK/job there.
svm_initrd() {
    local work=$1 root=$1/initrd number=10 module
    mkdir -p "$root"/{bin,proc,sys,dev,low,up,mnt,modules}
    cp /bin/busybox "$root/bin/busybox"
    for module in "${SVM_MODULES[@]}"; do
        cp "$SVM_LIB/$module.ko" "$root/modules/$((number++))-${module##*/}.ko" ||
            die "Debian's kernel has no module $module" "adapt SVM_MODULES in scripts/lib/svm.sh"
    done
    cat >"$root/init" <<INIT
#!/bin/busybox sh
/bin/busybox --install -s /bin
export PATH=/bin
mount -t proc proc /proc; mount -t sysfs sysfs /sys; mount -t devtmpfs devtmpfs /dev
for module in /modules/*.ko; do insmod \$module || echo "no \$module"; done
mount -t 9p -o trans=virtio,version=9p2000.L,ro,cache=loose,msize=262144 root /low
mount -t tmpfs -o size=75% up /up; mkdir /up/upper /up/work
mount -t overlay -o lowerdir=/low,upperdir=/up/upper,workdir=/up/work overlay /mnt
mount -t proc proc /mnt/proc; mount -t sysfs sysfs /mnt/sys; mount -t devtmpfs devtmpfs /mnt/dev
mkdir -p /mnt/dev/pts /mnt/dev/shm
mount -t devpts devpts /mnt/dev/pts; mount -t tmpfs tmpfs /mnt/dev/shm
mkdir -p /mnt${SVM_LIB%/kernel} "/mnt/lib/modules/\$(uname -r)"
mount -o bind "/mnt${SVM_LIB%/kernel}" "/mnt/lib/modules/\$(uname -r)"
mount -t tmpfs tmpfs /mnt/run; mount -t cgroup2 cgroup2 /mnt/sys/fs/cgroup
ip link set lo up
chroot /mnt /bin/bash '$work/job'
sync
echo o >/proc/sysrq-trigger
sleep 10
INIT
    # What the kernel runs when it wants a module; the modules are in the host's root.
    mkdir "$root/sbin"
    printf '#!/bin/busybox sh\nexec /bin/busybox chroot /mnt /sbin/modprobe "$@"\n' >"$root/sbin/modprobe"
    chmod +x "$root/init" "$root/sbin/modprobe"
    (cd "$root" && find . | cpio --quiet -o -H newc | gzip -1) >"$work/initrd.gz"
}

# svm_tests FILTER...: the end-to-end tests in such a machine; fails if one does, or none ends.
svm_tests() {
    local work program filter
    if ! have qemu-system-x86_64 || ! have cpio || ! have depmod || ! have dmsetup; then
        install_packages qemu-system-x86 cpio kmod dmsetup
    fi
    # Goes with the logs, also after Ctrl-C.
    work=$TEST_LOGS/svm
    mkdir "$work"
    svm_kernel "$CACHE/svm-kernel"
    svm_initrd "$work"
    program=$(cd "$ROOT" && cargo test --locked -p bulkhead-tests --test e2e --no-run --message-format=json 2>/dev/null |
        sed -n 's/.*"name":"e2e".*"executable":"\([^"]*\)".*/\1/p' | tail -n 1)
    [ -x "$program" ] || die "the end-to-end tests could not be built" "run: scripts/dev test --e2e vm-contract"
    {
        printf 'export HOME=/root PATH=%q BULKHEAD_OUT=%q BULKHEAD_CONTAINERD2=%q BULKHEAD_FS_PROGRAMS=%q\n' \
            "$PATH" "$OUT" "${CONTAINERD2_BIN:-}" "${FS_PROGRAMS_BIN:-}"
        [ -z "${BULKHEAD_FS_GROUPS:-}" ] || printf 'export BULKHEAD_FS_GROUPS=%q\n' "$BULKHEAD_FS_GROUPS"
        # No udev runs there, to which dmsetup leaves the nodes of its devices otherwise.
        printf 'export DM_DISABLE_UDEV=1\n'
        # Devices whose modules nobody asks for by another name.
        printf 'modprobe -a tun vhost_net loop dm-thin-pool\n'
        printf 'cd %q && %q' "$ROOT" "$program"
        for filter in "$@"; do printf ' %q' "$filter"; done
        printf '\n'
    } >"$work/job"
    qemu-system-x86_64 -accel tcg,thread=multi -machine q35 -cpu max -smp 2 -m 6144 -nographic \
        -no-reboot -virtfs "local,path=/,mount_tag=root,security_model=none,readonly=on,multidevs=remap" \
        -kernel "$SVM_KERNEL" -initrd "$work/initrd.gz" -append "console=ttyS0 panic=-1 quiet" \
        </dev/null | sed -u 's/\r//g' | tee "$work/log"
    local result
    result=$(grep '^test result:' "$work/log" | tail -n 1)
    case $result in
        *' 0 failed;'*) return 0 ;;
        *) return 1 ;;
    esac
}
