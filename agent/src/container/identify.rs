//! `Identify`: makes this guest different from all others.

use super::Containers;
use crate::error::Failure;
use crate::generation::{GenerationId, Identity};
use bulkhead_proto::agent::IdentifyRequest;

impl Containers {
    /// Returns the generation id that the guest has taken on.
    pub fn identify(&self, request: &IdentifyRequest) -> Result<GenerationId, Failure> {
        let identity = Identity::new(request)?;
        let generation = self.guest.generation();
        generation.identify(&identity, self.guest.surroundings())
    }
}
