//! The interfaces that are joined to the guest, and the way from there to what the namespace has.

use super::error::NetworkError;
use super::join::{change_senders, join, part};
use super::netns::Netns;
use super::request::{Device, request};
use super::senders::Senders;
use super::settings::NetworkSettings;
use super::state::{Interface, NetworkState};
use super::tap::{Tap, set_mtu};
use crate::folder::RuntimeFolder;
use crate::guest::Guest;
use crate::slots::{self, NetCard, NetQueues};
use bulkhead_netlink::Netlink;
use bulkhead_proto::agent::SetNetworkRequest;
use bulkhead_proto::vmm::PluggedSlot;
use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::sync::Arc;

/// Longest name of an interface, IFNAMSIZ without the end.
const MAX_NAME: usize = 15;

/// See the module.
pub(super) struct Joined {
    netns: Netns,
    joins: Joins,
    attached: BTreeMap<u32, Attached>,
    next_id: u32,
    /// What the guest took on last.
    sent: SetNetworkRequest,
}

/// The VM, and what its network devices are like.
pub(super) struct Joins {
    pub folder: Arc<RuntimeFolder>,
    pub guest: Arc<Guest>,
    /// Pairs of queues of each device.
    pub queues: usize,
    pub settings: NetworkSettings,
}

/// An interface that has a device in the guest.
struct Attached {
    device: Device,
    slot: PluggedSlot,
    tap: u32,
    /// As they were when it was plugged in, which the device keeps.
    mac: [u8; 6],
    max_mtu: u32,
    /// Of the tap.
    mtu: u32,
    /// Whose frames the tap lets pass.
    senders: Senders,
}

impl Joined {
    /// None yet.
    pub fn new(netns: Netns, joins: Joins) -> Self {
        Self {
            netns,
            joins,
            attached: BTreeMap::new(),
            next_id: 0,
            sent: SetNetworkRequest::new(),
        }
    }

    /// Makes the guest's network what the namespace has.
    pub async fn settle(&mut self) -> Result<(), NetworkError> {
        let state = self.read().await?;
        let gone: Vec<u32> = self
            .attached
            .iter()
            .filter(|(index, one)| !state.interfaces.get(index).is_some_and(|now| one.fits(now)))
            .map(|(index, _)| *index)
            .collect();
        if !gone.is_empty() {
            self.detach(&state, &gone).await?;
        }
        for (index, interface) in &state.interfaces {
            if !self.attached.contains_key(index) {
                self.attach(*index, interface).await?;
            }
        }
        self.follow_mtu(&state).await?;
        self.follow_addresses(&state).await?;
        self.tell(&state).await
    }

    async fn read(&self) -> Result<NetworkState, NetworkError> {
        let ours: BTreeSet<u32> = self.attached.values().map(|one| one.tap).collect();
        self.inside(move |netlink| NetworkState::read(netlink, |index| ours.contains(&index)))
            .await?
    }

    async fn tell(&mut self, state: &NetworkState) -> Result<(), NetworkError> {
        let wanted = request(state, |index| {
            let attached = self.attached.get(&index)?;
            Some(attached.device.clone())
        });
        if wanted != self.sent {
            self.joins.guest.set_network(&wanted).await?;
            self.sent = wanted;
        }
        Ok(())
    }

    /// Joins the interface to a new device of the guest's. On failure nothing is left of it.
    async fn attach(&mut self, index: u32, interface: &Interface) -> Result<(), NetworkError> {
        let senders = self.senders(interface);
        let (queues, wanted, own) = (self.joins.queues, interface.clone(), senders.clone());
        let tap = self
            .inside(move |netlink| join(index, &wanted, queues, &own, netlink))
            .await??;
        let tap_index = tap.index;
        let plugged = self.plug(tap, interface).await;
        let (slot, name) = match plugged {
            Ok(plugged) => plugged,
            Err(error) => {
                self.part(vec![index]).await;
                return Err(error);
            }
        };
        tracing::info!(
            interface = interface.name,
            slot = slot.slot,
            "joined to the guest"
        );
        let device = Device {
            id: self.next_id,
            name,
        };
        self.next_id += 1;
        let attached = Attached {
            device,
            slot,
            tap: tap_index,
            mac: interface.mac,
            max_mtu: interface.mtu,
            mtu: interface.mtu,
            senders,
        };
        self.attached.insert(index, attached);
        Ok(())
    }

