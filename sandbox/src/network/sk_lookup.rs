//! Steering connections by a BPF program (Documentation/bpf/prog_sk_lookup.rst): every TCP
//! connection to the loopback addresses of a network namespace goes to one listener, whatever its
//! port. Rules of a packet filter would do too, but the namespace's tables belong to CNI.

use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};

/// Commands of bpf(2).
const BPF_MAP_CREATE: libc::c_long = 0;
const BPF_MAP_UPDATE_ELEM: libc::c_long = 2;
const BPF_PROG_LOAD: libc::c_long = 5;
const BPF_LINK_CREATE: libc::c_long = 28;

const BPF_MAP_TYPE_SOCKMAP: u32 = 15;
const BPF_PROG_TYPE_SK_LOOKUP: u32 = 30;
const BPF_SK_LOOKUP: u32 = 36;

/// Helpers of programs (enum bpf_func_id).
const MAP_LOOKUP_ELEM: i32 = 1;
const SK_RELEASE: i32 = 86;
const SK_ASSIGN: i32 = 124;

/// Places in struct bpf_sk_lookup.
const FAMILY: i16 = 8;
const PROTOCOL: i16 = 12;
const LOCAL_IP4: i16 = 40;
const LOCAL_IP6: i16 = 44;

/// Places in the map.
const LISTENER_IP4: i32 = 0;
const LISTENER_IP6: i32 = 1;

/// Let the lookup go on, with the socket that was assigned if any was.
const SK_PASS: i32 = 1;

/// What is attached to a namespace, as long as this lives.
#[derive(Debug)]
pub(super) struct Steering {
    _link: OwnedFd,
}

impl Steering {
    /// Steers the connections of `netns` to 127.0.0.1 and ::1 to these listeners in it.
    pub fn attach(netns: impl AsFd, ip4: impl AsFd, ip6: Option<impl AsFd>) -> io::Result<Self> {
        let map = bpf(
            BPF_MAP_CREATE,
            &mut words(&[BPF_MAP_TYPE_SOCKMAP, 4, 8, 2, 0]),
        )?;
        put(&map, LISTENER_IP4, ip4.as_fd().as_raw_fd())?;
        if let Some(ip6) = &ip6 {
            put(&map, LISTENER_IP6, ip6.as_fd().as_raw_fd())?;
        }
        let program = load(&program(map.as_raw_fd()))?;
        let mut link = words(&[
            program.as_raw_fd().cast_unsigned(),
            netns.as_fd().as_raw_fd().cast_unsigned(),
            BPF_SK_LOOKUP,
            0,
        ]);
        let link = bpf(BPF_LINK_CREATE, &mut link)?;
        Ok(Self { _link: link })
    }
}

/// An instruction (Documentation/bpf/standardization/instruction-set.rst, "Instruction encoding").
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Insn {
    code: u8,
    /// Destination register.
    to: u8,
    /// Source register.
    from: u8,
    offset: i16,
    value: i32,
}

impl Insn {
    const fn new(code: u8, to: u8, from: u8, offset: i16, value: i32) -> Self {
        Self {
            code,
            to,
            from,
            offset,
            value,
        }
    }

    /// A 32-bit field of the context (BPF_LDX | BPF_MEM | BPF_W).
    const fn load(to: u8, from: u8, offset: i16) -> Self {
        Self::new(0x61, to, from, offset, 0)
    }

    /// BPF_ALU64 | BPF_MOV | BPF_X.
    const fn copy(to: u8, from: u8) -> Self {
        Self::new(0xbf, to, from, 0, 0)
    }

    /// BPF_ALU64 | BPF_MOV | BPF_K.
    const fn set(to: u8, value: i32) -> Self {
        Self::new(0xb7, to, 0, 0, value)
    }

    /// BPF_JMP32 | BPF_JNE | BPF_K.
    const fn jump_unless(register: u8, value: i32, offset: i16) -> Self {
        Self::new(0x56, register, 0, offset, value)
    }

