//! End-to-end tests: real guests, real shims, a real containerd. See `bulkhead_tests::runner` for
//! what a scenario is and how it is isolated.

mod boot_refused;
mod check_command;
mod clone_network;
mod conformance;
mod containerd;
mod crash;
mod cri;
mod disks;
mod docker;
mod facts;
mod file_systems;
mod limits;
mod memory;
mod registers;
mod resources;
mod shim_codes;
mod shim_refused;
mod shim_restart;
mod shim_sandbox;
mod shim_storm;
mod shim_task;
mod snapshotters;
mod streams;
mod synced;
mod templates;
mod terminal;
mod vm;
mod vm_container;
mod vm_hotplug;
mod vm_net;
mod vm_slots;
mod vm_template;
mod volumes;
mod writable_layer;

use bulkhead_tests::runner::{self, Need, Scenario};

/// The longest first, so that two lanes end at about the same time.
const SCENARIOS: &[Scenario] = &[
    Scenario {
        name: "containerd-debian",
        needs: Need::Guest,
        run: containerd::debian,
    },
    Scenario {
        name: "containerd-current",
        needs: Need::CurrentContainerd,
        run: containerd::current,
    },
    Scenario {
        name: "cri-debian",
        needs: Need::Pods,
        run: cri::debian,
    },
    Scenario {
        name: "cri-current",
        needs: Need::PodsOnCurrentContainerd,
        run: cri::current,
    },
    Scenario {
        name: "cri-sandboxer",
        needs: Need::PodsOnCurrentContainerd,
        run: cri::sandboxer::run,
    },
    Scenario {
        name: "cni-debian",
        needs: Need::Pods,
        run: cri::network::debian,
    },
    Scenario {
        name: "cni-2",
        needs: Need::PodsOnCurrentContainerd,
        run: cri::network::current,
    },
    Scenario {
        name: "docker-life",
        needs: Need::Docker,
        run: docker::life,
    },
    Scenario {
        name: "docker-networks",
        needs: Need::Docker,
        run: docker::networks,
    },
    Scenario {
        name: "hostile-frames",
        needs: Need::Pods,
        run: cri::network::hostile::run,
    },
    Scenario {
        name: "cni-queues",
        needs: Need::Pods,
        run: cri::network::kinds::queues,
    },
    Scenario {
        name: "cni-ipvlan",
        needs: Need::Ipvlan,
        run: cri::network::kinds::ipvlan,
    },
    Scenario {
        name: "rates-debian",
        needs: Need::Pods,
        run: cri::network::rates::debian,
    },
    Scenario {
        name: "rates-2",
        needs: Need::PodsOnCurrentContainerd,
        run: cri::network::rates::current,
    },
    Scenario {
        name: "rates-sandboxer",
        needs: Need::PodsOnCurrentContainerd,
        run: cri::network::rates::sandboxer,
    },
    Scenario {
        name: "volumes-pod",
        needs: Need::Pods,
        run: cri::volumes::run,
    },
    Scenario {
        name: "volumes-files",
        needs: Need::Guest,
        run: volumes::files,
    },
    Scenario {
        name: "file-systems",
        needs: Need::FileSystemPrograms,
        run: file_systems::run,
    },
    Scenario {
        name: "disks",
        needs: Need::Guest,
        run: disks::run,
    },
    Scenario {
        name: "synced",
        needs: Need::Guest,
        run: synced::run,
    },
    Scenario {
        name: "layers",
        needs: Need::Pods,
        run: cri::layers::run,
    },
    Scenario {
        name: "writable-layer",
        needs: Need::Guest,
        run: writable_layer::run,
    },
    Scenario {
        name: "rootfs-erofs",
        needs: Need::CurrentContainerd,
        run: snapshotters::erofs,
    },
    Scenario {
        name: "rootfs-blockfile",
        needs: Need::CurrentContainerd,
        run: snapshotters::blockfile,
    },
    Scenario {
        name: "rootfs-devmapper",
        needs: Need::ThinPools,
        run: snapshotters::devmapper,
    },
    Scenario {
        name: "conformance",
        needs: Need::Guest,
        run: conformance::run,
    },
    Scenario {
        name: "templates-life",
        needs: Need::Guest,
        run: templates::life,
    },
    Scenario {
        name: "templates-at-once",
        needs: Need::Guest,
        run: templates::at_once,
    },
    Scenario {
        name: "registers",
        needs: Need::Guest,
        run: registers::on_one_cpu,
    },
    Scenario {
        name: "registers-2-cpus",
        needs: Need::Guest,
        run: registers::on_two_cpus,
    },
    Scenario {
        name: "shim-task-v3",
        needs: Need::Guest,
        run: shim_task::v3,
    },
    Scenario {
        name: "shim-task-v2",
        needs: Need::Guest,
        run: shim_task::v2,
    },
    Scenario {
        name: "shim-sandbox",
        needs: Need::Guest,
        run: shim_sandbox::run,
    },
    Scenario {
        name: "shim-codes",
        needs: Need::Guest,
        run: shim_codes::run,
    },
    Scenario {
        name: "shim-restart",
        needs: Need::Guest,
        run: shim_restart::run,
    },
    Scenario {
        name: "shim-storm",
        needs: Need::Guest,
        run: shim_storm::run,
    },
    Scenario {
        name: "crash",
        needs: Need::Guest,
        run: crash::run,
    },
    Scenario {
        name: "limits",
        needs: Need::Guest,
        run: limits::run,
    },
    Scenario {
        name: "memory",
        needs: Need::Guest,
        run: memory::run,
    },
    Scenario {
        name: "memory-resized",
        needs: Need::Guest,
        run: memory::resized,
    },
    Scenario {
        name: "resources",
        needs: Need::Guest,
        run: resources::run,
    },
    Scenario {
        name: "streams",
        needs: Need::Guest,
        run: streams::run,
    },
    Scenario {
        name: "terminal",
        needs: Need::Guest,
        run: terminal::run,
    },
    Scenario {
        name: "templates-full-disk",
        needs: Need::Guest,
        run: templates::full_disk,
    },
    Scenario {
        name: "boot-refused",
        needs: Need::Guest,
        run: boot_refused::run,
    },
    Scenario {
        name: "vm-contract",
        needs: Need::Guest,
        run: vm::contract,
    },
    Scenario {
        name: "vm-hotplug",
        needs: Need::Guest,
        run: vm_hotplug::run,
    },
    Scenario {
        name: "vm-net",
        needs: Need::Taps,
        run: vm_net::run,
    },
    Scenario {
        name: "vm-vhost",
        needs: Need::VhostNet,
        run: vm_net::vhost,
    },
    Scenario {
        name: "vm-slots",
        needs: Need::Guest,
        run: vm_slots::run,
    },
    Scenario {
        name: "vm-template",
        needs: Need::Guest,
        run: vm_template::run,
    },
    Scenario {
        name: "vm-template-two-cpus",
        needs: Need::Guest,
        run: vm_template::two_cpus,
    },
    Scenario {
        name: "vm-two-cpus",
        needs: Need::Guest,
        run: vm::two_cpus,
    },
    Scenario {
        name: "vm-ends",
        needs: Need::Guest,
        run: vm::ends,
    },
    Scenario {
        name: "vm-refused",
        needs: Need::Guest,
        run: vm::refused,
    },
    Scenario {
        name: "shim-refused",
        needs: Need::Host,
        run: shim_refused::run,
    },
    Scenario {
        name: "check-command",
        needs: Need::Host,
        run: check_command::run,
    },
];

fn main() -> std::process::ExitCode {
    runner::main(SCENARIOS)
}
