//! Joining two devices of a namespace: all that comes in by the one goes out by the other, before
//! the host's own stack sees it. So the guest answers for the addresses of the pod's, and the
//! interface can keep them for whoever reads them there.

use super::filter::Instruction;
use bulkhead_netlink::route::RouteNetlinkMessage as Message;
use bulkhead_netlink::route::link::LinkMessage;
use bulkhead_netlink::route::tc::{
    TcAction, TcActionAttribute, TcActionMirror, TcActionMirrorOption, TcActionOption,
    TcActionType, TcAttribute, TcBpfFlags, TcFilterBpf, TcFilterBpfOption, TcFilterU32,
    TcFilterU32Option, TcHandle, TcHeader, TcMessage, TcMirror, TcMirrorActionType, TcOption,
    TcU32Key, TcU32Selector, TcU32SelectorFlags,
};
use bulkhead_netlink::{
    DefaultNla, Emitable, NLA_F_NESTED, NLM_F_CREATE, NLM_F_EXCL, Netlink, NetlinkError, allow,
};

/// Handle of an ingress qdisc, to which its filters belong.
const INGRESS: TcHandle = TcHandle {
    major: 0xffff,
    minor: 0,
};

/// Priority of our filters, by which they are known again; of those that drop, one more.
const PRIORITY: u32 = 0xb117;

/// Attributes of a program of the classic packet filter (linux/pkt_cls.h).
const BPF_ACTION: u16 = 1;
const BPF_OPS_LEN: u16 = 4;
const BPF_OPS: u16 = 5;

/// Such a program's end, and what drops a frame.
const RETURN: u16 = 0x06;
const TC_ACT_SHOT: u32 = 2;

/// What is no longer there needs no deletion.
const GONE: [i32; 3] = [libc::ENOENT, libc::EINVAL, libc::ENODEV];

/// Has all frames that come in by `from` go out by `to`. On failure nothing is left.
pub(super) fn redirect(from: u32, to: u32, netlink: &mut Netlink) -> Result<(), NetlinkError> {
    with_filters(from, vec![everything(from, to)], netlink)
}

/// Has the frames that come in by `from` go out by `to` if `program` says anything but 0 of them,
/// and drops all others. On failure nothing is left.
pub(super) fn redirect_some(
    from: u32,
    to: u32,
    program: &[Instruction],
    netlink: &mut Netlink,
) -> Result<(), NetlinkError> {
    let filters = vec![nothing(from), some(from, to, program)];
    with_filters(from, filters, netlink)
}

/// Replaces the program of [`redirect_some`]. No frame passes unseen meanwhile.
pub(super) fn change_program(
    from: u32,
    to: u32,
    program: &[Instruction],
    netlink: &mut Netlink,
) -> Result<(), NetlinkError> {
    let message = Message::NewTrafficFilter(some(from, to, program));
    netlink.change(message, NLM_F_CREATE)
}

fn with_filters(
    from: u32,
    filters: Vec<TcMessage>,
    netlink: &mut Netlink,
) -> Result<(), NetlinkError> {
    netlink.change(
        Message::NewQueueDiscipline(qdisc(from)),
        NLM_F_CREATE | NLM_F_EXCL,
    )?;
    for filter in filters {
        let message = Message::NewTrafficFilter(filter);
        if let Err(error) = netlink.change(message, NLM_F_CREATE | NLM_F_EXCL) {
            let _ = undo(from, netlink);
            return Err(error);
        }
    }
    Ok(())
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
fn everything(from: u32, to: u32) -> TcMessage {
    let mut everything = TcU32Selector::default();
    everything.flags = TcU32SelectorFlags::Terminal;
    everything.nkeys = 1;
    everything.keys = vec![TcU32Key::default()];
    let options = vec![
        TcOption::U32(TcFilterU32Option::Selector(everything)),
        TcOption::U32(TcFilterU32Option::Action(vec![out_by(to)])),
    ];
    filter(from, PRIORITY, TcFilterU32::KIND, options)
}

/// What `program` accepts (tc-bpf(8)).
fn some(from: u32, to: u32, program: &[Instruction]) -> TcMessage {
    let mut action = vec![0; [out_by(to)].as_slice().buffer_len()];
    [out_by(to)].as_slice().emit(&mut action);
    let mut options = classic(program);
    options.push(bpf(BPF_ACTION | NLA_F_NESTED, action));
    filter(from, PRIORITY, TcFilterBpf::KIND, options)
}

/// Drops what comes so far. Every host that has the filter above has this, while the action `drop`
/// is one more module.
fn nothing(from: u32) -> TcMessage {
    let drop = Instruction {
        code: RETURN,
        if_true: 0,
        if_false: 0,
        value: TC_ACT_SHOT,
    };
    let mut options = classic(&[drop]);
    options.push(TcOption::Bpf(TcFilterBpfOption::Flags(
        TcBpfFlags::DirectAction,
    )));
    filter(from, PRIORITY + 1, TcFilterBpf::KIND, options)
}

fn classic(program: &[Instruction]) -> Vec<TcOption> {
    // Programs have at most 4096 instructions.
    let length = program.len() as u16;
    let instructions = program.iter().flat_map(|one| {
        let [a, b] = one.code.to_ne_bytes();
        let [c, d, e, f] = one.value.to_ne_bytes();
        [a, b, one.if_true, one.if_false, c, d, e, f]
    });
    vec![
        bpf(BPF_OPS_LEN, length.to_ne_bytes().to_vec()),
        bpf(BPF_OPS, instructions.collect()),
    ]
}

fn bpf(kind: u16, value: Vec<u8>) -> TcOption {
    TcOption::Bpf(TcFilterBpfOption::Other(DefaultNla::new(kind, value)))
}

/// The action that sends a frame out by a device.
fn out_by(device: u32) -> TcAction {
    let mut mirror = TcMirror::default();
    mirror.generic.action = TcActionType::Stolen;
    mirror.eaction = TcMirrorActionType::EgressRedir;
    mirror.ifindex = device;
    let mut action = TcAction::default();
    action.attributes = vec![
        TcActionAttribute::Kind(TcActionMirror::KIND.into()),
        TcActionAttribute::Options(vec![TcActionOption::Mirror(TcActionMirrorOption::Parms(
            mirror,
        ))]),
    ];
    action
}

/// The only filter of its priority, so it can be replaced by its handle.
fn filter(from: u32, priority: u32, kind: &str, options: Vec<TcOption>) -> TcMessage {
    let handle = match kind {
        TcFilterBpf::KIND => TcHandle { major: 0, minor: 1 },
        _ => TcHandle::default(),
    };
    let header = TcHeader {
        index: from.cast_signed(),
        handle,
        parent: INGRESS,
        info: priority << 16 | u32::from((libc::ETH_P_ALL as u16).to_be()),
        ..Default::default()
    };
    let attributes = vec![
        TcAttribute::Kind(kind.into()),
        TcAttribute::Options(options),
    ];
    TcMessage::from_parts(header, attributes)
}