    /// BPF_JMP | BPF_CALL.
    const fn call(helper: i32) -> Self {
        Self::new(0x85, 0, 0, 0, helper)
    }

    fn bytes(self) -> [u8; 8] {
        let [low, high] = self.offset.to_le_bytes();
        let [a, b, c, d] = self.value.to_le_bytes();
        [self.code, self.from << 4 | self.to, low, high, a, b, c, d]
    }
}

/// The program, with jumps to its last two instructions still to be aimed.
fn program(map: RawFd) -> Vec<Insn> {
    /// Where a lookup that is none of ours goes.
    const OUT: i16 = i16::MAX;
    let (context, found, frame) = (6, 7, 10);
    let mut code = vec![
        Insn::copy(context, 1),
        Insn::load(2, context, PROTOCOL),
        Insn::jump_unless(2, libc::IPPROTO_TCP, OUT),
        Insn::load(2, context, FAMILY),
        Insn::jump_unless(2, libc::AF_INET, 4),
        Insn::load(2, context, LOCAL_IP4),
        Insn::jump_unless(2, i32::from_ne_bytes([127, 0, 0, 1]), OUT),
        Insn::set(3, LISTENER_IP4),
        // BPF_JMP | BPF_JA: over what is for IPv6.
        Insn::new(0x05, 0, 0, 10, 0),
        Insn::jump_unless(2, libc::AF_INET6, OUT),
    ];
    for (word, wanted) in [0, 0, 0, i32::from_ne_bytes([0, 0, 0, 1])]
        .iter()
        .enumerate()
    {
        code.push(Insn::load(2, context, LOCAL_IP6 + 4 * word as i16));
        code.push(Insn::jump_unless(2, *wanted, OUT));
    }
    code.extend([
        Insn::set(3, LISTENER_IP6),
        // BPF_STX | BPF_MEM | BPF_W: the key, on the stack.
        Insn::new(0x63, frame, 3, -4, 0),
        Insn::copy(2, frame),
        // BPF_ALU64 | BPF_ADD | BPF_K.
        Insn::new(0x07, 2, 0, 0, -4),
        // BPF_LD | BPF_DW | BPF_IMM of a map's descriptor, in two parts.
        Insn::new(0x18, 1, 1, 0, map),
        Insn::new(0, 0, 0, 0, 0),
        Insn::call(MAP_LOOKUP_ELEM),
        // BPF_JMP | BPF_JEQ | BPF_K: no listener for this family.
        Insn::new(0x15, 0, 0, OUT, 0),
        Insn::copy(found, 0),
        Insn::copy(1, context),
        Insn::copy(2, found),
        Insn::set(3, 0),
        Insn::call(SK_ASSIGN),
        Insn::copy(1, found),
        Insn::call(SK_RELEASE),
        Insn::set(0, SK_PASS),
        // BPF_JMP | BPF_EXIT.
        Insn::new(0x95, 0, 0, 0, 0),
    ]);
    let out = code.len() - 2;
    for (at, insn) in code.iter_mut().enumerate() {
        if insn.offset == OUT {
            insn.offset = (out - at - 1) as i16;
        }
    }
    code
}

fn load(program: &[Insn]) -> io::Result<OwnedFd> {
    let code: Vec<u8> = program.iter().flat_map(|insn| insn.bytes()).collect();
    let license = c"Apache-2.0";
    let mut attributes = words(&[BPF_PROG_TYPE_SK_LOOKUP, program.len() as u32]);
    attributes[8..16].copy_from_slice(&(code.as_ptr() as u64).to_ne_bytes());
    attributes[16..24].copy_from_slice(&(license.as_ptr() as u64).to_ne_bytes());
    attributes[EXPECTED_ATTACH_TYPE..][..4].copy_from_slice(&BPF_SK_LOOKUP.to_ne_bytes());
    // The code lives until the call has returned.
    let loaded = bpf(BPF_PROG_LOAD, &mut attributes);
    drop(code);
    loaded
}

/// Place of expected_attach_type among the attributes of BPF_PROG_LOAD.
const EXPECTED_ATTACH_TYPE: usize = 68;

