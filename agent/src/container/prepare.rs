//! `Prepare`: what every container needs and none owns, made before the machine is saved.

use super::Containers;
use crate::error::{Failure, Kind};
use crate::warm;

impl Containers {
    /// Can be repeated. Afterwards the guest has no identity of its own.
    pub async fn prepare(&self) -> Result<(), Failure> {
        if !self.table.is_empty() {
            return Err(Failure::new(
                Kind::FailedPrecondition,
                "there are containers in this guest; only an empty one can be prepared to be saved",
            ));
        }
        let hierarchy = self.guest.prepare()?;
        self.spawner.spares().fill()?;
        warm::heap();
        self.spawner.make_ahead(hierarchy).await?;
        // The fork has made every page of the agent's a shared one again.
        warm::memory();
        self.guest.generation().give_up();
        Ok(())
    }
}