    async fn plug(
        &self,
        tap: Tap,
        interface: &Interface,
    ) -> Result<(PluggedSlot, String), NetworkError> {
        let failed = |step: &'static str, cause: String| NetworkError::Interface {
            interface: interface.name.clone(),
            step,
            cause,
        };
        let queues = NetQueues {
            vhosts: self.joins.settings.vhosts(tap.queues.len()),
            taps: tap.queues,
        };
        let plugged = slots::plug_net(&self.joins.folder, self.card(interface), queues);
        let slot = plugged
            .await
            .map_err(|error| failed("plug a device into the virtual machine", error.to_string()))?;
        let name = match self.joins.guest.attach_device(slot).await {
            Ok(name) if (1..=MAX_NAME).contains(&name.len()) => Ok(name),
            Ok(name) => Err(format!("it answered a name of {} bytes", name.len())),
            Err(error) => Err(error.to_string()),
        };
        match name {
            Ok(name) => Ok((slot, name)),
            Err(cause) => {
                self.unplug(slot).await;
                Err(failed("have the guest attach a device", cause))
            }
        }
    }

    fn card(&self, interface: &Interface) -> NetCard {
        NetCard {
            mac: interface.mac,
            mtu: u16::try_from(interface.mtu).unwrap_or(u16::MAX),
            to_guest: self.joins.settings.to_guest,
            from_guest: self.joins.settings.from_guest,
        }
    }

    fn senders(&self, interface: &Interface) -> Senders {
        Senders::of(interface, self.joins.settings.own_addresses_only)
    }

    async fn unplug(&self, slot: PluggedSlot) {
        if let Err(error) = slots::unplug(&self.joins.folder, slot).await {
            tracing::warn!(%error, "a network device stays plugged in");
        }
    }

    /// Takes interfaces from the guest that the namespace no longer has, or has changed in a way
    /// that a device can't follow.
    async fn detach(&mut self, state: &NetworkState, gone: &[u32]) -> Result<(), NetworkError> {
        let mut left = Vec::new();
        for index in gone {
            left.extend(self.attached.remove(index));
        }
        // The guest forgets them first. If it doesn't, they end all the same.
        let told = self.tell(state).await;
        for one in &left {
            if let Err(error) = self.joins.guest.detach_device(one.slot).await {
                tracing::warn!(%error, "the guest does not let go of a network device");
            }
            self.unplug(one.slot).await;
        }
        self.part(gone.to_vec()).await;
        told
    }

    async fn follow_mtu(&mut self, state: &NetworkState) -> Result<(), NetworkError> {
        for (index, interface) in &state.interfaces {
            let Some(one) = self.attached.get(index) else {
                continue;
            };
            if one.mtu == interface.mtu {
                continue;
            }
            let (tap, mtu) = (one.tap, interface.mtu);
            let set = self
                .inside(move |netlink| set_mtu(tap, mtu, netlink))
                .await?;
            set.map_err(|cause| NetworkError::Interface {
                interface: interface.name.clone(),
                step: "set the MTU of its tap device",
                cause: cause.to_string(),
            })?;
            if let Some(one) = self.attached.get_mut(index) {
                one.mtu = mtu;
            }
        }
        Ok(())
    }

    async fn follow_addresses(&mut self, state: &NetworkState) -> Result<(), NetworkError> {
        for (index, interface) in &state.interfaces {
            let senders = self.senders(interface);
            let Some(one) = self.attached.get(index) else {
                continue;
            };
            if one.senders == senders {
                continue;
            }
            let (tap, index, wanted, own) = (one.tap, *index, interface.clone(), senders.clone());
            self.inside(move |netlink| change_senders(tap, index, &wanted, &own, netlink))
                .await??;
            if let Some(one) = self.attached.get_mut(&index) {
                one.senders = senders;
            }
        }
        Ok(())
    }

    /// Leaves the namespace as it was; for after the VM's end.
    pub async fn part_all(self) {
        let all: Vec<u32> = self.attached.keys().copied().collect();
        if !all.is_empty() {
            self.part(all).await;
        }
    }

    async fn part(&self, interfaces: Vec<u32>) {
        let parted = self.inside(move |netlink| {
            for index in interfaces {
                if let Err(error) = part(index, netlink) {
                    tracing::warn!(%error, index, "a redirection is left in the pod's network");
                }
            }
        });
        if let Err(error) = parted.await {
            tracing::warn!(%error, "redirections are left in the pod's network");
        }
    }

    async fn inside<T: Send + 'static>(
        &self,
        work: impl FnOnce(&mut Netlink) -> T + Send + 'static,
    ) -> Result<T, NetworkError> {
        let done = self.netns.later(move || {
            let mut netlink = Netlink::open().map_err(io::Error::other)?;
            Ok::<_, io::Error>(work(&mut netlink))
        });
        done.await
            .flatten()
            .map_err(|cause| NetworkError::Namespace(Arc::new(cause)))
    }
}

impl Attached {
    /// Whether the device can be the interface's as it is now.
    fn fits(&self, interface: &Interface) -> bool {
        interface.mac == self.mac && interface.mtu <= self.max_mtu
    }
}
