//! A connection through CRI's PortForward: over a websocket, on which each port has a channel for
//! its bytes and one for errors, and each begins with the port's number (Kubernetes'
//! `k8s.io/kubelet`, package portforward).

use super::super::stream::open;
use tungstenite::Message;

/// What the server at `url` sends until it ends the connection, after `request`; or the error that
/// containerd tells of.
pub fn exchange(url: &str, port: u16, request: &[u8]) -> Result<String, String> {
    let mut socket = open(url);
    socket
        .send(Message::binary([&[0], request].concat()))
        .unwrap();
    let mut channels = [Vec::new(), Vec::new()];
    loop {
        let message = match socket.read() {
            Ok(Message::Close(_)) | Err(_) => break,
            Ok(message) => message.into_data(),
        };
        if let Some((channel, bytes)) = message.split_first() {
            channels[usize::from(*channel)].extend_from_slice(bytes);
        }
        // The server has ended: containerd says nothing of that on an open websocket.
        if channels[0].ends_with(b"</end>\n") || channels[1].len() > 2 {
            break;
        }
    }
    let text = |channel: &[u8]| {
        let (number, rest) = channel.split_at_checked(2).unwrap_or((&[], channel));
        assert_eq!(number, port.to_le_bytes(), "{channel:?}");
        String::from_utf8_lossy(rest).into_owned()
    };
    match text(&channels[1]) {
        error if error.is_empty() => Ok(text(&channels[0])),
        error => Err(error),
    }
}
