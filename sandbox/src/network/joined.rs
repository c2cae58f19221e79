//! The interfaces that are joined to the guest, and the way from there to what the namespace has.

use super::error::NetworkError;
use super::join::{change_senders, join, part};
use super::netns::Netns;
use super::redirect::is_redirected;
use super::request::{Device, request};
use super::senders::Senders;
use super::settings::NetworkSettings;
use super::state::{Interface, NetworkState};
use super::tap::{Tap, set_down, set_mtu};
use crate::folder::RuntimeFolder;
use crate::guest::Guest;
use crate::slots::{self, NetCard, NetQueues};
use bulkhead_netlink::{Netlink, NetlinkError};
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
    /// Devices that are to go, and stay until the guest lets go of them. Their interfaces stay
    /// joined meanwhile, so that the host's own stack doesn't speak in the guest's place, but to
    /// taps that are down.
    leaving: BTreeMap<u32, Attached>,
    next_id: u32,
    /// What the guest can't have, as it was told last.
    left_out: Vec<String>,
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
            leaving: BTreeMap::new(),
            next_id: 0,
            left_out: Vec::new(),
            sent: SetNetworkRequest::new(),
        }
    }

    /// Makes the guest's network what the namespace has.
    pub async fn settle(&mut self) -> Result<(), NetworkError> {
        let (state, lost) = self.read().await?;
        if state.left_out != self.left_out {
            tracing::warn!(what = ?state.left_out, "the guest does not have all of the pod's network");
            self.left_out.clone_from(&state.left_out);
        }
        let fits = |index: &u32, one: &Attached| {
            let now = state.interfaces.get(index);
            now.is_some_and(|now| one.fits(now)) && !lost.contains(index)
        };
        let gone: Vec<u32> = self
            .attached
            .iter()
            .filter(|(index, one)| !fits(index, one))
            .map(|(index, _)| *index)
            .collect();
        if !gone.is_empty() || !self.leaving.is_empty() {
            self.detach(&state, &gone).await?;
        }
        for (index, interface) in &state.interfaces {
            if !self.attached.contains_key(index) && !self.leaving.contains_key(index) {
                self.attach(*index, interface).await?;
            }
        }
        self.follow_mtu(&state).await?;
        self.follow_addresses(&state).await?;
        self.tell(&state).await?;
        self.none_is_stuck(&state)
    }

    /// What the namespace has, and the interfaces whose frames no longer go to the guest though
    /// they were joined to it: they were in another namespace meanwhile, or another program has
    /// taken the redirection away.
    async fn read(&self) -> Result<(NetworkState, BTreeSet<u32>), NetworkError> {
        let all = self.attached.values().chain(self.leaving.values());
        let ours: BTreeSet<u32> = all.map(|one| one.tap).collect();
        let joined: Vec<u32> = self.attached.keys().copied().collect();
        self.inside(move |netlink| {
            let state = NetworkState::read(netlink, |index| ours.contains(&index))?;
            let mut lost = BTreeSet::new();
            for index in joined {
                let redirected = is_redirected(index, netlink);
                if !redirected.map_err(|cause| NetworkError::Read {
                    what: "redirections",
                    cause: Arc::new(cause),
                })? {
                    lost.insert(index);
                }
            }
            Ok((state, lost))
        })
        .await?
    }

    /// The next look tries again.
    fn none_is_stuck(&self, state: &NetworkState) -> Result<(), NetworkError> {
        let stuck = |(index, interface)| self.leaving.contains_key(index).then_some(interface);
        match state.interfaces.iter().find_map(stuck) {
            None => Ok(()),
            Some(interface) => Err(NetworkError::Interface {
                interface: interface.name.clone(),
                step: "change the device",
                cause: "the guest does not let go of the one that it has".into(),
            }),
        }
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
        let slot = match self.plug(tap, interface).await {
            Ok(slot) => slot,
            Err(error) => {
                self.part(vec![index]).await;
                return Err(error);
            }
        };
        let device = Device {
            id: self.next_id,
            name: String::new(),
        };
        self.next_id += 1;
        let mut attached = Attached {
            device,
            slot,
            tap: tap_index,
            mac: interface.mac,
            max_mtu: interface.mtu,
            mtu: interface.mtu,
            senders,
        };
        match self.take_into_use(slot).await {
            Ok(name) => attached.device.name = name,
            Err(cause) => {
                self.leaving.insert(index, attached);
                self.let_go().await;
                return Err(failed(interface, "have the guest attach a device", cause));
            }
        }
        tracing::info!(
            interface = interface.name,
            slot = slot.slot,
            "joined to the guest"
        );
        self.attached.insert(index, attached);
        Ok(())
    }

    async fn plug(&self, tap: Tap, interface: &Interface) -> Result<PluggedSlot, NetworkError> {
        let queues = NetQueues {
            vhosts: self.joins.settings.vhosts(tap.queues.len()),
            taps: tap.queues,
        };
        let plugged = slots::plug_net(&self.joins.folder, self.card(interface), queues);
        plugged.await.map_err(|error| {
            failed(
                interface,
                "plug a device into the virtual machine",
                error.to_string(),
            )
        })
    }

    /// The guest's name for it.
    async fn take_into_use(&self, slot: PluggedSlot) -> Result<String, String> {
        match self.joins.guest.attach_device(slot).await {
            Ok(name) if (1..=MAX_NAME).contains(&name.len()) => Ok(name),
            Ok(name) => Err(format!("it answered a name of {} bytes", name.len())),
            Err(error) => Err(error.to_string()),
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

    /// Takes interfaces from the guest that the namespace no longer has, or has changed in a way
    /// that a device can't follow.
    async fn detach(&mut self, state: &NetworkState, gone: &[u32]) -> Result<(), NetworkError> {
        for index in gone {
            if let Some(one) = self.attached.remove(index) {
                self.leaving.insert(*index, one);
            }
        }
        // The guest forgets them first. If it doesn't, they end all the same.
        let told = self.tell(state).await;
        self.let_go().await;
        told
    }

    /// Takes out the devices that are to go, as far as the guest lets go of them.
    async fn let_go(&mut self) {
        let mut out = Vec::new();
        for (index, one) in &self.leaving {
            if slots::take_out(&self.joins.guest, &self.joins.folder, one.slot).await {
                out.push(*index);
                continue;
            }
            // Nothing comes out of it any more, whoever may use its addresses from now on.
            let tap = one.tap;
            let step = "a tap stays up whose device is to go";
            self.try_inside(step, move |netlink| set_down(tap, netlink))
                .await;
        }
        self.leaving.retain(|index, _| !out.contains(index));
        if !out.is_empty() {
            self.part(out).await;
        }
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
            set.map_err(|cause| {
                let step = "set the MTU of the tap device";
                failed(interface, step, cause.to_string())
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
        let all = self.attached.keys().chain(self.leaving.keys());
        let all: Vec<u32> = all.copied().collect();
        if !all.is_empty() {
            self.part(all).await;
        }
    }

    async fn part(&self, interfaces: Vec<u32>) {
        for index in interfaces {
            let left = "a redirection is left in the pod's network";
            self.try_inside(left, move |netlink| part(index, netlink))
                .await;
        }
    }

    /// Does what nothing can be done about if it fails.
    async fn try_inside(
        &self,
        otherwise: &'static str,
        work: impl FnOnce(&mut Netlink) -> Result<(), NetlinkError> + Send + 'static,
    ) {
        let done = self.inside(work).await;
        let failed = match done {
            Ok(done) => done.err().map(|error| error.to_string()),
            Err(error) => Some(error.to_string()),
        };
        if let Some(error) = failed {
            tracing::warn!(error, "{otherwise}");
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

fn failed(interface: &Interface, step: &'static str, cause: String) -> NetworkError {
    NetworkError::Interface {
        interface: interface.name.clone(),
        step,
        cause,
    }
}

impl Attached {
    /// Whether the device can be the interface's as it is now.
    fn fits(&self, interface: &Interface) -> bool {
        interface.mac == self.mac && interface.mtu <= self.max_mtu
    }
}
