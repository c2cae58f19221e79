//! Run in a container by the end-to-end tests: `raw-frames INTERFACE FRAME...` sends each frame, in
//! hexadecimal digits, as it is. Needs CAP_NET_RAW.

use std::ffi::CString;
use std::io::{Error, Result};

fn main() -> Result<()> {
    let mut arguments = std::env::args().skip(1);
    let interface = CString::new(arguments.next().unwrap_or_default())?;
    // SAFETY: takes numbers only.
    let socket = unsafe { libc::socket(libc::AF_PACKET, libc::SOCK_RAW, 0) };
    if socket < 0 {
        return Err(Error::last_os_error());
    }
    // SAFETY: sockaddr_ll is plain data, for which all zeroes is a value.
    let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
    address.sll_family = libc::AF_PACKET as u16;
    // SAFETY: a C string that lives across the call.
    address.sll_ifindex = unsafe { libc::if_nametoindex(interface.as_ptr()) } as i32;
    for frame in arguments {
        let digits = frame.as_bytes().chunks(2);
        let bytes = digits.map(|two| u8::from_str_radix(&String::from_utf8_lossy(two), 16));
        let bytes: Vec<u8> = bytes
            .collect::<std::result::Result<_, _>>()
            .map_err(Error::other)?;
        // SAFETY: frame and address live across the call.
        let sent = unsafe {
            libc::sendto(
                socket,
                bytes.as_ptr().cast(),
                bytes.len(),
                0,
                (&raw const address).cast(),
                size_of_val(&address) as u32,
            )
        };
        if sent < 0 {
            return Err(Error::last_os_error());
        }
    }
    Ok(())
}