fn put(map: &OwnedFd, key: i32, socket: RawFd) -> io::Result<()> {
    let key = key.to_ne_bytes();
    let value = u64::from(socket.cast_unsigned()).to_ne_bytes();
    let mut attributes = words(&[map.as_raw_fd().cast_unsigned()]);
    attributes[8..16].copy_from_slice(&(key.as_ptr() as u64).to_ne_bytes());
    attributes[16..24].copy_from_slice(&(value.as_ptr() as u64).to_ne_bytes());
    call(BPF_MAP_UPDATE_ELEM, &mut attributes).map(drop)
}

/// Attributes that begin with these words; all others are 0.
fn words(words: &[u32]) -> [u8; 128] {
    let mut attributes = [0; 128];
    for (to, word) in attributes.chunks_exact_mut(4).zip(words) {
        to.copy_from_slice(&word.to_ne_bytes());
    }
    attributes
}

/// A call that answers with a descriptor.
fn bpf(command: libc::c_long, attributes: &mut [u8; 128]) -> io::Result<OwnedFd> {
    let fd = call(command, attributes)?;
    // SAFETY: bpf(2) has just returned this descriptor; nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn call(command: libc::c_long, attributes: &mut [u8; 128]) -> io::Result<RawFd> {
    // SAFETY: the attributes, and what they point to, live across the call; their size is passed,
    // and what the kernel doesn't know of is 0.
    let answer = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            command,
            attributes.as_mut_ptr(),
            attributes.len(),
        )
    };
    match RawFd::try_from(answer) {
        Ok(fd) if fd >= 0 => Ok(fd),
        _ => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;
    use std::io::ErrorKind;
    use std::net::{TcpListener, TcpStream};
    use std::process::Command;

    #[test]
    fn jumps_lead_to_the_end_or_to_the_lookup() {
        let code = program(3);
        let out = code.len() - 2;
        assert_eq!(code[out], Insn::set(0, SK_PASS));
        let target = |at: usize| (at as i64 + 1 + i64::from(code[at].offset)) as usize;
        let over = code.iter().position(|insn| insn.code == 0x05).unwrap();
        assert_eq!(code[target(over)].code, 0x63, "the key is stored next");
        assert_eq!(code[target(4)].value, libc::AF_INET6);
        for (at, insn) in code.iter().enumerate() {
            if matches!(insn.code, 0x56 | 0x15) && at != 4 {
                assert_eq!(target(at), out, "{at}");
            }
        }
    }

    #[test]
    fn every_port_of_the_loopback_goes_to_the_listener_as_long_as_it_is_attached() {
        if !nix::unistd::geteuid().is_root() {
            eprintln!("SKIPPED 1 test: it needs root, for network namespaces");
            return;
        }
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).unwrap();
        let up = Command::new("ip")
            .args(["link", "set", "lo", "up"])
            .status();
        assert!(up.unwrap().success());
        let netns = File::open("/proc/thread-self/ns/net").unwrap();
        let ip4 = TcpListener::bind("127.0.0.1:0").unwrap();
        let ip6 = TcpListener::bind("[::1]:0").ok();
        let steering = Steering::attach(&netns, &ip4, ip6.as_ref()).unwrap();
        for port in [1, 80, 8080, 65535] {
            let mut listeners = vec![(&ip4, format!("127.0.0.1:{port}"))];
            listeners.extend(ip6.as_ref().map(|ip6| (ip6, format!("[::1]:{port}"))));
            for (listener, address) in listeners {
                let _client = TcpStream::connect(&address).unwrap();
                let (server, _) = listener.accept().unwrap();
                assert_eq!(server.local_addr().unwrap().to_string(), address);
            }
        }
        let refused = |address: &str| TcpStream::connect(address).unwrap_err().kind();
        assert_eq!(refused("127.0.0.2:80"), ErrorKind::ConnectionRefused);
        drop(steering);
        assert_eq!(refused("127.0.0.1:80"), ErrorKind::ConnectionRefused);
    }
}
