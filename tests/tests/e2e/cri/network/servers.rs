//! Servers of the test's own, each a thread that ends with the test's process.

use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::time::Duration;

/// Longest silence of a connection.
const PATIENCE: Duration = Duration::from_secs(60);

/// Answers each connection with what was sent, its bytes each one higher, once the client's end of
/// file has come. Returns where it listens.
pub fn echo(ip: IpAddr) -> SocketAddr {
    let listener = TcpListener::bind((ip, 0)).unwrap();
    let address = listener.local_addr().unwrap();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            let mut bytes = Vec::new();
            let _ = stream.read_to_end(&mut bytes);
            bytes
                .iter_mut()
                .for_each(|byte| *byte = byte.wrapping_add(1));
            let _ = stream.write_all(&bytes);
        }
    });
    address
}

/// A name server for one name, `NAME`, which has `answer`; all others it doesn't know (RFC 1035,
/// section 4.1).
pub fn names(ip: IpAddr, name: &'static str, answer: Ipv4Addr) {
    let socket = UdpSocket::bind((ip, 53)).unwrap();
    let wanted: Vec<u8> = name
        .split('.')
        .flat_map(|label| [&[label.len() as u8], label.as_bytes()].concat())
        .chain([0])
        .collect();
    std::thread::spawn(move || {
        let mut query = [0; 512];
        while let Ok((length, from)) = socket.recv_from(&mut query) {
            let question = &query[12..length];
            let end = question.iter().position(|byte| *byte == 0).unwrap() + 1;
            let known = question[..end].eq_ignore_ascii_case(&wanted);
            let is_a = question[end..end + 2] == [0, 1];
            let mut reply = query[..2].to_vec();
            // An answer, with recursion; no error, or no such name.
            reply.extend([0x85, if known { 0x80 } else { 0x83 }]);
            reply.extend([0, 1, 0, u8::from(known && is_a), 0, 0, 0, 0]);
            reply.extend(&question[..end + 4]);
            if known && is_a {
                // The question's name, an address, for a minute.
                reply.extend([0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 60, 0, 4]);
                reply.extend(answer.octets());
            }
            socket.send_to(&reply, from).unwrap();
        }
    });
}

/// Sends each connection so many zeroes. Returns where it listens.
pub fn say(ip: IpAddr, length: usize) -> SocketAddr {
    let listener = TcpListener::bind((ip, 0)).unwrap();
    let address = listener.local_addr().unwrap();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let _ = stream.unwrap().write_all(&vec![0; length]);
        }
    });
    address
}

/// What an HTTP server has at `/`.
#[track_caller]
pub fn get(address: SocketAddr) -> String {
    get_path(address, "/").trim_end().to_owned()
}

/// What an HTTP server has at a path.
#[track_caller]
pub fn get_path(address: SocketAddr, path: &str) -> String {
    let stream = TcpStream::connect_timeout(&address, PATIENCE);
    let mut stream = stream.unwrap_or_else(|error| panic!("{address}: {error}"));
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    let request = format!("GET {path} HTTP/1.0\r\n\r\n");
    stream.write_all(request.as_bytes()).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    assert!(head.contains(" 200 "), "{head}");
    body.to_owned()
}
