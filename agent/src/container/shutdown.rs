//! `Shutdown`: the end of the guest.

use super::Containers;
use crate::error::{Context, Failure};

impl Containers {
    /// Ends every container, brings what they wrote to the host, and switches the guest off. In a
    /// guest this doesn't return unless the kernel refuses.
    pub async fn shutdown(&self) -> Result<(), Failure> {
        let containers = self.table.all();
        for container in &containers {
            for pid in container.all_pids()? {
                let pid = i32::try_from(pid).unwrap_or_default();
                // It may have gone by itself.
                let _ = super::send_signal(pid, libc::SIGKILL);
            }
        }
        for container in &containers {
            container.init.child.wait().await;
            if let Some(cgroup) = &container.cgroup {
                cgroup.remove().await?;
            }
        }
        rustix::fs::sync();
        self.guest.switch_off().context(|| "switch the guest off")
    }
}
