//! Exec and Attach: the byte streams of a process, over the URL that CRI answers with. This is
//! Kubernetes' remote command protocol over a websocket, version 4: each binary message is a
//! channel's number and its bytes.

use serde_json::Value;
use std::net::TcpStream;
use std::time::Duration;
use tungstenite::client::IntoClientRequest;
use tungstenite::http::HeaderValue;
use tungstenite::{Message, WebSocket};

/// Spoken by containerd 1.6 as by 2.x.
const PROTOCOL: &str = "v4.channel.k8s.io";

/// Longest silence.
const PATIENCE: Duration = Duration::from_secs(120);

const STDIN: u8 = 0;
const STDOUT: u8 = 1;
const ERROR: u8 = 3;
const RESIZE: u8 = 4;

/// Connects to a URL that CRI answered with.
pub fn open(url: &str) -> WebSocket<TcpStream> {
    let url = url.replacen("http://", "ws://", 1);
    let mut request = url.as_str().into_client_request().unwrap();
    let address = request.uri().authority().unwrap().as_str().to_owned();
    let headers = request.headers_mut();
    headers.insert("Sec-WebSocket-Protocol", HeaderValue::from_static(PROTOCOL));
    let connection = TcpStream::connect(&address).unwrap();
    connection.set_read_timeout(Some(PATIENCE)).unwrap();
    let (socket, answer) =
        tungstenite::client(request, connection).unwrap_or_else(|error| panic!("{url}: {error}"));
    let chosen = answer.headers().get("Sec-WebSocket-Protocol");
    assert_eq!(chosen.unwrap(), PROTOCOL);
    socket
}

/// An open connection. Dropping it detaches.
pub struct Stream {
    socket: WebSocket<TcpStream>,
    output: Vec<u8>,
}

impl Stream {
    /// Connects to the URL of an Exec or Attach.
    pub fn open(url: &str) -> Self {
        Self {
            socket: open(url),
            output: Vec::new(),
        }
    }

    fn send(&mut self, channel: u8, bytes: &[u8]) {
        let message = [&[channel], bytes].concat();
        self.socket.send(Message::binary(message)).unwrap();
    }

    /// Types on the terminal.
    pub fn type_in(&mut self, text: &str) {
        self.send(STDIN, text.as_bytes());
    }

    /// Gives the terminal a size.
    pub fn resize(&mut self, columns: u16, rows: u16) {
        let size = serde_json::json!({ "Width": columns, "Height": rows });
        self.send(RESIZE, size.to_string().as_bytes());
    }

    /// The next bytes of any channel.
    fn next(&mut self) -> (u8, Vec<u8>) {
        loop {
            let message = self.socket.read().unwrap_or_else(|error| {
                let output = String::from_utf8_lossy(&self.output);
                panic!("{error}; output so far: {output:?}")
            });
            let bytes = message.into_data();
            if let Some((channel, bytes)) = bytes.split_first()
                && !bytes.is_empty()
            {
                return (*channel, bytes.to_vec());
            }
        }
    }

    /// Reads until the output contains `text`.
    pub fn until(&mut self, text: &str) {
        while !String::from_utf8_lossy(&self.output).contains(text) {
            let (channel, bytes) = self.next();
            assert_eq!(channel, STDOUT, "{}", String::from_utf8_lossy(&bytes));
            self.output.extend(bytes);
        }
    }

    /// Reads to the end: all output, and the exit code.
    pub fn end(mut self) -> (String, i64) {
        let status: Value = loop {
            match self.next() {
                (ERROR, bytes) => break serde_json::from_slice(&bytes).unwrap(),
                (STDOUT, bytes) => self.output.extend(bytes),
                (channel, bytes) => panic!("channel {channel}: {bytes:?}"),
            }
        };
        let output = String::from_utf8_lossy(&self.output).into_owned();
        if status["status"] == "Success" {
            return (output, 0);
        }
        let code = status["details"]["causes"][0]["message"].as_str();
        let code = code.and_then(|code| code.parse().ok());
        (output, code.unwrap_or_else(|| panic!("{status}")))
    }
}
