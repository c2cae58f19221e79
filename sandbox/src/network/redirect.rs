//! Joining two devices of a namespace: all that comes in by the one goes out by the other, before
//! the host's own stack sees it. So the guest answers for the addresses of the pod's, and the
//! interface can keep them for whoever reads them there.

use bulkhead_netlink::route::RouteNetlinkMessage as Message;
use bulkhead_netlink::route::link::LinkMessage;
use bulkhead_netlink::route::tc::{
    TcAction, TcActionAttribute, TcActionMirror, TcActionMirrorOption, TcActionOption,
    TcActionType, TcAttribute, TcFilterU32, TcFilterU32Option, TcHandle, TcHeader, TcMessage,
    TcMirror, TcMirrorActionType, TcOption, TcU32Key, TcU32Selector, TcU32SelectorFlags,
};
use bulkhead_netlink::{NLM_F_CREATE, NLM_F_EXCL, Netlink, NetlinkError, allow};

/// Handle of an ingress qdisc, to which its filters belong.
const INGRESS: TcHandle = TcHandle {
    major: 0xffff,
    minor: 0,
};

/// Priority of our filters, by which they are known again.
const PRIORITY: u32 = 0xb117;

/// What is no longer there needs no deletion.
const GONE: [i32; 3] = [libc::ENOENT, libc::EINVAL, libc::ENODEV];

/// Has all frames that come in by `from` go out by `to`. On failure nothing is left.
pub(super) fn redirect(from: u32, to: u32, netlink: &mut Netlink) -> Result<(), NetlinkError> {
    netlink.change(
        Message::NewQueueDiscipline(qdisc(from)),
        NLM_F_CREATE | NLM_F_EXCL,
    )?;
    let added = netlink.change(
        Message::NewTrafficFilter(filter(from, to)),
        NLM_F_CREATE | NLM_F_EXCL,
    );
    if added.is_err() {
        let _ = undo(from, netlink);
    }
    added
}

/// Takes back what [`redirect`] did to `from`.
pub(super) fn undo(from: u32, netlink: &mut Netlink) -> Result<(), NetlinkError> {
    allow(
        netlink.change(Message::DelQueueDiscipline(qdisc(from)), 0),
        &GONE,
    )
}

/// Takes back what [`redirect`] did to any device of the calling thread's namespace.
pub(super) fn undo_all(netlink: &mut Netlink) -> Result<(), NetlinkError> {
    for message in netlink.dump(&Message::GetLink(LinkMessage::default()))? {
        if let Message::NewLink(link) = message
            && is_redirected(link.header.index, netlink)?
        {
            undo(link.header.index, netlink)?;
        }
    }
    Ok(())
}

/// Whether [`redirect`] was done to `from` and not taken back.
pub(super) fn is_redirected(from: u32, netlink: &mut Netlink) -> Result<bool, NetlinkError> {
    let found = netlink.dump(&Message::GetTrafficFilter(TcMessage::from_parts(
        TcHeader {
            index: from.cast_signed(),
            parent: INGRESS,
            ..Default::default()
        },
        Vec::new(),
    )));
    match found {
        Ok(found) => Ok(found.iter().any(|message| match message {
            Message::NewTrafficFilter(filter) => filter.header.info >> 16 == PRIORITY,
            _ => false,
        })),
        Err(error) if error.errno().is_some_and(|errno| GONE.contains(&errno)) => Ok(false),
        Err(error) => Err(error),
    }
}

fn qdisc(device: u32) -> TcMessage {
    let header = TcHeader {
        index: device.cast_signed(),
        handle: INGRESS,
        parent: TcHandle::INGRESS,
        ..Default::default()
    };
    TcMessage::from_parts(header, vec![TcAttribute::Kind("ingress".into())])
}

/// A u32 filter with one key that everything has: older than matchall, so every host has it.
fn filter(from: u32, to: u32) -> TcMessage {
    let header = TcHeader {
        index: from.cast_signed(),
        parent: INGRESS,
        info: PRIORITY << 16 | u32::from((libc::ETH_P_ALL as u16).to_be()),
        ..Default::default()
    };
    let mut everything = TcU32Selector::default();
    everything.flags = TcU32SelectorFlags::Terminal;
    everything.nkeys = 1;
    everything.keys = vec![TcU32Key::default()];
    let mut mirror = TcMirror::default();
    mirror.generic.action = TcActionType::Stolen;
    mirror.eaction = TcMirrorActionType::EgressRedir;
    mirror.ifindex = to;
    let mut action = TcAction::default();
    action.attributes = vec![
        TcActionAttribute::Kind(TcActionMirror::KIND.into()),
        TcActionAttribute::Options(vec![TcActionOption::Mirror(TcActionMirrorOption::Parms(
            mirror,
        ))]),
    ];
    let options = vec![
        TcOption::U32(TcFilterU32Option::Selector(everything)),
        TcOption::U32(TcFilterU32Option::Action(vec![action])),
    ];
    let attributes = vec![
        TcAttribute::Kind(TcFilterU32::KIND.into()),
        TcAttribute::Options(options),
    ];
    TcMessage::from_parts(header, attributes)
}
